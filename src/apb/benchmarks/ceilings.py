"""Hardware ceilings, measured at the start of a benchmark: the rates that its floor is computed from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch

from ..distributed.collectives import Group
from ..hardware import Stopwatch
from ..kernels.attention import Segment, attention
from ..planning.cost import Ceilings

# A prefill takes seconds, but after some tens of ms of matrix products a GPU at its power limit lowers its clock.
_SUSTAINED_S = 0.4


def measure_ceilings(device: torch.device, dtype: torch.dtype, group: Group) -> Ceilings:
    """Rates of a large matrix product, causal attention (32 heads over 8 KV heads of 128), an all-gather and a copy.

    Products and attention are measured at the sustained rate, not at that of the first call. The sizes fill a GPU; on
    the CPU they are smaller. The link rate is 0 for a single rank.
    """
    linear, products = product_rate(device, dtype), attention_rate(device, dtype)
    link = 0.0
    if group.size > 1:
        x = torch.randn(1 << 27 if device.type == "cuda" else 1 << 20, device=device, dtype=dtype)
        link = (group.size - 1) * x.nbytes / median_seconds(lambda: group.all_gather(x).wait(), device)
    return Ceilings(linear, products, link, copy_bandwidth(device))


def attention_rate(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> float:
    """Sustained FLOPs per second of causal attention, counting unmasked pairs only."""
    rows = 32768 if device.type == "cuda" else 2048
    q, k, v = (torch.randn(rows, heads, 128, device=device, dtype=dtype) for heads in (32, 8, 8))
    pairs = rows * (rows + 1) // 2
    once = sustained_seconds(lambda: attention(q, [Segment(k, v, causal=True)], backend=backend), device)
    return 4 * 32 * 128 * pairs / once


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Sustained FLOPs per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / sustained_seconds(lambda: a @ b, device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    source = torch.randn(1 << 30 if device.type == "cuda" else 1 << 25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def sustained_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds per call in a long run of back-to-back calls after an equally long warm-up; on the CPU three calls."""
    once = median_seconds(function, device, repeat=3)
    calls = math.ceil(_SUSTAINED_S / once) if device.type == "cuda" else 3
    for _ in range(calls):
        function()
    watch = Stopwatch(device)
    for _ in range(calls):
        function()
    return watch.seconds() / calls


def median_seconds(function: Callable[[], object], device: torch.device, warm_up: int = 2, repeat: int = 5) -> float:
    """Median seconds of ``repeat`` calls after ``warm_up`` untimed ones."""
    for _ in range(warm_up):
        function()
    seconds = []
    for _ in range(repeat):
        watch = Stopwatch(device)
        function()
        seconds.append(watch.seconds())
    return statistics.median(seconds)
