"""Every kernel of the package once or twice on small ragged shapes, for tools that watch each access to memory.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 python tests/gpu/small_shapes.py

    TRITON_INSTRUMENTATION_MODE=consan python tests/gpu/small_shapes.py hopper64 hopper128 hopper256

Without the first variable tensors are parts of larger allocations, and what is read or written beside them goes unseen.
Names of kernels as arguments: only these. Results are compared with plain torch, as a kernel that does nothing touches
no wrong address either.
"""

from __future__ import annotations

import math
import sys

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from apb.kernels import decode, matvec, reference
from apb.kernels.fused import HOPPER, Part, Task, launch, why_not_hopper
from apb.kernels.segment import Segment
from apb.kernels.selection import attention_received, choose, pack
from apb.kernels.vertical_slash import by_flex, by_tiles

GPU = torch.device("cuda")


def draw(rows: int, heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(rows, heads, head_dim), each head's rows together, exactly as long as it says."""
    return torch.randn(heads, rows, head_dim, device=GPU).to(dtype).transpose(0, 1)


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-2) -> None:
    assert ((actual.float() - wanted.float()).norm() <= tolerance * wanted.float().norm()).item()


def fused(kernel: str, head_dim: int) -> None:
    """A launch of anchor rows and two blocks, one of a single row, over a run of pairs and their own keys."""
    if kernel == "hopper" and (why := why_not_hopper(GPU, torch.bfloat16, head_dim)):
        print(f"left out: {why}")
        return
    q, own, run = draw(331, 4, head_dim), [draw(331, 2, head_dim) for _ in "kv"], [draw(77, 2, head_dim) for _ in "kv"]
    tasks = (
        Task(0, 33, (Part(0, 0, 33, True),)),
        Task(33, 34, (Part(0, 0, 33, False), Part(1, 33, 1, True))),
        Task(34, 331, (Part(0, 0, 77, False), Part(1, 34, 297, True))),
    )
    out, lse = torch.full_like(q, math.nan), torch.full((4, 331), math.nan, device=GPU)
    launch(q, [(run[0], run[1]), (own[0], own[1])], tasks, head_dim**-0.5, out, lse, kernel=kernel)
    for task in tasks:
        segments = [
            Segment(*(x[part.first : part.first + part.keys] for x in (run, own)[part.source]), part.causal)
            for part in task.parts
        ]
        rows = slice(task.start, task.stop)
        wanted, wanted_lse = reference.attention(q[rows], segments, head_dim**-0.5)
        close(out[rows], wanted)
        close(lse[:, rows], wanted_lse)


def few_rows() -> None:
    """Rows of decode and of a question; what lies behind the length is not read."""
    shapes = ((1, 1, 128, torch.bfloat16), (7, 333, 64, torch.float16), (20, 129, 256, torch.float32))
    for rows, keys, head_dim, dtype in shapes:
        q, k, v = draw(rows, 8, head_dim, dtype), draw(keys, 2, head_dim, dtype), draw(keys, 2, head_dim, dtype)
        length = torch.tensor([max(1, keys - 50)], dtype=torch.int32, device=GPU)
        out, lse = decode.attention(q, k, v, head_dim**-0.5, length=length)
        wanted, wanted_lse = reference.attention(q, [Segment(k[:length], v[:length])], head_dim**-0.5)
        close(out, wanted)
        close(lse, wanted_lse)


def cached_row() -> None:
    """A row of decode over storage of exactly the size that the table says; its own pair is appended first."""
    for keys, head_dim, dtype in ((1, 128, torch.bfloat16), (333, 64, torch.float16), (129, 80, torch.float32)):
        q, new = draw(1, 8, head_dim, dtype), [draw(1, 2, head_dim, dtype) for _ in "kv"]
        stored = [torch.randn(2, keys, head_dim, device=GPU).to(dtype) for _ in "kv"]
        table = torch.tensor([[*(x.data_ptr() for x in stored), keys]], device=GPU)
        decode.append(*new, table, 0, torch.tensor([keys - 1], device=GPU))
        for x, row in zip(stored, new, strict=True):
            assert torch.equal(x[:, -1], row[0])
        length = torch.tensor([keys], dtype=torch.int32, device=GPU)
        out, lse = decode.cached_attention(q, table, 0, 2, head_dim**-0.5, length)
        k, v = (x.transpose(0, 1) for x in stored)
        wanted, wanted_lse = reference.attention(q, [Segment(k, v)], head_dim**-0.5)
        close(out, wanted)
        close(lse, wanted_lse)


def selection() -> None:
    """Scoring, choice and packing of blocks of one token, of several chunks, of a ragged end."""
    for tokens, selectable, count, head_dim in ((1, 1, 1, 64), (9001, 8999, 1001, 128), (333, 300, 300, 80)):
        query, k, v = draw(5, 8, head_dim), draw(tokens, 2, head_dim), draw(tokens, 2, head_dim)
        scores = attention_received(query, k, head_dim**-0.5)
        close(scores, attention_received(query, k, head_dim**-0.5, triton=False), 2e-2)
        chosen = choose(scores, count, selectable, pooled=True)
        assert torch.equal(chosen, choose(scores, count, selectable, pooled=True, triton=False))
        out = torch.full((2, 2, count, head_dim), math.nan, dtype=k.dtype, device=GPU)
        pack(k, v, chosen, out.transpose(1, 2))
        for head in range(2):
            assert torch.equal(out[0, head], k[chosen[head], head])
            assert torch.equal(out[1, head], v[chosen[head], head])


def tiles() -> None:
    """Block-sparse attention over chosen columns and diagonals."""
    q, k, v = draw(200, 4, 64), draw(200, 2, 64), draw(200, 2, 64)
    columns, diagonals = (torch.rand(4, 200, device=GPU) < share for share in (0.05, 0.02))
    diagonals[:, 0] = True
    out, lse = by_flex(q, k, v, columns, diagonals, 0.125)
    wanted, wanted_lse = by_tiles(q.float(), k.float(), v.float(), columns, diagonals, 0.125)
    close(out, wanted)
    close(lse, wanted_lse)


def one_row() -> None:
    """Products of one row with whole tiles and parts of them; the weights are of exactly their size."""
    for outputs, width, dtype in ((1, 1, torch.float32), (1001, 4096, torch.bfloat16), (130, 5001, torch.float16)):
        x, weight, bias = (
            torch.randn(*shape, device=GPU).to(dtype) for shape in ((1, width), (outputs, width), (outputs,))
        )
        close(matvec.linear(x, weight, bias), linear(x.double(), weight.double(), bias.double()))


KERNELS = {"decode": few_rows, "cached": cached_row, "matvec": one_row, "selection": selection, "tiles": tiles}
KERNELS |= {
    f"{kernel}{head_dim}": lambda kernel=kernel, head_dim=head_dim: fused(kernel, head_dim)
    for kernel in ("hopper", "portable")
    for head_dim in HOPPER
}

if __name__ == "__main__":
    torch.manual_seed(0)
    # Triton's checker keeps its books in memory that it asks for.
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=GPU))
    for name in sys.argv[1:] or KERNELS:
        KERNELS[name]()
        torch.cuda.synchronize()
        print(f"{name}: done", flush=True)
