"""A kernel as small as can be whose warps share their work as the Hopper kernel's do, for tools that look for races.

    python tests/gpu/hand_over.py             # correct: what a tool reports here, it reports of Triton or of nothing
    python tests/gpu/hand_over.py careless    # a race: a tool that does not report it would not report such elsewhere

One warp brings tiles in with the bulk copy engine, four warps take them out, both say so by barriers. The careless ones
give a tile's place back before they have read the tile, so that the next may come into it meanwhile.
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS, COLUMNS, TILES = 64, 64, 8
_fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _take(
    out, place, full, free, TILES: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, CAREFUL: gl.constexpr
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    for tile in range(TILES):
        mbarrier.wait(full, tile & 1)
        if not CAREFUL:
            mbarrier.arrive(free, count=1)
        values = place.load(layout)
        if CAREFUL:
            mbarrier.arrive(free, count=1)
        gl.store(out + (tile * ROWS + rows)[:, None] * COLUMNS + cols[None, :], values)


@gluon.jit
def _bring(desc, place, full, free, TILES: gl.constexpr, ROWS: gl.constexpr):
    for tile in range(TILES):
        mbarrier.wait(free, (tile & 1) ^ 1)
        mbarrier.expect(full, desc.block_type.nbytes)
        _fetch(desc, [tile * ROWS, 0], full, place)


@gluon.jit
def hand_over(desc, out, TILES: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, CAREFUL: gl.constexpr):
    place = gl.allocate_shared_memory(desc.dtype, [ROWS, COLUMNS], desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full, free = bars.index(0), bars.index(1)
    mbarrier.init(full, count=1)
    mbarrier.init(free, count=1)
    # fmt: off
    gl.warp_specialize([
        (_take, (out, place, full, free, TILES, ROWS, COLUMNS, CAREFUL)),
        (_bring, (desc, place, full, free, TILES, ROWS)),
    ], [1], [24])
    # fmt: on


def main(careful: bool) -> None:
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    values = torch.randn(TILES * ROWS, COLUMNS, device="cuda").bfloat16()
    out = torch.empty_like(values)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    desc = TensorDescriptor.from_tensor(values, [ROWS, COLUMNS], layout)
    hand_over[(1,)](desc, out, TILES, ROWS, COLUMNS, careful, num_warps=4)
    torch.cuda.synchronize()
    print("as it should be" if torch.equal(values, out) else "wrong values")


if __name__ == "__main__":
    main("careless" not in sys.argv[1:])
