"""The fused kernels on an NVIDIA GPU against fp64: special lengths, poisoned outputs, strides, a CUDA graph."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor

from apb import Segment, attention
from apb.kernels import fused
from apb.kernels.fused import HOPPER, Part, Task, launch

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.fixture(params=["hopper", "portable"])
def kernel(request: pytest.FixtureRequest) -> str:
    """The name of a kernel that can run here, for the dtypes and head dims of these tests."""
    name: str = request.param
    if name == "hopper" and (why := fused.why_not_hopper(torch.device("cuda"), torch.bfloat16, 128)):
        # It is machine code of one kind of chip: other GPUs have the portable kernel alone, which is tested there.
        pytest.skip(why)
    return name


def draw(rows: int, heads: int, head_dim: int, dtype: torch.dtype, heads_first: bool) -> Tensor:
    if heads_first:
        return torch.randn(heads, rows, head_dim, device="cuda").to(dtype).transpose(0, 1)
    return torch.randn(rows, heads, head_dim, device="cuda").to(dtype)


def dense(q: Tensor, segments: list[Segment], scale: float) -> tuple[Tensor, Tensor]:
    """fp64 attention over the segments as one masked softmax; rows without a key are 0 with lse -inf."""
    rows = len(q)
    scores, values = [q.new_zeros(q.shape[1], rows, 0).double()], [q.new_zeros(0, *q.shape[1:]).double()]
    for segment in segments:
        keys, group = len(segment.k), q.shape[1] // segment.k.shape[1]
        score = torch.einsum("rhd,khd->hrk", q.double(), segment.k.double().repeat_interleave(group, 1)) * scale
        if segment.causal:
            hidden = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows).logical_not()
            score = score.masked_fill(hidden, -math.inf)
        scores.append(score)
        values.append(segment.v.double().repeat_interleave(group, 1))
    score = torch.cat(scores, -1)
    lse = score.logsumexp(-1)
    weights = (score - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()
    return torch.einsum("hrk,khd->rhd", weights, torch.cat(values)), lse


def check(out: Tensor, lse: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    wanted, wanted_lse = expected
    seen = wanted_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert ((out.double() - wanted).norm() <= TOLERANCE[out.dtype] * wanted.norm()).item()
    assert not out[~seen.T].any()
    if seen.any():
        assert (lse.double() - wanted_lse)[seen].abs().max().item() < 1e-4


def computed(q: Tensor, segments: list[Segment], kernel: str) -> tuple[Tensor, Tensor]:
    """One launch into poisoned outputs; twice, and the same."""
    parts = tuple(Part(number, 0, len(segment.k), segment.causal) for number, segment in enumerate(segments))
    sources = [(segment.k, segment.v) for segment in segments]
    results = []
    for _ in range(2):
        out = torch.full(q.shape, math.nan, dtype=q.dtype, device="cuda")
        lse = torch.full((q.shape[1], len(q)), math.nan, device="cuda")
        launch(q, sources, (Task(0, len(q), parts),), q.shape[2] ** -0.5, out, lse, kernel=kernel)
        results.append((out, lse))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    return results[0]


LENGTHS = {
    "one row, one key": (1, [(1, True)]),
    "one row": (1, [(777, False), (1, True)]),
    "one key": (300, [(1, False)]),
    "nothing passed": (500, [(129, False), (500, True)]),
    "no anchor": (500, [(130, False), (500, True)]),
    "itself": (1000, [(1000, True)]),
    "ragged": (1001, [(61, False), (333, False), (1001, True)]),
    "whole tiles": (640, [(512, False), (256, False), (640, True)]),
    "rows that see nothing": (500, [(200, True)]),
    "more keys than rows": (200, [(900, True)]),
    "fewer rows than a strip": (65, [(65, True)]),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("head_dim", list(HOPPER))
def test_special_lengths(head_dim: int, lengths: tuple[int, list[tuple[int, bool]]], kernel: str) -> None:
    """Every length gives fp64's numbers, within what bf16 allows."""
    torch.manual_seed(0)
    rows, keys = lengths
    q = draw(rows, 8, head_dim, torch.bfloat16, heads_first=True)
    segments = [
        Segment(*(draw(count, 2, head_dim, torch.bfloat16, heads_first=number % 2 == 0) for _ in "kv"), causal)
        for number, (count, causal) in enumerate(keys)
    ]
    check(*computed(q, segments, kernel), dense(q, segments, head_dim**-0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (6, 2), (5, 5), (8, 1)])
def test_groups_and_dtypes(heads: int, kv_heads: int, dtype: torch.dtype, kernel: str) -> None:
    """Any group size, both 16-bit dtypes."""
    torch.manual_seed(0)
    q = draw(700, heads, 128, dtype, heads_first=False)
    segments = [Segment(draw(333, kv_heads, 128, dtype, True), draw(333, kv_heads, 128, dtype, False))]
    segments.append(Segment(draw(700, kv_heads, 128, dtype, False), draw(700, kv_heads, 128, dtype, True), True))
    check(*computed(q, segments, kernel), dense(q, segments, 128**-0.5))


def test_several_tasks(kernel: str) -> None:
    """Anchor rows and blocks in one launch, from shared sources; rows of no task stay as they are."""
    torch.manual_seed(0)
    q, own_k, own_v = (draw(3000, heads, 128, torch.bfloat16, True) for heads in (8, 2, 2))
    run_k, run_v = (draw(900, 2, 128, torch.bfloat16, False) for _ in "kv")
    tasks = (
        Task(0, 400, (Part(0, 0, 400, True),)),
        Task(400, 1501, (Part(0, 0, 400, False), Part(1, 400, 1101, True))),
        Task(1501, 2999, (Part(0, 0, 900, False), Part(1, 1501, 1498, True))),
    )
    out, lse = torch.full_like(q, math.nan), torch.full((8, 3000), math.nan, device="cuda")
    launch(q, [(run_k, run_v), (own_k, own_v)], tasks, 128**-0.5, out, lse, kernel=kernel)
    assert out[2999].isnan().all() and lse[:, 2999].isnan().all()
    for task in tasks:
        rows = slice(task.start, task.stop)
        segments = [
            Segment(*(x[part.first : part.first + part.keys] for x in source), part.causal)
            for part, source in zip(task.parts, ((run_k, run_v), (own_k, own_v)), strict=False)
        ]
        check(out[rows], lse[:, rows], dense(q[rows], segments, 128**-0.5))


def test_softcap(kernel: str) -> None:
    """The capped logits are those of tanh in fp64."""
    torch.manual_seed(0)
    q, k, v = (draw(rows, 4, 128, torch.bfloat16, True) for rows in (300, 500, 500))
    out, lse = torch.full_like(q, math.nan), torch.full((4, 300), math.nan, device="cuda")
    launch(q, [(k, v)], (Task(0, 300, (Part(0, 0, 500, False),)),), 1.0, out, lse, softcap=5.0, kernel=kernel)
    logits = 5 * torch.tanh(torch.einsum("rhd,khd->hrk", q.double(), k.double()) / 5)
    check(out, lse, (torch.einsum("hrk,khd->rhd", logits.softmax(-1), v.double()), logits.logsumexp(-1)))


@pytest.mark.parametrize("value", [math.nan, -3e4])
@pytest.mark.parametrize("head_dim", list(HOPPER))
def test_one_head_apart(head_dim: int, value: float, kernel: str) -> None:
    """A head whose rows all have logits far below the others', or none that are numbers, changes no other head."""
    torch.manual_seed(0)
    q, k, v = (draw(300, heads, head_dim, torch.bfloat16, True) for heads in (8, 2, 2))
    k[:, 0] = k[:, 0].abs() + 1
    segments = [Segment(k[:130], v[:130]), Segment(k, v, causal=True)]
    changed = q.clone()
    changed[:, 3] = value
    others = [head for head in range(8) if head != 3]
    wanted, wanted_lse = computed(q, segments, kernel)
    if value < 0:
        out, lse = computed(changed, segments, kernel)
        assert out[:, 3].isfinite().all() and lse[3].max().item() < -1e4
        expected, _ = dense(
            changed[:, 3:4], [Segment(x.k[:, :1], x.v[:, :1], x.causal) for x in segments], head_dim**-0.5
        )
        assert ((out[:, 3:4].double() - expected).norm() <= 2e-2 * expected.norm()).item()
    else:
        out, lse = torch.empty_like(q), torch.empty_like(wanted_lse)
        parts = (Part(0, 0, 130, False), Part(1, 0, 300, True))
        sources = [(x.k, x.v) for x in segments]
        launch(changed, sources, (Task(0, 300, parts),), head_dim**-0.5, out, lse, kernel=kernel)
    assert torch.equal(out[:, others], wanted[:, others])
    assert torch.equal(lse[others], wanted_lse[others])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 70_001), (32, 20_000), (64, 3000), (7, 3)])
def test_few_rows(rows: int, keys: int, dtype: torch.dtype) -> None:
    """Split keys: a step of decode, the question's rows, more rows than keys."""
    torch.manual_seed(0)
    q = draw(rows, 32, 128, dtype, heads_first=False)
    segments = [Segment(draw(keys, 8, 128, dtype, True), draw(keys, 8, 128, dtype, True), causal=True)]
    check(*attention(q, segments, backend="fused"), dense(q, segments, 128**-0.5))


def test_a_graph_serves_every_length() -> None:
    """Captured once, the split kernel reads from the device how many keys there are; what lies behind is not read."""
    from apb.kernels import decode

    torch.manual_seed(0)
    q = draw(1, 32, 128, torch.bfloat16, heads_first=False)
    k, v = torch.full((2, 9000, 8, 128), math.nan, device="cuda", dtype=torch.bfloat16)
    length = torch.ones(1, dtype=torch.int32, device="cuda")
    decode.attention(q, k, v, 128**-0.5, length=length)  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode.attention(q, k, v, 128**-0.5, length=length)
    for keys in (1, 64, 1000, 8999):
        k[:keys], v[:keys] = torch.randn(2, keys, 8, 128, device="cuda")
        length.fill_(keys)
        graph.replay()
        check(out, lse, dense(q, [Segment(k[:keys], v[:keys])], 128**-0.5))


OTHER_PROGRAM = """
import torch

a = torch.randn(8192, 8192, device="cuda").bfloat16()
a @ a
torch.cuda.synchronize()
print("runs", flush=True)
while True:
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
"""


@pytest.mark.parametrize("head_dim", HOPPER)
def test_another_program_on_the_gpu_changes_nothing(head_dim: int, kernel: str) -> None:
    """Launches long enough to be interrupted in the middle so that the other gets its turn: all the same, bit by bit.

    A launch in fifteen had rows that were wrong while the kernel for Hopper initialised a barrier that nobody used.
    """
    torch.manual_seed(0)
    rows = 16384 * 128 // max(head_dim, 128)
    q, k, v = (draw(rows, heads, head_dim, torch.bfloat16, True) for heads in (32, 8, 8))
    task = Task(0, rows, (Part(0, 0, rows, True),))

    def compute() -> tuple[Tensor, Tensor]:
        out, lse = torch.full_like(q, math.nan), torch.full((32, rows), math.nan, device="cuda")
        launch(q, [(k, v)], (task,), head_dim**-0.5, out, lse, kernel=kernel)
        return out, lse

    wanted, wanted_lse = compute()
    assert wanted.isfinite().all()
    with subprocess.Popen([sys.executable, "-c", OTHER_PROGRAM], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "runs\n"
            started, launches = time.monotonic(), 0
            while time.monotonic() - started < 4 or launches < 100:
                out, lse = compute()
                assert torch.equal(out, wanted)
                assert torch.equal(lse, wanted_lse)
                launches += 1
            assert other.poll() is None
        finally:
            other.kill()
