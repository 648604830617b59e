"""Faster layers: where they are made so, what that may change, and that all of it can be undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers.models.llama import modeling_llama

from apb import Engine, InputError, Prompt
from apb.hf import fusing
from hybrids import make
from models import tiny_model


def test_nothing_is_compiled_on_the_cpu():
    """There it does not pay: not done by itself, and refused with the reason when asked for."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    engine = Engine.from_model(model)
    assert not any("NORM" in name.upper() and "forward" in vars(m) for name, m in model.named_modules())
    engine.close()
    with pytest.raises(InputError, match=r"fused=True cannot be had here: .*cpu"):
        Engine.from_model(model, fused=True)


@pytest.mark.triton
def test_parts_run_compiled_and_come_back(monkeypatch):
    """Norms, MLPs and the rotary embedding go through torch.compile, to the same effect; undone, nothing is left."""
    compiled = []

    def compile_(function, **options):
        assert options == ({} if function.__name__ == "apply_rotary_pos_emb" else {"dynamic": True})

        def run(*args, **kwargs):
            compiled.append(function.__qualname__)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(fusing, "why_not", lambda device: None)
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    prompt = Prompt.from_tokens([1, 2], [(7 * i) % 97 for i in range(200)], [5, 6, 7])
    slow = Engine.from_model(model, strategy="apb", blocks=3, fused=False)
    expected = slow.prefill(prompt).logits
    with pytest.raises(InputError, match="Another engine on this model"):
        Engine.from_model(model)
    slow.close()
    assert not compiled
    rotate = modeling_llama.apply_rotary_pos_emb
    fast = Engine.from_model(model, strategy="apb", blocks=3)
    # The last row's logits, a single row's product, are summed up in another order.
    torch.testing.assert_close(fast.prefill(prompt).logits, expected, rtol=1e-5, atol=1e-5)
    layers = model.config.num_hidden_layers
    assert compiled.count("LlamaRMSNorm.forward") == 2 * layers + 1
    assert compiled.count("LlamaMLP.forward") == layers
    assert compiled.count("apply_rotary_pos_emb") == layers
    fast.close()
    assert modeling_llama.apply_rotary_pos_emb is rotate
    assert not any("forward" in vars(module) for module in model.modules())
    assert type(model.lm_head) is nn.Linear


def test_one_rope_for_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph has numbers of rows alone as variables, and what it returns is what is not compiled returns."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        given = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        graphs.append([size for x in given if isinstance(x, torch.Tensor) for size in x.shape])
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, backend=backend, **how))
    original = modeling_llama.apply_rotary_pos_emb
    first, second = (fusing.fuse_parts(tiny_model("llama", heads=4, kv_heads=2, head_dim=16)) for _ in range(2))
    first()  # the other model of the family goes on with it
    assert modeling_llama.apply_rotary_pos_emb is not original
    try:
        for rows in (40, 4, 16, 333):  # as many as heads, as wide as a head
            q, k = (torch.randn(1, rows, heads, 16).transpose(1, 2) for heads in (4, 2))
            angles = torch.randn(1, rows, 16)
            rotated = modeling_llama.apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
            for actual, expected in zip(rotated, original(q, k, angles.cos(), angles.sin()), strict=True):
                torch.testing.assert_close(actual, expected)
    finally:
        second()
    assert modeling_llama.apply_rotary_pos_emb is original
    (sizes,) = graphs
    assert sorted(size for size in sizes if isinstance(size, int)) == sorted([1, 4, 16, 1, 2, 16, 1, 16, 1, 16])


def test_gated_norms_are_compiled_too(monkeypatch):
    """Those of recurrent layers, in fp32 between many passes: one graph for all layers."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = make("qwen3_5_text")
    undo = fusing.fuse_parts(model)
    gated = [module for module in model.modules() if type(module).__name__ == "Qwen3_5RMSNormGated"]
    assert len(gated) == 2
    assert len({vars(module)["forward"].func for module in gated}) == 1
    undo()
    assert not any("forward" in vars(module) for module in gated)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("outputs", "width"), [(1, 1), (7, 64), (130, 37), (33, 2048), (3, 5000)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_of_one_row(outputs: int, width: int, dtype: torch.dtype, with_bias: bool):
    """Any widths, whole tiles or not, against torch in fp64; what lies behind the weights is not taken for them."""
    from apb.kernels import matvec

    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, width).to(dtype), torch.full((outputs + 1, width + 3), float("nan"), dtype=dtype)
    weight[:outputs, :width] = torch.randn(outputs, width)
    weight = weight[:outputs, :width]
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    actual = matvec.linear(x, weight, bias)
    assert actual.shape == (1, 1, outputs) and actual.dtype == dtype
    wanted = linear(x.double(), weight.double(), None if bias is None else bias.double())
    # The sum's rounding, and that of what is given back.
    room = width * 2.0**-24 * linear(x.abs().double(), weight.abs().double()) + torch.finfo(dtype).eps * wanted.abs()
    assert ((actual.double() - wanted).abs() <= room + 1e-7).all()


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [(7, 3), (64, 16, 16), (1, 130, 5)], ids=str)
@pytest.mark.parametrize("width", [37, 64, 5000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_several_layers_of_one_row(counts: tuple[int, ...], width: int, dtype: torch.dtype, with_bias: bool):
    """To the bit what each layer gives alone; and an MLP's gate, with what it opens."""
    from apb.kernels import matvec

    torch.manual_seed(0)
    x = torch.randn(1, 1, width).to(dtype)
    weights = [torch.randn(count, width).to(dtype) / width**0.5 for count in counts]
    biases = [torch.randn(count).to(dtype) if with_bias else None for count in counts]
    found = matvec.several(x, weights, biases)
    for actual, weight, bias in zip(found, weights, biases, strict=True):
        assert torch.equal(actual, matvec.linear(x, weight, bias))
    gate, up = weights[0], weights[1].repeat(counts[0], 1)[: counts[0]]
    actual = matvec.gated(x, gate, up)
    wanted = torch.nn.functional.silu(matvec.linear(x, gate, None).float()) * matvec.linear(x, up, None).float()
    torch.testing.assert_close(actual.float(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.triton
def test_what_is_done_by_row(monkeypatch):
    """Single rows without gradients alone, of plain linear layers; compiled parts call the kernel too."""
    from apb.kernels import matvec

    rows = []
    launch = matvec._launch
    monkeypatch.setattr(matvec, "_launch", lambda *given: rows.append(len(given[0])) or launch(*given))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    layers = model.model.layers

    class Adapted(nn.Linear):
        pass

    layers[0].mlp.up_proj.__class__ = Adapted
    hooked = layers[1].mlp.up_proj
    hooked.forward = lambda x: linear(x, hooked.weight)
    undo = fusing.fuse_parts(model)
    one, two = torch.tensor([[3]]), torch.tensor([[3, 4]])
    with torch.no_grad():
        model(two)
        assert len(rows) == 0
        model(one)
        assert len(rows) == 7 * len(layers) + 1 - 2  # the two that are somebody else's
        assert {*rows} == {model.config.hidden_size, layers[0].mlp.down_proj.in_features, 4 * 16}
        undo()
        rows.clear()
        model(one)
        assert len(rows) == 0
    assert type(layers[0].mlp.up_proj) is Adapted and "forward" in vars(hooked)
    fusing.fuse_parts(model)
    model.requires_grad_(True)
    model(one).logits.sum().backward()  # the kernel has no backward pass
    assert len(rows) == 0 and model.lm_head.weight.grad is not None


@pytest.mark.triton
def test_a_shard_of_a_layer_is_no_single_row():
    """Two rows of half a layer's width are as many numbers as the whole layer's width."""
    layer = nn.Linear(8, 5, bias=False)
    rows = torch.randn(1, 2, 4)
    layer.weight = nn.Parameter(layer.weight[:, :4].clone())
    undo = fusing.fuse_parts(nn.ModuleList([layer]))
    with torch.no_grad():
        torch.testing.assert_close(layer(rows), linear(rows, layer.weight))
    undo()
