"""Selection on an NVIDIA GPU: the kernels choose and pack what torch does, at real sizes, and wait for nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from apb.kernels.selection import attention_received, choose, pack
from apb.strategies.contest import Contest

pytestmark = pytest.mark.gpu

SIZES = {  # tokens, selectable, count
    "16K": (16384, 16384, 2048),
    "16K, ragged": (16411, 12331, 2047),
    "64K": (65536, 65536, 8192),
    "one token": (1, 1, 1),
    "all but one": (3000, 2999, 2998),
    "all": (3000, 2999, 2999),
}
SCORES = {
    "random": lambda tokens: torch.randn(8, tokens, device="cuda"),
    "few values": lambda tokens: torch.randint(0, 9, (8, tokens), device="cuda").float(),
    "alike": lambda tokens: torch.full((8, tokens), -0.5, device="cuda"),
    "tokens first": lambda tokens: torch.rand(tokens, 8, device="cuda").T,
    "not numbers": lambda tokens: torch.randn(8, tokens, device="cuda").sqrt(),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize(("tokens", "selectable", "count"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("pooled", [False, True])
def test_choice_is_torchs(tokens: int, selectable: int, count: int, pooled: bool, scores) -> None:
    """The same tokens as a stable sort gives, ties and all."""
    torch.manual_seed(tokens)
    drawn = scores(tokens)
    actual = choose(drawn, count, selectable, pooled=pooled)
    assert torch.equal(actual, choose(drawn, count, selectable, pooled=pooled, triton=False))


def heads_first(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(heads, rows, head_dim, device="cuda").to(dtype).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "count", "head_dim"), [(16411, 2047, 128), (900, 1, 64), (70, 70, 80)])
def test_packed_as_torch_does(tokens: int, count: int, head_dim: int, dtype: torch.dtype) -> None:
    """Into a part of the message; the rest of it stays as it was."""
    torch.manual_seed(tokens)
    k, v = heads_first(tokens, 8, head_dim, dtype), heads_first(tokens, 8, head_dim, dtype)
    chosen = choose(torch.rand(8, tokens, device="cuda"), count, tokens, pooled=True)
    messages = []
    for triton in (None, False):
        message = torch.full((2, 8, count + 12, head_dim), math.nan, dtype=dtype, device="cuda")
        pack(k, v, chosen, message.transpose(1, 2)[:, 7 : 7 + count], triton=triton)
        assert message[:, :, :7].isnan().all() and message[:, :, 7 + count :].isnan().all()
        messages.append(message[:, :, 7 : 7 + count])
    assert torch.equal(*messages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("rows", "tokens", "head_dim"), [(1, 1, 64), (30, 16411, 128), (333, 900, 256), (5, 77, 80)])
def test_scores_agree_with_fp64(
    rows: int, tokens: int, head_dim: int, softcap: float | None, dtype: torch.dtype
) -> None:
    """Few rows and many, to fp32's accuracy: logits are not rounded."""
    torch.manual_seed(rows)
    query, k = heads_first(rows, 32, head_dim, dtype), heads_first(tokens, 8, head_dim, dtype)
    repeated = k.double().repeat_interleave(4, 1)
    logits = torch.einsum("rhd,khd->hrk", query.double(), repeated) * head_dim**-0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = logits.softmax(-1).mean(1).unflatten(0, (8, 4)).mean(1)
    actual = attention_received(query, k, head_dim**-0.5, softcap)
    assert ((actual.double() - wanted).abs() <= 1e-4 * wanted + 1e-7 / tokens).all()
    blocks = torch.cat([k, k.flip(0)]).unflatten(0, (2, tokens))
    both = attention_received(query, blocks, head_dim**-0.5, softcap)
    assert torch.equal(both[0], actual)
    assert torch.equal(both[1], attention_received(query, blocks[1], head_dim**-0.5, softcap))


def test_nothing_is_read_back() -> None:
    """From scores to the packed message, and in a contest for a budget, no step waits for the GPU."""
    k, v, query = (heads_first(rows, heads, 128, torch.bfloat16) for rows, heads in ((2000, 8), (2000, 8), (20, 32)))
    message = torch.empty(2, 8, 250, 128, dtype=torch.bfloat16, device="cuda")
    lse = torch.full((32, 20), 9.0, device="cuda")
    contest = Contest((3, 4), (150, 250), (0, 32), 100)
    contest.columns(torch.rand(8, 250, device="cuda"))  # what the first layer copies, all others read
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            chosen = choose(attention_received(query, k, 0.09), 250, 2000, pooled=True)
            pack(k, v, chosen, message.transpose(1, 2))
            columns = contest.columns(attention_received(query, k, 0.09, lse=lse).gather(1, chosen))
            assert columns.shape == (2, 8, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
