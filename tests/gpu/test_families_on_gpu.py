"""Models with peculiar layers on a GPU: the numbers of the CPU, and windows over many chunks at once."""

from __future__ import annotations

import pytest
import torch

import apb
import families
from apb.kernels.window import Run, window_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("family", "reading"), families.CASES)
def test_peculiar_layers(family: str, reading: str) -> None:
    """fp32 on the GPU: transformers' logits where a strategy is exact, else the oracle's, through decode."""
    model = families.make(*families.PECULIAR[family]).to("cuda")
    logits = families.read(model, reading)
    torch.testing.assert_close(logits.cpu(), families.expected(family, reading), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("window", "heads", "kv_heads", "head_dim"), [(128, 64, 8, 64), (4096, 16, 8, 256)])
@pytest.mark.parametrize("rows", [20001, 65536])
def test_windows_of_long_blocks(rows: int, window: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """bf16, a block behind a halo: some rows against one softmax in fp32."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(count: int, heads: int) -> torch.Tensor:
        shape = (count, heads, head_dim)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    halo = window - 1
    q, k, v = draw(rows, heads), draw(rows + halo, kv_heads), draw(rows + halo, kv_heads)
    out, lse = window_attention(apb.attention, q, halo, [Run(k, v, 0)], window)
    for row in (0, 1, window - 1, window, rows // 2, rows - 1):
        keys, values = (x[row : row + window].float().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("hd,khd->hk", q[row].float(), keys) * head_dim**-0.5
        expected = torch.einsum("hk,khd->hd", scores.softmax(-1), values)
        torch.testing.assert_close(out[row].float(), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse[:, row], scores.logsumexp(-1), rtol=1e-2, atol=1e-2)
