"""A contiguous segment of keys and values that query rows attend to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Keys and values seen by all rows (``causal=False``) or causally with bottom-right alignment.

    Attributes:
        k, v: (keys, kv_heads, head_dim), same dtype and device as the query rows; any strides.
        causal: row i of R sees key j of K if j <= i + K - R: the last row sees every key.
    """

    k: Tensor
    v: Tensor
    causal: bool = False
