"""apb.attention and merge, every back-end, against one dense softmax in fp64 written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apb
from apb.kernels import fused
from apb.kernels.attention import BACKENDS, choose
from apb.kernels.merge import merge

CPU = torch.device("cpu")
# Tensors here are on the CPU, where "fused" is Triton's interpreter. Other systems than Linux have no Triton, and where
# there is a GPU, kernels are compiled instead, for tests/gpu.
NO_FUSED = fused.why_not(CPU, torch.float32, 64)
backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(name == "fused" and NO_FUSED is not None, reason=str(NO_FUSED)))
        for name in (*BACKENDS, "auto")
    ],
)


def dense(q: Tensor, segments: list[apb.Segment], scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64: one matrix over all segments' keys, its cells masked one by one from the definition."""
    rows, heads, head_dim = q.shape
    out, lse = q.new_zeros(rows, heads, head_dim, dtype=torch.float64), torch.full((heads, rows), -math.inf).double()
    for head in range(heads):
        for row in range(rows):
            logits, values = [], []
            for segment in segments:
                keys, kv_heads, _ = segment.k.shape
                seen = max(min(keys, row + keys - rows + 1), 0) if segment.causal else keys
                group = head // (heads // kv_heads)
                logits.append(segment.k[:seen, group].double() @ q[row, head].double())
                values.append(segment.v[:seen, group].double())
            if sum(map(len, logits)):
                whole = torch.cat(logits) * (head_dim**-0.5 if scale is None else scale)
                out[row, head] = whole.softmax(0) @ torch.cat(values)
                lse[head, row] = whole.logsumexp(0)
    return out, lse


def make(
    rows: int,
    keys: list[tuple[int, bool]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, list[apb.Segment]]:
    """Random q and segments of the given (keys, causal); logits are spread out, so that a wrong mask shows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    segments = [
        apb.Segment(draw(count, kv_heads, head_dim), draw(count, kv_heads, head_dim), causal) for count, causal in keys
    ]
    return 2 * draw(rows, heads, head_dim), segments


def agree(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-5, atol=1e-5)


SEGMENTS = {
    "one full": [(9, False)],
    "as many keys as rows": [(7, True)],
    "more keys than rows": [(12, True)],
    "fewer keys than rows": [(4, True)],
    "one causal key": [(1, True)],
    "many more keys": [(700, True)],
    "anchor, passed, own": [(5, False), (3, False), (7, True)],
    "all kinds": [(12, True), (4, True), (6, False), (7, True), (1, False)],
    "an empty one among others": [(0, False), (5, False), (0, True)],
    "only empty ones": [(0, False), (0, True)],
    "none": [],
}


@backends
@pytest.mark.parametrize("keys", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("rows", [1, 7])
def test_segments(rows: int, keys: list[tuple[int, bool]], backend: str) -> None:
    """Rows attend to the union of the segments; a causal one is aligned at the bottom right, whatever its length."""
    q, segments = make(rows, keys)
    out, lse = apb.attention(q, segments, backend=backend)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((4, rows), torch.float32)
    agree((out, lse), dense(q, segments))


def test_one_row_takes_one_call() -> None:
    """It sees all keys of a causal segment: to the bit what it gives without the mask, by torch's kernel too."""
    q, (segment,) = make(1, [(40, True)])
    out, lse = apb.attention(q, [segment], backend="torch")
    whole, whole_lse = apb.attention(q, [replace(segment, causal=False)], backend="torch")
    assert torch.equal(out, whole) and torch.equal(lse, whole_lse)


@backends
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_grouped_queries(group: int, head_dim: int, backend: str) -> None:
    """Query head h reads KV head h // group, for every group size."""
    q, segments = make(6, [(5, False), (9, True)], heads=8, kv_heads=8 // group, head_dim=head_dim)
    agree(apb.attention(q, segments, backend=backend), dense(q, segments))


@backends
@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.01, 0.5])
def test_scale(scale: float, backend: str) -> None:
    """The factor on q.k is the caller's where one is given."""
    q, segments = make(6, [(5, False), (9, True)])
    agree(apb.attention(q, segments, scale, backend=backend), dense(q, segments, scale))


@backends
def test_rows_without_a_key(backend: str) -> None:
    """A row that sees no key is 0 with lse -inf, never nan; rows beside it are not touched by that."""
    q, segments = make(7, [(4, True), (2, True)])
    out, lse = apb.attention(q, segments, backend=backend)
    assert torch.equal(out[:3], torch.zeros(3, 4, 64))
    assert lse[:, :3].eq(-math.inf).all()
    assert lse[:, 3:].isfinite().all()
    assert out[3:].abs().amin(-1).gt(0).any(-1).all()


@backends
@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows_or_no_keys(rows: int, backend: str) -> None:
    """Zero rows are legal, and so are zero keys: shapes stay as promised."""
    for keys in ([], [(0, True)], [(5, False), (2, True)]):
        q, segments = make(rows, keys)
        out, lse = apb.attention(q, segments, backend=backend)
        assert (tuple(out.shape), tuple(lse.shape)) == ((rows, 4, 64), (4, rows))


def views(x: Tensor) -> dict[str, Tensor]:
    """The same numbers as `x` (tokens, heads, d) with other strides."""
    padded = torch.zeros(len(x) + 3, x.shape[1], 2 * x.shape[2])
    padded[1 : len(x) + 1, :, : x.shape[2]] = x
    return {
        "heads first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "head_dim first": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "a slice": padded[1 : len(x) + 1, :, : x.shape[2]],
    }


@backends
@pytest.mark.parametrize("kind", ["heads first", "head_dim first", "a slice"])
def test_any_strides(kind: str, backend: str) -> None:
    """Inputs may be views of anything: transposed as transformers hands them over, or cut out of a cache."""
    q, segments = make(6, [(5, False), (9, True)])
    viewed = [replace(part, k=views(part.k)[kind], v=views(part.v)[kind]) for part in segments]
    assert not viewed[0].k.is_contiguous()
    agree(apb.attention(views(q)[kind], viewed, backend=backend), dense(q, segments))


def refused(backend: str, q: Tensor, segments: list[apb.Segment]) -> bool:
    """Whether the fused kernels do not take this dtype here, and say so (the interpreter has no products in bf16)."""
    if backend != "fused" or fused.why_not(CPU, q.dtype, q.shape[2]) is None:
        return False
    with pytest.raises(apb.InputError, match=str(q.dtype).removeprefix("torch.")):
        apb.attention(q, segments, backend=backend)
    return True


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    """bf16 and fp16: as near to fp64 of the same inputs as the output's rounding allows; lse stays fp32."""
    q, segments = make(40, [(50, False), (40, True)], dtype=dtype)
    if refused(backend, q, segments):
        return
    out, lse = apb.attention(q, segments, backend=backend)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    expected_out, expected_lse = dense(q, segments)
    bound = 4 * torch.finfo(dtype).eps
    assert (out.double() - expected_out).abs().max() < bound * expected_out.abs().max()
    assert (lse.double() - expected_lse).abs().max() < bound


@backends
def test_double_precision_is_taken(backend: str) -> None:
    """fp64 inputs give fp64 outputs, at least as exact as fp32."""
    q, segments = make(6, [(5, False), (9, True)], dtype=torch.float64)
    if refused(backend, q, segments):
        return
    out, lse = apb.attention(q, segments, backend=backend)
    assert (out.dtype, lse.dtype) == (torch.float64, torch.float32)
    agree((out, lse), dense(q, segments))


@backends
def test_large_logits_do_not_overflow(backend: str) -> None:
    """exp of logits in the hundreds would overflow: the maximum is taken off first, in the merge as well."""
    q, segments = make(6, [(5, False), (9, True)])
    q = 60 * q
    out, lse = apb.attention(q, segments, backend=backend)
    expected_out, expected_lse = dense(q, segments)
    assert expected_lse.max() > 200
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


@backends
def test_inputs_are_left_alone(backend: str) -> None:
    """Nothing that was given is written to."""
    q, segments = make(6, [(5, False), (9, True)])
    before = [x.clone() for x in (q, segments[0].k, segments[0].v, segments[1].k, segments[1].v)]
    apb.attention(q, segments, backend=backend)
    after = (q, segments[0].k, segments[0].v, segments[1].k, segments[1].v)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


# --- merge ---------------------------------------------------------------------------------------------------------


@given(st.data())
def test_splitting_the_keys_anywhere_changes_nothing(data: st.DataObject) -> None:
    """Attention over parts of the keys, cut anywhere and merged in any order, is attention over all of them."""
    rows, keys = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 30))
    backend = data.draw(st.sampled_from(["reference", "torch"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, keys), max_size=5)))
    q, (whole,) = make(rows, [(keys, data.draw(st.booleans()))], seed=data.draw(st.integers(0, 99)))
    # of a causal segment only the last part can be causal with the same alignment; cut where all rows see all before
    cuts = [cut for cut in cuts if not whole.causal or cut <= keys - rows + 1]
    edges = [0, *cuts, keys]
    parts = [
        apb.Segment(whole.k[a:b], whole.v[a:b], whole.causal and number == len(edges) - 2)
        for number, (a, b) in enumerate(pairwise(edges))
    ]
    expected = dense(q, [whole])
    parts = data.draw(st.permutations(parts))
    agree(apb.attention(q, parts, backend=backend), expected)
    partial = [apb.attention(q, [part], backend=backend) for part in parts]
    agree(merge([out for out, _ in partial], [lse for _, lse in partial]), expected)


def test_merge_of_parts_that_saw_nothing() -> None:
    """A part without keys weighs nothing; a row without keys in any part is 0 with lse -inf, not nan."""
    q, segments = make(5, [(3, True), (4, False)])
    none = torch.zeros(5, 4, 64), torch.full((4, 5), -math.inf)
    seen = apb.attention(q, segments[:1])
    for parts in ([none, seen], [seen, none], [none, seen, none]):
        out, lse = merge([out for out, _ in parts], [lse for _, lse in parts])
        agree((out, lse), dense(q, segments[:1]))
        assert torch.equal(out[:2], torch.zeros(2, 4, 64))
    out, lse = merge([none[0]] * 3, [none[1]] * 3)
    assert torch.equal(out, none[0])
    assert torch.equal(lse, none[1])


def test_error_does_not_grow_with_the_number_of_parts() -> None:
    """The merge is in fp32: of 16 bf16 partial results it is no farther from fp64 than of 2."""
    q, (whole,) = make(16, [(1024, False)], dtype=torch.bfloat16)
    expected, _ = dense(q, [whole])

    def error(parts: int) -> float:
        size = 1024 // parts
        partial = [
            apb.attention(q, [apb.Segment(whole.k[a : a + size], whole.v[a : a + size])]) for a in range(0, 1024, size)
        ]
        out, lse = merge([out for out, _ in partial], [lse for _, lse in partial])
        assert out.dtype == lse.dtype == torch.float32
        return float((out.double() - expected).square().mean().sqrt())

    assert error(16) < 1.05 * error(2)
    assert error(2) < 4 * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())


# --- choice and refusals -------------------------------------------------------------------------------------------


def test_auto_takes_the_fused_kernels_and_says_why() -> None:
    """On the CPU "auto" is torch's fused attention; the reason is a phrase, as `apb doctor` prints it."""
    assert choose("auto", CPU, torch.float32, 64)[0] == "torch"
    name, reason = choose("auto", torch.device("meta"), torch.float32, 64)
    assert name == "reference"
    assert "meta" in reason


def wrong(
    change: Callable[[Tensor, apb.Segment], tuple[Tensor, list[apb.Segment]]],
) -> tuple[Tensor, list[apb.Segment]]:
    q, (segment,) = make(6, [(5, False)])
    return change(q, segment)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda q, s: (q[None], [s]), ["q must be (rows, heads, head_dim)", "(1, 6, 4, 64)"]),
        (lambda q, s: (q, [replace(s, k=s.k[0])]), ["Segment 0", "(2, 64)", "(5, 2, 64)"]),
        (lambda q, s: (q, [replace(s, v=s.v[:4])]), ["Segment 0", "(5, 2, 64)", "(4, 2, 64)"]),
        (
            lambda q, s: (q, [s, apb.Segment(s.k[..., :32], s.v[..., :32])]),
            ["Segment 1", "of 32", "4 query heads of 64"],
        ),
        (lambda q, s: (q[:, :3], [s]), ["2 KV heads", "3 query heads"]),
        (lambda q, s: (q, [apb.Segment(s.k[:, :0], s.v[:, :0])]), ["0 KV heads"]),
        (lambda q, s: (q, [replace(s, k=s.k.half())]), ["dtype", "torch.float32", "torch.float16"]),
        (lambda q, s: (q.half(), [s]), ["dtype", "torch.float16", "torch.float32"]),
        (lambda q, s: (q, [replace(s, v=s.v.to("meta"))]), ["device", "meta"]),
    ],
)
def test_inputs_that_do_not_fit(
    change: Callable[[Tensor, apb.Segment], tuple[Tensor, list[apb.Segment]]], fragments: list[str]
) -> None:
    """Shapes, dtypes and devices that do not go together raise InputError with the shapes, and are never broadcast."""
    q, segments = wrong(change)
    with pytest.raises(apb.InputError) as refusal:
        apb.attention(q, segments)
    assert all(fragment in str(refusal.value) for fragment in fragments), refusal.value


def test_integer_inputs_are_refused() -> None:
    """Attention needs floating-point numbers."""
    q, segments = make(6, [(5, False)])
    with pytest.raises(apb.InputError, match="floating"):
        apb.attention(q.long(), [apb.Segment(segments[0].k.long(), segments[0].v.long())])


def test_unknown_backend() -> None:
    """A back-end that is not there is refused with those that are."""
    q, segments = make(6, [(5, False)])
    with pytest.raises(apb.InputError, match=r"'magic'.*auto.*reference.*torch"):
        apb.attention(q, segments, backend="magic")


def test_a_backend_that_cannot_serve_says_why() -> None:
    """Asked for by name, a back-end that cannot serve such tensors is refused with the reason."""
    with pytest.raises(apb.InputError, match="meta"):
        choose("torch", torch.device("meta"), torch.float32, 64)
