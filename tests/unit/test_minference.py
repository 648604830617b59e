"""The vertical-slash pattern against a dense definition of its own: one mask per head over the whole prompt."""

from __future__ import annotations

import pytest
import torch

from apb import Engine, InputError, Plan, Prompt
from apb.kernels.vertical_slash import _rounded, by_flex, by_tiles
from models import tiny_model

PROMPT = Prompt.from_tokens([1, 2, 3], [(37 * i + 11) % 503 for i in range(401)], [5, 6, 7, 8, 9])
ROWS = len(PROMPT)
QUERY_START = ROWS - 5


def model():
    return tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=503)


def dense(vertical, slash):
    """Logits of the prompt's last row, by eager attention under an explicit mask: transformers' layers, our mask.

    Per layer and head, from the last 64 rows' softmax over all earlier keys: columns by their summed weight, the first
    30 always; diagonals i - j by theirs, the nearest 100 always. Document rows see those; the query's rows see all.
    """
    net = model()
    causal = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = (query[0] @ key[0].mT * scaling).masked_fill(~causal, float("-inf"))
        weights = scores[:, -64:].softmax(-1)
        columns = weights.sum(1)
        diagonals = torch.zeros_like(columns)
        for row in range(64):
            for head in range(len(columns)):
                position = ROWS - 64 + row
                for key_position in range(position + 1):
                    diagonals[head, position - key_position] += weights[head, row, key_position]
        columns[:, :30] = 1e9
        diagonals[:, :100] = 1e9
        mask = torch.zeros_like(scores, dtype=torch.bool)
        distance = torch.arange(ROWS)[:, None] - torch.arange(ROWS)
        for head in range(len(mask)):
            mask[head, :, columns[head].topk(vertical).indices] = True
            for offset in diagonals[head].topk(slash).indices.tolist():
                mask[head] |= distance == offset
        mask[:, QUERY_START:] = True
        out = scores.masked_fill(~(mask & causal), float("-inf")).softmax(-1) @ value[0]
        return out.transpose(0, 1).unsqueeze(0), None

    from transformers import AttentionInterface

    AttentionInterface.register("dense_minference", attend)
    net.set_attn_implementation("dense_minference")
    with torch.no_grad():
        return net(torch.tensor([PROMPT.token_ids])).logits[0, -1]


@pytest.mark.parametrize(("vertical", "slash"), [(40, 120), (31, 200), (200, 101)])
def test_pattern_is_its_definition(vertical, slash):
    """Logits equal the dense definition's, and differ from full attention's."""
    engine = Engine.from_model(model(), strategy="minference", vertical_size=vertical, slash_size=slash)
    session = engine.prefill(PROMPT)
    assert not session.plan.exact
    assert (session.logits - dense(vertical, slash)).abs().max().item() < 1e-4
    full = Engine.from_model(model(), strategy="full").prefill(PROMPT)
    assert (session.logits - full.logits).abs().max().item() > 1e-2


@pytest.mark.parametrize("budget", [{"vertical_size": 10**6}, {"slash_size": 1.0}])
def test_everything_chosen_is_full(budget):
    """With all columns, or all diagonals, nothing is left out: logits and cache are full attention's."""
    session = Engine.from_model(model(), strategy="minference", **budget).prefill(PROMPT)
    full = Engine.from_model(model(), strategy="full").prefill(PROMPT)
    assert session.plan.exact
    assert (session.logits - full.logits).abs().max().item() < 1e-4
    for layer in range(3):
        for got, expected in zip(session.gather_kv(layer), full.gather_kv(layer), strict=True):
            assert (got - expected).abs().max().item() < 1e-4


def test_as_many_columns_as_the_document_has_are_not_all():
    """The question's columns take part in the choice: some of the document's are left out, and the plan says so."""
    prompt = Prompt.from_tokens([], [(37 * i + 11) % 503 for i in range(120)], [(53 * i + 41) % 503 for i in range(60)])
    sparse = Engine.from_model(model(), strategy="minference", vertical_size=120, slash_size=1).prefill(prompt)
    full = Engine.from_model(model(), strategy="full").prefill(prompt)
    assert (sparse.logits - full.logits).abs().max().item() > 1e-2
    assert not sparse.plan.exact


@pytest.mark.parametrize("rows", [1, 127, 300, 513])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1)])
def test_both_engines_are_the_masked_softmax(rows, heads, kv_heads):
    """Tile by tile, and as FlexAttention sees it (its masks, here not compiled): one explicit mask's softmax."""
    torch.manual_seed(rows)
    q, k, v = (torch.randn(rows, count, 16) for count in (heads, kv_heads, kv_heads))
    columns, diagonals = torch.rand(heads, rows) < 0.05, torch.rand(heads, rows) < 0.02
    columns[0] = False  # heads may have chosen different numbers
    columns[-1, 0] = diagonals[:, 0] = True
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    mask = (distance >= 0) & (columns[:, None] | diagonals[:, distance.clamp(min=0)])
    keys, values = (x.repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for x in (k, v))
    for softcap in (None, 0.7):
        scores = q.transpose(0, 1) @ keys.mT * 0.3
        scores = (scores if softcap is None else torch.tanh(scores / softcap) * softcap).masked_fill(~mask, -torch.inf)
        expected = (scores.softmax(-1) @ values).transpose(0, 1)
        for engine in (by_tiles, by_flex):
            out, lse = engine(q, k, v, columns, diagonals, 0.3, softcap)
            assert (out - expected).abs().max().item() < 1e-5
            assert (lse - scores.logsumexp(-1)).abs().max().item() < 1e-5


def test_budgets_are_numbers_or_shares():
    """A float is a share of the prompt, an int a number of tokens, and neither exceeds the prompt."""
    sizes = {"prefix": 1, "document": 989, "query": 10, "strategy": "minference"}
    plan = Plan.build(**sizes, vertical_size=0.1, slash_size=50)
    assert plan.method.budgets == (100, 50)
    assert Plan.build(**sizes).method.budgets[1] == 1000
    for wrong in (0, -3, 1.5, 0.0):
        with pytest.raises(InputError, match=r"(?i)vertical size"):
            Plan.build(**sizes, vertical_size=wrong)


def test_prompts_of_nearly_the_same_length_share_a_shape():
    """What is compiled is compiled for a shape: lengths are rounded up by less than an eighth, and few are left."""
    lengths = range(16000, 33000)
    rounded = {_rounded(length) for length in lengths}
    assert len(rounded) < 12
    assert all(length <= _rounded(length) < 1.13 * length for length in lengths)
    assert {_rounded(length) for length in (0, 1, 128)} == {128}
    assert _rounded(32_766) == 32_768
