"""The stand-in for a cache where a pass stores keys and values elsewhere: in captured steps, or in several caches."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Called with a layer's index and the keys and values of the rows of a pass, (1, kv_heads, rows, head_dim) each.
Append = Callable[[int, Tensor, Tensor], None]


class StepLayer(CacheLayerMixin):
    """A layer of a :class:`StepCache`."""

    is_sliding = False

    def __init__(self, step: StepCache, index: int) -> None:
        super().__init__()
        self._step: StepCache = weakref.proxy(step)
        self._index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there is no storage here."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Pass the states to ``append`` and return them unchanged."""
        self._step.append(self._index, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens so far, over all ranks."""
        self._step.asked = True
        return self._step.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As :meth:`ShardLayer.get_mask_sizes`."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class StepCache(Cache):
    """Stand-in for a cache while the model reads one token after each of one or several texts.

    Attributes:
        append: stores a layer's new keys and values.
        total: tokens seen so far by all ranks together.
        asked: True once the model has read ``total``: it then depends on a number on the host, which a graph would
            capture as a constant, and which is not the same for several texts.
    """

    def __init__(self, layers: int, append: Append) -> None:
        self.append = append
        self.total = 0
        self.asked = False
        super().__init__(layers=[StepLayer(self, index) for index in range(layers)])
