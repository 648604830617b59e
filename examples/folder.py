"""Questions about a folder of text files, read once and kept beside it.

    python examples/folder.py FOLDER "What did the auditors object to?" ["Another question" ...] [--model MODEL]

The files are read as one text, each under its name, so that an answer can draw on several and name them. What was read
is saved as FOLDER.store; the next call asks it without reading again, unless a file has changed.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import apb
from apb.hf.loading import shipped_model


def text_of(folder: Path, pattern: str) -> str:
    """All files, in the order of their names."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    if not files:
        raise SystemExit(f"{folder} has no {pattern} files.")
    return "\n\n".join(f"=== {path.relative_to(folder)} ===\n\n{path.read_text()}" for path in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--pattern", default="*.txt")
    parser.add_argument("--model", default=str(shipped_model()))
    given = parser.parse_args()
    text = text_of(given.folder, given.pattern)
    store = given.folder.resolve().with_suffix(".store")
    stamp = store.with_suffix(".sha256")
    digest = hashlib.sha256(text.encode()).hexdigest()
    engine = apb.Engine.from_pretrained(given.model)
    if stamp.exists() and stamp.read_text() == digest:
        document = engine.load(store)
    else:
        document = engine.read(text, questions=given.questions)
        document.save(store)
        stamp.write_text(digest)
    for question in given.questions:
        answer = document.ask(question, max_new_tokens=64)
        print(f"{question}\n    {answer.text.strip()}   [read for: {answer.read_for}, exact: {answer.exact}]")


if __name__ == "__main__":
    main()
