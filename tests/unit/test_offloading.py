"""Keys and values in host memory: read layer by layer, or the chosen ones alone; the same numbers as on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_document import QUESTIONS, engine_of, llama, read
from torch import Tensor

import apb
from apb.decoding import Decoding, Dense, Indexed, Pages, Retrieval, Squeezed, Streamed
from apb.decoding.base import RECENT
from apb.decoding.streaming import Streaming, _Buffer
from apb.hf.offloading import check
from apb.hf.pinned import HostMemory
from families import PECULIAR, make

PREFIX, QUERY, ANSWER = [1, 2], [5, 6, 7], [12, 70, 33, 33, 1]
PROMPT = apb.Prompt.from_tokens(PREFIX, [(37 * i * i + 11 * i) % 97 for i in range(301)], QUERY)
# Methods with keys and values in host memory, and those that attend to the same on the device.
PAIRS: list[tuple[Decoding, Decoding]] = [
    (Streamed(), Dense()),
    (Retrieval(0.3), Pages(0.3)),
    (Retrieval(0.3, "squeezed"), Squeezed(0.3)),
]


def decoded(method: Decoding, model: Any) -> tuple[Tensor, apb.Session]:
    session = apb.Engine.from_model(model, strategy="full", decoding=method).prefill(PROMPT)
    return torch.stack([session.extend([token]) for token in ANSWER]), session


@pytest.mark.parametrize(("away", "here"), PAIRS, ids=lambda method: method.name)
@pytest.mark.parametrize("family", [None, "gemma2", "gemma3n_text"])
def test_the_same_as_on_the_device(away: Decoding, here: Decoding, family: str | None) -> None:
    """Logits, what is told of the answer, and the whole cache; of layers with a window nothing moves, and layers that
    share keys and values find them."""
    model = llama() if family is None else make(*PECULIAR[family])
    (logits, session), (wanted, other) = decoded(away, model), decoded(here, model)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert session.share == other.share
    cache, moved = session.cache, 0
    for layer in cache.indices:
        torch.testing.assert_close(session.gather_kv(layer), other.gather_kv(layer), rtol=1e-4, atol=1e-4)
        far = cache.far(layer)
        assert (far is None) == (layer in cache.windows)
        moved += far is not None
        if far is not None:
            assert len(far[0]) == len(PROMPT) - RECENT and len(cache.near(layer)[0]) == RECENT + len(ANSWER)
            assert cache.layers[layer].keys.shape[2] <= RECENT + len(ANSWER) + cache.growth
    assert moved


@pytest.mark.parametrize(("away", "here"), PAIRS, ids=lambda method: method.name)
def test_documents(away: Decoding, here: Decoding, tmp_path: Path) -> None:
    """Questions, a kept turn, a text that goes on, a copy, host memory of a keeper and a disk: the answers, and that
    what is there is in host memory still."""

    def told(method: Decoding) -> list[Any]:
        engine = engine_of(llama(), "full", decoding=method)
        document = read(engine)
        found: list[Any] = [document.ask(query, max_new_tokens=6).token_ids for query in QUESTIONS[:3]]
        document.ask(QUESTIONS[3], keep=True, max_new_tokens=6)
        copy = document.copy()
        found += [each.ask(QUESTIONS[9], max_new_tokens=6).token_ids for each in (document, copy)]
        assert document.state.cache.offloaded == copy.state.cache.offloaded == (method == away)
        document.save(tmp_path / method.name)
        loaded = engine.load(tmp_path / method.name)
        found.append(loaded.ask(QUESTIONS[5], max_new_tokens=6).token_ids)
        documents = apb.Documents(engine, 1 << 30, 1 << 30)
        documents.add("it", loaded)
        documents.make_room(1 << 30)
        assert documents.place("it") == "host"
        found.append(documents.ask("it", QUESTIONS[6], max_new_tokens=6).token_ids)
        text = [*document.state.document, *range(3, 60)]
        engine.read(tokens=text, prefix=document.state.prefix, after=document)
        found.append(document.prefill(QUESTIONS[7]).logits)
        document.ask(QUESTIONS[7], max_new_tokens=6)
        assert document.state.cache.offloaded == (method == away)
        return found

    if isinstance(away, Retrieval) and away.selector == "squeezed":
        away, here = replace(away, share=1.0), replace(here, share=1.0)
    for mine, wanted in zip(told(away), told(here), strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(wanted), rtol=1e-4, atol=1e-4)


class Layers:
    """A shard of layers in host memory, of different sizes; the second one has nothing there."""

    indices = (0, 1, 2, 5)

    def __init__(self) -> None:
        self.keys = {layer: torch.randn(7, 2 + layer, 4).transpose(0, 1) for layer in (0, 2, 5)}

    def far(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return (self.keys[layer], -self.keys[layer]) if layer in self.keys else None


def test_the_next_layer_is_fetched_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through two buffers, the first layer after the last one; nothing twice, and a layer out of turn is there too."""
    filled: list[int] = []
    fill = _Buffer.fill
    monkeypatch.setattr(_Buffer, "fill", lambda self, layer, far: (filled.append(layer), fill(self, layer, far))[1])
    shard = Layers()
    streaming = Streaming(shard)
    cpu = torch.device("cpu")
    seen = []
    for layer, started in ((0, [0, 2]), (1, []), (2, [5]), (5, [0]), (0, [2]), (2, [5]), (0, [0, 2])):
        pair = streaming.fetch(layer, cpu)
        assert filled == started, layer
        filled.clear()
        if pair is not None:
            assert torch.equal(pair[0], shard.keys[layer]) and torch.equal(pair[1], -shard.keys[layer])
            seen.append(pair[0].data_ptr())
    assert streaming.fetch(1, cpu) is None
    assert len(set(seen)) == 2


def test_what_cannot_be_in_host_memory_is_refused() -> None:
    """Before anything is read: latents, from which every pass makes keys, and layers on several GPUs."""
    with pytest.raises(apb.InputError, match=r"'deepseek_v3' models expand what the cache holds"):
        apb.Engine.from_model(make(*PECULIAR["deepseek_v3"]), strategy="full", decoding=Retrieval())
    with pytest.raises(apb.InputError, match="its layers are on 2"):
        check(llama().config, [torch.device("cuda", index) for index in range(2)])


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma2"])
def test_a_document_of_peculiar_layers_is_indexed(family: str) -> None:
    """Latents when a pass makes keys of them, layers with a window never; a budget of everything is exact."""
    model = make(*PECULIAR[family])
    wanted = read(engine_of(model, "full")).prefill(QUESTIONS[3])
    expected = [wanted.extend([token]) for token in ANSWER]
    wanted.cache.clear()
    document = read(engine_of(model, "full", decoding=Pages(1.0, page_size=4)))
    session = document.prefill(QUESTIONS[3])
    torch.testing.assert_close([session.extend([token]) for token in ANSWER], expected, rtol=1e-4, atol=1e-4)


def test_little_that_has_come_since_stays() -> None:
    """A turn of a conversation does not move all that is in host memory again."""
    engine = engine_of(llama(), "full", decoding=Streamed())
    document = engine.read(tokens=[(7 * i) % 97 for i in range(900)])
    before = document.state.cache.layers[0].far
    document.ask(QUESTIONS[3], keep=True, max_new_tokens=6)
    assert document.state.cache.layers[0].far is before
    document.ask([9] * 150, keep=True, max_new_tokens=6)
    document.ask(QUESTIONS[3], max_new_tokens=2)
    assert document.state.cache.layers[0].far.tokens > before.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_host_memory_begins_with_a_page(dtype: torch.dtype) -> None:
    """Rows of GPUs' usual sizes then begin where their reads do."""
    for count in (1, 5, 3 << 20):
        numbers = HostMemory(count, dtype, []).numbers
        assert numbers.shape == (count,) and numbers.data_ptr() % 4096 == 0


def test_a_selector_is_checked() -> None:
    with pytest.raises(apb.InputError, match=r"Unknown selector 'all'; choose one of pages, squeezed\."):
        Retrieval(selector="all")
    assert issubclass(Retrieval, Indexed) and Retrieval(0.3).index_key == Pages(0.3).index_key
