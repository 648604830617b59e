"""Faster layers: where they are made so, what that may change, and that all of it can be undone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import linear
from transformers import LlamaConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from apb import Engine, InputError, Prompt
from apb.hf import fusing
from apb.hf.recognizing import gate, rotates_halves, row_norm
from apb.hf.stream import Stream, Summand
from apb.kernels.norm import RowNorm
from families import PECULIAR, SMALL
from families import make as make_family
from hybrids import make
from models import tiny_model

# How many sums of a single row are part of the products before them, of models of three layers whose code adds what
# attention and the MLP give to the row, adds one of both, norms or scales what it adds, or adds both at once.
SUMS = {
    "llama": (("LlamaForCausalLM", SMALL), 6),
    "qwen2": (("Qwen2ForCausalLM", SMALL), 6),
    "phi3": (("Phi3ForCausalLM", SMALL), 6),
    "qwen3_moe": (PECULIAR["qwen3_moe"], 3),
    "gemma3_text": (PECULIAR["gemma3_text"], 0),
    "granite": (("GraniteForCausalLM", {**SMALL, "residual_multiplier": 0.3}), 0),
    "cohere": (("CohereForCausalLM", SMALL), 0),
}


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
    models = [tiny_model("llama", heads=4, kv_heads=2, head_dim=16) for _ in range(2)]
    first, second = (fusing.fuse_parts(model, Stream()) for model in models)
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
    undo = fusing.fuse_parts(model, Stream())
    gated = [module for module in model.modules() if type(module).__name__ == "Qwen3_5RMSNormGated"]
    assert len(gated) == 2
    assert len({vars(module)["forward"].args[0] for module in gated}) == 1
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
@pytest.mark.parametrize(
    ("counts", "width"), [((7, 3), 37), ((7, 3), 5000), ((64, 16, 16), 64), ((1, 130, 5), 37)], ids=str
)
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
    alone = [matvec.linear(x, weight, None) for weight in (gate, up)]
    gates = {"silu": functional.silu, "gelu_tanh": partial(functional.gelu, approximate="tanh")}
    assert gates.keys() == {*matvec.ACTIVATIONS}
    for name, function in gates.items():
        actual = matvec.gated(x, gate, up, name)
        wanted = function(alone[0].float()) * alone[1].float()
        torch.testing.assert_close(actual.float(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    residual = torch.randn(1, 1, counts[0]).to(dtype)
    assert torch.equal(matvec.linear(x, gate, biases[0], residual=residual), residual + found[0])


@pytest.mark.triton
def test_what_is_done_by_row(monkeypatch):
    """Single rows without gradients alone, of plain linear layers, in MLPs too."""
    from apb.kernels import matvec

    rows = []
    launch = matvec.linear
    monkeypatch.setattr(matvec, "linear", lambda x, *rest, **how: rows.append(x.shape[-1]) or launch(x, *rest, **how))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    layers = model.model.layers

    class Adapted(nn.Linear):
        pass

    layers[0].mlp.up_proj.__class__ = Adapted
    hooked = layers[1].mlp.up_proj
    hooked.forward = lambda x: linear(x, hooked.weight)
    undo = fusing.fuse_parts(model, Stream())
    one, two = torch.tensor([[3]]), torch.tensor([[3, 4]])
    with torch.no_grad():
        model(two)
        assert len(rows) == 0
        model(one)
        # Projections of q, k and v are one, and gates with what they open another kernel; but two MLPs have a layer
        # that is somebody else's.
        assert len(rows) == 2 * len(layers) + 2 + 1
        assert {*rows} == {model.config.hidden_size, layers[0].mlp.down_proj.in_features, 4 * 16}
        undo()
        rows.clear()
        model(one)
        assert len(rows) == 0
    assert type(layers[0].mlp.up_proj) is Adapted and "forward" in vars(hooked)
    undo = fusing.fuse_parts(model, Stream())
    model.requires_grad_(True)
    model(one).logits.sum().backward()  # the kernel has no backward pass
    assert len(rows) == 0 and model.lm_head.weight.grad is not None
    undo()


@pytest.mark.triton
def test_a_shard_of_a_layer_is_no_single_row():
    """Two rows of half a layer's width are as many numbers as the whole layer's width."""
    layer = nn.Linear(8, 5, bias=False)
    rows = torch.randn(1, 2, 4)
    layer.weight = nn.Parameter(layer.weight[:, :4].clone())
    undo = fusing.fuse_parts(nn.ModuleList([layer]), Stream())
    with torch.no_grad():
        torch.testing.assert_close(layer(rows), linear(rows, layer.weight))
    undo()


@pytest.mark.triton
@pytest.mark.parametrize("family", SUMS)
def test_a_single_row(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's logits, whatever its code does with what layers give, from the first row on."""
    from apb.kernels import matvec

    summed = []
    launch = matvec.linear
    monkeypatch.setattr(
        matvec, "linear", lambda *given, **how: summed.append("residual" in how) or launch(*given, **how)
    )
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    options, sums = SUMS[family]
    model = make_family(*options)
    with torch.no_grad():
        rows = [torch.tensor([[token]]) for token in (3, 4, 3)]
        expected = [model(row, use_cache=False).logits for row in rows]
        undo = fusing.fuse_parts(model, Stream())
        for row, wanted in zip(rows, expected, strict=True):
            summed.clear()
            torch.testing.assert_close(model(row, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5)
        assert sum(summed) == sums
        undo()
        summed.clear()
        assert torch.equal(model(rows[0], use_cache=False).logits, expected[0]) and not summed
    assert not any({"forward", "summand"} & {*vars(module)} for module in model.modules())


@pytest.mark.triton
def test_a_product_is_what_the_code_does_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known to be added to the row that was normed: once it is not, or the row was changed, it is the product."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    norm, layer = modeling_llama.LlamaRMSNorm(16), nn.Linear(16, 16)
    other = torch.randn(1, 1, 16)
    undo = fusing.fuse_parts(nn.ModuleList([norm, layer]), Stream())

    def read(use: Any) -> Any:
        row = torch.linspace(-1, 1, 16).view(1, 1, 16)
        with torch.no_grad():
            return use(row, layer(norm(row)))

    def change(row: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        row += 1
        return row + product

    uses = {
        "added": lambda row, product: row + product,
        "added to": lambda row, product: product + row,
        "changed": change,
        "to another": lambda row, product: other + product,
        "alone": lambda row, product: 2 * product,
        "of another shape": lambda row, product: torch.cat([row.view(4, 4), product.view(4, 4)]),
        "indexed": lambda row, product: row[0, -1] + product[0, -1],
        "written to": lambda row, product: row + product.mul_(2),
        "written to first": lambda row, product: (product.mul_(2), row + product)[1],
        "written to in part": lambda row, product: (product.view(-1)[:4].zero_(), row + product)[1],
        "looked at": lambda row, product: (row + product) * product.isfinite(),
        "by torch": lambda row, product: torch.add(row, product, alpha=2),
        "told": lambda row, product: torch.tensor([*product.shape, product.size(-1), product.dim(), product.itemsize]),
    }
    expected = {}
    undo()
    for name, use in uses.items():
        expected[name] = read(use)
    for name in uses:
        undo = fusing.fuse_parts(nn.ModuleList([norm, layer]), Stream())
        for each in ("added", "added", name, name, "added"):
            found = read(uses[each])
            torch.testing.assert_close(found, expected[each], rtol=1e-5, atol=1e-5)
            assert type(found) is torch.Tensor
        undo()


def test_a_norm_that_a_message_gave_along() -> None:
    """It is taken for that norm of that sum alone: not of another one, nor after the sum was written to."""
    stream, product = Stream(), torch.linspace(-1, 1, 4).view(1, 1, 4)
    norms = [RowNorm(torch.full((4,), factor), 1e-5, offset=False, rounded=True) for factor in (1.0, 3.0)]
    taken = []

    def onto(x: torch.Tensor, row: torch.Tensor, norm: RowNorm | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        total = row + product
        return total, None if norm is None else norm.of(total)

    def compute(x: torch.Tensor, norm: RowNorm) -> torch.Tensor:
        taken.append(False)
        return norm.of(x)

    def normed(x: torch.Tensor, norm: RowNorm) -> bool:
        """True if the norm was there already; it is right in any case."""
        taken.clear()
        torch.testing.assert_close(stream.normed(x, norm, compute), norm.of(x))
        return not taken

    layer = Summand(stream, 4, lambda x: product.clone(), onto)
    row = torch.ones(1, 1, 4)

    def added() -> torch.Tensor:
        normed(row, norms[0])
        return row + layer(row)

    assert not normed(added(), norms[0])  # seen to follow
    assert normed(added(), norms[0])
    assert not normed(added(), norms[1])  # another follows, from now on
    assert normed(added(), norms[1]) and not normed(added(), norms[0])
    normed(added(), norms[1])
    total = added()
    total += 1
    assert not normed(total, norms[1])
    normed(row, norms[0])
    earlier = layer(row)  # with the norm that followed until then
    normed(row + layer(row), norms[0])
    normed(row, norms[0])
    assert not normed(row + earlier, norms[0])


class Changed(modeling_llama.LlamaRMSNorm):
    """An RMS norm, but for a change that is given, of the rows in fp32, of the norm, or of eps."""

    def __init__(self, rows: Any = None, normed: Any = None, eps: float = 1.0) -> None:
        super().__init__(16, 1e-5)
        self.rows, self.normed, self.factor = rows or (lambda x: x), normed or (lambda x: x), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.rows(x.float())
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.factor * self.variance_epsilon)
        return self.normed(self.weight * rows.to(x.dtype))


class GatedMLP(modeling_llama.LlamaMLP):
    """Llama's, but for what is done to the parts."""

    def __init__(self, opening: Any = None, opened: Any = None) -> None:
        super().__init__(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2))
        self.opening, self.opened = opening or (lambda x: x), opened or (lambda x: x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.opening(self.gate_proj(x))) * self.opened(self.up_proj(x)))


def test_what_modules_compute_is_found_out() -> None:
    """By calling them: norms of each kind of factors and rounding, gates, RoPE; and what only looks like one is not
    taken, whatever makes the difference."""
    llama = tiny_model("qwen3", heads=4, kv_heads=2, head_dim=16).model
    gemma = make_family(*PECULIAR["gemma3_text"]).model
    olmo = make_family("Olmo2ForCausalLM", SMALL).model
    assert row_norm(llama.norm) == RowNorm(llama.norm.weight, 1e-6, offset=False, rounded=True)
    assert row_norm(gemma.norm) == RowNorm(gemma.norm.weight, gemma.norm.eps, offset=True, rounded=False)
    eps = olmo.norm.variance_epsilon
    assert row_norm(olmo.norm) == RowNorm(olmo.norm.weight, eps, offset=False, rounded=False)
    assert gate(llama.layers[0].mlp) == gate(GatedMLP()) == "silu" and gate(gemma.layers[0].mlp) == "gelu_tanh"
    plain = Changed()
    assert row_norm(plain) == RowNorm(plain.weight, 1e-5, offset=False, rounded=True)
    others = {
        "layer norm": nn.LayerNorm(16),
        "another eps": Changed(eps=2.0),
        "centred": Changed(rows=lambda x: x - x.mean(-1, keepdim=True)),
        "clamped before": Changed(rows=lambda x: x.clamp(-100, 100)),
        "scaled": Changed(normed=lambda x: 1.01 * x),
        "in fp32": Changed(normed=lambda x: x.float()),
    }
    assert [name for name, module in others.items() if row_norm(module) is not None] == []
    gates = {
        "clamped": GatedMLP(opening=lambda x: x.clamp(max=10)),
        "clamped values": GatedMLP(opened=lambda x: x.clamp(-10, 10)),
        "shifted": GatedMLP(opened=lambda x: x + 1),
        "scaled": GatedMLP(opening=lambda x: 1.01 * x),
    }
    assert [name for name, module in gates.items() if gate(module) is not None] == []
    assert rotates_halves(modeling_llama.apply_rotary_pos_emb)
    assert not rotates_halves(modeling_cohere.apply_rotary_pos_emb)
    assert not rotates_halves(lambda q, k, cos, sin, positions: (q, k))


@pytest.mark.triton
def test_modules_of_one_class_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is found out for itself; and has the weights that it has when it is called."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    norms = [modeling_llama.LlamaRMSNorm(8, eps) for eps in (1e-6, 0.5)]
    mlps = [GatedMLP(), GatedMLP(opening=lambda x: x.clamp(max=0.01))]
    modules = nn.ModuleList([*norms, *mlps]).requires_grad_(False)
    x = torch.linspace(-1, 1, 8).view(1, 1, 8)
    undo = fusing.fuse_parts(modules, Stream())
    for scale in (1.0, 2.0):
        for module in modules:
            for layer in (module, *module.children()):
                if hasattr(layer, "weight"):
                    layer.weight = nn.Parameter(scale * layer.weight, requires_grad=False)
            with torch.no_grad():
                torch.testing.assert_close(module(x), type(module).forward(module, x), rtol=1e-5, atol=1e-6)
    undo()


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norms_and_rope_of_few_rows(dtype: torch.dtype) -> None:
    """Of widths that are powers of two or not, and of heads in any order, as transformers computes them."""
    from apb.kernels import few_rows

    torch.manual_seed(0)
    room = 4 * torch.finfo(dtype).eps
    for shape in ((1, 1, 2048), (1, 3, 48), (1, 2, 5, 20)):
        x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
        for offset, rounded in ((False, True), (True, False), (False, False)):
            norm = RowNorm(weight, 1e-5, offset, rounded)
            torch.testing.assert_close(few_rows.rms_norm(x, norm), norm.of(x), rtol=room, atol=room)
    for rows, width in ((1, 64), (3, 24)):
        q, k = (torch.randn(1, rows, heads, width).to(dtype).transpose(1, 2) for heads in (6, 2))
        angles = torch.randn(1, rows, width)
        sines = angles.cos().to(dtype), angles.sin().to(dtype)
        wanted = modeling_llama.apply_rotary_pos_emb(*(x.float() for x in (q, k, *sines)))
        for actual, each in zip(few_rows.rotate_halves(q, k, *sines), wanted, strict=True):
            torch.testing.assert_close(actual.float(), each, rtol=room, atol=room)
