"""Documents on disk: a manifest and a shard of keys and values for each rank that wrote it.

A shard's name is new for every writing, and the manifest is replaced last, in one step: whenever a writer is killed,
the folder holds the old document or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import __version__
from .asking import Asking, OfText, OfTokens
from .distributed.collectives import Group
from .errors import InputError, first_line
from .hf.cache import ShardCache, Tail
from .hf.host import Staging
from .hf.identity import fingerprint
from .hf.recurrent import named_states, states_named
from .manifest import FORMAT, MANIFEST, damaged, manifest_of
from .planning.methods import METHODS
from .planning.plan import Plan
from .state import ROOM, State

if TYPE_CHECKING:
    from .engine import Engine

_KIND = "shard"  # beginning of the names of files of keys and values
# Beginnings of the names of states of recurrent layers, after the document and after what it was read for.
_STATE, _READ_STATE = "state", "read.state"


# --- writing --------------------------------------------------------------------------------------------------------


def save(engine: Engine, asking: Asking, state: State, folder: Path) -> None:
    """Write a document; every rank writes its shard, and rank 0 the manifest."""
    group = engine.group
    if engine.mesh.tensor.size > 1:
        raise InputError("Documents of ranks that share weights cannot be saved yet; read without tensor parallelism.")
    stamp = torch.tensor([secrets.randbits(48)], device=engine.device)
    shards = [
        folder / f"{_KIND}-{int(group.broadcast(stamp).item()):012x}-{rank}.safetensors" for rank in range(group.size)
    ]

    def write_shard() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(state), shards[group.rank], metadata=_places(state))

    def write_manifest() -> None:
        if group.rank == 0:
            part = folder / f"{MANIFEST}.part"
            part.write_text(json.dumps(_manifest(engine, asking, state, shards), indent=1), encoding="utf-8")
            part.replace(folder / MANIFEST)

    for step in (write_shard, write_manifest):
        problem = None
        try:
            step()
        except (OSError, SafetensorError) as error:
            problem = f"The document cannot be written to {str(folder)!r}: {_reason(error)}."
        # All ranks learn of it, and wait for each other.
        if group.sum(torch.tensor([int(problem is not None)], device=engine.device)).item():
            with suppress(OSError):
                shards[group.rank].unlink()
            raise InputError(problem or f"The document cannot be written to {str(folder)!r} by another rank.")
    if group.rank == 0:
        for each in set(folder.glob(f"{_KIND}-*.safetensors")) - set(shards):
            each.unlink()


def _tensors(state: State) -> dict[str, Tensor]:
    """The tensors of a rank's shard; keys and values are (kv_heads, tokens, head_dim).

    They are copied on the host: a second cache may not fit on the device.
    """
    found = {"logits": state.logits.contiguous()}
    for name in ("prefix", "document", "query", "kept", "unread"):
        found[name] = torch.tensor(getattr(state, name), dtype=torch.long)
    state.cache.forget(len(state.token_ids))
    if state.cache.keeps_new:  # the same on every rank
        found |= named_states(state.cache.states, _STATE) | named_states(state.tail.states, _READ_STATE)
    for layer in state.cache.indices:
        for name, part in zip(("keys", "values"), state.cache.shard(layer), strict=True):
            found[f"{layer}.{name}"] = part.transpose(0, 1).cpu().contiguous()
        keys, values, _ = state.tail.layers[layer]
        found |= {f"read.{layer}.keys": keys[0].cpu(), f"read.{layer}.values": values[0].cpu()}
    return found


def _places(state: State) -> dict[str, str]:
    """A shard's metadata: for every layer the true positions of its tokens, [start, stop] in storage order."""
    layers = {
        layer: [[each.start, each.stop] for each in state.cache.positions(layer)] for layer in state.cache.indices
    }
    return {"positions": json.dumps(layers)}


def _manifest(engine: Engine, asking: Asking, state: State, shards: Sequence[Path]) -> dict[str, Any]:
    plan = state.plan
    return {
        "format": FORMAT,
        "apb": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"name": str(engine.model.name_or_path), "fingerprint": fingerprint(engine.model)},
        "dtype": str(engine.dtype).removeprefix("torch."),
        "tokens": len(state.token_ids),
        "tokens_sha256": tokens_hash(state.token_ids),
        "strategy": plan.strategy,
        "options": asdict(plan.method),
        "sizes": [plan.prefix, plan.document, plan.query, plan.ranks, plan.rounds],
        "exact": plan.exact,
        "compressor": state.compressor if plan.passing_length else None,
        "read_for": list(state.read_for),
        "prefill_s": state.prefill_s,
        "asking": asking.to_dict(),
        "shards": [{"file": path.name, "bytes": path.stat().st_size, "sha256": _hash(path)} for path in shards],
    }


def tokens_hash(token_ids: Sequence[int]) -> str:
    """A sha256 of token ids."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A rank's shard on disk: its path, and by layer the true positions in storage order."""

    path: Path
    positions: dict[int, list[range]]

    @classmethod
    def of(cls, path: Path) -> Shard:
        """The shard of a file."""
        with safe_open(path, framework="pt") as file:
            layers = json.loads((file.metadata() or {})["positions"])
        return cls(path, {int(layer): [range(*each) for each in runs] for layer, runs in layers.items()})


def load(engine: Engine, folder: Path, verify: bool) -> tuple[Asking, State]:
    """What :class:`apb.Document` is made of, from a folder."""
    manifest = manifest_of(folder)
    _check_model(engine, folder, manifest)
    try:
        files = _files(folder, manifest)
        if verify:
            _verify(engine.group, engine.device, folder, manifest, files)
        return _asking(engine, manifest), _state(engine, manifest, [Shard.of(path) for path in files])
    except (SafetensorError, OSError, KeyError, TypeError, IndexError) as error:
        raise damaged(folder, _reason(error)) from error


def _check_model(engine: Engine, folder: Path, manifest: dict[str, Any]) -> None:
    """InputError if a document is not of the engine's model and dtype, or of a strategy that is not here."""
    document = f"The document in {str(folder)!r}"
    if engine.mesh.tensor.size > 1:
        raise InputError(f"{document} cannot be read by ranks that share weights yet; leave tensor parallelism out.")
    dtype = str(engine.dtype).removeprefix("torch.")
    if manifest.get("dtype") != dtype:
        raise InputError(f"{document} is in {manifest.get('dtype')}, and the model in {dtype}; load it in that dtype.")
    model = manifest.get("model") or {}
    if model.get("fingerprint") != fingerprint(engine.model):
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


def _verify(group: Group, device: torch.device, folder: Path, manifest: dict[str, Any], files: Sequence[Path]) -> None:
    """InputError on all ranks if a shard is not what was written: each rank checks its share, its own shard if any."""
    wrong = len(files)
    for number in range(group.rank, len(files), group.size):
        try:
            same = _hash(files[number]) == manifest["shards"][number]["sha256"]
        except (OSError, KeyError):  # the others wait below
            same = False
        wrong = wrong if same else min(wrong, number)
    first = int(group.all_gather(torch.tensor([wrong], device=device)).wait().min())
    if first < len(files):
        raise damaged(folder, f"{files[first].name} is not what was written")


def _asking(engine: Engine, manifest: dict[str, Any]) -> Asking:
    fields = manifest["asking"]
    return OfTokens((), ()) if "text" not in fields else OfText.from_dict(engine.needed_tokenizer(), fields)


def _state(engine: Engine, manifest: dict[str, Any], shards: Sequence[Shard]) -> State:
    prefix, document, query, ranks, rounds = manifest["sizes"]
    method = METHODS[manifest["strategy"]](**manifest["options"])
    plan = Plan(method, prefix, document, query, ranks, rounds)
    with safe_open(shards[-1].path, framework="pt") as last:
        names = ("prefix", "document", "query", "kept", "unread")
        tokens = {name: tuple(last.get_tensor(name).tolist()) for name in names}
        logits = last.get_tensor("logits").to(engine.device)
        states, read_states = (
            states_named(last.keys(), name, last.get_tensor, engine.device_of) for name in (_STATE, _READ_STATE)
        )
    total = sum(len(tokens[name]) for name in ("prefix", "document", "kept"))
    group = engine.group
    owns_tail = group.rank == group.size - 1
    own = group.size == len(shards)  # every rank takes back what it, or its like, has written
    mine = range(total) if own else range(total * group.rank // group.size, total * (group.rank + 1) // group.size)
    layers = shards[0].positions
    read = shards[group.rank].positions if own else {layer: [mine] for layer in layers}
    held = max(sum(map(len, runs)) for runs in read.values())
    cache = ShardCache(max((*layers, *states)) + 1, capacity=held + ROOM * owns_tail, keeps_new=owns_tail, total=total)
    cache.states = states
    tail: dict[int, tuple[Tensor, Tensor, list[range]]] = {}
    staging = Staging() if engine.device.type == "cuda" else None
    for layer in layers:
        device = engine.device_of(layer)
        parts = _slices([shards[group.rank]] if own else shards, layer, mine)
        if staging is not None:
            parts = ((staging.to(device, keys), staging.to(device, values), part) for keys, values, part in parts)
        cache.fill(layer, parts)
        with safe_open(shards[-1].path, framework="pt", device=str(device)) as last:
            keys, values = (last.get_tensor(f"read.{layer}.{name}").unsqueeze(0) for name in ("keys", "values"))
        if owns_tail:
            tail[layer] = keys, values, [range(plan.query_start, plan.total)]
        else:
            tail[layer] = keys[:, :, :0], values[:, :, :0], []
    return State(
        plan=plan,
        prefix=tokens["prefix"],
        document=tokens["document"],
        query=tokens["query"],
        read_for=tuple(each if isinstance(each, str) else tuple(each) for each in manifest["read_for"]),
        compressor=manifest["compressor"] or "",
        cache=cache,
        tail=Tail(tail, plan.total, read_states),
        logits=logits,
        prefill_s=manifest["prefill_s"],
        kept=tokens["kept"],
        unread=tokens["unread"],
    )


def _slices(shards: Sequence[Shard], layer: int, wanted: range) -> Iterator[tuple[Tensor, Tensor, range]]:
    """Keys, values (1, kv_heads, tokens, head_dim) and positions of the wanted tokens of a layer, in storage order.

    They are views of the files. A rank without any gets an empty part, for the shape of its storage.
    """
    found = False
    for shard in shards:
        with safe_open(shard.path, framework="pt") as file:
            row = 0
            for run in shard.positions[layer]:
                part = range(max(run.start, wanted.start), min(run.stop, wanted.stop))
                if part:
                    found = True
                    rows = slice(row + part.start - run.start, row + part.stop - run.start)
                    keys, values = (file.get_slice(f"{layer}.{name}")[:, rows] for name in ("keys", "values"))
                    yield keys.unsqueeze(0), values.unsqueeze(0), part
                row += len(run)
    if not found:
        with safe_open(shards[0].path, framework="pt") as file:
            keys, values = (file.get_slice(f"{layer}.{name}")[:, :0] for name in ("keys", "values"))
            yield keys.unsqueeze(0), values.unsqueeze(0), range(0)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)
