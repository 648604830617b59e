"""The manifests of documents on disk, for readers that know neither torch nor transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import InputError

MANIFEST = "document.json"
FORMAT = 3
_READ = (1, 2, FORMAT)  # before 2 every layer had every token, before 3 shards were hashed in one piece


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a document; InputError if there is none that this version can read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"There is no document in {str(folder)!r}: {MANIFEST} cannot be read.") from error
    except ValueError as error:
        raise damaged(folder, f"{MANIFEST} is not JSON") from error
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise damaged(folder, f"{MANIFEST} is no manifest of a document")
    if found["format"] not in _READ:
        raise InputError(
            f"The document in {str(folder)!r} is of format {found['format']}, and this version of apb reads formats up "
            f"to {FORMAT}; use the version that wrote it, {found.get('apb')}, or read the text again."
        )
    return found


def documents(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, manifest) of the document in a folder, or of those in the folders in it."""
    if (folder / MANIFEST).is_file():
        return [(folder, manifest_of(folder))]
    if not folder.is_dir():
        raise InputError(f"The folder {str(folder)!r} does not exist.")
    return [(path.parent, manifest_of(path.parent)) for path in sorted(folder.glob(f"*/{MANIFEST}"))]


def damaged(folder: Path, what: str) -> InputError:
    """The error of a store that cannot be trusted."""
    return InputError(f"The document in {str(folder)!r} is damaged: {what}; read the text again.")
