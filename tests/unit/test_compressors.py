"""Compressors: scores against hand computation, the choice of the best, and files of trained heads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import apb
from apb.compressors import COMPRESSORS, BlockView, Head, make_compressor
from apb.compressors.query import Query
from apb.compressors.retaining import Retaining
from apb.hf.heads import HeadShape, load_heads
from apb.hf.random_weights import shape_config
from apb.kernels import selection
from apb.kernels.selection import attention_received
from apb.planning.plan import Block
from models import tiny_heads, tiny_model

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
FEATURES = (HEADS + 2 * KV_HEADS) * HEAD_DIM


def view(tokens: int = 12, rows: int = 3, layer: int = 1, block: int = 2, seed: int = 0, passed: int = 4) -> BlockView:
    """A block of random keys, with query rows and what stood before RoPE."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return BlockView(
        layer=layer,
        block=Block(block, 40, 40 + tokens, 0, 0),
        k=draw(tokens, KV_HEADS, HEAD_DIM),
        v=draw(tokens, KV_HEADS, HEAD_DIM),
        query=draw(rows, HEADS, HEAD_DIM),
        scale=0.3,
        passed=passed,
        before_rope=draw(tokens, FEATURES),
        q=draw(tokens, HEADS, HEAD_DIM),
    )


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 150])
@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_query_scores(tokens: int, rows: int, softcap: float | None) -> None:
    """query: softmax over the block of each query row's logits, as the layer caps them, mean over rows and the group's
    heads; however many query rows there are."""
    seen = replace(view(tokens, rows), softcap=softcap)
    actual = make_compressor("query").score(seen)
    for kv_head in range(KV_HEADS):
        total = [0.0] * tokens
        for row in range(rows):
            for head in (2 * kv_head, 2 * kv_head + 1):
                logits = [0.3 * float(seen.query[row, head] @ seen.k[token, kv_head]) for token in range(tokens)]
                logits = logits if softcap is None else [softcap * math.tanh(logit / softcap) for logit in logits]
                whole = sum(map(math.exp, logits))
                total = [sum_ + math.exp(logit) / whole for sum_, logit in zip(total, logits, strict=True)]
        expected = [sum_ / (2 * rows) for sum_ in total]
        torch.testing.assert_close(actual[kv_head], torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert (actual.shape, actual.dtype) == ((KV_HEADS, tokens), torch.float32)


@pytest.mark.parametrize(("passed", "edge"), [(0, 0), (3, 0), (4, 1), (11, 2), (127, 31), (1000, 32)])
def test_query_edge_scores(passed: int, edge: int) -> None:
    """query-edge: query's scores, but the last tokens before all others: a quarter of what is passed, at most 32."""
    seen = view(tokens=300, passed=passed)
    actual, plain = (make_compressor(name).score(seen) for name in ("query-edge", "query"))
    assert torch.equal(actual[:, : 300 - edge], plain[:, : 300 - edge])
    assert (actual[:, 300 - edge :] > 1).all()  # no share of attention is


@pytest.mark.parametrize("name", ["query", "query-edge"])
def test_blocks_are_scored_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each by itself, in a call for those that lie evenly, are equally long and pass equally many pairs."""
    whole, compressor, calls = view(tokens=100), make_compressor(name), []
    places = ((3, 15), (15, 27), (27, 39), (40, 52), (53, 65), (65, 76), (76, 87), (87, 98))
    passed = (4, 4, 4, 4, 4, 4, 8, 8)
    blocks = [replace(whole, k=whole.k[slice(*each)], passed=count) for each, count in zip(places, passed, strict=True)]
    blocks.append(replace(whole, k=whole.k[87:98].clone(), passed=8))
    alone = [compressor.score(each) for each in blocks]

    def counted(query: Tensor, k: Tensor, *others: Any) -> Tensor:
        calls.append(len(k))
        monkeypatch.undo()
        received = attention_received(query, k, *others)
        monkeypatch.setattr(selection, "attention_received", counted)
        return received

    monkeypatch.setattr(selection, "attention_received", counted)
    together = compressor.score_all(blocks)
    assert calls == [3, 2, 1, 2, 1]
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


def test_a_childs_own_scores_are_those_of_all_blocks() -> None:
    """Whatever its parent computes for several blocks at once."""

    class Twice(Query):
        def score(self, seen: BlockView) -> Tensor:
            return 2 * super().score(seen)

    blocks = [view(seed=1), view(seed=2)]
    for block, scores in zip(blocks, Twice().score_all(blocks), strict=True):
        assert torch.equal(scores, 2 * make_compressor("query").score(block))


@pytest.mark.parametrize("name", ["query", "query-edge"])
def test_shares_of_the_whole_text_compare_over_blocks(name: str) -> None:
    """A token is worth its share of the question's attention to the text of all blocks, whatever it has of its own."""
    blocks = [view(seed=1), view(seed=2)]
    blocks[1] = replace(blocks[1], query=blocks[0].query)
    keys = torch.cat([block.k for block in blocks]).repeat_interleave(2, 1)
    logits = torch.einsum("rhd,khd->hrk", blocks[0].query, keys) * 0.3
    shares = logits.softmax(-1).mean(1).unflatten(0, (KV_HEADS, 2)).mean(1)
    compressor = make_compressor(name)
    for number, block in enumerate(blocks):
        seen = replace(block, lse=logits.logsumexp(-1))
        compared = compressor.compare(seen, compressor.score(seen))
        torch.testing.assert_close(compared, shares[:, 12 * number : 12 * number + 12], rtol=1e-4, atol=1e-7)


def test_other_scores_compare_as_they_are() -> None:
    """A later block's tokens are more recent than all of an earlier one's; heads and lots have one measure for all."""
    early, late = view(block=0), view(block=2)
    early = replace(early, block=Block(0, 0, 12, 0, 0))
    recent = make_compressor("recent")
    first, second = (recent.compare(each, recent.score(each)) for each in (early, late))
    assert first.max() < second.min()
    for kind in COMPRESSORS.values():
        assert kind.comparable
    scores = torch.rand(KV_HEADS, 12)
    for other in (make_compressor("random"), make_compressor("retaining", {"heads": "heads.pt"})):
        assert torch.equal(other.compare(late, scores), scores)
        assert other.edge(1000) == 0


def test_query_scores_read_nothing_but_keys_and_query() -> None:
    """Values and what stood before RoPE play no part."""
    seen = view()
    blind = replace(seen, v=torch.full_like(seen.v, math.nan), before_rope=None)
    assert torch.equal(make_compressor("query").score(seen), make_compressor("query").score(blind))


def test_retaining_scores() -> None:
    """retaining: fc2(silu(fc1(q, k, v before RoPE))) of the view's layer, max-pooled."""
    generator = torch.Generator().manual_seed(1)
    heads = [
        Head(torch.randn(8, FEATURES, generator=generator), torch.randn(KV_HEADS, 8, generator=generator))
        for _ in range(3)
    ]
    seen = view(layer=1)
    assert seen.before_rope is not None
    actual = make_compressor("retaining", {"heads": heads}).score(seen)
    for kv_head in range(KV_HEADS):
        scores = []
        for token in seen.before_rope:
            inner = [float(row @ token) for row in heads[1].fc1]
            scores.append(
                sum(float(w) * x / (1 + math.exp(-x)) for w, x in zip(heads[1].fc2[kv_head], inner, strict=True))
            )
        torch.testing.assert_close(actual[kv_head], torch.tensor(scores), rtol=1e-4, atol=1e-4)
    assert actual.dtype == torch.float32


def test_recent_prefers_later_tokens() -> None:
    """recent: strictly rising scores, so the last tokens are the best, without pooling."""
    scores = make_compressor("recent").score(view(7))
    assert scores.shape == (KV_HEADS, 7)
    assert (scores.diff(dim=1) > 0).all()


def test_random_depends_on_seed_layer_and_block_alone() -> None:
    """random: the same for the same seed, layer and block whatever the data; different as soon as one of them is."""

    def score(seed: int = 0, layer: int = 1, block: int = 2, data: int = 0) -> Tensor:
        return make_compressor("random", seed=seed).score(view(layer=layer, block=block, seed=data))

    assert torch.equal(score(), score(data=1))
    state = torch.random.get_rng_state()
    others = [score(), score(seed=1), score(layer=2), score(block=3), score(layer=2, block=1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    for number, one in enumerate(others):
        assert all(not torch.equal(one, other) for other in others[number + 1 :])
    assert not torch.equal(others[0][0], others[0][1])  # KV heads draw apart
    assert 0 <= others[0].min() <= others[0].max() < 1


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_scores_every_token_of_every_head(name: str) -> None:
    """The contract of `score`: (kv_heads, tokens) in fp32, finite, also in a half-precision model."""
    for dtype in (torch.float32, torch.bfloat16):
        seen = view()
        assert seen.before_rope is not None
        seen = replace(
            seen,
            k=seen.k.to(dtype),
            v=seen.v.to(dtype),
            query=seen.query.to(dtype),
            before_rope=seen.before_rope.to(dtype),
        )
        heads = [Head(torch.ones(8, FEATURES, dtype=dtype), torch.ones(KV_HEADS, 8, dtype=dtype))] * 2
        scores = make_compressor(name, {"heads": heads} if name == "retaining" else None).score(seen)
        assert (scores.shape, scores.dtype) == ((KV_HEADS, 12), torch.float32)
        assert scores.isfinite().all()


def test_who_pools() -> None:
    """Scores that say something of a token's neighbours are max-pooled before the choice; the ablations' are not."""
    assert {name for name, kind in COMPRESSORS.items() if kind.pooled} == {"query", "query-edge", "retaining"}


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "has_heads", "fragments"),
    [
        ("magic", False, ["'magic'", "query, query-edge, random, recent, retaining"]),
        ("retaining", False, ["'retaining'", "none were given", "'query-edge'"]),
        ("query", True, ["'query'", "does not use them", "'retaining'"]),
    ],
)
def test_refused_compressors(name: str, has_heads: bool, fragments: list[str]) -> None:
    """An unknown name, heads missing, or heads that nothing would use: InputError, with the way out."""
    with pytest.raises(apb.InputError) as refusal:
        make_compressor(name, {"heads": "heads.pt"} if has_heads else None)
    assert all(fragment in str(refusal.value) for fragment in fragments), refusal.value


# --- files of heads ------------------------------------------------------------------------------------------------

SHAPE = {"layers": 3, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


def weights() -> dict[str, Tensor]:
    """A heads file's tensors under the public names."""
    return tiny_heads(tiny_model("llama", heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM))


def save(folder: Path, tensors: dict[str, Any], kind: str) -> Path:
    path = folder / ("heads.safetensors" if kind == "safetensors" else f"heads.{kind}")
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pt", "bin"])
def test_heads_file(tmp_path: Path, kind: str) -> None:
    """Both formats, keys model.layers.{i}.self_attn.fc1.weight / fc2.weight, every other key ignored."""
    tensors = weights()
    extra = {
        "model.layers.0.self_attn.fc3.weight": torch.ones(1),
        "model.layers.0.self_attn.fc1.bias": torch.ones(1),
        "model.layers.7.self_attn.fc1.weight": torch.ones(1),
        "model.layers.0.mlp.fc1.weight": torch.ones(1),
        "lm_head.weight": torch.ones(1),
    }
    heads = load_heads(save(tmp_path, {**tensors, **extra}, kind), **SHAPE)
    assert len(heads) == 3
    for layer, head in enumerate(heads):
        assert torch.equal(head.fc1, tensors[f"model.layers.{layer}.self_attn.fc1.weight"])
        assert torch.equal(head.fc2, tensors[f"model.layers.{layer}.self_attn.fc2.weight"])


@pytest.mark.parametrize(("name", "layers", "features"), [("llama-3.1-8b", 32, 6144), ("qwen2.5-14b", 48, 7168)])
def test_heads_in_the_public_layout(tmp_path: Path, name: str, layers: int, features: int) -> None:
    """Files as the public ones are made, for the configurations they are for, load; scores are those by hand."""
    shape = HeadShape.of(shape_config(name))
    assert (shape.layers, shape.kv_heads, shape.features) == (layers, 8, features)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):  # one layer of the public width, the others small: any width goes
        hidden = 1024 if layer == 3 else 5
        for part, rows, columns in (("fc1", hidden, features), ("fc2", 8, hidden)):
            weight = (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()
            tensors[f"model.layers.{layer}.self_attn.{part}.weight"] = weight
    heads = load_heads(save(tmp_path, tensors, "bin"), **asdict(shape))
    before_rope = torch.randn(9, features, generator=generator)
    for layer in (0, 3, layers - 1):
        fc1, fc2 = (tensors[f"model.layers.{layer}.self_attn.{part}.weight"].double() for part in ("fc1", "fc2"))
        inner = before_rope.double() @ fc1.T
        raw = (inner / (1 + (-inner).exp())) @ fc2.T
        seen = replace(view(9), layer=layer, before_rope=before_rope)
        torch.testing.assert_close(Retaining(heads).score(seen), raw.T.float(), rtol=1e-4, atol=1e-4)

    tensors[f"model.layers.{layers - 1}.self_attn.fc1.weight"] = torch.zeros(5, features - 128)
    wrong = save(tmp_path, tensors, "safetensors")
    with pytest.raises(apb.InputError, match=rf"Layer {layers - 1}: .*\(hidden, {features}\)"):
        load_heads(wrong, **asdict(shape))


def test_heads_take_the_models_dtype(tmp_path: Path) -> None:
    """Heads are cast to the dtype they will run in."""
    heads = load_heads(save(tmp_path, weights(), "pt"), **SHAPE, dtype=torch.bfloat16)
    assert {x.dtype for head in heads for x in (head.fc1, head.fc2)} == {torch.bfloat16}


def test_torch_file_may_hold_more_than_tensors(tmp_path: Path) -> None:
    """What is no tensor is ignored like any other key."""
    assert len(load_heads(save(tmp_path, {**weights(), "step": 3000, "note": "x"}, "pt"), **SHAPE)) == 3


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if name != key}


def replaced(key: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, key: torch.zeros(*shape)}


FC1, FC2 = (f"model.layers.1.self_attn.{name}.weight" for name in ("fc1", "fc2"))


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (without(FC1), ["layer 1", "3 layers"]),
        (without(FC2), ["layer 1", "3 layers"]),
        (lambda tensors: {}, ["layer 0", "3 layers"]),
        (replaced(FC1, 32, FEATURES - 1), ["Layer 1", f"(32, {FEATURES - 1})", f"(hidden, {FEATURES})"]),
        (replaced(FC1, 32), ["Layer 1", "(32,)", f"(hidden, {FEATURES})"]),
        (replaced(FC2, HEADS, 32), ["Layer 1", f"({HEADS}, 32)", f"({KV_HEADS}, 32)"]),
        (replaced(FC2, KV_HEADS, 31), ["Layer 1", f"({KV_HEADS}, 31)", f"({KV_HEADS}, 32)"]),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_heads_that_do_not_fit(
    tmp_path: Path, kind: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], fragments: list[str]
) -> None:
    """A sentence that names the layer and the shape the model needs."""
    path = save(tmp_path, change(weights()), kind)
    with pytest.raises(apb.InputError) as refusal:
        load_heads(path, **SHAPE)
    assert all(fragment in str(refusal.value) for fragment in (*fragments, str(path))), refusal.value


class Runs:
    """Unpickled, it would run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_code_in_a_heads_file_does_not_run(tmp_path: Path) -> None:
    """A pickle with code is refused and nothing of it is executed."""
    trace = tmp_path / "was-run"
    path = save(tmp_path, {**weights(), "x": Runs(f"touch {trace}")}, "pt")
    with pytest.raises(apb.InputError, match="cannot be read"):
        load_heads(path, **SHAPE)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["heads.safetensors", "heads.pt"])
@pytest.mark.parametrize("content", [b"", b"garbage " * 99], ids=["empty", "garbage"])
def test_files_that_are_no_heads(tmp_path: Path, content: bytes, name: str) -> None:
    """One sentence with the path, whatever the reader of the format raises."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(apb.InputError, match="cannot be read") as refusal:
        load_heads(path, **SHAPE)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_heads_that_are_not_there(tmp_path: Path) -> None:
    """A missing file, and a folder in its place, are refused with the path."""
    for path, reason in ((tmp_path / "heads.pt", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(apb.InputError, match=reason) as refusal:
            load_heads(path, **SHAPE)
        assert str(path) in str(refusal.value)


def test_a_torch_file_with_something_else(tmp_path: Path) -> None:
    """A torch file that holds a list is refused as such."""
    torch.save([torch.ones(2)], tmp_path / "heads.pt")
    with pytest.raises(apb.InputError, match="list"):
        load_heads(tmp_path / "heads.pt", **SHAPE)


# --- in a model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_retaining_scores_in_a_model(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer the heads score what the model's own projections (and norms) give before RoPE."""
    model = tiny_model(family, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    tensors = tiny_heads(model)
    engine = apb.Engine.from_model(
        model, blocks=3, anchor_length=9, passing_length=2, heads=save(tmp_path, tensors, "safetensors")
    )
    hidden: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: hidden.update({index: kwargs["hidden_states"][0]}),
            with_kwargs=True,
        )
    scored = []
    original = Retaining.score
    monkeypatch.setattr(
        Retaining, "score", lambda self, seen: scored.append((seen, original(self, seen))) or scored[-1][1]
    )
    engine.prefill(apb.Prompt.from_tokens([1, 2], [(7 * i) % 90 for i in range(31)], [5, 6, 7]))

    assert [(seen.layer, seen.block.index) for seen, _ in scored] == [(i, b) for i in range(3) for b in range(2)]
    rows = {0: slice(9, 9 + 2 + 11), 1: slice(22, 22 + 10)}  # after the anchor: block 0 with the prefix, block 1
    for seen, actual in scored:
        attention = model.model.layers[seen.layer].self_attn
        x = hidden[seen.layer][rows[seen.block.index]]
        q, k, v = (getattr(attention, f"{name}_proj")(x) for name in "qkv")
        if family == "qwen3":
            q, k = attention.q_norm(q.view(-1, HEADS, HEAD_DIM)), attention.k_norm(k.view(-1, KV_HEADS, HEAD_DIM))
        fc1, fc2 = (tensors[f"model.layers.{seen.layer}.self_attn.{name}.weight"] for name in ("fc1", "fc2"))
        inner = torch.cat([q.flatten(1), k.flatten(1), v], 1) @ fc1.T
        raw = (inner * inner.sigmoid()) @ fc2.T
        torch.testing.assert_close(actual, raw.T, rtol=1e-4, atol=1e-4)
