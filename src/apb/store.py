"""Documents written to disk: a manifest and a shard of keys and values for each rank.

A shard's name is new for every writing, and the manifest is replaced last, in one step: whenever a writer is killed,
the folder holds the old document or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from . import __version__
from .asking import Asking
from .decoding import Decoding
from .distributed.agreeing import together
from .distributed.collectives import Group
from .errors import InputError, first_line
from .hf.identity import fingerprint
from .hf.recurrent import named_states
from .manifest import FORMAT, MANIFEST
from .state import State

if TYPE_CHECKING:
    from .engine import Engine

_KIND = "shard"  # beginning of the names of files of keys and values
# Bytes of a file that are hashed by themselves, and of those read at a time.
_PIECE, _READ = 64 << 20, 1 << 20
INDEX = "index"
"""Beginning of the names of what a decode method has made of the keys; name of the metadata: its key, its layers."""
STATE, READ_STATE = "state", "read.state"
"""Beginnings of the names of states of recurrent layers, after the document and after what it was read for."""


def save(engine: Engine, asking: Asking, state: State, folder: Path) -> None:
    """Write a document; every rank writes its shard, and rank 0 the manifest. If one cannot, none has."""
    everyone, device, group = engine.mesh.everyone, engine.device, engine.group
    stamp = int(everyone.broadcast(torch.tensor([secrets.randbits(48)], device=device)).item())
    shards = [folder / f"{_KIND}-{stamp:012x}-{rank}.safetensors" for rank in range(group.size)]
    writes = engine.mesh.tensor.rank == 0  # of the processes that share weights the first one
    tensors, model = _tensors(state, engine.head_group), fingerprint(engine.model)
    decoding = engine.reading.decoding
    layers = _index_tensors(tensors, state, decoding, engine.head_group)

    def write_shard() -> None:
        if writes:
            with _told(folder):
                folder.mkdir(parents=True, exist_ok=True)
                save_file(tensors, shards[group.rank], metadata=_places(state) | _index_places(decoding, layers))

    def write_manifest() -> None:
        if everyone.rank == 0:
            with _told(folder):
                part = folder / f"{MANIFEST}.part"
                part.write_text(json.dumps(_manifest(engine, model, asking, state, shards), indent=1), encoding="utf-8")
                part.replace(folder / MANIFEST)

    try:
        together(everyone, device, write_shard)
        together(everyone, device, write_manifest)
    except InputError:
        if writes:
            with suppress(OSError):
                shards[group.rank].unlink()
        raise
    if everyone.rank == 0:
        for each in set(folder.glob(f"{_KIND}-*.safetensors")) - set(shards):
            each.unlink()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Failures to write as InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"The document cannot be written to {str(folder)!r}: {reason(error)}.") from error


def _tensors(state: State, heads: Group) -> dict[str, Tensor]:
    """The tensors of a rank's shard; keys and values are (kv_heads, tokens, head_dim), of the heads of all processes.

    They are copied on the host: a second cache may not fit on the device.
    """
    found = {"logits": state.logits.contiguous()}
    for name in ("prefix", "document", "query", "kept", "unread"):
        found[name] = torch.tensor(getattr(state, name), dtype=torch.long)
    state.cache.forget(len(state.token_ids))
    if state.cache.keeps_new:  # the same on every rank
        found |= named_states(state.cache.states, STATE) | named_states(state.tail.states, READ_STATE)
    for layer in state.cache.indices:
        keys, values, _ = state.tail.layers[layer]
        pairs = {f"{layer}": state.cache.shard(layer), f"read.{layer}": (x[0].transpose(0, 1) for x in (keys, values))}
        for name, pair in pairs.items():
            for kind, part in zip(("keys", "values"), pair, strict=True):
                _add(found, f"{name}.{kind}", part.transpose(0, 1), heads)
    return found


def _add(tensors: dict[str, Tensor], name: str, part: Tensor, heads: Group) -> None:
    """Add a tensor (kv_heads, ...) with the heads of all processes that share weights, on the first of them."""
    every = heads.gather(part.contiguous())
    if every is not None:
        here = [each.cpu() for each in every]
        tensors[name] = torch.cat(here) if len(here) > 1 else here[0]  # it may be gigabytes


def _index_tensors(tensors: dict[str, Tensor], state: State, decoding: Decoding, heads: Group) -> list[int]:
    """Add the indexes of a decode method; the layers that have one with keys in it."""
    kept = {} if decoding.index_key is None else state.cache.indexes.get(decoding.index_key, {})
    layers = []
    for layer, index in sorted(kept.items()):
        parts = index.tensors()
        layers += [layer] if parts else []
        for name, part in parts.items():
            _add(tensors, f"{INDEX}.{layer}.{name}", part, heads)
    return layers


def _index_places(decoding: Decoding, layers: Sequence[int]) -> dict[str, str]:
    """The metadata of a shard's indexes."""
    return {INDEX: json.dumps({"key": decoding.index_key, "layers": layers})} if layers else {}


def _places(state: State) -> dict[str, str]:
    """A shard's metadata: for every layer the true positions of its tokens, [start, stop] in storage order; windows."""
    layers = {
        layer: [[each.start, each.stop] for each in state.cache.positions(layer)] for layer in state.cache.indices
    }
    return {"positions": json.dumps(layers), "windows": json.dumps(dict(state.cache.windows))}


def _manifest(engine: Engine, model: str, asking: Asking, state: State, shards: Sequence[Path]) -> dict[str, Any]:
    plan = state.plan
    return {
        "format": FORMAT,
        "apb": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"name": _findable(str(engine.model.name_or_path)), "fingerprint": model},
        "dtype": str(engine.dtype).removeprefix("torch."),
        "tokens": len(state.token_ids),
        "tokens_sha256": tokens_hash(state.token_ids),
        "strategy": plan.strategy,
        "options": asdict(plan.method),
        "propagation": None if plan.propagation is None else asdict(plan.propagation) | (plan.propagated() or {}),
        "sizes": [plan.prefix, plan.document, plan.query, plan.ranks, plan.rounds],
        "exact": plan.exact,
        "compressor": state.compressor if plan.passing_length else None,
        "read_for": list(state.read_for),
        "prefill_s": state.prefill_s,
        "index": engine.reading.decoding.index_key,
        "index_s": state.index_s,
        "asking": asking.to_dict(),
        "shards": [{"file": path.name, "bytes": path.stat().st_size, "sha256": hash_of(path)} for path in shards],
    }


def _findable(model: str) -> str:
    """A model's name as it can be found from any folder; ids of the hub stay as they are."""
    return str(Path(model).absolute()) if model and Path(model).exists() else model


def tokens_hash(token_ids: Sequence[int]) -> str:
    """A sha256 of token ids."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def hash_of(path: Path, format: int = FORMAT) -> str:
    """The hash of a file in a manifest: sha256 over the sha256 of each of its pieces, which threads share.

    ``format``: of the manifest; before 3 it is the sha256 of the whole file.
    """
    if format < 3:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def piece(start: int) -> bytes:
        digest, left = hashlib.sha256(), _PIECE
        with path.open("rb") as file:
            file.seek(start)
            while left and (part := file.read(min(left, _READ))):
                digest.update(part)
                left -= len(part)
        return digest.digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(piece, range(0, path.stat().st_size, _PIECE))
        return hashlib.sha256(b"".join(digests)).hexdigest()


def reason(error: Exception) -> str:
    """What went wrong with a file, in few words."""
    return getattr(error, "strerror", None) or first_line(error)
