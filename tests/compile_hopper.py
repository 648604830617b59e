"""Compiles the kernels for Hopper and for decode for sm_90, which needs no GPU, and prints as JSON what the code holds.

Run by tests/unit/test_fused.py in a process of its own, where Triton does not interpret.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from apb.kernels import chosen, decode
from apb.kernels.chosen import attending
from apb.kernels.fused import HOPPER, Config, hopper

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LAYOUT = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


def compile_forward(head_dim: int, config: Config, dtype: str, *, heads: int = 32, group: int = 4) -> Any:
    """The compiled kernel, with the arguments that :func:`apb.kernels.fused.launch` gives it."""
    constants = {
        **{"H": heads, "GROUP": group, "D": head_dim, "BN": config.block_n, "GROUPS": config.groups},
        **{"STAGES": config.stages, "PING_PONG": config.ping_pong, "CAPPED": False, "REGISTERS": config.registers},
    }
    types = {"q": f"tensordesc<{dtype}[1, 64, {head_dim}],{LAYOUT!r}>", "out": f"*{dtype}", "lse": "*fp32"}
    tiles = f"tensordesc<{dtype}[1, {config.block_n}, {head_dim}],{LAYOUT!r}>"
    types |= dict.fromkeys(("k0", "v0", "k1", "v1", "k2", "v2"), tiles)
    types |= dict.fromkeys(("out_row", "out_head", "lse_head"), "i32")
    types |= {"scale": "fp32", "cap": "fp32"} | dict.fromkeys(("table", "items", "bounds"), "*i32")
    types |= dict.fromkeys(constants, "constexpr")
    names = hopper.forward.arg_names
    aligned = ("out", "lse", "table", "items", "bounds", "out_row", "out_head")
    source = GluonASTSource(
        hopper.forward,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": 4, "maxnreg": config.cap}
    return triton.compile(source, target=TARGET, options=options)


def examine(kernel: Any) -> dict[str, Any]:
    """What the machine code holds, as a whole and in each consumer's loops over tiles, masked ones and whole ones."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines = text.splitlines()
    labels = {found[1]: number for number, line in enumerate(lines) if (found := re.match(r"(\.L_x_\d+):", line))}
    loops = []
    for number, line in enumerate(lines):
        found = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if found and labels.get(found[1], number) < number:
            loops.append((labels[found[1]], number))
    inner = [
        "\n".join(lines[a:b])
        for a, b in loops
        if not any((a, b) != (c, d) and a <= c and d <= b and d - c > 100 for c, d in loops)
    ]
    # The loop over items, which stores, is laid out so that it can look innermost.
    inner = [body for body in inner if body.count("WARPGROUP.DEPBAR") == 2 and "STG" not in body]
    # Between the wait for QK and that for PV: there the softmax runs while PV does.
    meanwhile = [body.split("WARPGROUP.DEPBAR")[1] for body in inner]
    return {
        "products": text.count("HGMMA"),
        "spills": sum(map(_spills, lines)),
        "stores": dict(Counter(re.findall(r"\bSTG\.E(?:\.\w+)?", text))),
        "loop_spills": [sum(map(_spills, body.splitlines())) for body in inner],
        "exponentials": sum(body.count("MUFU.EX2") for body in inner),
        "exponentials_meanwhile": sum(body.count("MUFU.EX2") for body in meanwhile),
        "shared": kernel.metadata.shared,
        "barriers": len(_barriers(kernel.asm["ptx"])),
        "barriers_overwritten": sorted(_barriers(kernel.asm["ptx"]) & _stored(kernel.asm["ptx"])),
    }


def _barriers(ptx: str) -> set[int]:
    """Where barriers are initialised in shared memory."""
    offsets = dict(re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx))
    return {int(offsets[register]) for register in re.findall(r"mbarrier\.init\S* \[(%r\d+)\]", ptx)}


def _stored(ptx: str) -> set[int]:
    """Where whatever else is stored in shared memory begins."""
    return {int(offset) for offset in re.findall(r"\bst\.shared\S*\s+\[\S+?\+(\d+)\]", ptx)}


def _spills(line: str) -> bool:
    return re.search(r"\b(?:LDL|STL)\b", line) is not None


def compile_decode(kernel: Any, head_dim: int, stages: int = decode._STAGES, **more: int) -> Any:
    """A kernel of decode, for a row of 32 heads over 8 KV heads in bf16, with the arguments of its launch."""
    constants = {"H": 32, "GROUP": 4, "D": head_dim, "BD": 1 << (head_dim - 1).bit_length(), "BM": 16, "BN": 64}
    constants |= {"CAUSAL": False, "CAPPED": False, **more}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("q", "k", "v"), "*bf16")
    types |= dict.fromkeys(("table", "storages"), "*i64") | dict.fromkeys(("counts", "spans"), "*i32")
    types |= dict.fromkeys(("parts", "sums"), "*fp32") | {"length": "*i32", "scale": "fp32", "cap": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    # All others are multiples of 16.
    unknown = ("rows", "sessions", "splits", "programs", "layer", "scale", "cap", *constants)
    source = ASTSource(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        {(at,): constants[name] for at, name in enumerate(kernel.arg_names) if name in constants},
        {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if name not in unknown},
    )
    return triton.compile(source, target=TARGET, options={"num_warps": 4, "num_stages": stages})


def accesses(kernel: Any) -> dict[str, int]:
    """How often the code reads global memory, by how wide: copies to shared memory by bytes, and loads."""
    ptx = kernel.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", ptx)
    return dict(Counter([*copies, *re.findall(r"\bld\.global\.(\S+)", ptx)]))


def main() -> None:
    """Every configuration in use, and one in the other dtype."""
    cases = [(head_dim, "bf16") for head_dim in HOPPER] + [(128, "fp16")]
    reports = [
        {"head_dim": head_dim, "dtype": dtype} | examine(compile_forward(head_dim, HOPPER[head_dim], dtype))
        for head_dim, dtype in cases
    ]
    decoding = {
        name: {head_dim: accesses(compile_decode(kernel, head_dim)) for head_dim in (64, 128)}
        for name, kernel in (("plain", decode._split), ("cached", decode._split_cached))
    }
    listed = {
        f"{page or 'keys'}, {'far' if far else 'near'}": accesses(
            compile_decode(
                attending.attend, 128, chosen._LISTED_STAGES, KV=8, BK=8, CHUNKS=chosen.CHUNKS, PAGE=page, FAR=far
            )
        )
        for page in (0, 16)
        for far in (False, True)
    }
    json.dump({"hopper": reports, "decode": decoding, "listed": listed}, sys.stdout)


if __name__ == "__main__":
    main()
