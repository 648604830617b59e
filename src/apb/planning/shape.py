"""The shape of a model, as far as planning needs it: pure Python, like the plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recurrent:
    """The recurrent layers of a model.

    Attributes:
        parameters: weights that each row of a pass is multiplied by in them.
        narrow, wide: numbers of a state of all of them, in the model's dtype and in fp32.
        layers: how many there are, all alike.
        written: numbers that the linear maps of all of them write for a row.
        effect: numbers (fp32) of what a run of rows does to a state of all of them; 0 if runs cannot be composed.
        lookback: rows before a run that its first ones depend on beside the state, if runs can be composed.
    """

    parameters: int
    narrow: int
    wide: int
    layers: int
    written: int
    effect: int = 0
    lookback: int = 0

    def state_bytes(self, element_bytes: int) -> int:
        """Bytes of a state of all layers."""
        return self.narrow * element_bytes + self.wide * 4


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that costs depend on.

    Attributes:
        layers, heads, kv_heads, head_dim, hidden, intermediate, vocabulary: as in its configuration; kv_heads and
            head_dim of the layers that see all, if layers differ.
        layer_parameters: weights that each row of a pass is multiplied by, over all layers: those of the linear maps,
            and of the experts that a token is routed to.
        parameters: all weights, embeddings included.
        reach: for every layer its window, own token included, or None if it sees all; empty: all do.
        chunked: True if the windows do not slide: their edges stand still at multiples of the window.
        near: (kv_heads, head_dim) of the layers with a window, where they differ from the others'.
        cache_width: numbers that a token's keys and values take in one layer's cache, on average if layers differ; 0:
            2 * kv_heads * head_dim.
        expands: True if keys and values are expanded from what the cache holds, as from latents.
        attending: layers that attend; 0: all.
        recurrent: the recurrent layers; None without any.
        expert_row: numbers that the experts, which all run at once, hold for one token; 0 without experts.
        split: (layers, weights) of each GPU if the layers of a rank are on several; empty if they are on one.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    layer_parameters: int
    parameters: int
    reach: tuple[int | None, ...] = ()
    chunked: bool = False
    near: tuple[int, int] | None = None
    cache_width: int = 0
    expands: bool = False
    attending: int = 0
    recurrent: Recurrent | None = None
    expert_row: int = 0
    split: tuple[tuple[int, int], ...] = ()

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each layer that has one; the other layers see all."""
        return tuple(window for window in self.reach if window is not None)

    @property
    def pair_width(self) -> int:
        """Numbers of one token's keys and values in one layer, as attention reads them and ranks send them."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def attention_layers(self) -> int:
        """Layers that attend."""
        return self.attending or self.layers

    @property
    def near_pair_width(self) -> int:
        """:attr:`pair_width` of the layers with a window."""
        return 2 * self.near[0] * self.near[1] if self.near else self.pair_width

    @property
    def near_head_dim(self) -> int:
        """Head dim of the layers with a window."""
        return self.near[1] if self.near else self.head_dim

    @property
    def cache_row(self) -> int:
        """Numbers that one token's keys and values take in the cache, over all layers."""
        return self.attention_layers * self.layer_cache_row

    @property
    def layer_cache_row(self) -> int:
        """The same of one layer."""
        return self.cache_width or self.pair_width

    def fullest(self, tokens: int) -> tuple[int, int]:
        """(layers, weights) of the rank's fullest GPU, with ``tokens`` tokens in the cache."""
        parts = self.split or ((self.attention_layers, self.parameters),)
        return max(parts, key=lambda part: part[1] + part[0] * tokens * self.layer_cache_row)

    def shared(self, size: int) -> ModelShape:
        """One process's share of heads, MLPs, experts and the cache, if ``size`` processes share the weights."""
        return replace(
            self,
            heads=self.heads // size,
            kv_heads=self.kv_heads // size,
            near=self.near and (self.near[0] // size, self.near[1]),
            intermediate=self.intermediate // size,
            layer_parameters=self.layer_parameters // size,
            parameters=self.parameters // size,
            expert_row=self.expert_row // size,
        )

    def part(self, layers: range) -> ModelShape:
        """Some of the layers, with the embeddings only if the last layer is among them."""
        last = layers.stop == self.layers
        inside = self.layer_parameters * len(layers) // self.layers
        return replace(
            self,
            layers=len(layers),
            vocabulary=self.vocabulary if last else 0,
            layer_parameters=inside,
            parameters=inside + (self.parameters - self.layer_parameters if last else 0),
            reach=self.reach[layers.start : layers.stop],
        )

    def sliding(self, total: int) -> dict[int, int]:
        """The windows shorter than ``total`` tokens, and the number of layers with each."""
        return Counter(window for window in self.windows if window < total)
