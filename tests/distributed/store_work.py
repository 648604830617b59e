"""What two ranks do with stores that are damaged, or that one of them cannot write; and how one of them dies."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import apb
from apb import store
from apb.distributed.collectives import Group
from apb.distributed.mesh import Mesh
from cases import Case

PROMPT = Case(1, document=90).prompt
ASKED = (7, 38, 69)


def engine_of(group: Group) -> apb.Engine:
    """Of the same model everywhere."""
    return apb.Engine.from_model(Case(1).model(), strategy="ring", mesh=Mesh.of(group))


def read(engine: apb.Engine) -> apb.Document:
    """The document of all tests."""
    return engine.read(tokens=PROMPT.document, prefix=PROMPT.prefix)


def shard(folder: Path, number: int) -> Path:
    """The file of a rank."""
    return folder / json.loads((folder / store.MANIFEST).read_text())["shards"][number]["file"]


def flip(number: int) -> Callable[[Path], Any]:
    """Another bit in a rank's file."""

    def damage(folder: Path) -> None:
        data = bytearray(shard(folder, number).read_bytes())
        data[-5] ^= 1
        shard(folder, number).write_bytes(data)

    return damage


def change(**fields: Any) -> Callable[[Path], Any]:
    """Other fields in the manifest."""

    def damage(folder: Path) -> None:
        path = folder / store.MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def lacking(folder: Path) -> None:
    """A layer is missing from rank 1's file, and the checksum is right: only that rank finds out, and late."""
    path = shard(folder, 1)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["2.values"]
    save_file(tensors, path, metadata=metadata)
    shards = json.loads((folder / store.MANIFEST).read_text())["shards"]
    shards[1] |= {"bytes": path.stat().st_size, "sha256": store.hash_of(path)}
    change(shards=shards)(folder)


# By name: what is done to a store, and what is said of it.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rank 0's file": (flip(0), "-0.safetensors is not what was written"),
    "rank 1's file": (flip(1), "-1.safetensors is not what was written"),
    "a file missing": (lambda folder: shard(folder, 1).unlink(), "-1.safetensors is missing"),
    "a layer missing": (lacking, "is damaged"),
    "a later version": (change(format=99, apb="9.0"), "is of format 99"),
    "no manifest": (lambda folder: (folder / store.MANIFEST).unlink(), "There is no document in"),
}


def full(tensors: Any, path: Path, metadata: Any) -> None:
    """A disk with room for a part of a file."""
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def killed(tensors: Any, path: Path, metadata: Any) -> None:
    """The end of a process in the middle of a file."""
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def everything(folder: str) -> None:
    """One rank's part; writes what it was told in each case to the folder, and rank 1 dies at the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group, place = Group.of_world(), Path(folder)
    engine = engine_of(group)
    document = read(engine)
    told = {}
    for name, (damage, _) in DAMAGE.items():
        document.save(place / name)
        if group.rank == 0:
            damage(place / name)
        group.barrier()
        told[name] = told_by(lambda name=name: engine.load(place / name))
    document.save(place / "whole")
    for rank in range(2):
        with patch.object(store, "save_file", full if group.rank == rank else save_file):
            told[f"rank {rank}'s disk"] = told_by(lambda: document.save(place / "whole"))
    group.barrier()
    told["files"] = len(list((place / "whole").iterdir()))
    told["logits"] = engine.load(place / "whole").prefill(ASKED).logits
    torch.save(told, place / f"rank{group.rank}.pt")
    document.ask(ASKED, keep=True, max_new_tokens=3)
    with patch.object(store, "save_file", killed if group.rank == 1 else save_file):
        document.save(place / "whole")


def told_by(work: Callable[[], Any]) -> str:
    """The sentence by which something is refused."""
    try:
        work()
    except apb.InputError as error:
        return str(error)
    return "nothing"
