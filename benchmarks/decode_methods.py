"""Tokens per second of every decode method over one read text: the needle task and the shipped model.

    OMP_NUM_THREADS=1 python benchmarks/decode_methods.py --out benchmarks/results/decode_methods_cpu.json

The text is read once, in full, and every method reads the same tokens, those of the exact greedy answer. The methods
take turns token by token, so that all see the machine in the same state; a row has medians over all steps, in seconds
and in seconds of the processor, which other programs disturb less. Methods that keep keys and values in host memory
have a copy of what was read; on a CPU that is memory like any other, and what they show there is what their way costs,
not what it saves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import apb
from apb.asking import OfTokens
from apb.decoding import Decoding, Dense, Pages, Retrieval, Squeezed, Streamed
from apb.document import Document
from apb.evaluation import synthetic
from apb.evaluation.decode_fidelity import named
from apb.evaluation.settings import Setting
from apb.hardware import Stopwatch, fingerprint
from apb.hf.loading import shipped_model
from apb.hf.sampling import eos_ids
from apb.methods import Full
from apb.state import ROOM, State


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; the shipped one if left out")
    parser.add_argument("--task", default="multivalue")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--share", type=float, default=0.1, help="of the keys")
    parser.add_argument("--tokens", type=int, default=16, help="most steps of a turn; it ends with the answer")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    share = given.share
    methods = [Dense(), Pages(share), Squeezed(share), Streamed(), Retrieval(share)]
    engine = apb.Engine.from_pretrained(given.model or shipped_model(), strategy="full")
    assert engine.tokenizer is not None
    (item,) = synthetic.items(engine.tokenizer, given.task, given.length, 1, seed=0)
    prompt = item.prompt(engine.tokenizer)
    session = engine.prefill(prompt, max_new_tokens=given.tokens)
    state = State.of_session(session, prompt, (), "")
    with ExitStack() as engines:
        measured = [Measured(engines, engine, method, prompt, state, given.tokens) for method in methods]
        tokens = measured[0].answer(given.tokens)
        for turn in range(given.turns):
            for each in measured:
                each.begin()
            for step, token in enumerate(tokens):
                first = (turn + step) % len(measured)  # none always follows the same one
                for each in measured[first:] + measured[:first]:
                    each.step(token, timed=step > 0)
    rows = [each.row() for each in measured]
    tell(given, heading(engine, prompt, state) | {"answers": item.answers, "rows": rows})


def heading(engine: apb.Engine, prompt: apb.Prompt, state: State) -> dict[str, Any]:
    """What made the figures of one text: command, machine, and what was read, in seconds."""
    return {
        "command": f"python {' '.join(sys.argv)}",
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg()[0],
        "fingerprint": fingerprint(engine.device, engine.dtype),
        "prompt_tokens": len(prompt),
        "prefill_s": state.prefill_s,
    }


def tell(given: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print a report, with the kind of question, and write it to ``--out`` if that is given."""
    report["task"] = given.task
    print(json.dumps(report, indent=1))
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


class Measured:
    """The steps of one method, over a copy of what was read."""

    def __init__(
        self,
        engines: ExitStack,
        engine: apb.Engine,
        method: Decoding,
        prompt: apb.Prompt,
        state: State,
        tokens: int,
    ) -> None:
        self.method, self.prompt, self.tokens = method, prompt, tokens
        self.state = replace(state, cache=state.cache.copy(len(state.token_ids), ROOM))
        watch = Stopwatch(engine.device)
        method.build(self.state.cache)
        self.build_s = watch.seconds()
        self.engine = engines.enter_context(closing(Setting(Full(), decoding=method).engine(engine)))
        self.document = Document(self.engine, OfTokens(prompt.prefix, prompt.document), self.state)
        self.text = self.document.ask(prompt.query, max_new_tokens=tokens).text
        self.seconds: list[float] = []
        self.processor: list[float] = []

    def answer(self, tokens: int) -> list[int]:
        """The tokens of the greedy answer."""
        ends = eos_ids(self.engine.model)
        found = self.document.ask(self.prompt.query, max_new_tokens=tokens).token_ids
        return [token for token in found if token not in ends]

    def begin(self) -> None:
        """Ask the question again."""
        self.session = self.document.prefill(self.prompt.query, max_new_tokens=self.tokens)

    def step(self, token: int, timed: bool) -> None:
        """Read a token; the first is not timed: it indexes what the question added."""
        watch, before = Stopwatch(self.engine.device), time.process_time()
        self.session.extend([token])
        if timed:
            self.seconds.append(watch.seconds())
            self.processor.append(time.process_time() - before)

    def row(self) -> dict[str, Any]:
        """The figures."""
        parts = [index.tensors() for each in self.state.cache.indexes.values() for index in each.values()]
        median = statistics.median(self.seconds)
        return {
            "decode": named(self.method),
            "share": self.session.share,
            "build_s": self.build_s,
            "index_bytes": sum(x.nbytes for part in parts for x in part.values()),
            "cache_bytes": sum(x.nbytes for layer in self.state.cache.indices for x in self.state.cache.shard(layer)),
            "step_s": median,
            "tokens_per_s": 1 / median,
            "processor_s": statistics.median(self.processor),
            "steps": len(self.seconds),
            "answer": self.text,
        }


if __name__ == "__main__":
    main()
