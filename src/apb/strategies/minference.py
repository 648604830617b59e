"""MInference (arXiv 2407.02490): every head sees a few columns and diagonals, estimated from the last queries."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.reference import capped
from ..kernels.vertical_slash import vertical_slash
from ..layers.base import AttentionInput
from ..planning import methods
from ..timing import timed
from .base import Strategy, Visible, causal

# Number of the prompt's last rows whose attention chooses columns and diagonals.
ESTIMATING_ROWS = 64
# Always seen: the prompt's first columns (sinks) and the diagonals next to the main one.
FIRST_COLUMNS = 30
LAST_DIAGONALS = 100


class MInference(Strategy):
    """The vertical-slash pattern for all heads, on one device; the query's rows attend to everything."""

    method: methods.MInference

    def attend_document(self, layer: AttentionInput, out: Tensor) -> None:
        """See :meth:`Strategy.attend_document`."""
        for span in self.blocks:
            with timed("selection"):
                columns, diagonals = self.choose(layer)
            rows = span.rows
            with timed("attention"):
                attended = vertical_slash(
                    layer.q[rows], layer.k[rows], layer.v[rows], columns, diagonals, layer.scale, layer.softcap
                )
                out[rows] = layer.settle(*attended)

    def visible(self, layer: AttentionInput) -> Visible:
        """See :meth:`Strategy.visible`: a key before the row by its column or by their distance."""
        columns, diagonals = self.choose(layer)

        def visible(kv_head: int, heads: slice, rows: Tensor, keys: int) -> Tensor:
            distance = (rows[:, None] - torch.arange(keys, device=rows.device)).clamp(min=0)
            seen = columns[heads, None, :keys] | diagonals[heads][:, distance]
            return causal(kv_head, heads, rows, keys) & seen

        return visible

    def choose(self, layer: AttentionInput) -> tuple[Tensor, Tensor]:
        """Masks (heads, prompt tokens) of the columns and the diagonals (0: a row's own key) that each head sees."""
        prompt, heads, _ = layer.q.shape
        vertical, slash = self.method.budgets
        group = heads // layer.k.shape[1]
        columns = torch.zeros(heads, prompt, dtype=torch.bool, device=layer.q.device)
        diagonals = torch.zeros_like(columns)
        first = max(prompt - ESTIMATING_ROWS, 0)
        rows = torch.arange(first, prompt, device=layer.q.device)
        hidden = torch.arange(prompt, device=layer.q.device) > rows[:, None]
        for head in range(heads):  # one at a time: (rows, prompt) weights of all heads would take much memory
            scores = capped((layer.q[first:, head] @ layer.k[:, head // group].T).float() * layer.scale, layer.softcap)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            column = weights.sum(0)
            column[:FIRST_COLUMNS] = float("inf")
            columns[head] = _best(column, vertical)
            diagonal = _diagonal_sums(weights)
            diagonal[:LAST_DIAGONALS] = float("inf")
            diagonals[head] = _best(diagonal, slash)
        return columns, diagonals


def _diagonal_sums(weights: Tensor) -> Tensor:
    """Sums along diagonals of the last rows' (rows, keys) weights: element d is that of the keys d before their row."""
    rows, keys = weights.shape
    # Keys in falling order, with room at the end: then row r's weight at distance d stands at d + rows - 1 - r of its
    # line, and one step along a diagonal is one line further and one place back.
    line = keys + rows
    turned = weights.new_zeros(rows, line)
    turned[:, :keys] = weights.flip(1)
    return turned.as_strided((rows, keys), (line - 1, 1), rows - 1).sum(0)


def _best(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest of (tokens,) scores; ties go to the earlier token."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.sort(descending=True, stable=True).indices[:count]] = True
    return chosen
