"""Decode's kernel on an NVIDIA GPU: as accurate as its output's dtype allows, from memory full of not-a-number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from apb import Segment
from apb.kernels import reference

pytestmark = pytest.mark.gpu


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold not-a-number until something is written."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(9, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def draw(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(heads, rows, head_dim, device="cuda").to(dtype).transpose(0, 1)


def off(actual: Tensor, wanted: Tensor) -> float:
    """Relative distance, over all numbers."""
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sharpness", [1.0, 6.0])
@pytest.mark.parametrize(
    ("rows", "keys", "head_dim"), [(1, 1, 128), (1, 257, 64), (1, 131072, 128), (32, 20011, 128), (3, 5000, 256)]
)
def test_as_accurate_as_the_reference(
    rows: int, keys: int, head_dim: int, sharpness: float, dtype: torch.dtype
) -> None:
    """Partial results within 1e-4 of the reference's fp32; outputs are its roundings, but for few that lie between."""
    from apb.kernels import decode

    torch.manual_seed(0)
    q = (sharpness * draw(rows, 32, head_dim, torch.float32)).to(dtype)
    k, v = draw(keys, 8, head_dim, dtype), draw(keys, 8, head_dim, dtype)
    exact = [Segment(k.float(), v.float(), causal=True)]
    wanted, wanted_lse = reference.attention(q.float(), exact, head_dim**-0.5)
    with poisoned():
        partial, lse = decode.attention(q, k, v, head_dim**-0.5, causal=True, partial=True)
        out, _ = decode.attention(q, k, v, head_dim**-0.5, causal=True)
    assert partial.dtype == torch.float32
    seen = wanted_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert (lse - wanted_lse)[seen].abs().max().item() < 1e-4
    assert off(partial, wanted) < 1e-4
    assert off(out, wanted.to(dtype)) < 1e-3
    assert torch.equal(out, partial.to(dtype))


@pytest.mark.parametrize("length", [0, 1, 65])
def test_few_keys_of_a_large_cache(length: int) -> None:
    """Most splits have no key; with none at all the output is 0 and its lse -inf. What lies behind is not read."""
    from apb.kernels import decode

    torch.manual_seed(0)
    q = draw(1, 32, 128, torch.bfloat16)
    k, v = torch.full((2, 9000, 8, 128), math.nan, device="cuda", dtype=torch.bfloat16)
    k[:length], v[:length] = torch.randn(2, length, 8, 128, device="cuda")
    held = torch.tensor([length], dtype=torch.int32, device="cuda")
    with poisoned():
        out, lse = decode.attention(q, k, v, 128**-0.5, length=held)
    wanted, wanted_lse = reference.attention(q, [Segment(k[:length], v[:length])], 128**-0.5)
    torch.testing.assert_close(out, wanted, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=1e-4)


def test_one_head_apart() -> None:
    """A head whose logits are all far below the others', or not numbers, changes no other head."""
    from apb.kernels import decode

    torch.manual_seed(0)
    q, k, v = draw(1, 8, 128, torch.bfloat16), draw(3000, 2, 128, torch.bfloat16), draw(3000, 2, 128, torch.bfloat16)
    wanted, wanted_lse = decode.attention(q, k, v, 128**-0.5)
    others = [head for head in range(8) if head != 3]
    for value in (math.nan, -3e4):
        changed = q.clone()
        changed[:, 3] = value
        if value < 0:
            k[:, 0] = k[:, 0].abs() + 1
            wanted, wanted_lse = decode.attention(q, k, v, 128**-0.5)
        out, lse = decode.attention(changed, k, v, 128**-0.5)
        assert torch.equal(out[:, others], wanted[:, others])
        assert torch.equal(lse[others], wanted_lse[others])
        assert value != value or (out[:, 3].isfinite().all() and lse[3].item() < -1e4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 300, 4096, 5120, 14336])
@pytest.mark.parametrize("outputs", [1, 1024, 128257])
def test_products_of_one_row(outputs: int, width: int, dtype: torch.dtype) -> None:
    """Each is its exact value's rounding, but for what a sum in fp32 may be off."""
    from apb.kernels import matvec

    torch.manual_seed(0)
    x, bias = torch.randn(1, 1, width, device="cuda").to(dtype), torch.randn(outputs, device="cuda").to(dtype)
    weight = torch.randn(outputs, width, device="cuda").to(dtype)
    with poisoned():
        out = matvec.linear(x, weight, bias)
    wanted = torch.cat([x[0, 0].double() @ part.double().T for part in weight.split(4096)]) + bias.double()
    room = 2e-6 * width**0.5 + torch.finfo(dtype).eps / 2 * wanted.abs()
    assert ((out[0, 0].double() - wanted).abs() <= room).all()


@pytest.mark.parametrize("rows", [1, 2, 300])
def test_products_in_fp8(rows: int) -> None:
    """Rows are rounded as torch rounds them; products are those of fp64, a single row's without rounding it; compiled
    and captured, the very same."""
    from apb.kernels import float8

    torch.manual_seed(0)
    x, bias = torch.randn(rows, 4096, device="cuda").bfloat16(), torch.randn(1024, device="cuda").bfloat16()
    plain = torch.randn(1024, 4096, device="cuda").bfloat16()
    weight, scale = float8.scaled(plain)
    for given in (x, plain):
        rounded, by_row = float8.scaled(given)
        on_host, expected = float8.scaled(given.cpu())
        torch.testing.assert_close(by_row.cpu(), expected, rtol=1e-6, atol=0)
        apart = rounded.cpu().float() != on_host.float()  # a quotient at the middle between two numbers
        assert apart.float().mean() < 1e-3
    out = float8.linear(x, weight, scale, bias)
    rounded, by_row = float8.scaled(x)
    rows_used = x.double() if rows == 1 else rounded.double() * by_row[:, None]
    wanted = rows_used @ (weight.double() * scale[:, None]).T + bias.double()
    # Hopper's sums of fp8 products keep 14 bits of the largest.
    assert (out.double() - wanted).norm() / wanted.norm() < 4e-3
    torch.testing.assert_close(out.double(), wanted, rtol=2**-7, atol=4.0 if rows > 1 else 0.01)
    compiled = torch.compile(lambda x: 2 * float8.linear(x, weight, scale, bias))
    assert torch.equal(compiled(x), 2 * out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = float8.linear(x, weight, scale, bias)
    graph.replay()
    assert torch.equal(captured, out)
