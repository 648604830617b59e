"""`benchmarks/fp8_cache.py`: numbers as a cache in 8 bits gives them back, and what attention over them loses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from command_line import script

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
spec = importlib.util.spec_from_file_location("fp8_cache", BENCHMARKS / "fp8_cache.py")
assert spec and spec.loader
fp8_cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fp8_cache)


def test_numbers_counted_by_hand() -> None:
    """Three bits after the point, ties to even, nothing below 2^-10; a head's factor is of that head alone."""
    large = torch.tensor([[448.0, 1.0625], [17.0, -19.0], [0.0009, 0.0]])
    x = torch.stack([large, 2.0**-20 * large.flip(0)], 1)  # two heads
    kept = torch.tensor([[448.0, 1.0], [16.0, -20.0], [0.0, 0.0]])
    assert torch.equal(fp8_cache.stored(x, each_token=False), torch.stack([kept, 2.0**-20 * kept.flip(0)], 1))
    own = fp8_cache.stored(x, each_token=True)
    assert torch.equal(own[0, 0], kept[0])
    torch.testing.assert_close(own[2, 0], x[2, 0], rtol=1e-6, atol=0)  # its largest number is kept, and 0


def rounded(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """To float8_e4m3 and back, in fp64, by its definition."""
    factor = x.abs().amax(dims, keepdim=True) / 448
    exponent = torch.frexp(x / factor).exponent.clamp(min=-5)
    step = torch.ldexp(torch.ones_like(x), exponent - 4)
    return (x / factor / step).round() * step * factor


def test_errors_are_those_of_a_dense_computation() -> None:
    """The kind in which keys count most, in fp64 and head by head; far more than bf16 costs in every kind."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([(k[:, h // 4] @ q[0, h] / 128**0.5).softmax(0) @ v[:, h // 4] for h in range(32)])

    device = torch.device("cpu")
    rows = list(fp8_cache.storing_errors(200, device))
    torch.manual_seed(0)
    q, k, v = (x.double() for x in fp8_cache.random_cache("sharp", 200, device))
    exact = dense(q, k, v)
    for row, dims in zip([row for row in rows if row["kind"] == "sharp"], ((0, 2), (2,)), strict=True):
        k8, v8 = rounded(k, dims), rounded(v, dims)
        wanted = [(dense(q, *kv) - exact).norm() / exact.norm() for kv in ((k8, v8), (k8, v), (k, v8))]
        found = [row["error"], row["error_by_keys"], row["error_by_values"]]
        torch.testing.assert_close(found, [x.item() for x in wanted], rtol=1e-2, atol=0)
    assert len(rows) == 2 * len(fp8_cache.KINDS)
    assert all(row["error"] > 10 * row["rounding"] for row in rows)


def test_without_a_gpu_the_benchmark_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script(BENCHMARKS / "small_kernels.py") == 2
    assert capsys.readouterr() == (
        "",
        "small_kernels.py: These kernels are measured on an NVIDIA GPU, but torch sees none here.\n",
    )
