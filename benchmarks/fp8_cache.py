"""Accuracy cost of storing keys and values in float8_e4m3, on random data; part of small_kernels.py.

There is no kernel for such a cache: attention is computed in fp32 over the dequantized values, so the errors are those
of storage alone. The data differ in how many keys a row attends to, and in whether some channels are larger than
others, as they are in models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from apb import Segment
from apb.kernels import reference

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# Figures by name.
Row = dict[str, Any]
KINDS = ("flat", "sharp", "one key in a thousand counts", "flat, outlying channels")


def distance(actual: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of ``wanted``."""
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


def stored(x: Tensor, each_token: bool) -> Tensor:
    """``x`` (tokens, kv_heads, head_dim) quantized to float8_e4m3 and dequantized to fp32.

    A scale per head, or per head and token if ``each_token``, maps the largest value to the format's largest.
    """
    most = x.float().abs().amax(2 if each_token else (0, 2), keepdim=True)
    factor = (most / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-12)
    return (x.float() / factor).to(torch.float8_e4m3fn).float() * factor


def random_cache(kind: str, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, heads, head_dim), k and v (keys, kv_heads, head_dim) in bf16; ``kind``: one of KINDS."""
    q = torch.randn(1, HEADS, HEAD_DIM, device=device)
    k, v = (torch.randn(keys, KV_HEADS, HEAD_DIM, device=device) for _ in range(2))
    if kind == "sharp":
        q *= 4
    elif kind == "one key in a thousand counts":
        meant = torch.randperm(keys, device=device)[: max(keys // 1000, 1)]
        k[meant] = 0.6 * q[:, :: HEADS // KV_HEADS] + 0.8 * k[meant]
        q *= 1.5
    elif kind == "flat, outlying channels":
        k[..., :4] *= 10
        q[..., :4] *= 0.3
        v[..., 7] *= 10
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def storing_errors(keys: int, device: torch.device) -> Iterator[Row]:
    """Yield a row per kind of data and of scales, with relative errors against attention over the same bf16 values.

    ``error`` is with keys and values in 8 bits, ``error_by_keys`` and ``error_by_values`` with only one of them;
    ``rounding`` is the error of rounding the output to bf16.
    """
    for kind in KINDS:
        torch.manual_seed(0)
        q, k, v = random_cache(kind, keys, device)
        exact = _attention(q, k, v)
        for factors, each_token in (("head", False), ("head and token", True)):
            k8, v8 = stored(k, each_token), stored(v, each_token)
            yield {
                "keys": keys,
                "kind": kind,
                "factor_for_each": factors,
                "error": distance(_attention(q, k8, v8), exact),
                "error_by_keys": distance(_attention(q, k8, v), exact),
                "error_by_values": distance(_attention(q, k, v8), exact),
                "rounding": distance(exact.bfloat16(), exact),
            }


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q.float(), [Segment(k, v)], HEAD_DIM**-0.5)[0]
