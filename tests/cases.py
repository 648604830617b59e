"""Prefills that one process and several ranks must do alike: one row each, and what the oracle says of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import apb
from apb.compressors import BlockView, make_compressor
from apb.distributed.collectives import Group
from apb.distributed.mesh import Mesh
from models import tiny_heads, tiny_model
from oracle import OracleResult, dense_decode, dense_prefill

VOCABULARY = 503  # prime, so that no token stands twice in a document shorter than that
ANSWER = (12, 70, 33, 33, 1)  # tokens read after the prompt


@dataclass(frozen=True)
class Case:
    """One prefill: the lengths of the prompt's parts, the plan, the model."""

    blocks: int
    rounds: int = 1
    prefix: int = 3
    document: int = 101
    query: int = 6
    anchor_length: int | None = 17  # prefix, query and 8 document tokens
    passing_length: int = 4
    passing_budget: int | None = None
    strategy: str = "apb"
    compressor: str = "query"
    family: str = "llama"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    seed: int = 0
    margin: float = 1e-3  # how far the oracle's closest decision must be from a coin toss

    @property
    def prompt(self) -> apb.Prompt:
        """Token ids without a repetition in the document."""
        return apb.Prompt.from_tokens(
            [(91 * i + 5) % VOCABULARY for i in range(self.prefix)],
            [(37 * i + 11) % VOCABULARY for i in range(self.document)],
            [(53 * i + 41) % VOCABULARY for i in range(self.query)],
        )

    def model(self) -> PreTrainedModel:
        """The same weights every time."""
        return tiny_model(
            self.family,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab=VOCABULARY,
            seed=self.seed,
        )

    def engine(self, model: PreTrainedModel | None = None, group: Group | None = None, **options: Any) -> apb.Engine:
        """An engine that reads as the case says, on the ranks of a group."""
        model = model or self.model()
        options |= {"strategy": self.strategy, "blocks": self.blocks, "passing_length": self.passing_length}
        options["rounds"] = self.rounds
        options["allow_extrapolation"] = True  # past 4096 tokens these models are as good as before
        if self.passing_budget is not None:
            options["passing_budget"] = self.passing_budget
        options["mesh"] = None if group is None else Mesh.of(group)
        if self.compressor != "retaining":
            return apb.Engine.from_model(
                model, anchor_length=self.anchor_length, compressor=self.compressor, seed=self.seed, **options
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "heads.safetensors")
            save_file(tiny_heads(model), path)
            return apb.Engine.from_model(model, anchor_length=self.anchor_length, heads=path, **options)

    def score(self) -> Callable[[int, int], Tensor] | None:
        """For the oracle: the scores of the compressor that draws lots, which no rule gives."""
        if self.compressor != "random":
            return None
        plan = self.engine().plan(self.prompt)

        def score(layer: int, index: int) -> Tensor:
            block = plan.block(index)
            empty = torch.empty(len(block), self.kv_heads, 0)
            return make_compressor("random", seed=self.seed).score(
                BlockView(layer, block, empty, empty, empty, empty, 1.0, 0)
            )

        return score


# Every number of blocks; uneven ones; every special length; every compressor, family and group size; every strategy.
# Exact strategies make their own blocks; the oracle knows them as one block.
CASES = {
    "one block": Case(1),
    "two blocks": Case(2),
    "three blocks": Case(3),
    "five blocks": Case(5, seed=7),
    "seven blocks": Case(7, seed=5),
    "blocks of a token or two": Case(7, document=9, anchor_length=11),
    "blocks shorter than what they may pass": Case(5, document=31, passing_length=9),
    "nothing passed": Case(4, passing_length=0),
    "anchor without document": Case(4, anchor_length=9),
    "anchor longer than a block": Case(5, document=61, anchor_length=3 + 6 + 20, seed=9),
    "anchor that ends with the first block": Case(4, document=80, anchor_length=3 + 6 + 20),
    "anchor as long as the prompt": Case(3, document=31, anchor_length=999),
    "no prefix": Case(4, prefix=0),
    "long prefix": Case(4, prefix=30, anchor_length=40, seed=1),
    "query of one token": Case(4, query=1, seed=3),
    "query longer than a block": Case(5, document=61, query=25, anchor_length=33),
    "every head its own keys": Case(4, heads=8, kv_heads=8, head_dim=8, seed=4),
    "four heads share keys": Case(4, heads=8, kv_heads=2),
    "eight heads share keys": Case(4, heads=8, kv_heads=1),
    "recent": Case(4, compressor="recent"),
    "query-edge": Case(4, compressor="query-edge", passing_length=8),
    "query-edge, blocks shorter than what they may pass": Case(
        5, document=31, passing_length=9, compressor="query-edge"
    ),
    "random": Case(4, compressor="random", seed=3),
    "retaining": Case(4, compressor="retaining"),
    "retaining, qwen3": Case(3, compressor="retaining", family="qwen3"),
    "qwen2": Case(3, family="qwen2", head_dim=32),
    "qwen3": Case(5, family="qwen3"),
    "mistral": Case(3, family="mistral", heads=6),
    "a block a round": Case(4, rounds=4, seed=2),
    "five blocks in two rounds": Case(5, rounds=2, seed=7),
    "seven blocks in three rounds, retaining": Case(7, rounds=3, compressor="retaining"),
    "five blocks in three rounds, nothing passed": Case(5, rounds=3, passing_length=0),
    "budget": Case(7, passing_budget=7),
    "budget, a block a round": Case(6, rounds=6, passing_budget=9),
    "budget, seven blocks in three rounds": Case(7, rounds=3, passing_budget=5),
    "budget smaller than what a block passes": Case(5, passing_length=6, passing_budget=3),
    "budget of everything": Case(5, passing_budget=16, seed=1),
    "budget, four heads share keys": Case(6, heads=8, kv_heads=2, passing_budget=6),
    "budget, every head its own keys": Case(6, heads=8, kv_heads=8, head_dim=8, passing_budget=6, seed=3),
    "budget, anchor longer than a block": Case(8, document=90, anchor_length=3 + 6 + 20, passing_budget=6),
    "budget, query-edge": Case(7, compressor="query-edge", passing_length=8, passing_budget=13),
    "budget, query-edge in rounds": Case(7, rounds=4, compressor="query-edge", passing_length=8, passing_budget=10),
    "budget, no anchor": Case(5, anchor_length=0, passing_budget=6),
    "budget, retaining": Case(6, compressor="retaining", passing_budget=6, seed=4),
    "budget, recent": Case(6, compressor="recent", passing_budget=6),
    "budget, random": Case(6, compressor="random", rounds=2, passing_budget=6),
    "budget, 64 blocks of 100 tokens in three rounds": Case(
        64,
        rounds=3,
        document=6437,
        query=4,
        anchor_length=30,
        passing_length=8,
        passing_budget=40,
        compressor="query-edge",
        heads=2,
        kv_heads=1,
        seed=17,
        margin=1e-4,  # fp32 errs by 1e-6, and thousands of decisions are closer than a few
    ),
    "star": Case(4, strategy="star", anchor_length=None),
    "star in three rounds": Case(7, rounds=3, strategy="star", anchor_length=12),
    "star, short anchor": Case(5, strategy="star", anchor_length=9),
    "full": Case(1, strategy="full"),
    "ring": Case(1, strategy="ring"),
    "ring, fewer tokens than chunks": Case(1, strategy="ring", document=3, query=2),
    "ring, no prefix": Case(1, strategy="ring", prefix=0),
    "ulysses": Case(1, strategy="ulysses", family="qwen3", heads=12, kv_heads=3),
    "ulysses, eight heads share keys": Case(1, strategy="ulysses", family="qwen3", heads=12, kv_heads=1),
    "ulysses, fewer tokens than chunks": Case(1, strategy="ulysses", family="qwen3", heads=12, kv_heads=4, document=2),
}


@dataclass(frozen=True)
class Outcome:
    """What one rank has after reading a prompt and then ANSWER: keys and values, per layer, None but on rank 0."""

    logits: Tensor
    keys: list[Tensor | None]
    values: list[Tensor | None]
    decoded: Tensor  # (len(ANSWER), vocabulary)


def read(engine: apb.Engine, case: Case) -> Outcome:
    """Run a case."""
    session = engine.prefill(case.prompt)
    pairs = [session.gather_kv(layer) for layer in range(engine.model.config.num_hidden_layers)]
    logits = session.logits.clone()
    decoded = torch.stack([session.extend([token]) for token in ANSWER])
    return Outcome(logits, [k for k, _ in pairs], [v for _, v in pairs], decoded)


@cache
def expected(name: str) -> tuple[OracleResult, Tensor]:
    """The oracle's prefill of a case and its logits after each token of ANSWER."""
    case = CASES[name]
    model, prompt = case.model(), case.prompt
    result = dense_prefill(
        model,
        prompt.prefix,
        prompt.document,
        prompt.query,
        blocks=case.blocks,
        anchor_length=case.anchor_length,
        passing_length=case.passing_length,
        compressor=None if case.compressor == "random" else case.compressor,
        strategy=case.strategy if case.strategy in ("apb", "star") else "apb",  # with one block all are exact
        heads=tiny_heads(model) if case.compressor == "retaining" else None,
        score=case.score(),
        rounds=case.rounds,
        passing_budget=case.passing_budget,
    )
    return result, dense_decode(model, result, ANSWER)


def check(outcome: Outcome, name: str, *, tolerance: float = 1e-4) -> None:
    """Assert that an outcome on rank 0 is the oracle's: logits, every layer's cache, decode."""
    result, decoded = expected(name)
    # Else a rounding error could change which pairs are passed, and the comparison would be a coin toss.
    assert result.margins > CASES[name].margin, f"scores of {name!r} are too close to each other: choose another seed"
    close = {"rtol": tolerance, "atol": tolerance}
    for layer, (keys, values) in enumerate(zip(result.keys, result.values, strict=True)):
        where = f"{name}, layer {layer}: "
        torch.testing.assert_close(outcome.keys[layer], keys, msg=lambda text, at=where: at + "keys: " + text, **close)
        torch.testing.assert_close(
            outcome.values[layer], values, msg=lambda text, at=where: at + "values: " + text, **close
        )
    torch.testing.assert_close(outcome.logits, result.logits, **close)
    torch.testing.assert_close(outcome.decoded, decoded, **close)
