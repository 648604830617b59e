"""One question about a code base.

    python examples/code.py REPOSITORY "Where are retries configured?" [--suffix .py --suffix .toml] [--model MODEL]

The question is known before anything is read, so every block passes on what this question attends to.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import apb
from apb.hf.loading import shipped_model

# Folders that nobody asks about.
SKIPPED = {".git", ".venv", "node_modules", "__pycache__", "build", "dist"}


def sources(root: Path, suffixes: list[str]) -> str:
    """All source files under a folder, each under its path."""
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix in suffixes and path.is_file() and not SKIPPED & set(path.relative_to(root).parts)
    ]
    if not files:
        raise SystemExit(f"{root} has no files that end in {' or '.join(suffixes)}.")
    return "\n".join(f"# {path.relative_to(root)}\n{path.read_text(errors='replace')}" for path in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("question")
    parser.add_argument("--suffix", action="append")
    parser.add_argument("--model", default=str(shipped_model()))
    given = parser.parse_args()
    engine = apb.Engine.from_pretrained(given.model)
    assert engine.tokenizer is not None
    prompt = apb.Prompt.for_model(engine.tokenizer, sources(given.repository, given.suffix or [".py"]), given.question)
    plan = engine.plan(prompt)
    print(f"{plan.document:,} tokens in {plan.blocks} blocks, {plan.passing_length} pairs of each passed on")
    answer = engine.generate(prompt, max_new_tokens=128)
    print(answer.text.strip())
    print(f"[read in {answer.timing['prefill_s']:.1f} s, exact: {answer.exact}]")


if __name__ == "__main__":
    main()
