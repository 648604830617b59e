"""How much of the attention of later layers falls on the rows that propagation would keep: a measure without labels.

Rows that go on above a layer are the only ones of the document that the question can look at there. So where the
question's rows, in a prefill that keeps all rows, pay little of their attention in later layers to what a layer would
have chosen, that layer is too early. docs/propagation.md has what was measured of its use.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layers.base import AttentionInput, LayerKind
from .planning.propagation import Propagation
from .strategies import Strategy
from .strategies.propagation import attention_to_document, best_rows

# Shares of the document's rows that are shown.
KEPT = (0.05, 0.1, 0.2, 0.4)


@dataclass
class Foresight:
    """The attention of the question's rows in each layer that sees the whole text, of one prompt.

    Attributes:
        received: by layer (document,) fp32 on the CPU: attention to each token of the document, the mean over the
            question's rows, summed over heads.
    """

    received: dict[int, Tensor] = field(default_factory=dict)

    def look(self, strategy: Strategy, layer: AttentionInput) -> None:
        """Note a layer's attention, in the last round of a prefill on one rank."""
        if strategy.itinerary.last and layer.kind is LayerKind.FULL:
            self.received[layer.index] = attention_to_document(strategy, layer).cpu()

    def held(self, propagation: Propagation) -> float:
        """Share (0 to 1) of the attention to the document in the layers above, which see the whole text, that falls on
        the rows that go on; the mean over those layers. ``propagation`` names one of :attr:`received`'s layers."""
        assert propagation.layer is not None
        scores = self.received[propagation.layer]
        rows = best_rows(scores, propagation.rows(len(scores)))
        above = [paid for layer, paid in self.received.items() if layer > propagation.layer]
        return float(torch.stack([paid[rows].sum() / paid.sum() for paid in above]).mean())

    def table(self) -> list[tuple[int, list[float]]]:
        """For each layer between a third and three quarters of the depth: :meth:`held` of each of KEPT."""
        last = max(self.received, default=0)
        middle = [index for index in self.received if last / 3 <= index <= last * 3 / 4 and index < last]
        return [(index, [self.held(Propagation(index, keep)) for keep in KEPT]) for index in middle]
