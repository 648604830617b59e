"""The oracle itself, against transformers' own eager attention and against rules written out a second time."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from apb.hf.cache_names import cache_of, with_cache
from models import FAMILIES, tiny_heads, tiny_model
from oracle import OracleResult, dense_decode, dense_prefill, pool, select

X, D, Q = [5, 17, 80], [(37 * i + 11) % 97 for i in range(38)], [41, 2, 66, 9]
P, N, M = len(X), len(D), len(Q)  # no token of D twice: in layer 0 its retaining scores would be equal
ENDS = [0, P + 10, P + 20, P + 29, P + 38]  # 38 tokens in 4 blocks: 10, 10, 9, 9, the prefix in the first
# family, heads, kv_heads, head_dim: groups of 2, 4, 1 and 3; head_dim above, below and equal to hidden / heads
SHAPES = [("llama", 4, 2, 16), ("mistral", 4, 1, 32), ("qwen2", 4, 4, 8), ("qwen3", 6, 2, 16)]


@pytest.fixture(params=SHAPES, ids=[shape[0] for shape in SHAPES])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, heads, kv_heads, head_dim = request.param
    return tiny_model(family, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama", heads=4, kv_heads=2, head_dim=16)


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-4) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def same(result: OracleResult, logits: Tensor, keys: list[Tensor], values: list[Tensor]) -> bool:
    pairs = zip([*result.keys, *result.values], [*keys, *values], strict=True)
    return close(result.logits, logits) and all(close(actual, expected) for actual, expected in pairs)


def pairs_of(cache: DynamicCache) -> tuple[list[Tensor], list[Tensor]]:
    return [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]


def filled(keys: list[Tensor], values: list[Tensor]) -> DynamicCache:
    cache = DynamicCache()
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(k[None].clone(), v[None].clone(), index)
    return cache


def forward(
    model: PreTrainedModel, tokens: list[int], start: int = 0, past: tuple[list[Tensor], list[Tensor]] | None = None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """transformers' own forward of tokens at positions start.. over past keys and values: logits (tokens, vocab), and
    keys and values of the new tokens alone, per layer (kv_heads, tokens, d)."""
    cache = filled(*past) if past else DynamicCache()
    positions = torch.arange(start, start + len(tokens))[None]
    with torch.no_grad():
        # an explicit mask: transformers must guess nothing from positions that do not follow the cache's length
        rows, old = len(tokens), cache.get_seq_length()
        hidden = torch.ones(rows, old + rows, dtype=torch.bool).triu(old + 1)
        mask = torch.zeros(rows, old + rows).masked_fill(hidden, -math.inf)[None, None]
        out = model(torch.tensor([tokens]), attention_mask=mask, position_ids=positions, **with_cache(model, cache))
    keys, values = pairs_of(cache)
    return out.logits[0], [k[:, -rows:] for k in keys], [v[:, -rows:] for v in values]


def join(parts: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]


def full(model: PreTrainedModel, tokens: list[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """transformers' plain forward, left to make its own mask: logits of the last token, keys, values."""
    with torch.no_grad():
        out = model(torch.tensor([tokens]), use_cache=True)
    return out.logits[0, -1], *pairs_of(cache_of(out))


def random_scores(model: PreTrainedModel, seed: int = 3) -> Callable[[int, int], Tensor]:
    """Another ranking for every layer, block and KV head."""
    kv_heads = model.config.num_key_value_heads

    def score(layer: int, block: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * seed + 10 * layer + block)
        return torch.rand(kv_heads, ENDS[block + 1] - ENDS[block], generator=generator)

    return score


def block_of(position: int) -> int:
    return next(index for index in range(4) if position < ENDS[index + 1])


# --- one block, and the two other ways to plain causal attention -----------------------------------


@pytest.mark.parametrize("strategy", ["apb", "star"])
def test_one_block_is_the_models_own_forward(model: PreTrainedModel, strategy: str) -> None:
    result = dense_prefill(model, X, D, Q, blocks=1, anchor_length=8, passing_length=5, strategy=strategy)
    assert same(result, *full(model, X + D + Q))
    assert [part.shape[1] for layer in result.selected for part in layer] == [0, 0, 0]
    assert result.margins == math.inf


@pytest.mark.parametrize("prefix", [X, []], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("compressor", ["query", "recent", "retaining"])
def test_everything_passed_over_an_anchor_of_the_prefix_is_full_attention(
    model: PreTrainedModel, compressor: str, prefix: list[int]
) -> None:
    """Such an anchor holds the prefix at its own positions, and every document token reaches every later block."""

    def prefill(passing_length: int) -> OracleResult:
        options = {"compressor": compressor, "heads": tiny_heads(model)}
        return dense_prefill(
            model, prefix, D, Q, blocks=4, anchor_length=len(prefix), passing_length=passing_length, **options
        )

    expected = full(model, prefix + D + Q)
    assert same(prefill(10), *expected)
    assert prefill(10).margins == math.inf
    assert not close(prefill(9).logits, expected[0])


# --- nothing passed: the blocks one after the other through transformers' own cache ----------------


@pytest.mark.parametrize("anchor_length", [0, 2, P, P + 2, P + M, P + M + 6, P + M + 15, P + M + N, 1000])
@pytest.mark.parametrize("compressor", ["query", None])
def test_nothing_passed_is_each_block_over_the_anchor(
    model: PreTrainedModel, anchor_length: int, compressor: str | None
) -> None:
    passing_length = 0 if compressor else 7
    result = dense_prefill(
        model, X, D, Q, blocks=4, anchor_length=anchor_length, passing_length=passing_length, compressor=compressor
    )
    anchor = forward(model, (X + Q + D)[:anchor_length])[1:] if anchor_length else None
    prompt = X + D
    parts = [forward(model, prompt[: ENDS[1]])]
    parts += [forward(model, prompt[a:b], a, anchor) for a, b in pairwise(ENDS[1:])]
    past = join([part[1] for part in parts]), join([part[2] for part in parts])
    logits, *own = forward(model, Q, P + N, past)
    assert same(result, logits[-1], join([past[0], own[0]]), join([past[1], own[1]]))


@pytest.mark.parametrize("anchor_length", [None, 0, 2, 7, 1000])
def test_star_is_each_block_over_the_first_tokens_of_block_one(
    model: PreTrainedModel, anchor_length: int | None
) -> None:
    result = dense_prefill(model, X, D, Q, blocks=4, anchor_length=anchor_length, passing_length=5, strategy="star")
    prompt = X + D
    parts = [forward(model, prompt[: ENDS[1]])]
    anchor = [k[:, :anchor_length] for k in parts[0][1]], [v[:, :anchor_length] for v in parts[0][2]]
    for a, b in pairwise(ENDS[1:]):
        parts.append(forward(model, prompt[a:b], a, None if anchor_length == 0 else anchor))
    past = join([part[1] for part in parts]), join([part[2] for part in parts])
    logits, *own = forward(model, Q, P + N, past)
    assert same(result, logits[-1], join([past[0], own[0]]), join([past[1], own[1]]))
    assert {part.shape[1] for layer in result.selected for part in layer} == {0}


# --- something passed: transformers' eager attention under a mask built from a rule ----------------


def eager_with_masks(
    model: PreTrainedModel, anchor: list[int], selected: list[list[Tensor]]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One transformers forward of [anchor, prompt], each layer's attention given its own mask, cell by cell."""
    at, total, kv_heads = len(anchor), P + N + M, model.config.num_key_value_heads

    def sees(layer: int, head: int, row: int, column: int) -> bool:
        if row < at or column > row:
            return column <= row
        t, u = row - at, column - at  # true positions; u < 0: an anchor column
        if t >= P + N:
            return u >= 0
        if u < 0:
            return block_of(t) > 0
        return block_of(t) == block_of(u) or u in selected[layer][block_of(u)][head].tolist()

    def mask(layer: int) -> Tensor:
        rows = range(at + total)
        cells = [[[sees(layer, head, row, column) for column in rows] for row in rows] for head in range(kv_heads)]
        visible = torch.tensor(cells).repeat_interleave(model.config.num_attention_heads // kv_heads, dim=0)
        return torch.zeros(visible.shape).masked_fill(~visible, -math.inf)[None]

    masks = {layer.self_attn: mask(index) for index, layer in enumerate(model.model.layers)}
    hooks = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": masks[module]}), with_kwargs=True
        )
        for attention in masks
    ]
    try:
        with torch.no_grad():
            tokens = torch.tensor([anchor + X + D + Q])
            positions = torch.tensor([[*range(at), *range(total)]])
            given = torch.zeros(1, 1, at + total, at + total)  # replaced in every layer
            out = model(tokens, attention_mask=given, position_ids=positions, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    keys, values = pairs_of(cache_of(out))
    return out.logits[0, -1], [k[:, at:] for k in keys], [v[:, at:] for v in values]


@pytest.mark.parametrize("compressor", ["query", "recent", "retaining", "given"])
def test_passed_pairs_reach_the_later_blocks_and_nobody_else(model: PreTrainedModel, compressor: str) -> None:
    score = random_scores(model) if compressor == "given" else None
    options = {"compressor": compressor, "heads": tiny_heads(model), "score": score}
    result = dense_prefill(model, X, D, Q, blocks=4, anchor_length=P + M + 4, passing_length=3, **options)
    assert same(result, *eager_with_masks(model, X + Q + D[:4], result.selected))
    nothing = dense_prefill(model, X, D, Q, blocks=4, anchor_length=P + M + 4, passing_length=0)
    assert not close(result.logits, nothing.logits)


# --- scores and selection --------------------------------------------------------------------------


def captured(
    model: PreTrainedModel, names: tuple[str, ...], **options: object
) -> tuple[list[dict[str, Tensor]], OracleResult]:
    """What the named submodules of each layer's attention gave for all rows during a prefill: [layer][name]."""
    seen: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda _, args, out, name=name, into=seen[index]: into.update({name: out})
        )
        for index, layer in enumerate(model.model.layers)
        for name in names
    ]
    result = dense_prefill(model, X, D, Q, blocks=4, passing_length=3, **options)
    for hook in hooks:
        hook.remove()
    return seen, result


def best(scores: list[float], first_eligible: int, block: int, count: int) -> list[int]:
    """True positions of the count best tokens of a block by pooled scores, one at a time, the earlier first."""
    pooled = [max(scores[max(0, i - 2) : i + 3]) for i in range(len(scores))]
    left = [i for i in range(len(scores)) if ENDS[block] + i >= first_eligible]
    taken = []
    for _ in range(min(count, len(left))):
        top = max(left, key=lambda i: pooled[i])  # max keeps the first of equals
        left.remove(top)
        taken.append(ENDS[block] + top)
    return sorted(taken)


@pytest.mark.parametrize("anchor_length", [P, P + M + 4])
def test_query_scores_written_out(model: PreTrainedModel, anchor_length: int) -> None:
    attention = model.model.layers[0].self_attn
    source = "q_norm" if hasattr(attention, "q_norm") else "q_proj"
    seen, result = captured(model, (source,), anchor_length=anchor_length, compressor="query")
    heads, kv_heads, d = model.config.num_attention_heads, model.config.num_key_value_heads, attention.head_dim
    for layer in range(3):
        rows = seen[layer][source].reshape(-1, heads, d)[-M:]  # before RoPE
        frequencies = [10000.0 ** (-2 * i / d) for i in range(d // 2)]
        for head in range(kv_heads):
            group = range(head * heads // kv_heads, (head + 1) * heads // kv_heads)
            for block in range(4):
                keys = result.keys[layer][head, ENDS[block] : ENDS[block + 1]].double()
                total = torch.zeros(len(keys), dtype=torch.float64)
                for row in range(M):
                    angles = torch.tensor([(P + N + row) * f for f in frequencies], dtype=torch.float64)
                    for member in group:
                        a, b = rows[row, member].double().split(d // 2)
                        q = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])
                        total += torch.exp(keys @ q / math.sqrt(d)) / torch.exp(keys @ q / math.sqrt(d)).sum()
                first_eligible = P + max(0, anchor_length - P - M)
                expected = best((total / (M * len(group))).tolist(), first_eligible, block, 3)
                assert result.selected[layer][block][head].tolist() == expected
    assert 1e-4 < result.margins < 1  # so the comparison above was no coin toss
    assert any(len({tuple(row.tolist()) for row in part}) > 1 for part in result.selected[0]) or kv_heads == 1


def test_retaining_scores_written_out(model: PreTrainedModel) -> None:
    normed = hasattr(model.model.layers[0].self_attn, "q_norm")
    names = ("q_norm", "k_norm", "v_proj") if normed else ("q_proj", "k_proj", "v_proj")
    heads = tiny_heads(model)
    seen, result = captured(model, names, anchor_length=P + M + 4, compressor="retaining", heads=heads)
    for layer in range(3):
        fc1 = heads[f"model.layers.{layer}.self_attn.fc1.weight"]
        fc2 = heads[f"model.layers.{layer}.self_attn.fc2.weight"]
        for block in range(4):
            scores = []
            for position in range(ENDS[block], ENDS[block + 1]):
                row = P + M + 4 + position
                inner = fc1 @ torch.cat([seen[layer][name][row].reshape(-1) for name in names])
                scores.append(fc2 @ (inner * torch.sigmoid(inner)))
            for head, of_head in enumerate(torch.stack(scores, dim=1)):
                expected = best(of_head.tolist(), P + 4, block, 3)
                assert result.selected[layer][block][head].tolist() == expected
    assert 1e-4 < result.margins < math.inf


@pytest.mark.parametrize(
    ("anchor_length", "passing_length", "expected"),
    [
        (P, 2, [[11, 12], [21, 22], [30, 31], [39, 40]]),
        (P + M + 8, 3, [[11, 12], [20, 21, 22], [29, 30, 31], [38, 39, 40]]),  # two of block 1 are left
        (P + M + 10, 3, [[], [20, 21, 22], [29, 30, 31], [38, 39, 40]]),  # none of block 1
        (P + M + 19, 3, [[], [22], [29, 30, 31], [38, 39, 40]]),  # the anchor reaches into block 2
        (P + M + 38, 3, [[], [], [], []]),
        (P, 50, [list(range(a, b)) for a, b in [(3, 13), (13, 23), (23, 32), (32, 41)]]),  # never the prefix
        (P, 0, [[], [], [], []]),
    ],
)
def test_recent_is_the_end_of_what_is_eligible(
    llama: PreTrainedModel, anchor_length: int, passing_length: int, expected: list[list[int]]
) -> None:
    options = {"anchor_length": anchor_length, "passing_length": passing_length, "compressor": "recent"}
    result = dense_prefill(llama, X, D, Q, blocks=4, **options)
    for layer in result.selected:
        assert [part.tolist() for part in layer] == [[positions] * 2 for positions in expected]
    assert result.margins == math.inf


def test_given_scores_are_not_pooled_and_ties_go_to_the_earlier_token(llama: PreTrainedModel) -> None:
    """Head 0: one clear best, then a tie of all the others. Head 1: best are prefix and anchor tokens, never taken."""

    def score(layer: int, block: int) -> Tensor:
        scores = torch.zeros(2, ENDS[block + 1] - ENDS[block])
        scores[0, 8] = 1.0
        scores[1, :5] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
        scores[1, 6] = 4.0
        return scores

    result = dense_prefill(llama, X, D, Q, blocks=4, anchor_length=P + M + 2, passing_length=2, score=score)
    for layer in result.selected:
        assert [part.tolist() for part in layer] == [[[5, 8], [5, 6]], [[13, 21], [13, 14]]] + [
            [[start, start + 8], [start, start + 1]] for start in (23, 32)
        ]
    assert result.margins == 0.0


def test_select_margins() -> None:
    def margin(scores: list[float], count: int, pooling: bool = False, eligible: range | None = None) -> object:
        raw = torch.tensor(scores)
        pooled = pool(raw[None])[0] if pooling else raw
        chosen, gap = select(raw, pooled, eligible or range(len(scores)), count)
        return chosen, pytest.approx(gap, abs=1e-6)

    assert margin([1.0, 8.0, 2.0, 6.0], 2) == ([1, 3], 4 / 6)
    assert margin([1.0, 8.0, 2.0, 6.0], 1, eligible=range(2, 4)) == ([3], 4 / 6)
    assert margin([-1.0, -4.0, -2.0], 2) == ([0, 2], 2 / 4)
    assert margin([3.0, 5.0, 3.0], 2) == ([0, 1], 0.0)
    assert margin([0.0, 0.0], 1) == ([0], 0.0)
    assert margin([1.0, 2.0], 2) == ([0, 1], math.inf)
    assert margin([1.0, 2.0], 0) == ([], math.inf)
    # one peak, its window cut in two: certain, as far as the nearest other score (3) is from the peak (4)
    assert margin([0.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 3.0], 2, pooling=True) == ([1, 2], 1 / 4)
    # two equal peaks side by side: which of them comes out ahead decides, a coin toss
    assert margin([0.0, 0.0, 4.0, 4.0, 0.0, 0.0], 2, pooling=True) == ([0, 1], 0.0)


def test_pool_stays_at_length_and_takes_two_neighbours_on_each_side() -> None:
    scores = torch.tensor([[-1.0, -2.0, -9.0, -8.0, -7.0, -3.0, -9.0]])
    assert pool(scores).tolist() == [[-1.0, -1.0, -1.0, -2.0, -3.0, -3.0, -3.0]]
    assert pool(torch.tensor([[-5.0], [4.0]])).tolist() == [[-5.0], [4.0]]


# --- decode, precision, inputs, models -------------------------------------------------------------


def test_decode_continues_from_the_cache(model: PreTrainedModel) -> None:
    tokens = [12, 70, 33, 33, 1]
    options = {"blocks": 4, "anchor_length": P + M + 4, "passing_length": 3}
    result = dense_prefill(model, X, D, Q, **options)
    before = [k.clone() for k in result.keys]
    expected = forward(model, tokens, P + N + M, (result.keys, result.values))[0]
    assert close(dense_decode(model, result, tokens), expected)
    assert all(torch.equal(k, old) for k, old in zip(result.keys, before, strict=True))
    whole = dense_prefill(model, X, D, Q + tokens[:3], blocks=1, anchor_length=None, passing_length=0)
    plain = dense_prefill(model, X, D, Q, blocks=1, anchor_length=None, passing_length=0)
    assert close(dense_decode(model, plain, tokens)[2], whole.logits)


def test_fp32_agrees_with_fp64(model: PreTrainedModel) -> None:
    options = {"blocks": 4, "anchor_length": P + M + 4, "passing_length": 3}
    single = dense_prefill(model, X, D, Q, **options)
    double = dense_prefill(model.double(), X, D, Q, **options)
    assert single.logits.dtype == torch.float32
    assert double.logits.dtype == double.keys[0].dtype == torch.float64
    assert close(single.logits.double(), double.logits)
    for one, other in zip(single.selected, double.selected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert single.margins == pytest.approx(double.margins, rel=0.05)


def test_tensors_are_taken_as_tokens(llama: PreTrainedModel) -> None:
    options = {"blocks": 2, "anchor_length": 9, "passing_length": 3}
    lists = dense_prefill(llama, X, D, Q, **options)
    tensors = dense_prefill(llama, *(torch.tensor(part) for part in (X, D, Q)), **options)
    assert torch.equal(lists.logits, tensors.logits)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query": []}, "at least one token"),
        ({"blocks": N + 1}, "at least one token"),
        ({"blocks": 0}, "at least one token"),
        ({"anchor_length": None}, "anchor_length"),
        ({"anchor_length": -1}, "anchor_length"),
        ({"passing_length": -1}, "passing_length"),
        ({"compressor": "best"}, "compressor"),
        ({"strategy": "ring"}, "strategy"),
    ],
)
def test_refusals(llama: PreTrainedModel, changes: dict[str, object], reason: str) -> None:
    request = {"prefix": X, "document": D, "query": Q, "blocks": 4, "anchor_length": 9, "passing_length": 3}
    dense_prefill(llama, **request)
    with pytest.raises(ValueError, match=reason):
        dense_prefill(llama, **{**request, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_repeatable_and_far_from_uniform(family: str) -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16}
    state = torch.random.get_rng_state()
    one, again, other = tiny_model(family, **shape), tiny_model(family, **shape), tiny_model(family, **shape, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not one.training
    assert one.dtype == torch.float32
    with torch.no_grad():
        out, same_out, other_out = (m(torch.tensor([X + D + Q]), output_attentions=True) for m in (one, again, other))
    assert torch.equal(out.logits, same_out.logits)
    assert not close(out.logits, other_out.logits)
    assert out.logits[0, -1].softmax(-1).max() > 0.2  # uniform: 0.01
    for weights in out.attentions:  # (1, heads, rows, rows): the best of up to 45 keys, on average over the last rows
        assert weights[0, :, -20:].max(-1).values.mean() > 0.2
        assert weights[0, :, -20:].max(-1).values.mean() < 0.95
