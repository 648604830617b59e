"""The fused kernels without a GPU: plain Triton interpreted, Gluon's emulated and compiled; their schedule."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb import Engine, Prompt, Segment, attention
from apb.kernels import fused, reference
from apb.kernels.fused import HOPPER, Config, Part, Task, launch
from apb.kernels.fused.schedule import FIELDS, SOURCES, schedule
from gluon_emulator import Descriptor, Pointer, emulated
from models import tiny_model

CPU = torch.device("cpu")
KERNEL = Path(fused.__file__).parent / "hopper.py"

# Rows of several blocks and of the anchor over [anchor and passed pairs | own rows], as one rank computes them at once.
ROWS, RUN = 420, 230
TASKS = (
    Task(0, 90, (Part(0, 0, 90, True),)),  # anchor rows over the anchor
    Task(90, 91, (Part(0, 0, 90, False), Part(1, 90, 1, True))),  # a block of one token, nothing passed
    Task(91, 260, (Part(0, 0, 131, False), Part(1, 91, 169, True))),
    Task(260, 419, (Part(0, 0, RUN, False), Part(1, 260, 159, True))),  # row 419 is of no task
)


def expected(q: Tensor, sources: list[tuple[Tensor, Tensor]], tasks: tuple[Task, ...]):
    """(out, lse) by the reference, task by task; nan where a row is of no task."""
    out, lse = torch.full(q.shape, math.nan), torch.full((q.shape[1], len(q)), math.nan)
    for task in tasks:
        rows = slice(task.start, task.stop)
        segments = [
            Segment(*(x[part.first : part.first + part.keys] for x in sources[part.source]), part.causal)
            for part in task.parts
        ]
        out[rows], lse[:, rows] = reference.attention(q[rows].float(), segments, q.shape[2] ** -0.5)
    return out, lse


def draw(rows: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(heads, rows, head_dim).to(dtype).transpose(0, 1)  # the strides that transformers hands over


def agree(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float) -> None:
    torch.testing.assert_close(actual[0].float(), wanted[0].float(), rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-5, atol=1e-5, equal_nan=True)


# --- schedule ------------------------------------------------------------------------------------------------------


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Task, ...]:
    """Tasks over consecutive rows, each with parts of some of the sources."""
    found, start = [], 0
    for rows in draw(st.lists(st.integers(1, 300), min_size=1, max_size=4)):
        sources = sorted(draw(st.sets(st.integers(0, SOURCES - 1))))
        parts = tuple(
            Part(source, draw(st.integers(0, 50)), draw(st.integers(1, 400)), draw(st.booleans())) for source in sources
        )
        found.append(Task(start, start + rows, parts))
        start += rows
    return tuple(found)


@given(tasks(), st.sampled_from([64, 128, 192]), st.sampled_from([32, 128]), st.integers(1, 20))
def test_every_row_sees_its_keys_once(tasks: tuple[Task, ...], block_m: int, block_n: int, programs: int) -> None:
    """Strips share the rows out, items the strips and heads; a strip's tiles and mask show a row what its task does."""
    heads, kv_heads = 4, 2
    plan = schedule(tasks, heads, kv_heads, 128, block_m, block_n, programs, CPU)
    strips = plan.table.tolist()
    counted = Counter(plan.items.tolist())
    assert counted == Counter(range(len(strips) * heads))
    bounds = plan.bounds.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(counted) and len(bounds) - 1 <= programs
    assert bounds == sorted(bounds)
    seen: dict[int, list[int]] = {}
    for strip in strips:
        assert len(strip) == FIELDS
        assert 0 < strip[1] - strip[0] <= block_m
        for row in range(strip[0], strip[1]):
            assert row not in seen
            seen[row] = []
            for source in range(SOURCES):
                first, whole, masked, keys, diagonal = strip[2 + 5 * source : 7 + 5 * source]
                limit = min(keys, row + diagonal + 1)
                assert whole * block_n <= max(limit, 0)  # no mask is needed there
                assert (whole + masked) * block_n >= limit  # nothing lies beyond
                seen[row].append((first, max(limit, 0)))
    for task in tasks:
        parts = {part.source: part for part in task.parts}
        for row in range(task.start, task.stop):
            for source in range(SOURCES):
                if source not in parts:
                    assert seen[row][source] == (0, 0)
                    continue
                part = parts[source]
                count = part.keys
                if part.causal:
                    count = min(part.keys, max(row - task.start + 1 + part.keys - (task.stop - task.start), 0))
                assert seen[row][source] == (part.first, count)
    assert set(seen) == set(range(tasks[-1].stop))


@pytest.mark.parametrize("blocks", [1, 8])
def test_programs_end_together(blocks: int) -> None:
    """On long blocks no program has more than a few tiles above the mean, although rows differ fivefold in cost."""
    tasks = [
        Task(i * 16384, (i + 1) * 16384, (Part(0, 0, 4096 + 2048 * i, False), Part(1, i * 16384, 16384, True)))
        for i in range(blocks)
    ]
    tasks.append(Task(16384 * blocks, 16384 * blocks + 4096, (Part(0, 0, 4096, True),)))  # anchor rows
    plan = schedule(tuple(tasks), 32, 8, 256, 128, 128, 132, CPU)
    table, items, bounds = (x.tolist() for x in (plan.table, plan.items, plan.bounds))
    cost = [sum(strip[2 + 5 * s + 1] + strip[2 + 5 * s + 2] for s in range(SOURCES)) for strip in table]
    shares = [sum(cost[item // 32] for item in items[a:b]) for a, b in pairwise(bounds)]
    assert len(shares) == 132
    assert max(shares) < 1.02 * sum(shares) / len(shares)


# --- plain Triton, interpreted -------------------------------------------------------------------------------------


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (2, 1, 128), (2, 2, 80)])
def test_portable_kernel(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    """Anchor rows and blocks of ragged lengths in one launch; a row of no task is left alone."""
    torch.manual_seed(0)
    q = draw(ROWS, heads, head_dim, dtype)
    sources = [tuple(draw(rows, kv_heads, head_dim, dtype) for _ in "kv") for rows in (RUN, ROWS)]
    out = torch.full(q.shape, math.nan, dtype=dtype)
    lse = torch.full((heads, ROWS), math.nan)
    launch(q, sources, TASKS, head_dim**-0.5, out, lse)
    agree((out, lse), expected(q, sources, TASKS), 1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.triton
@pytest.mark.parametrize("rows", [9, 90])
def test_softcap(rows: int) -> None:
    """softcap * tanh(x / softcap), in the kernel for many rows and in that for few."""
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(count, heads, 64) for count, heads in ((rows, 4), (130, 2), (130, 2)))
    out, lse = attention(q, [Segment(k, v, causal=True)], 0.125, backend="fused", softcap=2.0)
    logits = torch.einsum("rhd,khd->hrk", q, k.repeat_interleave(2, 1)) * 0.125
    hidden = torch.ones(rows, 130, dtype=torch.bool).triu(131 - rows)
    logits = (2 * torch.tanh(logits / 2)).masked_fill(hidden, -math.inf)
    mixed = torch.einsum("hrk,khd->rhd", logits.softmax(-1), v.repeat_interleave(2, 1))
    agree((out, lse), (mixed, logits.logsumexp(-1)), 1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    """The kernels themselves need a positive factor; callers need not know."""
    torch.manual_seed(0)
    q, k, v = torch.randn(70, 4, 64), torch.randn(90, 2, 64), torch.randn(90, 2, 64)
    segments = [Segment(k, v, causal=True)]
    agree(attention(q, segments, scale, "fused"), reference.attention(q, segments, scale), 1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("count", [3, 4, 7])
def test_more_segments_than_one_launch_takes(count: int) -> None:
    """More than three segments are merged."""
    torch.manual_seed(0)
    q = torch.randn(70, 4, 64)
    segments = [
        Segment(torch.randn(9 + i, 2, 64), torch.randn(9 + i, 2, 64), causal=i == count - 1) for i in range(count)
    ]
    agree(fused.attention(q, segments, 0.125), reference.attention(q, segments, 0.125), 1e-5)


@pytest.mark.triton
@pytest.mark.parametrize(("rows", "causal"), [(1, False), (1, True), (5, True)])
@pytest.mark.parametrize("length", [5, 64, 700, 1500])
def test_decode_reads_the_length_from_the_device(rows: int, causal: bool, length: int) -> None:
    """What lies behind the length in a cache's storage is not read, not even multiplied by zero."""
    from apb.kernels import decode

    torch.manual_seed(0)
    q = torch.randn(rows, 8, 64)
    k, v = torch.full((2, 1500, 2, 64), math.nan)
    k[:length], v[:length] = torch.randn(2, length, 2, 64)
    held = torch.tensor([length], dtype=torch.int32)
    wanted = reference.attention(q, [Segment(k[:length], v[:length], causal)], 0.125)
    agree(decode.attention(q, k, v, 0.125, causal=causal, length=held), wanted, 1e-5)


@pytest.mark.triton
def test_empty_sources_are_not_read() -> None:
    """Nothing passed and no anchor: a source without keys, or none at all."""
    torch.manual_seed(0)
    q, k, v = torch.randn(70, 4, 64), torch.randn(70, 2, 64), torch.randn(70, 2, 64)
    tasks = (Task(0, 60, (Part(1, 0, 60, True),)), Task(60, 70, ()))
    out, lse = torch.empty_like(q), torch.empty(4, 70)
    launch(q, [(k[:0], v[:0]), (k, v)], tasks, 0.125, out, lse)
    agree((out, lse), expected(q, [(k[:0], v[:0]), (k, v)], tasks), 1e-5)


@pytest.mark.triton
@pytest.mark.parametrize(("budget", "kv_heads"), [(None, 1), (8, 2)])
def test_prefill(budget: int | None, kv_heads: int) -> None:
    """A whole prefill by apb, in two rounds, and a step of decode give the logits that torch's kernels give; with a
    budget blocks read the anchor and copies of each head's best pairs, in place of all pairs."""
    prompt = Prompt.from_tokens([1, 2], [(37 * i + 11) % 97 for i in range(90)], [5, 6, 7])
    found = []
    for backend in ("torch", "fused"):
        model = tiny_model("llama", heads=2, kv_heads=kv_heads, head_dim=16)
        options = {"blocks": 5, "rounds": 2, "anchor_length": 20, "passing_length": 6, "passing_budget": budget}
        engine = Engine.from_model(model, backend=backend, strategy="apb", **options)
        session = engine.prefill(prompt)
        found.append(torch.stack([session.logits, session.extend([3])]))
        engine.close()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


# --- Gluon's, for Hopper -------------------------------------------------------------------------------------------

CONFIGS = {
    "head dim 64": (64, HOPPER[64]),
    "head dim 128": (128, HOPPER[128]),
    "head dim 256": (256, HOPPER[256]),
    "two consumers": (64, Config(128, 2, 3, 240, 168, False)),
    "in turns": (128, Config(128, 2, 2, 240, 168, True)),
    "three in turns": (64, Config(128, 3, 3, 160, 128, True)),
}


def emulate(
    q: Tensor,
    sources: list[tuple[Tensor, Tensor]],
    tasks: tuple[Task, ...],
    config: Config,
    *,
    programs: int = 3,
    factors: tuple[float, float] | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """What the kernel for Hopper writes, on the emulated machine, one program after the other."""
    rows, heads, head_dim = q.shape
    kv_heads = sources[0][0].shape[1]
    plan = schedule(tasks, heads, kv_heads, 2 * head_dim, config.block_m, config.block_n, programs, CPU)
    out, lse = np.full((rows, heads, head_dim), np.nan, np.float16), np.full((heads, rows), np.nan, np.float32)
    pairs = [x for source in (*sources, sources[0])[:3] for x in source]
    pairs += pairs[:2] * (SOURCES - len(pairs) // 2)
    tables = [Pointer(x.numpy().ravel()) for x in (plan.table, plan.items, plan.bounds)]
    for program in range(len(plan.bounds) - 1):
        with emulated(KERNEL, seed + program) as (module, machine):
            machine.program = program
            module.forward(
                Descriptor(q.numpy().transpose(1, 0, 2), 64),
                *(Descriptor(x.numpy().transpose(1, 0, 2), config.block_n) for x in pairs),
                *(Pointer(out.reshape(-1)), Pointer(lse.reshape(-1)), heads * head_dim, head_dim, rows),
                *map(np.float32, factors or (head_dim**-0.5 / math.log(2), 1.0)),
                *tables,
                **{"H": heads, "GROUP": heads // kv_heads, "D": head_dim, "BN": config.block_n},
                **{"GROUPS": config.groups, "STAGES": config.stages, "PING_PONG": config.ping_pong},
                **{"CAPPED": factors is not None, "REGISTERS": config.registers},
            )
    return torch.from_numpy(out), torch.from_numpy(lse)


@pytest.mark.parametrize(("head_dim", "config"), CONFIGS.values(), ids=CONFIGS)
def test_hopper_kernel_emulated(head_dim: int, config: Config) -> None:
    """Right numbers for ragged blocks and anchor rows, with copies that land late and in any order; no wait hangs."""
    torch.manual_seed(0)
    q = draw(ROWS, 4, head_dim)
    sources = [tuple(draw(rows, 2, head_dim) for _ in "kv") for rows in (RUN, ROWS)]
    agree(emulate(q, sources, TASKS, config), expected(q, sources, TASKS), 2e-3)


@pytest.mark.parametrize("keys", [1, 128, 300])
@pytest.mark.parametrize("rows", [1, 128, 200])
def test_hopper_kernel_emulated_at_the_edges(rows: int, keys: int) -> None:
    """One key, one row, whole tiles only; rows without any key are 0 with lse -inf."""
    torch.manual_seed(0)
    q = draw(rows, 2, 128)
    sources = [tuple(draw(keys, 2, 128) for _ in "kv")]
    for causal in (False, True):
        tasks = (Task(0, rows, (Part(0, 0, keys, causal),)),)
        agree(emulate(q, sources, tasks, HOPPER[128], programs=1), expected(q, sources, tasks), 2e-3)


def test_hopper_kernel_emulated_without_keys() -> None:
    """A task that sees nothing is written too."""
    q = draw(70, 2, 128)
    out, lse = emulate(q, [(q, q)], (Task(0, 70, ()),), HOPPER[128])
    assert torch.equal(out, torch.zeros_like(out))
    assert lse.eq(-math.inf).all()


def test_hopper_kernel_emulated_with_softcap() -> None:
    """The same cap as the other kernel's."""
    torch.manual_seed(0)
    q, k, v = 3 * draw(70, 2, 64), 3 * draw(200, 2, 64), draw(200, 2, 64)
    tasks = (Task(0, 70, (Part(0, 0, 200, False),)),)
    out, lse = emulate(q, [(k, v)], tasks, HOPPER[64], factors=(2 / math.log(2), 2 * 0.125 / 2 / math.log(2)))
    logits = 2 * torch.tanh(torch.einsum("rhd,khd->hrk", q.float(), k.float()) * 0.125 / 2)
    agree((out, lse), (torch.einsum("hrk,khd->rhd", logits.softmax(-1), v.float()), logits.logsumexp(-1)), 2e-3)


@settings(max_examples=15)
@given(tasks(), st.integers(0, 9))
def test_hopper_kernel_emulated_on_any_tasks(tasks: tuple[Task, ...], seed: int) -> None:
    """Any shares of any sources, however late the copies land."""
    torch.manual_seed(seed)
    q = draw(tasks[-1].stop, 2, 64)
    sources = [tuple(draw(450, 1, 64) for _ in "kv") for _ in range(SOURCES)]
    agree(emulate(q, sources, tasks, HOPPER[64], seed=seed), expected(q, sources, tasks), 2e-3)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """What compile_hopper.py prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "compile_hopper.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.triton
def test_decode_by_the_table_reads_as_wide(compiled: dict[str, Any]) -> None:
    """Addresses from memory do not narrow what is read: keys and values still go to shared memory 16 bytes at a time,
    the rows of q come so too. What is read beside them are the row of the table and the length."""
    for plain, cached in zip(*(compiled["decode"][name].values() for name in ("plain", "cached")), strict=True):
        assert plain["0x10"] > 0
        assert cached == {**plain, "b64": 3}
        assert set(cached) == {"0x10", "v4.b32", "b64", "b32"}


@pytest.mark.triton
def test_host_memory_is_read_as_wide(compiled: dict[str, Any]) -> None:
    """Where each key's address is one of two, they go to shared memory 16 bytes at a time as well: what is read beside
    them are two addresses and two numbers of the table's row."""
    for kind in ("16", "keys"):
        near, far = (compiled["listed"][f"{kind}, {place}"] for place in ("near", "far"))
        assert near["0x10"] > 0
        assert far == {**near, "b64": near["b64"] + 4}


@pytest.mark.triton
def test_hopper_kernel_compiles(compiled: dict[str, Any]) -> None:
    """Every configuration compiles for sm_90 to warpgroup products; in the loops the softmax of a tile stands where the
    product of the tile before with its values is under way: that is what makes it fast. No spills at head dim 128,
    some between items at 256; at 64, whose three consumers have 160 registers a thread, up to two in the loops over
    whole tiles (a counter, not an operand) and up to four in those over masked ones. The result is stored 16 bytes at a
    time, at both places that write. Nothing is stored where a barrier has been initialised: a GPU that other programs
    interrupt does not keep it."""
    reports = compiled["hopper"]
    assert {report["head_dim"] for report in reports} == set(HOPPER)
    for report in reports:
        assert report["products"] > 0, report
        assert report["shared"] <= 227 * 1024, report
        config = HOPPER[report["head_dim"]]
        turns = config.groups if config.ping_pong else 0
        assert report["barriers"] == 2 * config.groups + 4 * config.stages + turns, report
        assert report["barriers_overwritten"] == [], report
        masked, whole = report["loop_spills"][::2], report["loop_spills"][1::2]
        assert len(masked) == len(whole) == HOPPER[report["head_dim"]].groups, report
        assert (max(masked) <= 4 and max(whole) <= 2) if report["head_dim"] == 64 else max(masked + whole) == 0, report
        assert report["spills"] <= {64: 54, 128: 0, 256: 15}[report["head_dim"]], report
        rows, groups = 2, HOPPER[report["head_dim"]].groups  # of a thread, and how many consumers
        stores = {"STG.E": 2 * groups * rows, "STG.E.128": 2 * groups * rows * report["head_dim"] // 32}
        assert report["stores"] == stores, report
        assert report["exponentials_meanwhile"] == report["exponentials"] > 0, report
