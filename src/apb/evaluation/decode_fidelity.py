"""Fidelity of decode methods: the attention that a step recalls, and the next token that it predicts.

A text is read in full once. Then the tokens of its exact greedy answer are read, one a step:

- with exact attention, while every method says what it would have attended to: the share of a head's attention mass on
  those keys is exp(lse of the method - lse of all keys);
- by every method itself, for the Kullback-Leibler divergence, in nats, of the next-token distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..asking import OfTokens
from ..decoding import EXACT, Decoding, Reader, Shard
from ..document import Document
from ..engine import Engine
from ..errors import InputError, at_least
from ..hf.sampling import eos_ids
from ..layers.base import AttentionInput
from ..layers.shards import NewRows
from ..planning.methods import Full
from ..planning.options import given
from ..prompt import Prompt
from ..state import State
from .settings import Setting


@dataclass(frozen=True)
class DecodeFidelity:
    """The figures of one prompt and one method.

    Attributes:
        decode: the method, as text.
        tokens: of the answer, one step each.
        share: of the keys that tokens attended to.
        mass: [layer], mean over steps and heads of the share (0 to 1) of exact attention's mass on those keys.
        mass_min: the least mean over the steps of any layer and head.
        kl: mean over the steps, nats.
        agreement: share of the steps that predict the exact method's token.
    """

    decode: str
    tokens: int
    share: float
    mass: list[float]
    mass_min: float
    kl: float
    agreement: float

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)


@dataclass(frozen=True)
class _Watching(Decoding):
    """Exact, while other methods say what they would attend to; ``seen``: for each of them by layer the shares of mass,
    (heads,) a step."""

    name: ClassVar[str] = "watching"
    exact: ClassVar[bool] = True

    methods: tuple[Decoding, ...]
    seen: list[dict[int, list[Tensor]]] = field(compare=False)

    def prepare(self, cache: Shard, backend: str = "auto") -> Reader:
        """See :meth:`Decoding.prepare`."""
        return _WatchingReader(
            EXACT.prepare(cache, backend), [method.prepare(cache, backend) for method in self.methods], self.seen
        )


class _WatchingReader(Reader):
    def __init__(self, exact: Reader, others: Sequence[Reader], seen: list[dict[int, list[Tensor]]]) -> None:
        self._exact, self._others, self._seen = exact, others, seen

    def attend(self, layer: AttentionInput, rows: NewRows) -> tuple[Tensor, Tensor]:
        """See :meth:`Reader.attend`."""
        out, lse = self._exact.attend(layer, rows)
        for reader, seen in zip(self._others, self._seen, strict=True):
            _, part = reader.attend(layer, rows)
            seen.setdefault(layer.index, []).append((part - lse).exp()[:, 0].clamp(max=1).double().cpu())
        return out, lse


def measure(
    engine: Engine,
    prompt: Prompt,
    methods: Sequence[Decoding],
    tokens: int = 16,
    done: Callable[[], None] | None = None,
) -> list[DecodeFidelity]:
    """The fidelity of every method on one prompt, over the same answer.

    Args:
        engine: gives the model; its own strategy and decode method are not used. One rank.
        prompt: the prompt to read.
        methods: decode methods to compare with the exact one.
        tokens: most tokens of the answer; it ends before one that ends the model's turn.
        done: called after every answer (one for each method, and the exact one).
    """
    if engine.group.size > 1:
        raise InputError(f"Looking into decode steps takes one rank, and there are {engine.group.size}; use one.")
    at_least("tokens", tokens, 1)
    watching = _Watching(tuple(methods), [{} for _ in methods])
    with closing(Setting(Full(), decoding=watching).engine(engine)) as exact:
        session = exact.prefill(prompt, max_new_tokens=tokens)
        state = State.of_session(session, prompt, (), "")
        session = _asked(exact, prompt, state, tokens)
        answer, logits = [int(session.logits.argmax())], []
        while len(answer) <= tokens:
            logits.append(session.extend(answer[-1:]))
            answer.append(int(logits[-1].argmax()))
            if answer[-1] in eos_ids(engine.model):
                break
    if done is not None:
        done()
    expected = torch.stack(logits).log_softmax(-1)
    found = []
    for method, seen in zip(methods, watching.seen, strict=True):
        with closing(Setting(Full(), decoding=method).engine(engine)) as other:
            session = _asked(other, prompt, state, tokens)
            predicted = torch.stack([session.extend([token]) for token in answer[: len(logits)]]).log_softmax(-1)
        mass = torch.stack([torch.stack(steps).mean(0) for _, steps in sorted(seen.items())])  # (layers, heads)
        found.append(
            DecodeFidelity(
                named(method),
                len(logits),
                session.share,
                mass.mean(1).tolist(),
                mass.min().item(),
                (expected.exp() * (expected - predicted)).sum(-1).mean().item(),
                (expected.argmax(-1) == predicted.argmax(-1)).double().mean().item(),
            )
        )
        if done is not None:
            done()
    return found


def named(method: Decoding) -> str:
    """A decode method with the options that were given."""
    return ", ".join([method.name, *(f"{name.replace('_', ' ')} {value}" for name, value in given(method).items())])


def _asked(engine: Engine, prompt: Prompt, state: State, tokens: int) -> Any:
    """The session after the prompt, by an engine's own decode method, over what is read already."""
    document = Document(engine, OfTokens(prompt.prefix, prompt.document), state)
    return document.prefill(prompt.query, max_new_tokens=tokens)
