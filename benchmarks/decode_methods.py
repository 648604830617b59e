"""Tokens per second of every decode method over one read text: the needle task and the shipped model.

    OMP_NUM_THREADS=2 python benchmarks/decode_methods.py --out benchmarks/results/decode_methods_cpu.json

The text is read once, in full. The methods take turns, each with the same greedy tokens of the exact answer, so that
all see the machine in the same state; a row has the median of all steps and the medians of each turn. Methods that keep
keys and values in host memory have a copy of what was read; on a CPU that is memory like any other, and what they show
there is what their way costs, not what it saves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import closing
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
    measured = [Measured(engine, method, prompt, state, given.tokens) for method in methods]
    tokens: list[int] = []
    for _ in range(given.turns):
        for each in measured:
            tokens = each.turn(tokens)
    report: dict[str, Any] = {
        "command": f"python {' '.join(sys.argv)}",
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg()[0],
        "fingerprint": fingerprint(engine.device, engine.dtype),
        "task": given.task,
        "prompt_tokens": len(prompt),
        "steps": len(tokens) - 1,
        "prefill_s": state.prefill_s,
        "answers": item.answers,
        "rows": [each.row() for each in measured],
    }
    print(json.dumps(report, indent=1))
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


class Measured:
    """The steps of one method."""

    def __init__(self, engine: apb.Engine, method: Decoding, prompt: apb.Prompt, state: State, tokens: int) -> None:
        self.engine, self.method, self.prompt, self.tokens = engine, method, prompt, tokens
        self.state = replace(state, cache=state.cache.copy(len(state.token_ids), ROOM))
        watch = Stopwatch(engine.device)
        method.build(self.state.cache)
        self.build_s = watch.seconds()
        self.turns: list[list[float]] = []
        self.text, self.share = "", 1.0

    def turn(self, tokens: list[int]) -> list[int]:
        """One answer, its steps timed one by one; of ``tokens``, if there are any, else of its own choice.

        The first step is left out: it indexes what the question added.
        """
        with closing(Setting(Full(), decoding=self.method).engine(self.engine)) as engine:
            document = Document(engine, OfTokens(self.prompt.prefix, self.prompt.document), self.state)
            if not self.turns:
                self.text = document.ask(self.prompt.query, max_new_tokens=self.tokens).text
            session = document.prefill(self.prompt.query, max_new_tokens=self.tokens + 1)
            seconds, read = [], []
            for step in range(len(tokens) or self.tokens + 1):
                token = tokens[step] if tokens else int(session.logits.argmax())
                if token in eos_ids(engine.model):
                    break
                read.append(token)
                watch = Stopwatch(engine.device)
                session.extend(read[-1:])
                seconds.append(watch.seconds())
            self.share = session.share
        self.turns.append(seconds[1:])
        return read

    def row(self) -> dict[str, Any]:
        """The figures."""
        medians = [statistics.median(turn) for turn in self.turns]
        median = statistics.median(second for turn in self.turns for second in turn)
        parts = [index.tensors() for each in self.state.cache.indexes.values() for index in each.values()]
        return {
            "decode": named(self.method),
            "share": self.share,
            "build_s": self.build_s,
            "index_bytes": sum(x.nbytes for part in parts for x in part.values()),
            "cache_bytes": sum(x.nbytes for layer in self.state.cache.indices for x in self.state.cache.shard(layer)),
            "step_s": median,
            "tokens_per_s": 1 / median,
            "tokens_per_s_by_turn": [1 / each for each in medians],
            "answer": self.text,
        }


if __name__ == "__main__":
    main()
