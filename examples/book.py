"""A conversation about a book: it is read once, every turn stays, and answers appear as they are written.

    python examples/book.py BOOK.txt [--model MODEL] < questions.txt

Questions come from standard input, one a line. Each turn is read exactly over the book and the turns before it, so "and
who was her brother?" knows whom the last answer was about.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import apb
from apb.hf.loading import shipped_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path)
    parser.add_argument("--model", default=str(shipped_model()))
    given = parser.parse_args()
    engine = apb.Engine.from_pretrained(given.model)

    def tell(done: int, total: int) -> None:
        print(f"\rreading: {done:,} of {total:,} tokens", end="", file=sys.stderr, flush=True)

    book = engine.read(given.book.read_text(), progress=tell)
    print(f"\n{book.plan.document:,} tokens in {book.plan.blocks} blocks", file=sys.stderr)
    for question in filter(None, map(str.strip, sys.stdin)):
        print(f"> {question}")
        for piece in book.stream(question, keep=True, max_new_tokens=128):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
