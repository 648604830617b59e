"""The interface of decode methods: attention of new tokens over the keys and values that a rank keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..planning.options import Checked

if TYPE_CHECKING:  # a decode method can be named without torch
    from torch import Tensor

    from ..layers.base import AttentionInput
    from ..layers.shards import NewRows, StoredShard


RECENT = 64
"""Keys at a shard's end that are in no index and stay on the device; mostly the question's are among them, which its
answer needs in full."""


class LayerIndex(Protocol):
    """What a decode method has made of a layer's keys, to be kept with them.

    Shallow copies go with copies of the cache: its tensors are replaced, never changed.
    """

    def forget(self, tokens: int) -> None:
        """Forget all keys but the first ``tokens``, which the cache still holds."""

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name, to be stored; nothing if it covers no key.

        (kv_heads, ...) each, numbers of floating point in the keys' dtype.
        """

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Become the index that :meth:`tensors` was asked of; the tensors are on the device."""


class Shard(Protocol):
    """The interface of a rank's cache for decode methods.

    Attributes:
        indexes: what decode methods keep with the cache: under a key of their own, an index by layer. The cache tells
            the indexes which keys it drops.
        windows: by layer its window in tokens; layers without an entry see all.
        expands: True if every pass expands what it holds, as latents, into the keys and values that its rows attend to.
    """

    indexes: dict[Hashable, dict[int, LayerIndex]]
    windows: Mapping[int, int]
    expands: bool

    @property
    def indices(self) -> list[int]:
        """Indices of the layers that have keys and values."""

    def shard(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer: (tokens, kv_heads, head_dim) each, on the device; views unless some are far."""

    def near(self, layer: int) -> tuple[Tensor, Tensor]:
        """Those that are on the device, behind the far ones: views."""

    def far(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Those in host memory, the first of the layer; None if there are none."""

    def move_away(self, keep: int) -> None:
        """Move keys and values of layers that see all to host memory, but for the last ``keep`` tokens of each."""


class Reader(ABC):
    """A decode method over one rank's shard; made by :meth:`Decoding.prepare`.

    Attributes:
        share: share of the shard's keys that a token attends to, at most 1.
    """

    share: float = 1.0

    @abstractmethod
    def attend(self, layer: AttentionInput, rows: NewRows) -> tuple[Tensor, Tensor]:
        """Partial attention of new rows over this rank's shard, in a layer of full attention.

        Args:
            layer: q (rows, heads, head_dim) of the new rows; k, v (tokens, kv_heads, head_dim) of the shard that are on
                the device, which end with the rows' own where this rank keeps them.
            rows: positions of rows and keys.

        Returns:
            out (rows, heads, head_dim) in q's dtype or fp32, and lse (heads, rows) fp32, the natural log of the sum of
            exponentials over the keys that were attended to; the ranks' results are merged by it.
        """


class StoredReader(ABC):
    """A decode method over any shard, for steps that are captured as CUDA graphs; by :meth:`Decoding.stored_reader`.

    Shards of one layout are read by one of them, in any order.

    Attributes:
        batched: True if it attends for several sessions at once, each of them to a shard of its own.
        far: True if it also reads what is in host memory.
    """

    batched: ClassVar[bool] = False
    far: bool = False

    def begin(self, reader: Any, lengths: Sequence[int]) -> None:  # noqa: B027
        """Write to the device's memory what the next step needs of a shard besides its keys. Nothing, by default.

        Args:
            reader: the shard's, by :meth:`Decoding.prepare` of the same method.
            lengths: by layer the keys that the row sees of the shard, its own among them if the shard gets it.
        """

    def end(self, reader: Any) -> None:  # noqa: B027
        """Note in a shard's reader what the step has attended to; nothing waits for the device. Nothing, by default."""

    @abstractmethod
    def attend(self, layer: AttentionInput, shard: StoredShard) -> tuple[Tensor, Tensor]:
        """As :meth:`Reader.attend`, for one new row of each session.

        Their own k, v (sessions, kv_heads, head_dim) are in the shards already.
        """


@dataclass(frozen=True)
class Decoding(Checked, ABC):
    """A method of attention of new tokens over the cache; subclasses are frozen dataclasses of their options.

    Layers with a sliding window are attended exactly under every method.

    Attributes:
        name: the name in ``--decode`` and in results.
        exact: True if every key is attended to.
        offloads: True if it has the cache move to host memory (:meth:`Shard.move_away`).
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    offloads: ClassVar[bool] = False

    @property
    def index_key(self) -> tuple[str, int] | None:
        """The name of the kind of index and what it depends on, under which :attr:`Shard.indexes` has it.

        It is saved with a document, and fits every method that has the same. None if there is nothing to save.
        """
        return None

    def new_index(self) -> LayerIndex:
        """An index of no key, of the kind that :attr:`index_key` names."""
        raise NotImplementedError(f"the decode method {self.name!r} keeps no index")

    def build(self, cache: Shard) -> None:
        """Make now what can be made of a cache before a token is read, and is kept with it. Nothing, by default."""

    @abstractmethod
    def prepare(self, cache: Shard, backend: str = "auto") -> Reader:
        """Build the reader of a shard, once after prefill; ``backend``: of :func:`apb.attention`."""

    def stored_reader(self) -> StoredReader | None:
        """A new reader of any shard, so that a step captured as CUDA graphs serves every cache.

        None, the default, if there is no such reader: tokens are then read by ordinary passes.
        """
        return None
