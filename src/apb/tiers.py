"""Many documents in bounded memory: on the device, in host memory, on disk; those asked last are the nearest."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .asking import Question
from .document import Document
from .errors import InputError
from .generation import Generation
from .hf.host import HostCopy
from .manifest import MANIFEST, documents, manifest_of

if TYPE_CHECKING:
    from .engine import Engine


@dataclass
class _Kept:
    """Where a document is; bytes are those of the rank that holds most.

    Attributes:
        document: itself, unless it is on disk alone; ``document.state.here`` tells if it is on the device.
        copy: its copy in host memory, of the tokens ``copied``, which takes ``host`` bytes.
        folder: its store on disk, of the tokens ``stored``; None for one that was found there.
        size: bytes of its keys and values.
        device: bytes that it takes on the device, with the room for questions and answers.
        disk: bytes of its files.
        held: True while it must not leave the device.
        tried: the tokens with which it could not be written to disk.
    """

    document: Document | None = None
    copy: HostCopy | None = None
    copied: tuple[int, ...] = ()
    folder: Path | None = None
    stored: tuple[int, ...] | None = None
    size: int = 0
    device: int = 0
    host: int = 0
    disk: int = 0
    held: bool = False
    tried: tuple[int, ...] | None = None

    @property
    def here(self) -> bool:
        """True if it is on the device."""
        return self.document is not None and self.document.state.here

    def drop_copy(self) -> None:
        """Free the copy in host memory."""
        self.copy, self.copied, self.host = None, (), 0


class Documents:
    """Keeps documents under keys, as many as fit: what no longer fits moves down, least recently asked first.

    From the device a document moves to host memory (pinned, where there is a GPU), from there to disk, and from there
    it is forgotten. Asking brings it back to the device; from host memory it arrives layer by layer, while the first
    layers read the question already. Copies further down stay where there is room, so that moving down again costs
    nothing.

    Bounds are bytes of one rank on the device and in host memory, and of all files on disk. A text is read beside what
    is kept, so leave that much memory free. Under several ranks every rank makes the same calls.
    """

    def __init__(
        self,
        engine: Engine,
        device_bytes: int,
        host_bytes: int,
        folder: str | Path | None = None,
        disk_bytes: int = 0,
    ) -> None:
        """Make a keeper; documents that another one has left in the folder are there again.

        Args:
            engine: reads and answers.
            device_bytes, host_bytes, disk_bytes: what documents may take in each place; 0 leaves a place out.
            folder: for those on disk, of one model and of one keeper at a time.
        """
        self.engine = engine
        self.device_bytes, self.host_bytes = device_bytes, host_bytes
        self.folder, self.disk_bytes = None if folder is None else Path(folder), disk_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # by the names of their folders, the last asked last
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = [path for path, _ in documents(self.folder)]
            for path in sorted(found, key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, path.name)):
                size = _bytes_on_disk(path)
                self._kept[path.name] = _Kept(folder=path, size=size, device=size, disk=size)
            self._free_disk(0)

    def read(self, key: str, text: str | None = None, **reading: Any) -> Document:
        """Read a document and keep it; ``reading`` as in :meth:`apb.Engine.read`."""
        return self.add(key, self.engine.read(text, **reading))

    def add(self, key: str, document: Document) -> Document:
        """Keep a document that was read, in place of the one under this key, if any.

        Raises:
            InputError: it alone is larger than the device may hold.
        """
        there = self._kept.get(_name(key))
        if there is not None and there.document is document:
            return self.document(key)
        self.forget(key)
        kept = _Kept(document)
        self._count([kept])
        if kept.device > self.device_bytes:
            raise _too_large(key, kept.device, self.device_bytes)
        self._kept[_name(key)] = kept
        self._settle(kept)
        return document

    def document(self, key: str) -> Document:
        """The document under a key, on the device; it stays there until others need the room.

        Raises:
            InputError: there is none, or its files cannot be used.
        """
        kept = self._kept.get(_name(key))
        if kept is None:
            raise InputError(f"There is no document {key!r}: it was never read, or is forgotten; read it.")
        self._kept.move_to_end(_name(key))
        if not kept.here:
            if kept.device > self.device_bytes:
                raise _too_large(key, kept.device, self.device_bytes)
            self._free_device(kept.device, kept)
            if kept.document is not None and kept.copy is not None:
                kept.document.come_back(kept.copy)
            elif kept.folder is not None:
                # What this keeper wrote is not hashed again, which would take longer than to read it.
                kept.document = self.engine.load(kept.folder, verify=kept.stored is None)
                kept.stored = kept.document.token_ids
        self._settle(kept)
        assert kept.document is not None
        return kept.document

    def ask(self, key: str, query: Question, **options: Any) -> Generation:
        """Answer a question about a document; ``options`` as in :meth:`apb.Document.ask`."""
        answer = self.document(key).ask(query, **options)
        self._settle(self._kept[_name(key)])
        return answer

    def hold(self, key: str, held: bool = True) -> None:
        """Have a document stay on the device, whatever others need; or let it go when the next one needs the room."""
        kept = self._kept.get(_name(key))
        if kept is not None:
            kept.held = held

    def held(self, key: str) -> bool:
        """True if a document is held."""
        kept = self._kept.get(_name(key))
        return kept is not None and kept.held

    @property
    def unwritten(self) -> bool:
        """True if :meth:`write` has something to do."""
        return self._unwritten() is not None

    def write(self) -> None:
        """Write the document that was asked last, of those that are not on disk, in place of any asked before it.

        It stays where it is. So nothing is lost when this process ends, whatever ends it, once all are written.
        """
        name = self._unwritten()
        if name is None:
            return
        kept = self._kept[name]
        assert kept.document is not None
        kept.document.rest()
        for other in list(self._kept.values()):
            if other is kept or self.bytes()["disk"] + kept.size <= self.disk_bytes:
                break
            self._remove(other)
            if other.document is None:
                self._drop(other)
        if self.bytes()["disk"] + kept.size <= self.disk_bytes:
            self._write(name, kept)
        kept.tried = kept.document.token_ids

    def make_room(self, size: int) -> None:
        """Have documents leave the device, until ``size`` of its bytes are free for others, or none is there."""
        self._free_device(size, None)

    def forget(self, key: str) -> None:
        """Drop a document from everywhere, if it is there."""
        kept = self._kept.pop(_name(key), None)
        if kept is not None:
            self._remove(kept)
            if kept.document is not None:
                kept.document.drop()

    def __contains__(self, key: str) -> bool:
        return _name(key) in self._kept

    def place(self, key: str) -> str | None:
        """Where a document is asked from: "device", "host" or "disk"; None if it is not kept."""
        kept = self._kept.get(_name(key))
        if kept is None:
            return None
        return "device" if kept.here else "disk" if kept.copy is None else "host"

    def bytes(self) -> dict[str, int]:
        """Bytes in each place: "device", "host", "disk"; a document counts in every place that has a copy of it."""
        every = self._kept.values()
        return {
            "device": sum(kept.device for kept in every if kept.here),
            "host": sum(kept.host for kept in every),
            "disk": sum(kept.disk for kept in every),
        }

    # --- moving down ------------------------------------------------------------------------------------------------

    def _settle(self, last: _Kept) -> None:
        """Be within all bounds, with the one that was asked last on the device if it fits at all."""
        self._count([kept for kept in self._kept.values() if kept.here])
        self._free_device(0, last)

    def _count(self, here: list[_Kept]) -> None:
        """Measure documents on the device, whose caches may have grown."""
        group, mine = self.engine.group, []
        for kept in here:
            assert kept.document is not None
            cache, tail = kept.document.state.cache, kept.document.state.tail.nbytes
            mine.append([cache.filled + tail, cache.nbytes + tail])
        if group.size > 1 and mine:  # all ranks must move the same documents
            mine = group.all_gather(torch.tensor(mine, device=self.engine.device)).wait().amax(0).tolist()
        for kept, (size, device) in zip(here, mine, strict=True):
            kept.size, kept.device = size, device

    def _free_device(self, more: int, last: _Kept | None) -> None:
        """Have so many bytes free on the device; ``last`` leaves as the last one."""
        for kept in sorted(self._kept.values(), key=lambda kept: kept is last):
            if self.bytes()["device"] + more <= self.device_bytes:
                break
            if kept.here and not kept.held:
                self._move_down(kept)

    def _free_host(self, more: int) -> None:
        """Have so many bytes free in host memory; copies of what is on the device as well go first."""
        every = [kept for kept in self._kept.values() if kept.copy is not None]
        for kept in sorted(every, key=lambda kept: not kept.here):
            if self.bytes()["host"] + more <= self.host_bytes:
                break
            if kept.here:
                kept.drop_copy()
            else:
                self._move_to_disk(kept)

    def _free_disk(self, more: int) -> None:
        """Have so many bytes free on disk; stores of what is elsewhere as well go first."""
        every = [kept for kept in self._kept.values() if kept.disk]
        for kept in sorted(every, key=lambda kept: kept.document is None):
            if self.bytes()["disk"] + more <= self.disk_bytes:
                break
            self._remove(kept)
            if kept.document is None:
                self._drop(kept)

    def _move_down(self, kept: _Kept) -> None:
        """Take a document off the device."""
        document = kept.document
        assert document is not None
        document.rest()
        self._count([kept])
        tokens = document.token_ids
        if kept.copied != tokens:
            kept.drop_copy()
        if kept.size > self.host_bytes:
            self._move_to_disk(kept)
            return
        if kept.copy is None:
            self._free_host(kept.size)
            kept.host = kept.size
        kept.copy, kept.copied = document.leave(kept.copy), tokens

    def _move_to_disk(self, kept: _Kept) -> None:
        """Leave a document on disk alone, or forget it."""
        document, name = kept.document, next(name for name, each in self._kept.items() if each is kept)
        assert document is not None
        if kept.stored != document.token_ids:
            self._remove(kept)
            if self.folder is not None and kept.size <= self.disk_bytes:
                self._free_disk(kept.size)
                self._write(name, kept)
        document.drop()
        kept.document = None
        kept.drop_copy()
        if kept.folder is None:
            self._drop(kept)
        else:
            self._free_disk(0)

    def _write(self, name: str, kept: _Kept) -> None:
        """Write a document to disk, if it can be written."""
        assert self.folder is not None and kept.document is not None
        tokens = kept.document.token_ids
        try:
            kept.document.save(self.folder / name)
        except InputError as error:
            warnings.warn(f"A document is not on disk, and is forgotten once it is nowhere else. {error}", stacklevel=2)
        else:
            kept.folder, kept.stored = self.folder / name, tokens
            kept.disk = _bytes_on_disk(kept.folder)

    def _unwritten(self) -> str | None:
        """The name of what :meth:`write` writes; documents in use are not, whose caches hold more than them."""
        if self.folder is None:
            return None
        for name, kept in reversed(self._kept.items()):
            if kept.document is not None and not kept.held and kept.size <= self.disk_bytes:
                tokens = kept.document.token_ids
                if tokens not in (kept.stored, kept.tried):
                    return name
        return None

    def _remove(self, kept: _Kept) -> None:
        """Remove a document's store, if it has one."""
        if kept.folder is not None:
            if self.engine.mesh.everyone.rank == 0:
                shutil.rmtree(kept.folder)
            self.engine.mesh.everyone.barrier()
        kept.folder, kept.stored, kept.disk = None, None, 0

    def _drop(self, kept: _Kept) -> None:
        self._kept = OrderedDict((name, each) for name, each in self._kept.items() if each is not kept)


def _name(key: str) -> str:
    """The name of a document's folder."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _bytes_on_disk(folder: Path) -> int:
    return sum(int(shard["bytes"]) for shard in manifest_of(folder)["shards"])


def _too_large(key: str, size: int, limit: int) -> InputError:
    return InputError(
        f"The document {key!r} takes {size:,} bytes on the device, and device_bytes is {limit:,}; raise it, or ask a "
        "shorter text."
    )
