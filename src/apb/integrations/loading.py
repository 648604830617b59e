"""Keys and values on their way from a store into another program's cache, layer by layer, on a thread of their own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensors import TensorFile

# Bytes of keys, and of values, that are under way at once.
_PIECE = 32 << 20
# Threads that read heads side by side.
_READERS = 4


@dataclass(frozen=True)
class Handover:
    """Tokens of a stored document that a request is to have, in plain values, so that it travels.

    Attributes:
        request: id of the request.
        paths: the document's files.
        start, stop: the tokens, by position.
        blocks: the request's blocks in the cache.
    """

    request: str
    paths: tuple[str, ...]
    start: int
    stop: int
    blocks: tuple[int, ...]

    def blocks_to_fill(self, size: int) -> set[int]:
        """Those that the tokens go into, if a block is of so many tokens."""
        return set(self.blocks[self.start // size : -(-self.stop // size)])


@dataclass(frozen=True)
class Place:
    """Where a layer's keys and values go.

    Attributes:
        layer: index of the layer in the model.
        heads: those of the model's KV heads that are held here.
        write: stores keys and values (tokens, heads, head_dim) in slots (tokens,) of the cache.
        device, dtype: of keys and values.
    """

    layer: int
    heads: range
    write: Callable[[Tensor, Tensor, Tensor], None]
    device: torch.device
    dtype: torch.dtype


class Document:
    """A stored document's files, opened."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.files = [TensorFile(Path(path)) for path in paths]
        self.positions: list[dict[str, list[list[int]]]] = [
            json.loads(file.metadata["positions"]) for file in self.files
        ]
        last = self.files[-1]
        self.tokens = sum(last.shape(name)[0] for name in ("prefix", "document", "kept"))

    def runs(self, layer: int) -> Iterator[tuple[TensorFile, str, int, range]]:
        """(file, name, first row, positions) of the runs of a layer's tokens, those of the question last."""
        for file, positions in zip(self.files, self.positions, strict=True):
            row = 0
            for start, stop in positions[str(layer)]:
                yield file, str(layer), row, range(start, stop)
                row += stop - start
        last, name = self.files[-1], f"read.{layer}"
        yield last, name, 0, range(self.tokens, self.tokens + last.shape(f"{name}.keys")[1])


@dataclass
class Load:
    """A handover under way.

    Attributes:
        handover: what is loaded.
        error: why it failed; None so far.
        seconds: how long it took, once it is done.
    """

    handover: Handover
    error: Exception | None = None
    seconds: float = 0.0
    layers: dict[str, Future[Any]] = field(default_factory=dict)

    def wait(self, name: str) -> None:
        """Have what is computed from now on see a layer's keys and values; nothing if they could not be loaded."""
        event = self.layers.pop(name).result() if name in self.layers else None
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    @property
    def awaited(self) -> bool:
        """True if every layer was waited for."""
        return not self.layers

    @property
    def done(self) -> bool:
        """True if all of it has arrived, or failed."""
        return all(each.done() for each in self.layers.values())

    def finish(self) -> None:
        """Wait for all of it."""
        for each in self.layers.values():
            if (event := each.result()) is not None:
                event.synchronize()


class Loader:
    """Loads documents one after the other.

    Args:
        block: tokens of a block of the cache.
        tell: called with a sentence about what could not be loaded.
    """

    def __init__(self, block: int, tell: Callable[[str], None]) -> None:
        self._block = block
        self._tell = tell
        self._worker = ThreadPoolExecutor(1, "apb-load")
        self._readers = ThreadPoolExecutor(_READERS, "apb-read")
        self._local = threading.local()

    def start(self, handover: Handover, places: Mapping[str, Place], *, synchronize: bool) -> Load:
        """Begin to load into these layers, in their order.

        Args:
            handover: what to load.
            places: by the layers' names.
            synchronize: a layer counts as loaded once its bytes are there; else once they are ordered behind an event.
        """
        load = Load(handover, layers={name: Future() for name in places})
        first = next(iter(places.values()))
        ready = None
        if first.device.type == "cuda":  # whoever had the blocks before may still write into them
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(first.device))
        self._worker.submit(self._run, load, dict(load.layers), places, ready, synchronize)
        return load

    def close(self) -> None:
        """End the threads; what is under way is finished first."""
        self._worker.shutdown()
        self._readers.shutdown()

    def _run(
        self, load: Load, layers: dict[str, Future[Any]], places: Mapping[str, Place], ready: Any, synchronize: bool
    ) -> None:
        start = time.perf_counter()
        try:
            first = next(iter(places.values()))
            with torch.inference_mode(), self._stream(first.device, ready):
                document, slots = Document(load.handover.paths), self._slots(load.handover, first.device)
                for name, place in places.items():
                    self._layer(document, place, load.handover, slots)
                    event = None
                    if place.device.type == "cuda":
                        event = torch.cuda.Event()
                        event.record()
                        if synchronize:
                            event.synchronize()
                    load.seconds = time.perf_counter() - start
                    layers[name].set_result(event)
        except Exception as error:
            load.error = error
            handed = load.handover
            self._tell(
                f"{handed.stop - handed.start} tokens of a stored document cannot be loaded for request "
                f"{handed.request}, and are computed: {type(error).__name__}: {error}."
            )
        finally:
            for each in layers.values():
                if not each.done():
                    each.set_result(None)

    def _stream(self, device: torch.device, ready: Any) -> Any:
        """A context in which work is ordered on this thread's own stream, behind ``ready``."""
        if device.type != "cuda":
            return nullcontext()
        torch.cuda.set_device(device)
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(device)
        self._local.stream.wait_event(ready)
        return torch.cuda.stream(self._local.stream)

    def _slots(self, handover: Handover, device: torch.device) -> Tensor:
        positions = torch.arange(handover.start, handover.stop)
        blocks = torch.tensor(handover.blocks)[positions // self._block]
        return (blocks * self._block + positions % self._block).to(device)

    def _layer(self, document: Document, place: Place, handover: Handover, slots: Tensor) -> None:
        missing = handover.stop - handover.start
        for file, name, row, run in document.runs(place.layer):
            wanted = range(max(run.start, handover.start), min(run.stop, handover.stop))
            _, _, width = file.shape(f"{name}.keys")
            step = max(1, _PIECE // (len(place.heads) * width * place.dtype.itemsize))
            for start in range(wanted.start, wanted.stop, step):
                part = range(start, min(start + step, wanted.stop))
                keys, values = (
                    self._piece(file, f"{name}.{kind}", place, row + part.start - run.start, len(part))
                    for kind in ("keys", "values")
                )
                place.write(keys, values, slots[part.start - handover.start : part.stop - handover.start])
            missing -= len(wanted)
        if missing:
            raise ValueError(f"layer {place.layer} lacks {missing} of its tokens")

    def _piece(self, file: TensorFile, name: str, place: Place, start: int, rows: int) -> Tensor:
        """(rows, heads, width) of a tensor, where they are needed."""
        if file.dtype(name) != place.dtype:
            raise ValueError(f"it is in {file.dtype(name)}, not in {place.dtype}")
        pinned = place.device.type == "cuda"
        shape = len(place.heads), rows, file.shape(name)[2]
        host = torch.empty(shape, dtype=place.dtype, pin_memory=pinned)  # torch reuses it once its copy has run
        heads = zip(place.heads, host, strict=True)
        for each in [self._readers.submit(file.rows, name, head, start, into) for head, into in heads]:
            each.result()
        return host.to(place.device, non_blocking=pinned).transpose(0, 1).contiguous()
