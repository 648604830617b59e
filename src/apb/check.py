"""Correctness check of a model under this package: a shrunk copy with random weights, read by every strategy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .distributed.collectives import Group
from .distributed.mesh import Mesh
from .engine import Engine
from .errors import InputError, first_line
from .hf import counting, loading, supported, verifying
from .hf.config import layers_in_words
from .hf.reference import without_kernels
from .hf.shrinking import HEADS, shrink
from .hf.verifying import ANSWER, TOLERANCE, kind_of, small_model
from .planning.methods import METHODS, Method, make_method
from .prompt import Prompt

PROMPT = Prompt.from_tokens((), verifying.PROMPT[:-3], verifying.PROMPT[-3:])
BLOCKS = 5


@dataclass(frozen=True)
class Result:
    """One comparison: ``error`` is the largest difference of logits over the largest logit, None if it failed."""

    name: str
    error: float | None
    note: str = ""

    @property
    def passed(self) -> bool:
        """True if the difference is within rounding."""
        return self.error is not None and self.error < TOLERANCE


@dataclass
class Card:
    """A model's attention, its size, and the results of the comparisons."""

    model_type: str
    layers: str
    parameters: int | None = None
    cache_bytes_per_token: int | None = None
    max_positions: int | None = None
    refused: str | None = None
    results: list[Result] = field(default_factory=list)

    @property
    def supported(self) -> bool:
        """True if the model may be used: not refused, and all comparisons passed."""
        return self.refused is None and all(result.passed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        results = [asdict(result) | {"passed": result.passed} for result in self.results]
        return asdict(self) | {"supported": self.supported, "results": results}


def check(config: Any, group: Group | None = None) -> Card:
    """Check a model's configuration; every rank of ``group`` must call it, and all get the same card.

    The logits of a shrunk model with random weights in fp32 are compared after the prompt and after each of three more
    tokens: `full` with transformers' own eager attention; the other exact strategies, and apb with everything passed,
    with the same; and the ranks with one another. For apb and star, which are approximate, only the ranks are compared.
    At last comes what engines do themselves (:func:`apb.hf.verifying.verify`): the same with transformers' own decode.
    """
    group = group or Group()
    card = describe(config)
    if card.refused:
        return card
    try:
        model = small_model(kind_of(config), shrink(config))
        with torch.no_grad(), without_kernels(model):
            expected = model(torch.tensor([PROMPT.token_ids + ANSWER])).logits[0, len(PROMPT) - 1 :]
    except Exception as error:  # a model's code may fail in any way on a configuration that it was not written for
        card.results.append(Result("shrunk", None, f"no small copy can be made: {first_line(error)}"))
        return card
    for name, method, comparable in _ways(group.size):
        reference = expected if comparable else None
        try:
            with without_kernels(model):
                logits = _read(method, model, group)
        except InputError as error:
            card.refused = str(error)
            return card
        except Exception as error:  # a model may fail in any way; the card reports it
            card.results.append(Result(name, None, f"{type(error).__name__}: {first_line(error)}"))
        else:
            card.results.append(_judge(name, logits, reference, group))
    if card.supported:
        try:
            verifying.verify(config)  # what engines refuse is not supported
        except InputError as error:
            card.refused = str(error)
    return card


def _ways(ranks: int) -> Iterator[tuple[str, Method, bool]]:
    """(name, method, True if comparable with full attention) of every reading to check."""
    for number, (name, kind) in enumerate(METHODS.items()):
        method = make_method(name, {"blocks": BLOCKS})
        try:
            method.check_model(HEADS, ranks)
        except InputError:
            continue
        baseline = "full" if number else "transformers"  # transformers itself checks the first one of the table
        lossless = method.lossless(BLOCKS)
        if lossless is not None:
            setting, same = lossless
            yield f"{name}, {setting} = {baseline}" if setting else f"{name} = {baseline}", same, True
        if not kind.exact:
            yield f"{name}, ranks agree", method, False


def describe(config: Any) -> Card:
    """The card of a configuration before anything is run."""
    card = Card(config.model_type, "")
    try:
        supported.check_supported(config)
    except InputError as error:
        card.refused = str(error)
        return card
    card.layers = layers_in_words(config)
    card.max_positions = loading.position_limit(config)
    try:
        shape = counting.model_shape(config)
    except Exception:  # a configuration that leaves out what its model needs: its size is unknown
        return card
    card.parameters = shape.parameters
    card.cache_bytes_per_token = 2 * shape.cache_row
    return card


def _read(method: Method, model: Any, group: Group) -> Tensor:
    """Logits (1 + len(ANSWER), vocabulary) after the prompt and each token of ANSWER."""
    engine = Engine.from_model(model, strategy=method, mesh=Mesh.of(group), allow_extrapolation=True, verify=False)
    try:
        session = engine.prefill(PROMPT)
        return torch.stack([session.logits, *(session.extend([token]) for token in ANSWER)])
    finally:
        engine.close()


def _judge(name: str, logits: Tensor, expected: Tensor | None, group: Group) -> Result:
    """The largest difference of logits from the expected ones, over all ranks."""
    every = group.all_gather(logits).wait()
    if not every.isfinite().all():
        return Result(name, None, "the logits are not numbers")
    if not torch.equal(every, every[:1].expand_as(every)):
        return Result(name, None, "the ranks have different logits")
    if expected is None:
        return Result(name, 0.0)
    return Result(name, float((logits - expected).abs().max() / expected.abs().max().clamp(min=1)))
