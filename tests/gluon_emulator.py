"""Runs a Gluon kernel for Hopper on the CPU, in numpy: its warp groups are threads, its barriers wait as the GPU's do.

Nothing of Triton is imported: the kernel's module is loaded with stand-ins for what it imports. The emulation is there
to find what a compiler cannot: wrong indices and masks, and a broken protocol between producer and consumers. A copy
poisons its target at once and lands later, in any order; a product must read the same operands when it is issued and
when it is waited for; a wait that never ends is an error.
"""

from __future__ import annotations

import importlib
import queue
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

PATIENCE_S = 30.0


class Array(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype: Any, bitcast: bool = False) -> Array:
        return self.view(dtype) if bitcast else self.astype(dtype)

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)


def array(x: Any) -> Array:
    return np.asarray(x).view(Array)


@dataclass
class Pointer:
    """Addresses in a flat array."""

    memory: np.ndarray
    offset: Any = 0

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)


@dataclass
class Descriptor:
    """What a tensor map says: (heads, rows, head_dim) memory, read in boxes; what lies outside is zero."""

    memory: np.ndarray
    rows: int
    layout: Any = None

    @property
    def dtype(self) -> Any:
        return self.memory.dtype

    @property
    def block_type(self) -> Any:
        return types.SimpleNamespace(nbytes=self.rows * self.memory.shape[2] * self.memory.itemsize)

    def read(self, coordinates: list[int]) -> np.ndarray:
        head, row, _ = map(int, coordinates)
        box = np.zeros((1, self.rows, self.memory.shape[2]), self.memory.dtype)
        found = self.memory[head, max(row, 0) : row + self.rows]
        box[0, : len(found)] = found
        return box


@dataclass
class Shared:
    """A view of shared memory."""

    memory: np.ndarray

    @property
    def dtype(self) -> Any:
        return self.memory.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.memory[int(i)])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.memory.reshape(shape))  # a view: the memory is contiguous

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.memory.transpose(order))


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phases = 0

    def update(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += size
            assert self.missing >= 0, "more arrivals than the barrier was made for"
            if self.missing == 0 and self.bytes == 0:
                self.missing = self.count
                self.phases += 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phases % 2 != parity, PATIENCE_S), "a wait never ended"


class Barriers:
    def __init__(self, count: int) -> None:
        self.each = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.each[int(i)]


class Product:
    """A matrix product under way."""

    def __init__(self, a: Any, b: Shared, acc: Any) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.result = self.compute()

    def compute(self) -> Array:
        a = self.a.memory if isinstance(self.a, Shared) else self.a
        return array(self.acc + a.astype(np.float32) @ self.b.memory.astype(np.float32))

    def finish(self) -> None:
        assert np.array_equal(self.result, self.compute(), equal_nan=True), "operands changed under a product"


class Machine:
    """One program's hardware, and the modules that a kernel sees in place of Gluon's."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.program = 0
        self.copies: queue.Queue[Any] = queue.Queue()
        self.local = threading.local()
        self.failures: list[BaseException] = []

    def copy(self, descriptor: Descriptor, coordinates: list[int], barrier: Barrier, target: Shared) -> None:
        target.memory[...] = np.nan
        self.copies.put((descriptor, coordinates, barrier, target))

    def copy_engine(self) -> None:
        waiting: list[Any] = []
        while True:
            try:
                item = self.copies.get(block=not waiting)
                if item is None:
                    return
                waiting.append(item)
            except queue.Empty:
                descriptor, coordinates, barrier, target = waiting.pop(self.draw.randrange(len(waiting)))
                target.memory[...] = descriptor.read(coordinates)
                barrier.update(0, -descriptor.block_type.nbytes)

    def mma(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool) -> Product:
        assert is_async
        product = Product(a, b, acc if use_acc else np.float32(0))
        self.pending().append(product)
        return product

    def mma_wait(self, outstanding: int, deps: list[Product]) -> Any:
        pending = self.pending()
        while len(pending) > outstanding:
            pending.pop(0).finish()
        assert not any(product in pending for product in deps), "a result is used before it was waited for"
        return deps[0].result if len(deps) == 1 else tuple(product.result for product in deps)

    def pending(self) -> list[Product]:
        if not hasattr(self.local, "pending"):
            self.local.pending = []
        return self.local.pending

    def specialize(self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        def guarded(function: Callable[..., None], args: tuple[Any, ...]) -> None:
            try:
                with np.errstate(all="ignore"):
                    function(*args)
            except BaseException as error:
                self.failures.append(error)

        engine = threading.Thread(target=self.copy_engine, daemon=True)
        threads = [threading.Thread(target=guarded, args=partition, daemon=True) for partition in partitions]
        for thread in (engine, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        self.copies.put(None)
        if self.failures:
            raise self.failures[0]

    def modules(self) -> dict[str, types.ModuleType]:
        root = "triton.experimental.gluon"
        gluon, language = types.ModuleType(root), types.ModuleType(f"{root}.language")
        hopper = types.ModuleType(f"{root}.language.nvidia.hopper")
        gluon.jit = lambda function=None, **_: function or (lambda f: f)
        gluon.constexpr_function = lambda function: function
        gluon.language = language
        vars(language).update(_LANGUAGE)
        language.program_id = lambda axis: self.program
        language.warp_specialize = self.specialize
        hopper.mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: Barriers,
            init=lambda barrier, count: vars(barrier).update(count=count, missing=count),
            wait=lambda barrier, phase, pred=True: barrier.wait(int(phase)) if pred else None,
            arrive=lambda barrier, count=1: barrier.update(count, 0),
            expect=lambda barrier, size: barrier.update(1, size),
        )
        hopper.tma = types.SimpleNamespace(async_copy_global_to_shared=self.copy)
        hopper.fence_async_shared = lambda: None
        hopper.warpgroup_mma, hopper.warpgroup_mma_wait = self.mma, self.mma_wait
        names = ("triton", "triton.experimental", gluon, language, f"{root}.language.nvidia", hopper)
        modules = [types.ModuleType(name) if isinstance(name, str) else name for name in names]
        return {module.__name__: module for module in modules}


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    return Barriers(shape[0]) if layout is Barriers else Shared(np.full(shape, np.nan, dtype))


def _load(pointer: Pointer) -> Array:
    return array(pointer.memory[pointer.offset])


def _store(pointer: Pointer, value: Array, mask: Array) -> None:
    offset, mask = np.broadcast_arrays(pointer.offset, mask)
    pointer.memory[offset[mask]] = np.broadcast_to(value, mask.shape)[mask]


def _assembly(text: str, constraints: str, args: list[Array], dtype: Any, is_pure: bool, pack: int) -> Any:
    if text.startswith("cvt.rn.f16x2.f32"):
        low, high = (x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in args)
        return array((low | high << 16).view(np.int32))
    if text.startswith("mov.b32"):
        (x,) = args
        return tuple(array((x.view(np.uint32) >> shift).astype(np.uint16).view(np.int16)) for shift in (0, 16))
    if "vote.sync.any" in text:
        return array(args[0] * args[1])
    raise NotImplementedError(text)


_LANGUAGE: dict[str, Any] = {
    "constexpr": lambda x: x,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": "bfloat16",
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "static_range": range,
    "load": _load,
    "store": _store,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "where": lambda *args: array(np.where(*args)),
    "max": lambda x, axis: array(x.max(axis)),
    "sum": lambda x, axis: array(x.sum(axis)),
    "exp2": lambda x: array(np.exp2(x)),
    "log2": lambda x: array(np.log2(x)),
    "zeros": lambda shape, dtype, layout: array(np.zeros(shape, dtype)),
    "full": lambda shape, value, dtype, layout: array(np.full(shape, value, dtype)),
    "arange": lambda start, stop, layout: array(np.arange(start, stop, dtype=np.int32)),
    "reshape": lambda x, shape: x.reshape(shape),
    "split": lambda x: (x[..., 0], x[..., 1]),
    "join": lambda x, y: array(np.stack([x, y], -1)),
    "convert_layout": lambda x, layout: x,
    "inline_asm_elementwise": _assembly,
    "allocate_shared_memory": _allocate,
    "SliceLayout": lambda *_, **__: None,
    "DistributedLinearLayout": lambda *_, **__: None,
    "DotOperandLayout": lambda *_, **__: None,
    "NVMMADistributedLayout": lambda *_, **__: None,
}


@contextmanager
def emulated(path: Path, seed: int = 0) -> Iterator[tuple[Any, Machine]]:
    """The kernel module at ``path``, with what it imports from beside it and the machine that its functions run on."""
    machine = Machine(seed)
    package = types.ModuleType("emulated")
    package.__path__ = [str(path.parent)]
    with mock.patch.dict(sys.modules, machine.modules() | {"emulated": package}):
        yield importlib.import_module(f"emulated.{path.stem}"), machine
