"""Which stored document a prompt begins with, and its keys and values on their way into another cache."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import apb
from apb.asking import ANOTHER, NONE, THIS
from apb.integrations.loading import Handover, Loader, Place
from apb.integrations.lookup import NEVER, Lookup
from apb.manifest import MANIFEST
from models import tiny_model

PREFIX, TEXT, QUERY = (5, 6), tuple(n % 89 for n in range(3, 240)), (7, 8, 9, 1, 2)
OWN = (*PREFIX, *TEXT, *QUERY)
BLOCK = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text read exactly, one by apb for a question, one by apb for none."""
    folder = tmp_path_factory.mktemp("store")
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    for name, strategy, text, question in (
        ("exact", "full", TEXT, None),
        ("apb", "apb", TEXT[:200], QUERY),
        ("none", "apb", TEXT[50:], None),
    ):
        engine = apb.Engine.from_model(model, strategy=strategy, **({"blocks": 4} if strategy == "apb" else {}))
        engine.read(tokens=text, prefix=PREFIX, question=question).save(folder / name)
        engine.close()
    return folder


def lookup(store: Path, told: list[str] | None = None) -> Lookup:
    return Lookup(store, lambda stored: None, (told if told is not None else []).append)


APB = (*PREFIX, *TEXT[:200])
WITHOUT = (*PREFIX, *TEXT[50:])


@pytest.mark.parametrize(
    ("prompt", "allowance", "expected"),
    [
        (OWN, THIS, ("exact", len(PREFIX + TEXT), NONE)),
        ((*OWN[:50], 0, 0), THIS, ("exact", 50, NONE)),  # a part of an exact document
        ((0, *OWN), THIS, None),
        ((*APB, *QUERY), NEVER, ("exact", len(APB), NONE)),  # approximate ones are not needed
        ((*WITHOUT, 4, 4), NONE, ("none", len(WITHOUT), NONE)),
        ((*WITHOUT, 4, 4), ANOTHER, ("none", len(WITHOUT), NONE)),
        ((*WITHOUT, 4, 4), THIS, ("exact", 2, NONE)),
        (WITHOUT, ANOTHER, ("exact", 2, NONE)),  # nothing stands behind it
        ((*WITHOUT[:-1], 0, 4), ANOTHER, ("exact", 2, NONE)),  # a part of an approximate one
    ],
)
def test_found(store: Path, prompt: tuple[int, ...], allowance: str, expected: tuple[str, int, str] | None) -> None:
    """The document that saves most, exact if that saves as much; approximate ones whole, as allowed."""
    found, _ = lookup(store).find(prompt, allowance)
    assert (found and (found.document.folder.name, found.tokens, found.read_for)) == expected


def test_approximate_ones_serve_their_question(store: Path, tmp_path: Path) -> None:
    """With every token of the prompt; for another question only if that is allowed, and who asks learns of it."""
    shutil.copytree(store / "apb", tmp_path / "apb")
    own, other = (*APB, *QUERY), (*APB, *QUERY, 3)
    found, refused = lookup(tmp_path).find(own, THIS)
    assert found is not None and (found.tokens, found.read_for, refused) == (len(own), THIS, None)
    for allowance in (THIS, NONE):
        found, refused = lookup(tmp_path).find(other, allowance)
        assert found is None and refused is not None and refused.read_for == ANOTHER
    found, refused = lookup(tmp_path).find(other, ANOTHER)
    assert found is not None and (found.tokens, found.read_for, refused) == (len(APB), ANOTHER, None)
    assert found.to_dict() == {
        "document": "apb",
        "document_tokens": len(APB),
        "strategy": "apb",
        "exact": False,
        "read_for": ANOTHER,
    }
    assert lookup(tmp_path).find(own, NEVER)[0] is None


def test_what_comes_and_goes(store: Path, tmp_path: Path) -> None:
    """A document is found once it is whole, told of once if it cannot be used, and gone when it is deleted."""
    told: list[str] = []
    here = lookup(tmp_path, told)
    assert here.find(OWN, THIS) == (None, None)
    shutil.copytree(store / "exact", tmp_path / "a")
    assert here.find(OWN, THIS)[0] is not None
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / MANIFEST).write_text(json.dumps({"format": 99, "apb": "9"}))
    assert len(here.documents()) == len(here.documents()) == 1
    assert len(told) == 1 and "format 99" in told[0]
    shutil.rmtree(tmp_path / "a")
    assert here.documents() == []
    assert Lookup(store, lambda stored: "No.", told.append).documents() == []
    assert told[1:] == ["No."] * 3


class Cache:
    """Pages of a cache that takes keys and values by slots, and where to put those of one layer."""

    def __init__(self, layers: int, heads: range) -> None:
        self.pages = torch.zeros(2, layers, 64 * BLOCK, len(heads), 16)
        self.places = {
            f"layer{n}": Place(n, heads, self.writer(n), torch.device("cpu"), torch.float32) for n in range(layers)
        }

    def writer(self, layer: int):  # type: ignore[no-untyped-def]
        def write(keys: Tensor, values: Tensor, slots: Tensor) -> None:
            self.pages[0, layer, slots], self.pages[1, layer, slots] = keys, values

        return write


def handover(store: Path, start: int, stop: int) -> Handover:
    paths = tuple(map(str, sorted((store / "apb").glob("*.safetensors"))))
    return Handover("request", paths, start, stop, tuple(range(40, 40 - 16, -1)))


@pytest.mark.parametrize("heads", [range(2), range(1, 2)])
@pytest.mark.parametrize(("start", "stop"), [(0, len(APB) + len(QUERY) - 1), (32, 100), (48, len(APB))])
def test_loaded(store: Path, heads: range, start: int, stop: int) -> None:
    """Every token of document and question goes to its slot, of the heads that are held there; nothing else does."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    engine = apb.Engine.from_model(model, strategy="apb", blocks=4)
    session = engine.prefill(apb.Prompt.from_tokens(PREFIX, TEXT[:200], QUERY))
    cache, loader, told = Cache(3, heads), Loader(BLOCK, print), handover(store, start, stop)
    load = loader.start(told, cache.places, synchronize=False)
    for layer in range(3):
        load.wait(f"layer{layer}")
        slots = [told.blocks[n // BLOCK] * BLOCK + n % BLOCK for n in range(start, stop)]
        expected = torch.zeros_like(cache.pages[:, layer])
        for page, whole in zip(expected, session.gather_kv(layer), strict=True):
            page[slots] = whole.transpose(0, 1)[start:stop, heads.start : heads.stop]
        assert torch.equal(cache.pages[:, layer], expected)
    assert load.awaited and load.error is None
    loader.close()


@pytest.mark.parametrize("how", ["gone", "cut", "another dtype", "too few"])
def test_what_cannot_be_loaded(store: Path, tmp_path: Path, how: str) -> None:
    """It is told, nobody waits for ever, and the blocks that were to be filled are known."""
    shutil.copytree(store / "apb", tmp_path / "apb")
    told, cache, sentences = handover(tmp_path, 32, 500 if how == "too few" else 100), Cache(3, range(2)), list[str]()
    path = Path(told.paths[0])
    if how == "gone":
        path.unlink()
    if how == "cut":
        os.truncate(path, path.stat().st_size // 3)
    if how == "another dtype":
        cache.places = {
            name: Place(p.layer, p.heads, p.write, p.device, torch.float16) for name, p in cache.places.items()
        }
    loader = Loader(BLOCK, sentences.append)
    load = loader.start(told, cache.places, synchronize=True)
    load.finish()
    assert load.done and load.error is not None
    assert len(sentences) == 1 and "cannot be loaded for request request" in sentences[0]
    assert handover(tmp_path, 32, 100).blocks_to_fill(BLOCK) == set(range(38, 33, -1))
    loader.close()
