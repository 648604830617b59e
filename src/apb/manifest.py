"""The manifests of documents on disk, for readers that know neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError

MANIFEST = "document.json"
FORMAT = 3
_READ = (1, 2, FORMAT)  # before 2 every layer had every token, before 3 shards were hashed in one piece

_NUMBER = int | float
# Types of the fields that are read; those that may be None are not in every format.
_FIELDS: dict[str, Any] = {
    "created": str,
    "apb": str,
    "model": dict,
    "dtype": str,
    "tokens": int,
    "tokens_sha256": str,
    "strategy": str,
    "options": dict,
    "propagation": dict | None,
    "sizes": list,
    "exact": bool,
    "compressor": str | None,
    "read_for": list,
    "prefill_s": _NUMBER,
    "index": list | None,
    "index_s": _NUMBER | None,
    "asking": dict,
    "shards": list,
}
# Characters of an odd value that are shown.
_SHOWN = 40


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a document; InputError if there is none that this version can read."""
    _check_no_file(folder)
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
    _check(folder, found, _FIELDS)
    _check(folder, found["model"], {"name": str, "fingerprint": str})
    for shard in found["shards"]:
        _check(folder, {"shards": shard}, {"shards": dict})
        _check(folder, shard, {"file": str, "bytes": int, "sha256": str})
    if found.get("propagation"):
        _check(folder, found["propagation"], {"layer": int, "rows": int})
    if len(found["sizes"]) != 5 or not all(isinstance(size, int) for size in found["sizes"]):
        raise _odd(folder, "sizes", found["sizes"])
    return found


def _check_no_file(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"{str(folder)!r} is a file; name a document's folder, or a folder of such folders.")


def _check(folder: Path, part: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """InputError if a field of a manifest, or of a part of one, has another type."""
    for name, kind in fields.items():
        if not isinstance(part.get(name), kind):
            raise _odd(folder, name, part.get(name))


def _odd(folder: Path, name: str, value: Any) -> InputError:
    text = json.dumps(value)
    return damaged(folder, f"{MANIFEST} has {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'} for {name!r}")


def documents(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, manifest) of the document in a folder, or of those in the folders in it."""
    if (folder / MANIFEST).is_file():
        return [(folder, manifest_of(folder))]
    _check_no_file(folder)
    if not folder.is_dir():
        raise InputError(f"The folder {str(folder)!r} does not exist.")
    return [(path.parent, manifest_of(path.parent)) for path in sorted(folder.glob(f"*/{MANIFEST}"))]


def damaged(folder: Path, what: str) -> InputError:
    """The error of a store that cannot be trusted."""
    return InputError(f"The document in {str(folder)!r} is damaged: {what}; read the text again.")
