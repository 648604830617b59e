"""Bounds of pages of keys, which :class:`Pages` chooses by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels import chosen
from .selecting import KeyIndex


class PageIndex(KeyIndex):
    """The least and the largest key, channel by channel, of every full page.

    Attributes:
        least, largest: (kv_heads, pages, head_dim) of the keys' dtype.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.least: Tensor | None = None
        self.largest: Tensor | None = None

    def extend(self, keys: Tensor) -> None:
        """See :meth:`KeyIndex.extend`: full pages are covered."""
        stop = keys.shape[1] // self.page_size * self.page_size
        if not stop:
            return
        pages = keys[:, :stop].unflatten(1, (-1, self.page_size))
        found = pages.amin(2), pages.amax(2)
        if self.least is not None and self.largest is not None:
            found = torch.cat([self.least, found[0]], 1), torch.cat([self.largest, found[1]], 1)
        (self.least, self.largest), self.covered = found, self.covered + stop

    def forget(self, tokens: int) -> None:
        """See :meth:`KeyIndex.forget`."""
        pages = min(self.covered, tokens) // self.page_size
        self.covered = pages * self.page_size
        if self.least is not None and self.largest is not None:
            self.least, self.largest = self.least[:, :pages], self.largest[:, :pages]

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`KeyIndex.tensors`."""
        if self.least is None or self.largest is None or not self.covered:
            return {}
        return {"least": self.least, "largest": self.largest}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`KeyIndex.restore`."""
        self.least, self.largest = tensors["least"], tensors["largest"]
        self.covered = self.least.shape[1] * self.page_size

    def bounds(self, q: Tensor) -> Tensor:
        """What q.k is at most over every page: (kv_heads, group, pages) fp32, of q (kv_heads, group, head_dim) fp32.

        Quest's: each channel contributes the larger of its products with the least and the largest key.
        """
        assert self.least is not None and self.largest is not None, "no page is covered"
        least, largest = self.least.float().transpose(1, 2), self.largest.float().transpose(1, 2)
        return q.clamp(min=0) @ largest + q.clamp(max=0) @ least

    def scores(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`KeyIndex.scores`: a head's bounds as shares of their softmax, since heads differ in range."""
        bounds = self.bounds(q)
        scores = bounds.log_softmax(-1).amax(1)
        return scores, torch.full_like(scores, self.page_size, dtype=torch.long)

    def stored(self) -> chosen.Index | None:
        """See :meth:`KeyIndex.stored`."""
        if self.least is None or self.largest is None or not self.covered:
            return None
        return chosen.Index(self.largest, self.least, None, self.covered)

    def keys_of(self, chosen: Tensor) -> Tensor:
        """See :meth:`KeyIndex.keys_of`."""
        return chosen.repeat_interleave(self.page_size, 1)
