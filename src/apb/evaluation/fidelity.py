"""Fidelity of an approximation to full attention, before any answer: the attention it keeps, and its predictions.

Two figures, both on sampled rows of the document and never on a (rows, rows) matrix:

- the share of full attention's mass on the keys visible to a row, per layer and KV head: queries and keys are those of
  a full prefill, and the visible keys are those that the approximation chose in a prefill of its own;
- the Kullback-Leibler divergence, in nats, from full attention's next-token distribution to the approximation's.

The question's own rows see everything under every strategy; their prediction is listed separately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine
from ..errors import InputError
from ..layers.base import AttentionInput
from ..planning.methods import Full
from ..prompt import Prompt
from ..strategies.base import Strategy, Visible
from .settings import Setting

# Attention weights held at a time: rows * heads of a group * keys.
_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class Fidelity:
    """The figures of one prompt and one setting.

    Attributes:
        strategy, compressor, blocks, anchor_length, passing_length: the reading, by the plan.
        rows: sampled rows of the document.
        mass: [layer][KV head], mean share (0 to 1) of full attention's mass on visible keys.
        kl_document: mean over the sampled rows, nats.
        kl_answer: of the first answer token, nats.
        agreement: share of the sampled rows at which both predict the same token.
    """

    strategy: str
    compressor: str | None
    blocks: int
    anchor_length: int
    passing_length: int
    rows: int
    mass: list[list[float]]
    kl_document: float
    kl_answer: float
    agreement: float

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)


class Sight:
    """The keys visible to each row of the document, layer by layer, as a strategy chose them in its own prefill."""

    def __init__(self) -> None:
        self._visible: dict[int, Visible] = {}

    def look(self, strategy: Strategy, layer: AttentionInput) -> None:
        """Record a layer's choice of keys; it depends on the layer's input alone, so it is computed again here."""
        if not layer.plain:
            raise InputError(
                f"Layer {layer.index} has a sliding window, capped logits or sinks, and fidelity knows plain causal "
                "attention only; compare answers instead, with apb eval."
            )
        self._visible[layer.index] = strategy.visible(layer)

    def visible(self, layer: int, head: int, heads: slice, rows: Tensor, keys: int) -> Tensor:
        """True where a row sees a key: (heads of the group or 1, rows, keys) bool.

        Args:
            layer: index of the layer.
            head: KV head; ``heads``: its query heads.
            rows: (rows,) positions.
            keys: number of keys: positions 0 to keys - 1.
        """
        return self._visible[layer](head, heads, rows, keys)


def sample_rows(prompt: Prompt, count: int, seed: int) -> list[int]:
    """Positions of document rows, ascending: all of them if there are no more than ``count``."""
    start, stop = len(prompt.prefix), len(prompt.prefix) + len(prompt.document)
    return sorted(Random(seed).sample(range(start, stop), min(count, stop - start)))


def measure(
    engine: Engine,
    prompt: Prompt,
    settings: Sequence[Setting],
    rows: int = 128,
    seed: int = 0,
    done: Callable[[], None] | None = None,
) -> list[Fidelity]:
    """The fidelity of every setting on one prompt, on the same rows.

    Args:
        engine: gives the model; its own strategy is not used. One rank.
        prompt: the prompt to read.
        settings: the readings to compare with full attention.
        rows: number of the document's rows to sample.
        seed: of the sampling.
        done: called after every prefill (one for each setting, and one in full).
    """
    first = settings[0].method.question_first
    if any(setting.method.question_first is not first for setting in settings):
        raise InputError("Readings with and without the question in front have other rows; compare them apart.")
    prompt = prompt.question_first if first else prompt
    positions = sample_rows(prompt, rows, seed)
    wanted = [*positions, len(prompt) - 1]
    sights, plans, predictions = [], [], []
    for setting in settings:
        sight = Sight()
        with closing(setting.engine(engine)) as reader:
            plan, logits = reader.inspect(prompt, wanted, sight.look)
        sights.append(sight)
        plans.append(plan)
        predictions.append(logits.log_softmax(-1))
        if done is not None:
            done()
    places = torch.tensor(positions, device=engine.device)
    masses: list[list[list[float]]] = [[] for _ in settings]

    def look(strategy: Strategy, layer: AttentionInput) -> None:
        held = _mass(layer, places, sights)
        for mass, shares in zip(masses, held, strict=True):
            mass.append(shares)

    with closing(Setting(Full()).engine(engine)) as full:
        _, logits = full.inspect(prompt, wanted, look)
    if done is not None:
        done()
    expected = logits.log_softmax(-1)
    found = []
    for setting, plan, mass, prediction in zip(settings, plans, masses, predictions, strict=True):
        divergence = (expected.exp() * (expected - prediction)).sum(-1)
        same = expected[:-1].argmax(-1) == prediction[:-1].argmax(-1)
        found.append(
            Fidelity(
                plan.strategy,
                setting.compressor.name if setting.compressor and plan.passing_length else None,
                plan.blocks,
                plan.anchor_length,
                plan.passing_length,
                len(positions),
                mass,
                divergence[:-1].mean().item(),
                divergence[-1].item(),
                same.float().mean().item(),
            )
        )
    return found


def _mass(layer: AttentionInput, rows: Tensor, sights: Sequence[Sight]) -> list[list[float]]:
    """Per setting and KV head of one layer: the mean share of full attention's mass on the keys visible to the rows."""
    keys = layer.k.shape[0]
    kv_heads = layer.k.shape[1]
    group = layer.q.shape[1] // kv_heads
    chunks = rows.split(max(1, _WEIGHTS // (group * keys)))
    total = torch.zeros(len(sights), kv_heads, dtype=torch.float64)
    for head in range(kv_heads):
        heads = slice(head * group, (head + 1) * group)
        for chunk in chunks:
            q = layer.q[chunk, heads].transpose(0, 1)  # (group, rows, head_dim)
            scores = (q.float() @ layer.k[:, head].float().T) * layer.scale
            hidden = torch.arange(keys, device=rows.device) > chunk[:, None]
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            for index, sight in enumerate(sights):
                seen = sight.visible(layer.index, head, heads, chunk, keys)
                total[index, head] += (weights * seen).sum().double().cpu()
    return (total / (group * len(rows))).tolist()
