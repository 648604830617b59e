"""Documents on disk: as they were, on other numbers of ranks too; and never a wrong one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_document import PROMPT, QUESTIONS, engine_of, llama, read
from torch import Tensor

import apb
import forked
from apb import store
from apb.decoding import Pages, Squeezed
from apb.decoding.cluster_index import ClusterIndex
from apb.decoding.page_index import PageIndex
from byte_checkpoint import TEMPLATE, byte_tokenizer
from models import tiny_model


@pytest.mark.parametrize("strategy", ["full", "apb"])
def test_a_document_comes_back(strategy: str, tmp_path: Path) -> None:
    """By another engine of the same model: its own question bit for bit, others, and a conversation that goes on."""
    engine = engine_of(llama(), strategy)
    document = read(engine, question=PROMPT.query)
    own, other = (document.prefill(query).logits for query in (PROMPT.query, QUESTIONS[2]))
    answer = document.ask(QUESTIONS[4], max_new_tokens=8)
    document.save(tmp_path / "a")
    kept = document.ask(QUESTIONS[1], keep=True, max_new_tokens=5)
    document.save(tmp_path / "kept")
    after = document.ask(QUESTIONS[3], max_new_tokens=5)
    engine.close()
    engine = engine_of(llama(), strategy)
    loaded = engine.load(tmp_path / "a")
    assert (loaded.plan, loaded.read_for, loaded.exact) == (document.plan, (PROMPT.query,), strategy == "full")
    assert torch.equal(loaded.prefill(PROMPT.query).logits, own)
    assert torch.equal(loaded.prefill(QUESTIONS[2]).logits, other)
    again = loaded.ask(QUESTIONS[4], max_new_tokens=8)
    assert (again.token_ids, again.read_for) == (answer.token_ids, "another question")
    conversation = engine.load(tmp_path / "kept")
    assert conversation.token_ids == document.token_ids
    assert conversation.token_ids[-len(kept.token_ids) + 1 :] == tuple(kept.token_ids[:-1])
    assert conversation.ask(QUESTIONS[3], max_new_tokens=5).token_ids == after.token_ids


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_texts_come_back(template: str | None, tmp_path: Path) -> None:
    """Questions are encoded as behind the whole text, though only its end is stored."""
    text = "The keeper of Orrin was called Maud. " * 70
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258)
    engine = apb.Engine.from_model(model, byte_tokenizer(template), strategy="apb", blocks=4)
    document = engine.read(text, question="Who?", system="Be brief." if template else None)
    document.save(tmp_path)
    loaded = engine.load(tmp_path)
    for query, seen in (("Who?", "this question"), ("Where was it?", "another question")):
        first, second = (each.ask(query, max_new_tokens=6) for each in (document, loaded))
        assert first.token_ids == second.token_ids
        assert first.read_for == second.read_for == seen


INDEXED = {"pages": (Pages(0.4, page_size=5), PageIndex), "squeezed": (Squeezed(0.4, cluster_size=4), ClusterIndex)}


@pytest.mark.parametrize("name", INDEXED)
def test_indexes_come_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made while the text was read, and not again: the same tensors, and the same answers. Another page or cluster
    size has an index of its own, and one that lacks a part is damaged."""
    method, kind = INDEXED[name]
    document = read(engine_of(llama(), "full", decoding=method))
    (made,) = document.state.cache.indexes.values()
    assert made.keys() == {0, 1, 2}
    wanted = {layer: (index.covered, index.tensors()) for layer, index in made.items()}
    document.save(tmp_path / "a")
    answer = document.ask(QUESTIONS[4], max_new_tokens=8)
    assert answer.decode["share"] < 0.95
    with monkeypatch.context() as patch:
        patch.setattr(kind, "extend", lambda *_: None)
        loaded = engine_of(llama(), "full", decoding=method).load(tmp_path / "a")
    (restored,) = loaded.state.cache.indexes.values()
    assert restored.keys() == made.keys() and loaded.state.index_s == document.state.index_s
    for layer, index in restored.items():
        assert index.covered > 0
        torch.testing.assert_close((index.covered, index.tensors()), wanted[layer], rtol=0, atol=0)
    assert loaded.ask(QUESTIONS[4], max_new_tokens=8).token_ids == answer.token_ids
    size = "page_size" if name == "pages" else "cluster_size"
    other = engine_of(llama(), "full", decoding=replace(method, **{size: 7}))
    assert list(other.load(tmp_path / "a").state.cache.indexes) == [(name, 7)]
    without(f"index.1.{'least' if name == 'pages' else 'means'}")(tmp_path / "a")
    with pytest.raises(apb.InputError, match="is damaged"):
        engine_of(llama(), "full", decoding=method).load(tmp_path / "a")


def test_means_of_an_earlier_build(tmp_path: Path) -> None:
    """They were stored in fp32: as the kernels read them in the keys' dtype, they are restored in it."""
    model, method = llama().to(torch.bfloat16), INDEXED["squeezed"][0]
    document = read(engine_of(model, "full", decoding=method))
    (made,) = document.state.cache.indexes.values()
    document.save(tmp_path)
    names = [f"index.{layer}.means" for layer in range(3)]
    rewritten(lambda tensors: tensors.update({name: tensors[name].float() for name in names}))(tmp_path)
    (restored,) = engine_of(model, "full", decoding=method).load(tmp_path).state.cache.indexes.values()
    for layer in range(3):
        parts = restored[layer].tensors()
        assert parts["means"].dtype == torch.bfloat16 and parts["labels"].dtype == torch.int32
        torch.testing.assert_close(parts, made[layer].tensors(), rtol=0, atol=0)


def test_writing_again_replaces_and_leaves_nothing(tmp_path: Path) -> None:
    engine = engine_of(llama(), "full")
    document = read(engine)
    document.save(tmp_path)
    first = set(tmp_path.iterdir())
    document.ask(QUESTIONS[0], keep=True, max_new_tokens=3)
    document.save(tmp_path)
    second = set(tmp_path.iterdir())
    assert len(second) == len(first) == 2
    assert first & second == {tmp_path / store.MANIFEST}
    assert engine.load(tmp_path).token_ids == document.token_ids


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        path = folder / store.MANIFEST
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))

    return damage


def shard(folder: Path) -> Path:
    return next(folder.glob("shard-*.safetensors"))


def flip(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[-5] ^= 1
    shard(folder).write_bytes(data)


def rewritten(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """A shard of other tensors, whose checksum is right."""

    def damage(folder: Path) -> None:
        path = shard(folder)
        tensors = load_file(path)
        change(tensors)
        with safe_open(path, framework="pt") as file:
            save_file(tensors, path, metadata=file.metadata())
        manifest(lambda m: m["shards"][0].update(bytes=path.stat().st_size, sha256=store.hash_of(path)))(folder)

    return damage


def hashed_whole(folder: Path) -> None:
    """As before format 3."""
    told = hashlib.sha256(shard(folder).read_bytes()).hexdigest()
    manifest(lambda m: (m.update(format=2), m["shards"][0].update(sha256=told)))(folder)


def without(name: str) -> Callable[[Path], None]:
    """A shard that lacks a tensor."""
    return rewritten(lambda tensors: tensors.pop(name))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (flip, "is not what was written"),
    "a shard cut short": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-9]), "bytes, not"),
    "a shard missing": (lambda f: shard(f).unlink(), "is missing"),
    "a layer missing": (without("1.keys"), "is damaged"),
    "no manifest": (lambda f: (f / store.MANIFEST).unlink(), "There is no document in"),
    "no JSON": (lambda f: (f / store.MANIFEST).write_text("{"), "is not JSON"),
    "another kind of JSON": (lambda f: (f / store.MANIFEST).write_text("[]"), "is no manifest"),
    "a field missing": (manifest(lambda m: m.pop("sizes")), "is damaged"),
    "a later version": (manifest(lambda m: m.update(format=99, apb="9.0")), "is of format 99"),
    "another model": (manifest(lambda m: m["model"].update(fingerprint="x", name="other")), "another model, other"),
    "another dtype": (manifest(lambda m: m.update(dtype="bfloat16")), "is in bfloat16, and the model in float32"),
    "an unknown strategy": (manifest(lambda m: m.update(strategy="magic")), "'magic'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    """One sentence that names the folder and what is wrong."""
    engine = engine_of(llama(), "full")
    read(engine).save(tmp_path / "a")
    damage, sentence = DAMAGE[name]
    damage(tmp_path / "a")
    with pytest.raises(apb.InputError, match=sentence) as caught:
        engine.load(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


def test_shards_are_hashed_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are; documents of before are compared as a whole."""
    path, engine = tmp_path / "file", engine_of(llama(), "full")
    for size in (0, 1, 96, 97, 1000):
        data = Random(size).randbytes(size)
        path.write_bytes(data)
        pieces = [hashlib.sha256(data[start : start + 96]).digest() for start in range(0, size, 96)]
        with monkeypatch.context() as patch:
            patch.setattr(store, "_PIECE", 96)
            patch.setattr(store, "_READ", 60)
            assert store.hash_of(path) == hashlib.sha256(b"".join(pieces)).hexdigest()
    read(engine).save(tmp_path / "a")
    hashed_whole(tmp_path / "a")
    engine.load(tmp_path / "a")
    flip(tmp_path / "a")
    with pytest.raises(apb.InputError, match="is not what was written"):
        engine.load(tmp_path / "a")


def test_weights_tell_models_apart(tmp_path: Path) -> None:
    engine, other = engine_of(llama(), "full"), llama()
    read(engine).save(tmp_path)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(apb.InputError, match="another model"):
        engine_of(other, "full").load(tmp_path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left but what was there; a place that is no folder is refused as well."""
    engine = engine_of(llama(), "full")
    document = read(engine)
    document.save(tmp_path / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", full)
        with pytest.raises(apb.InputError, match="No space left on device"):
            document.save(tmp_path / "a")
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(apb.InputError, match="cannot be written"):
        document.save(tmp_path / "file")


def write_on(folder: Path, ready: Connection) -> None:
    """A process that writes until it is killed."""
    torch.set_num_threads(1)
    document = read(engine_of(llama(), "full"))
    document.save(folder)
    ready.send("ready")
    while True:
        document.ask(QUESTIONS[0], keep=True, max_new_tokens=2)
        document.save(folder)


def test_killed_while_writing(tmp_path: Path) -> None:
    """At whatever moment: the folder holds a document that is whole, and says what reading it anew says."""
    engine, draw, context = engine_of(llama(), "full"), Random(0), forked.context()
    for number in range(3):
        folder = tmp_path / str(number)
        reading, writing = context.Pipe(duplex=False)
        writer = context.Process(target=write_on, args=(folder, writing))
        writer.start()
        assert reading.recv() == "ready"
        time.sleep(draw.random() / 4)
        writer.kill()
        writer.join()
        document = engine.load(folder)
        kept = document.token_ids[len(PROMPT.prefix) + len(PROMPT.document) :]
        prompt = apb.Prompt.from_tokens(PROMPT.prefix, PROMPT.document, [*kept, *document.state.unread, *QUESTIONS[1]])
        expected = engine.prefill(prompt).logits
        torch.testing.assert_close(document.prefill(QUESTIONS[1]).logits, expected, rtol=1e-4, atol=1e-4)
