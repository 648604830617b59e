"""Watch a log: what was read stays, and only the lines that have come since are read, with the question.

    python examples/log.py SERVICE.log "What failed last?" [--every SECONDS] [--times N] [--model MODEL]

The new lines are read exactly over what is there, so the cost of a look is that of the new lines, however long the log.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import apb
from apb.hf.loading import shipped_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("question")
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--times", type=int, default=1_000_000)
    parser.add_argument("--model", default=str(shipped_model()))
    given = parser.parse_args()
    engine = apb.Engine.from_pretrained(given.model)
    text = given.log.read_text()
    document = engine.read(text, question=given.question)
    for look in range(given.times):
        if look:
            time.sleep(given.every)
            # Only whole lines: what is read stays as it is.
            longer = given.log.read_text()
            longer = longer[: longer.rfind("\n") + 1]
            if len(longer) > len(text):
                text = longer
                document = engine.read(text, after=document)
        since = time.perf_counter()
        answer = document.ask(given.question, max_new_tokens=64)
        seconds = time.perf_counter() - since
        print(f"{len(document.token_ids):,} tokens, {seconds:.2f} s: {answer.text.strip()}", flush=True)


if __name__ == "__main__":
    main()
