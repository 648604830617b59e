"""Register arithmetic of the Hopper kernel's consumers: softmax, rounding, rescaling.

Written for the layout of a warpgroup's product: of its 64 rows a thread holds two, and two neighbouring columns in
every eight of each.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _scaling(count):
    """PTX that scales ``count`` registers, two of each row by turns, and skips it if all factors of the warp are 1."""
    first, second = 2 * count, 2 * count + 2
    lines = [
        "{ .reg .pred p, r;",
        f"setp.neu.f32 p, ${first}, 0f3F800000; setp.neu.f32 r, ${second}, 0f3F800000; or.pred p, p, r;",
        "vote.sync.any.pred p, p, 0xffffffff; @!p bra DONE;",
        *(f"mul.f32 ${i}, ${i}, ${second if i & 2 else first};" for i in range(count)),
        "DONE: }",
    ]
    return " ".join(lines)


_SCALING = gl.constexpr(_scaling(32))
_SCALED = gl.constexpr(",".join(["=f"] * 32 + [str(i) for i in range(32)] + ["f"] * 32))


@gluon.jit
def capped(s, cap, CAPPED: gl.constexpr):
    """tanh for soft-capped logits: ``s * cap`` is twice its argument in base 2; the scale includes the outer factor."""
    if CAPPED:
        return 1.0 - 2.0 / (gl.exp2(s * cap) + 1.0)
    else:
        return s


@gluon.jit
def row_sums(p, M: gl.constexpr, BN: gl.constexpr):
    """Partial row sums (M, 8): each thread adds up its own columns; the rest is summed at the end."""
    return gl.sum(gl.reshape(p, [M, BN // 8, 8]), 1)


@gluon.jit
def pack(p, M: gl.constexpr, BN: gl.constexpr, dtype: gl.constexpr):
    """Round pairs of neighbours into one int32 each, (M, BN / 2): 16-bit values carried through a loop get unpacked."""
    low, high = gl.split(gl.reshape(p, [M, BN // 2, 2]))
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def unpack(pairs, M: gl.constexpr, BN: gl.constexpr, dtype: gl.constexpr):
    """(M, BN) values of ``dtype`` from the pairs of :func:`pack`."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    return gl.reshape(gl.join(low, high), [M, BN]).to(dtype, bitcast=True)


@gluon.jit
def _row_max(s, M: gl.constexpr, BN: gl.constexpr):
    """Row maxima (M,), in four dependency chains instead of one."""
    return gl.max(gl.max(gl.reshape(s, [M, BN // 16, 16]), 1), 1)


@gluon.jit
def softmax(s, m, scale, M: gl.constexpr, BN: gl.constexpr, MASKED: gl.constexpr):
    """exp2(scale * s - new maximum), the new maximum, and the factor that rescales the previous sums."""
    new = gl.maximum(m, gl.convert_layout(_row_max(s, M, BN), m.type.layout) * scale)
    shift = new
    if MASKED:  # a row may have seen no key yet: (-inf) - (-inf) would be nan
        shift = gl.where(new == float("-inf"), 0.0, new)
    return gl.exp2(s * scale - shift[:, None]), new, gl.exp2(m - shift)


@gluon.jit
def rescaled(acc, alpha):
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.inline_asm_elementwise(_SCALING, _SCALED, [acc, alpha], dtype=gl.float32, is_pure=True, pack=32)


@gluon.constexpr_function
def in_fours(D):
    """Layout of (64, D / 2) pairs with four neighbours per thread: 16 bytes, against 4 in a product's layout.

    A row stays with the same four threads as in the product's layout, so the exchange stays within a warp.
    """
    columns = [[0, step] for step in (16, 32, 64) if step < D // 2]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], *columns, [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, D // 2])
