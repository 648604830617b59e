"""Documents read back from disk, on as many ranks as there are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .asking import Asking, OfText, OfTokens
from .distributed.agreeing import from_first, together
from .distributed.collectives import Group
from .errors import InputError
from .hf.cache import ShardCache
from .hf.config import expands
from .hf.host import Staging
from .hf.identity import fingerprint
from .hf.recurrent import states_named
from .hf.tail import Tail
from .layers.recurrent import State as LayerState
from .manifest import damaged, manifest_of
from .planning.methods import METHODS
from .planning.plan import Plan
from .planning.propagation import Propagation
from .state import ROOM, SEAM, State
from .store import INDEX, READ_STATE, STATE, hash_of, reason

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Shard:
    """A rank's shard on disk.

    Attributes:
        path: of its file.
        positions: by layer the true positions in storage order.
        windows: of layers.
        index: the key of the indexes that are in it, and the layers that have one; of none without any.
    """

    path: Path
    positions: dict[int, list[range]]
    windows: dict[int, int]
    index: tuple[tuple[Any, ...], list[int]] = ((), [])

    @classmethod
    def of(cls, path: Path) -> Shard:
        """The shard of a file."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        layers, windows = json.loads(metadata["positions"]), json.loads(metadata.get("windows", "{}"))
        index = json.loads(metadata.get(INDEX, '{"key": [], "layers": []}'))
        return cls(
            path,
            {int(layer): [range(*each) for each in runs] for layer, runs in layers.items()},
            {int(layer): window for layer, window in windows.items()},
            (tuple(index["key"]), index["layers"]),
        )

    def rows(self, layer: int, wanted: range) -> Iterator[tuple[slice, list[range]]]:
        """Where the wanted tokens of a layer are: rows that lie side by side, and their positions."""
        row = start = stop = 0
        places: list[range] = []
        for run in self.positions[layer]:
            part = range(max(run.start, wanted.start), min(run.stop, wanted.stop))
            if part:
                first = row + part.start - run.start
                if places and first != stop:
                    yield slice(start, stop), places
                    places = []
                start, stop = (start if places else first), first + len(part)
                places.append(part)
            row += len(run)
        if places:
            yield slice(start, stop), places


def load(engine: Engine, folder: Path, verify: bool) -> tuple[Asking, State]:
    """What :class:`apb.Document` is made of, from a folder; on all ranks, or the same InputError on all."""
    everyone, device = engine.mesh.everyone, engine.device
    model = fingerprint(engine.model)
    found = together(everyone, device, lambda: manifest_of(folder) if everyone.rank == 0 else {})
    # A writer may replace it at any time: all ranks go by the same one.
    manifest = json.loads(from_first(everyone, device, json.dumps(found).encode()))

    def check() -> list[Path]:
        _check_model(engine, model, folder, manifest)
        with _damage(folder):
            return _files(folder, manifest)

    def compare() -> None:
        """Each process its share, its own shard if any."""
        with _damage(folder):
            for number in range(everyone.rank, len(files), everyone.size):
                if hash_of(files[number], manifest["format"]) != manifest["shards"][number]["sha256"]:
                    raise damaged(folder, f"{files[number].name} is not what was written")

    def fetch() -> tuple[Asking, State]:
        with _damage(folder):
            return _asking(engine, manifest), _state(engine, manifest, [Shard.of(path) for path in files])

    files = together(everyone, device, check)
    if verify:
        together(everyone, device, compare)
    return together(everyone, device, fetch)


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Files that are not as they should be as InputError."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, IndexError) as error:
        raise damaged(folder, reason(error)) from error


def _check_model(engine: Engine, fingerprint: str, folder: Path, manifest: dict[str, Any]) -> None:
    """InputError if a document is not of the engine's model and dtype, or of a strategy that is not here."""
    document = f"The document in {str(folder)!r}"
    dtype = str(engine.dtype).removeprefix("torch.")
    if manifest.get("dtype") != dtype:
        raise InputError(f"{document} is in {manifest.get('dtype')}, and the model in {dtype}; load it in that dtype.")
    model = manifest.get("model") or {}
    if model.get("fingerprint") != fingerprint:
        raise InputError(f"{document} was read by another model, {model.get('name')}; load that one.")
    if manifest.get("strategy") not in METHODS:
        raise InputError(
            f"{document} was read by the strategy {manifest.get('strategy')!r}, which is not in this package."
        )


def _files(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    files = []
    for shard in manifest["shards"]:
        path = folder / Path(shard["file"]).name
        if not path.is_file():
            raise damaged(folder, f"{path.name} is missing")
        if path.stat().st_size != shard["bytes"]:
            raise damaged(folder, f"{path.name} has {path.stat().st_size} bytes, not {shard['bytes']}")
        files.append(path)
    return files


def _asking(engine: Engine, manifest: dict[str, Any]) -> Asking:
    fields = manifest["asking"]
    return OfTokens((), ()) if "text" not in fields else OfText.from_dict(engine.needed_tokenizer(), fields)


def _state(engine: Engine, manifest: dict[str, Any], shards: Sequence[Shard]) -> State:
    prefix, document, query, ranks, rounds = manifest["sizes"]
    method = METHODS[manifest["strategy"]](**manifest["options"])
    told = manifest.get("propagation")
    propagation = None if told is None else Propagation(told["layer"], told["keep"])
    plan = Plan(method, prefix, document, query, ranks, rounds, propagation=propagation)
    with safe_open(shards[-1].path, framework="pt") as last:
        names = ("prefix", "document", "query", "kept", "unread")
        tokens = {name: tuple(last.get_tensor(name).tolist()) for name in names}
        logits = last.get_tensor("logits").to(engine.device)
        states, read_states = (
            states_named(last.keys(), name, last.get_tensor, engine.device_of) for name in (STATE, READ_STATE)
        )
    total = sum(len(tokens[name]) for name in ("prefix", "document", "kept"))
    cache, tail = _cache(engine, shards, total, plan, states)
    return State(
        plan=plan,
        prefix=tokens["prefix"],
        document=tokens["document"],
        query=tokens["query"],
        read_for=tuple(each if isinstance(each, str) else tuple(each) for each in manifest["read_for"]),
        compressor=manifest["compressor"] or "",
        cache=cache,
        tail=replace(tail, states=read_states),
        logits=logits,
        prefill_s=manifest["prefill_s"],
        kept=tokens["kept"],
        unread=tokens["unread"],
        index_s=manifest.get("index_s", 0.0),
    )


def _cache(
    engine: Engine, shards: Sequence[Shard], total: int, plan: Plan, states: dict[int, LayerState]
) -> tuple[ShardCache, Tail]:
    """This rank's part of what is kept, of ``total`` tokens, and of what the document was read for.

    ``states``: those of recurrent layers after the tokens, the same on every rank.
    """
    group = engine.group
    owns_tail = group.rank == group.size - 1
    if group.size == len(shards):  # every rank takes back what it, or its like, has written
        sources, mine = [shards[group.rank]], range(total)
    else:
        sources, mine = list(shards), range(total * group.rank // group.size, total * (group.rank + 1) // group.size)
    staging = Staging() if engine.device.type == "cuda" else None
    layers = max((*shards[0].positions, *states)) + 1
    cache = ShardCache(
        layers,
        capacity=0,
        keeps_new=owns_tail,
        total=total,
        windows=shards[0].windows,
        expands=expands(engine.model.config),
    )
    cache.states = states
    tail: dict[int, tuple[Tensor, Tensor, list[range]]] = {}
    for layer in shards[0].positions:
        device = engine.device_of(layer)
        held = sum(len(place) for shard in sources for _, places in shard.rows(layer, mine) for place in places)
        cache.capacity = held + ROOM * owns_tail
        for keys, values, places in _parts(sources, layer, mine, engine.head_group):
            pair = (keys, values) if staging is None else (staging.to(device, keys), staging.to(device, values))
            cache.fill(layer, *pair, places)
        with safe_open(shards[-1].path, framework="pt") as last:
            keys, values = (x.to(device) for x in _pair(last, f"read.{layer}", engine.head_group, slice(None)))
        if owns_tail:
            tail[layer] = keys, values, [range(plan.query_start, plan.query_start + keys.shape[2])]
        else:
            tail[layer] = keys[:, :, :0], values[:, :, :0], []
    if group.size == len(shards):  # on another number of ranks shards are cut otherwise, and indexes are made anew
        _restore_indexes(engine, cache, shards[group.rank])
    cache.keep_windows(plan.query_start - SEAM)
    return cache, Tail(tail, plan.total)


def _restore_indexes(engine: Engine, cache: ShardCache, shard: Shard) -> None:
    """The indexes of the engine's decode method, if they are in the shard that the cache was filled from."""
    decoding, (key, layers) = engine.reading.decoding, shard.index
    if not layers or key != decoding.index_key:
        return
    restored = cache.indexes.setdefault(key, {})
    with safe_open(shard.path, framework="pt") as file:
        names = list(file.keys())
        for layer in layers:
            start, parts = f"{INDEX}.{layer}.", {}
            for name in names:
                if name.startswith(start):
                    part = _heads(file, name, engine.head_group, slice(None))
                    # Means of clusters were stored in fp32 once, and kernels take them for the keys' dtype.
                    dtype = engine.dtype if part.is_floating_point() else part.dtype
                    parts[name.removeprefix(start)] = part.to(engine.device_of(layer), dtype)
            restored[layer] = decoding.new_index()
            restored[layer].restore(parts)


def _parts(
    shards: Sequence[Shard], layer: int, wanted: range, sharing: Group
) -> Iterator[tuple[Tensor, Tensor, list[range]]]:
    """Keys, values (1, kv_heads, tokens, head_dim) and positions of the wanted tokens of a layer, in storage order.

    They are views of the files. A rank without any gets an empty part, for the shape of its storage.
    """
    found = False
    for shard in shards:
        with safe_open(shard.path, framework="pt") as file:
            for rows, places in shard.rows(layer, wanted):
                found = True
                yield *_pair(file, f"{layer}", sharing, rows), places
    if not found:
        with safe_open(shards[0].path, framework="pt") as file:
            yield *_pair(file, f"{layer}", sharing, slice(0)), []


def _pair(file: Any, name: str, sharing: Group, rows: slice) -> tuple[Tensor, Tensor]:
    """Keys and values (1, kv_heads, rows, head_dim), of the heads that this one of the processes holds."""
    keys, values = (_heads(file, f"{name}.{kind}", sharing, rows).unsqueeze(0) for kind in ("keys", "values"))
    return keys, values


def _heads(file: Any, name: str, sharing: Group, rows: slice) -> Tensor:
    """A tensor's rows (kv_heads, rows, ...), of the heads that this one of the processes holds."""
    part = file.get_slice(name)
    heads = part.get_shape()[0]
    mine = slice(heads * sharing.rank // sharing.size, heads * (sharing.rank + 1) // sharing.size)
    found: Tensor = part[mine, rows]
    return found
