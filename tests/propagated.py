"""Prefills with propagation that any number of ranks must do alike, and what the dense oracle says of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import apb
import families
from apb.distributed.mesh import Mesh
from families import ANSWER, APB, PROMPT, STAR, VOCABULARY, WIDE, WINDOW
from oracle import masked_prefill

LAYERS = 5
# A third of the layers sees all; windows below and above the layer that scores.
MIXED = {
    "sliding_window": WINDOW,
    "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ],
}
DEEP = {"num_hidden_layers": LAYERS}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", {**WIDE, **DEEP, "num_attention_heads": 12, "num_key_value_heads": 3}),
    "gemma3_text": ("Gemma3ForCausalLM", {**WIDE, **DEEP, **MIXED}),
    "gemma2": ("Gemma2ForCausalLM", {**WIDE, **DEEP, **MIXED, "attn_logit_softcapping": 2.0}),
    "gpt_oss": ("GptOssForCausalLM", {**families.SMALL, **DEEP, **MIXED, "head_dim": 16, "num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**families.PECULIAR["deepseek_v3"][1], **DEEP}),
}
READINGS: dict[str, dict[str, Any]] = {
    "full": {"strategy": "full"},
    "ring": {"strategy": "ring"},
    "ulysses": {"strategy": "ulysses"},
    "minference": {"strategy": "minference", "vertical_size": 1.0},
    "apb": APB,
    "apb, 3 rounds": {**APB, "rounds": 3},
    "star": STAR,
    "star, 2 rounds": {**STAR, "rounds": 2},
}
# Every strategy on one model; every kind of layer under the strategies that differ most.
CASES = [("qwen3", reading) for reading in READINGS]
CASES += [(name, reading) for name in ("gemma3_text", "gemma2", "gpt_oss") for reading in ("full", "apb")]
CASES += [("gemma3_text", "apb, 3 rounds"), ("deepseek_v3", "full"), ("deepseek_v3", "star")]
LAYER, KEEP = 1, 0.3
COUNT = 30  # of 101 tokens


@dataclass(frozen=True)
class Outcome:
    """What a rank has after the prompt and ANSWER.

    logits: (1 + len(ANSWER), vocabulary). positions: of the last layer after the prompt, over all ranks. lengths:
    tokens that this rank holds of the first and the last layer. keys: (kv_heads, tokens, d) of the last layer on
    rank 0.
    """

    logits: Tensor
    positions: list[int]
    lengths: tuple[int, int]
    keys: Tensor | None


def engine(name: str, reading: str, group: Any = None, **options: Any) -> apb.Engine:
    """An engine with propagation."""
    mesh = None if group is None else Mesh.of(group)
    options = {"propagation": apb.Propagation(LAYER, KEEP), **READINGS[reading], **options}
    return apb.Engine.from_model(families.make(*MODELS[name]), mesh=mesh, **options)


def read(name: str, reading: str, group: Any = None, **options: Any) -> Outcome:
    """Run a case."""
    made = engine(name, reading, group, **options)
    session = made.prefill(PROMPT)
    shards = [session.cache.shard(layer)[0].shape[0] for layer in (0, LAYERS - 1)]
    positions, keys = session.positions(LAYERS - 1), session.gather_kv(LAYERS - 1)[0]
    logits = torch.stack([session.logits, *(session.extend([token]) for token in ANSWER)])
    made.close()
    return Outcome(logits, positions, (shards[0], shards[1]), keys)


@cache
def expected(name: str, reading: str) -> tuple[Tensor, list[int]]:
    """The oracle's logits, and the positions of the last layer's cache after the prompt."""
    options = READINGS[reading]
    sizes: dict[str, Any] = {"blocks": 1, "anchor_length": None, "passing_length": 0}
    sizes |= options if options["strategy"] in ("apb", "star") else {}
    went_on: list[int] = []
    parts = PROMPT.prefix, PROMPT.document, PROMPT.query
    logits = masked_prefill(
        families.make(*MODELS[name]), *parts, ANSWER, **sizes, propagation=(LAYER, COUNT), went_on=went_on
    )
    start = len(PROMPT.prefix) + len(PROMPT.document)
    return logits, [*range(len(PROMPT.prefix)), *went_on, *range(start, len(PROMPT))]


__all__ = ["CASES", "VOCABULARY", "engine", "expected", "read"]
