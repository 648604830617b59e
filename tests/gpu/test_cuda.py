"""On an NVIDIA GPU: the back-ends against fp64, the engine against transformers and against the dense oracle."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest
import torch

from apb import Engine, Prompt, Segment, attention
from apb.kernels.vertical_slash import by_flex, by_tiles
from models import tiny_model
from oracle import dense_prefill

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def dense(q, segments, scale):
    """fp64 attention of (rows, heads, d) over the segments, as one masked softmax: out and lse."""
    rows, heads, _ = q.shape
    scores, values = [], []
    for segment in segments:
        keys, group = segment.k.shape[0], heads // segment.k.shape[1]
        score = torch.einsum("rhd,khd->hrk", q.double(), segment.k.double().repeat_interleave(group, 1)) * scale
        if segment.causal:
            hidden = torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(keys - rows + 1)
            score = score.masked_fill(hidden, float("-inf"))
        scores.append(score)
        values.append(segment.v.double().repeat_interleave(group, 1))
    score = torch.cat(scores, -1)
    return torch.einsum("hrk,khd->rhd", score.softmax(-1), torch.cat(values)), score.logsumexp(-1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (6, 2, 64), (8, 8, 64), (8, 1, 128)])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_torch_backend_agrees_with_fp64(dtype, heads, kv_heads, head_dim, rows):
    """Full and causal segments of ragged lengths, in the strides transformers hands over, give fp64's out and lse."""
    torch.manual_seed(0)

    def tensor(length, count):
        # (1, heads, length, d) memory seen as (length, heads, d), and the other way round: both occur.
        return torch.randn(count, length, head_dim, device="cuda").to(dtype).transpose(0, 1)

    q = torch.randn(rows, heads, head_dim, device="cuda").to(dtype)
    segments = [Segment(tensor(length, kv_heads), tensor(length, kv_heads)) for length in (257, 0, 33)]
    segments.append(Segment(tensor(rows + 130, kv_heads), tensor(rows + 130, kv_heads), causal=True))
    out, lse = attention(q, segments, backend="torch")
    expected, expected_lse = dense(q, segments, head_dim**-0.5)
    assert ((out.double() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]
    assert (lse.double() - expected_lse).abs().max().item() < 1e-4


def prompt() -> Prompt:
    draw = random.Random(0)
    return Prompt.from_tokens([1, 2], [draw.randrange(97) for _ in range(1003)], [5, 6, 7, 8])


def test_full_is_transformers():
    """In fp32 the engine's logits are those of transformers' eager attention on the same GPU."""
    model = tiny_model("llama", heads=8, kv_heads=2, head_dim=64).cuda()
    expected = model(torch.tensor([prompt().token_ids], device="cuda")).logits[0, -1]
    engine = Engine.from_model(model, strategy="full")
    assert (engine.prefill(prompt()).logits - expected).abs().max().item() < 1e-4
    engine.close()


@pytest.mark.parametrize("blocks", [2, 5])
def test_apb_is_the_oracle(blocks):
    """In fp32 logits and every layer's cache are the dense oracle's."""
    model = tiny_model("llama", heads=8, kv_heads=2, head_dim=64)
    expected = dense_prefill(
        model, prompt().prefix, prompt().document, prompt().query, blocks=blocks, anchor_length=40, passing_length=16
    )
    assert expected.margins > 1e-4, "the selection of this seed is a coin toss: take another"
    options = {"blocks": blocks, "anchor_length": 40, "passing_length": 16}
    engine = Engine.from_model(model.cuda(), strategy="apb", **options)
    session = engine.prefill(prompt())
    assert (session.logits.cpu() - expected.logits).abs().max().item() < 1e-4
    for layer, (keys, values) in enumerate(zip(expected.keys, expected.values, strict=True)):
        got_keys, got_values = session.gather_kv(layer)
        assert (got_keys.cpu() - keys).abs().max().item() < 1e-4
        assert (got_values.cpu() - values).abs().max().item() < 1e-4
    engine.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim"), [(1000, 6, 2, 64), (4099, 32, 8, 128)])
def test_block_sparse_attention_is_the_same_pattern(dtype, rows, heads, kv_heads, head_dim):
    """Compiled FlexAttention, which skips tiles, gives what plain torch computes in fp32 for the same choice."""
    torch.manual_seed(rows)
    q, k, v = (torch.randn(rows, count, head_dim, device="cuda") for count in (heads, kv_heads, kv_heads))
    columns, diagonals = (torch.rand(heads, rows, device="cuda") < share for share in (0.02, 0.01))
    diagonals[:, 0] = True
    half = [x.to(dtype) for x in (q, k, v)]
    expected, _ = by_tiles(*(x.float() for x in half), columns, diagonals, head_dim**-0.5)
    out, _ = by_flex(*half, columns, diagonals, head_dim**-0.5)
    assert ((out.float() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_layers_change_rounding_only(dtype):
    """Compiled norms, MLPs and RoPE are no further from fp64 than the layers as transformers runs them."""
    model = tiny_model("llama", heads=8, kv_heads=2, head_dim=64).to("cuda", dtype)
    exact = deepcopy(model).double()(torch.tensor([prompt().token_ids], device="cuda")).logits[0, -1]
    errors = []
    for fused in (False, True):
        engine = Engine.from_model(model, strategy="full", fused=fused)
        errors.append(((engine.prefill(prompt()).logits - exact).norm() / exact.norm()).item())
        engine.close()
    print(errors)
    assert errors[1] < 1.5 * errors[0] + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "drawn"])
def test_graphs_choose_the_same_tokens(dtype, sampling):
    """Decode by CUDA graphs: the tokens of plain decode, also past the room that was captured."""
    model = tiny_model("llama", heads=8, kv_heads=2, head_dim=64).to("cuda", dtype)
    tokens = []
    for graphs in (False, True):
        engine = Engine.from_model(model, strategy="apb", blocks=4, graphs=graphs)
        tokens.append(engine.generate(prompt(), max_new_tokens=40, **sampling).token_ids)
        session = engine.prefill(prompt(), max_new_tokens=12)
        tokens.append([])
        for _ in range(20):
            tokens[-1].append(int(session.logits.argmax()))
            session.extend(tokens[-1][-1:])
        engine.close()
    assert tokens[0] == tokens[2]
    assert tokens[1] == tokens[3]
