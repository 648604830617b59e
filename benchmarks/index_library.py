"""A library's indexes over keys beside the package's selectors: what they recall, what they take to build and to ask.

    pip install faiss-cpu
    OMP_NUM_THREADS=1 python benchmarks/index_library.py --out benchmarks/results/index_library_cpu.json

RetrievalAttention (arXiv 2409.10516) finds single keys by a graph or by inverted lists over a head's keys, where pages
and clusters choose keys together. Here faiss keeps such an index for each KV head of each layer; every query head of a
group asks it for as many keys as may be attended to, and the best of what they find, each as a share of its head's, are
taken. All methods read the tokens of one exact greedy answer over one text: attention mass and KL as in
``apb eval decode``; seconds to build, and of a step (median), one method after the other.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from decode_methods import heading, tell
from torch import Tensor

import apb
from apb.asking import OfTokens
from apb.decoding import Decoding, Pages, Squeezed
from apb.decoding.indexed import Indexed
from apb.decoding.selecting import KeyIndex
from apb.document import Document
from apb.evaluation import synthetic
from apb.evaluation.decode_fidelity import measure, named
from apb.evaluation.settings import Setting
from apb.hf.loading import shipped_model
from apb.kernels.chosen import within
from apb.methods import Full, option
from apb.state import ROOM, State

NEIGHBOURS = 32
"""Edges of a key in a graph."""


class FaissIndex(KeyIndex):
    """faiss's index of each KV head's keys, by inner product; ``share`` of them are asked for."""

    def __init__(self, kind: str, share: float) -> None:
        self.kind, self.share = kind, share
        self.heads: list[Any] = []

    def extend(self, keys: Tensor) -> None:
        """See :meth:`KeyIndex.extend`: every key is covered."""
        self.heads = self.heads or [self._empty(head) for head in keys]
        for index, head in zip(self.heads, keys, strict=True):
            index.add(head.float().contiguous().numpy())
        self.covered += keys.shape[1]

    def _empty(self, keys: Tensor) -> Any:
        import faiss

        tokens, width = keys.shape
        if self.kind == "graph":
            return faiss.IndexHNSWFlat(width, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        lists = max(int(4 * math.sqrt(tokens)), 1)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(keys.float().contiguous().numpy())
        index.nprobe = max(8, math.ceil(2 * self.share * lists))
        return index

    def forget(self, tokens: int) -> None:
        """See :meth:`KeyIndex.forget`: such an index does not shrink; it is built again."""
        if tokens < self.covered:
            self.heads, self.covered = [], 0

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`KeyIndex.tensors`: it is not stored."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`KeyIndex.restore`: it is not stored."""

    def scores(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`KeyIndex.scores`: of single keys; of those that are not found minus infinity."""
        wanted = max(math.ceil(self.share * self.covered), 1)
        scores = q.new_full((len(q), self.covered + 1), -math.inf)  # the last place: nothing found
        for index, heads, own in zip(self.heads, q, scores, strict=True):
            if self.kind == "graph":
                index.hnsw.efSearch = max(64, wanted)
            products, keys = (torch.from_numpy(x) for x in index.search(heads.contiguous().numpy(), wanted))
            found = products.masked_fill(keys < 0, -math.inf)
            shares = (found - found.logsumexp(1, keepdim=True)).flatten()
            own.scatter_reduce_(0, keys.flatten().where(keys.flatten() >= 0, self.covered), shares, "amax")
        return scores[:, :-1], torch.ones(len(q), self.covered, dtype=torch.long)

    def stored(self) -> None:
        """See :meth:`KeyIndex.stored`: no kernel reads it."""

    def keys_of(self, chosen: Tensor) -> Tensor:
        """See :meth:`KeyIndex.keys_of`."""
        return chosen


@dataclass(frozen=True)
class Library(Indexed):
    """Keys that faiss finds, in a graph (HNSW) or in inverted lists."""

    name: ClassVar[str] = "faiss"

    kind: str = option("graph", "graph or lists.")

    @property
    def index_key(self) -> tuple[str, int]:
        """See :attr:`Decoding.index_key`."""
        return f"{self.name} {self.kind}", round(1e6 * self.share)

    def new_index(self) -> KeyIndex:
        """See :meth:`Decoding.new_index`."""
        return FaissIndex(self.kind, self.share)

    def choose(self, scores: Tensor, sizes: Tensor, keys: int) -> Tensor:
        """See :meth:`Indexed.choose`."""
        return within(scores, sizes, keys) & scores.isfinite()


def main() -> None:
    import faiss

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; the shipped one if left out")
    parser.add_argument("--task", default="multivalue")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--share", type=float, action="append", help="of the keys; 0.01, 0.03 and 0.1 if left out")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    faiss.omp_set_num_threads(1)
    engine = apb.Engine.from_pretrained(given.model or shipped_model(), strategy="full", dtype="float32")
    assert engine.tokenizer is not None
    (item,) = synthetic.items(engine.tokenizer, given.task, given.length, 1, seed=0)
    prompt = item.prompt(engine.tokenizer)
    methods: list[Decoding] = [
        method
        for share in given.share or (0.01, 0.03, 0.1)
        for method in (Pages(share), Squeezed(share), Library(share), Library(share, kind="lists"))
    ]
    session = engine.prefill(prompt, max_new_tokens=given.tokens)
    state = State.of_session(session, prompt, (), "")
    document = Document(engine, OfTokens(prompt.prefix, prompt.document), state)
    tokens = document.ask(prompt.query, max_new_tokens=given.tokens).token_ids
    rows = [timed(engine, method, prompt, state, tokens) for method in methods]
    for row, fidelity in zip(rows, measure(engine, prompt, methods, given.tokens), strict=True):
        row |= {"mass": statistics.fmean(fidelity.mass), "mass_min": fidelity.mass_min, "kl": fidelity.kl}
        row |= {"share": fidelity.share, "agreement": fidelity.agreement, "steps": fidelity.tokens}
    tell(given, heading(engine, prompt, state) | {"faiss": faiss.__version__, "rows": rows})


def timed(engine: apb.Engine, method: Decoding, prompt: apb.Prompt, state: State, tokens: list[int]) -> dict[str, Any]:
    """Seconds to build the indexes of all layers, and of a step."""
    cache = state.cache.copy(len(state.token_ids), ROOM)
    start = time.perf_counter()
    method.build(cache)
    built = time.perf_counter() - start
    with closing(Setting(Full(), decoding=method).engine(engine)) as own:
        document = Document(own, OfTokens(prompt.prefix, prompt.document), replace(state, cache=cache))
        session = document.prefill(prompt.query, max_new_tokens=len(tokens))
        steps = []
        for token in tokens:
            start = time.perf_counter()
            session.extend([token])
            steps.append(time.perf_counter() - start)
    return {"decode": named(method), "build_s": built, "step_s": statistics.median(steps[1:])}


if __name__ == "__main__":
    main()
