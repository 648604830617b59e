"""One layer's input to attention, and the kinds of layers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import pad


class LayerKind(Enum):
    """The reach of a layer's rows; each kind has its own attention (:mod:`apb.layers.routing`)."""

    FULL = "full attention"
    WINDOW = "sliding window"


def as_wide(values: Tensor, like: Tensor) -> Tensor:
    """Values (..., width), followed by zeros if ``like``, the keys or values of that width, is wider.

    Kernels want keys and values alike, and zeros stay zeros.
    """
    return pad(values, (0, like.shape[-1] - values.shape[-1])) if values.shape[-1] < like.shape[-1] else values


@dataclass(frozen=True)
class AttentionInput:
    """One layer's input to attention, in this rank's row order.

    Attributes:
        index: index of the layer.
        q: (rows, heads, head_dim), after RoPE.
        k, v: (rows, kv_heads, head_dim), after RoPE, not repeated over the group.
        scale: factor on q.k.
        before_rope: (rows, (heads + 2 kv_heads) * head_dim), q, k, v before RoPE; None unless the compressor needs it.
        window: largest number of keys that a row sees, its own included; None without a limit.
        chunked: True if the window's edge stands still at multiples of ``window`` instead of moving with the row.
        shared: index of the layer whose keys and values these are, if this layer has none of its own.
        softcap: as in :func:`apb.attention`.
        sinks: (heads,), logits in every row's softmax that have no value; None without sinks.
        earlier: keys and values (tokens, kv_heads, head_dim) that this rank's cache holds of earlier rounds; None in
            the first.
    """

    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    before_rope: Tensor | None = None
    window: int | None = None
    chunked: bool = False
    shared: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    earlier: tuple[Tensor, Tensor] | None = None

    @property
    def kind(self) -> LayerKind:
        """The kind of the layer for this prompt: a window as long as the prompt does not count."""
        return LayerKind.FULL if self.window is None else LayerKind.WINDOW

    @property
    def kept(self) -> int:
        """Index of the layer in whose place the cache keeps these keys and values."""
        return self.index if self.shared is None else self.shared

    @property
    def plain(self) -> bool:
        """True if attention is a softmax of q.k over all keys, and nothing else."""
        return self.window is None and self.softcap is None and self.sinks is None

    def settle(self, out: Tensor, lse: Tensor, heads: slice = slice(None)) -> Tensor:
        """Convert merged results (rows, heads, head_dim) with lse (heads, rows) to the model's attention output.

        The sinks join the softmax here, once, after all partial results have been merged. ``heads``: those of ``out``.
        The result has out's dtype, or is fp32: assigned to rows of the output, it is rounded and copied at once.
        """
        if self.sinks is not None:
            out = out * torch.sigmoid(lse - self.sinks[heads].float()[:, None]).T.unsqueeze(-1)
        return out
