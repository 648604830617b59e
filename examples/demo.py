"""Ask a question about a long document, with apb and with full attention; run by `make demo`.

    python examples/demo.py [--document FILE --query TEXT] [--out FILE.json]

Without a document one is generated: running text with many hidden facts of one kind, and a question about one of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from apb import Engine, Generation, InputError, Prompt
from apb.cli.generate import read_document
from apb.cli.progress import Bar
from apb.cli.quiet import quiet_libraries
from apb.evaluation.tasks import generate
from apb.hf.loading import shipped_model

DOCUMENT_TOKENS = 33_000
# On one device smaller blocks and fewer passed pairs mean less computation.
BLOCKS = 16
PASSING_LENGTH = 64
SEED = 2025


def answer(engine: Engine, prompt: Prompt) -> Generation:
    """Read and answer, with a progress bar."""
    with Bar(f"{engine.plan(prompt).strategy:>4}: reading", "token") as bar:
        return engine.generate(prompt, max_new_tokens=32, progress=bar.update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", help="text file to read; generated if left out")
    parser.add_argument("--query", help="the question; needed with --document")
    parser.add_argument("--out", type=Path, help="also write both results there, as JSON")
    arguments = parser.parse_args()
    if (arguments.document is None) != (arguments.query is None):
        raise InputError("DOCUMENT and QUERY go together: give both, or neither.")
    quiet_libraries()
    apb = Engine.from_pretrained(shipped_model(), strategy="apb", blocks=BLOCKS, passing_length=PASSING_LENGTH)
    assert apb.tokenizer is not None
    expected = None
    if arguments.document:
        document, query = read_document(arguments.document), arguments.query
        source = Path(arguments.document).name
    else:
        sample = generate("multikey", apb.tokenizer, DOCUMENT_TOKENS, SEED, haystack="prose")
        document, query, expected = sample.document, sample.query, sample.answer
        source = "a generated text with 65 hidden facts"
    prompt = Prompt.for_model(apb.tokenizer, document, query)
    print(f"Model:    {shipped_model().name} on {apb.device}, {str(apb.dtype).removeprefix('torch.')}")
    print(f"Document: {source}, {len(prompt.document):,} tokens")
    print(f"Question: {query}", flush=True)
    fast = answer(apb, prompt)
    exact = answer(Engine.from_model(apb.model, apb.tokenizer, strategy="full"), prompt)
    print()
    for result, note in ((fast, f"{fast.plan['blocks']} blocks, approximate"), (exact, "exact")):
        seconds = result.timing["prefill_s"]
        print(f"{result.strategy:>4}: read in {seconds:6.2f} s ({note}), answer:{' ' + result.text.strip()}")
    ratio = exact.timing["prefill_s"] / fast.timing["prefill_s"]
    print(f"Full attention took {ratio:.1f} times as long to read it.")
    if arguments.out:
        report = {"command": "python " + " ".join(sys.argv), "query": query, "expected": expected, "ratio": ratio}
        report["results"] = [fast.to_dict(), exact.to_dict()]
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if expected is not None:
        right = expected in fast.text
        print(f"The document says {expected}: apb's answer is {'right' if right else 'WRONG'}.")
        sys.exit(not right)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
