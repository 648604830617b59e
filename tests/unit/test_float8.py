"""Linear layers in fp8: rounding against numpy, products against fp64, which layers, and where it is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from apb import Engine, InputError, Prompt
from apb.hf import float8, identity
from apb.kernels.float8 import linear, scaled
from models import tiny_model


def nearest(values: np.ndarray) -> np.ndarray:
    """The nearest numbers of e4m3: 3 bits after the leading one, steps of 2^-9 below 2^-6, at most 448."""
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return np.clip(np.round(values / step) * step, -448, 448)


def test_rows_are_rounded_to_the_nearest():
    """Each row by its own scale, its largest number to 448; a row of zeros stays zeros."""
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e-3], [1], [1], [300], [0]])
    rounded, scale = scaled(x)
    expected = x[:4].abs().amax(1) / 448
    torch.testing.assert_close(scale[:4], expected)
    np.testing.assert_array_equal(rounded[:4].float().numpy(), nearest((x[:4] / expected[:, None]).double().numpy()))
    assert not rounded[4].float().any() and scale[4] > 0


def test_linear_layers_multiply_what_was_rounded():
    """fp64 products of the rounded numbers; beside the layer itself within fp8's error."""
    generator = torch.Generator().manual_seed(2)
    x, weight = (
        torch.randn(2, 7, 64, generator=generator).bfloat16(),
        torch.randn(48, 64, generator=generator).bfloat16(),
    )
    bias = torch.randn(48, generator=generator).bfloat16()
    rounded, by_output = scaled(weight)
    out = linear(x, rounded, by_output, bias)
    rows, by_row = scaled(x.view(14, 64))
    exact = (rows.double() * by_row[:, None]) @ (rounded.double() * by_output[:, None]).T + bias.double()
    torch.testing.assert_close(out.double().view(14, 48), exact, rtol=2**-7, atol=2**-6)
    plain = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert 0.001 < (out.double() - plain).norm() / plain.norm() < 0.06


def test_a_model_in_fp8():
    """Its linear layers but the output; answers are those of transformers with the same layers; and it says so."""
    plain, model = (tiny_model("llama", heads=4, kv_heads=2, head_dim=16) for _ in range(2))
    odd = nn.Linear(20, 64, bias=False)
    model.model.layers[0].odd = odd
    float8.round_layers(model)
    kinds = {name for name, module in model.named_modules() if isinstance(module, float8.Float8Linear)}
    assert len(kinds) == 7 * model.config.num_hidden_layers
    assert type(model.lm_head) is nn.Linear and model.model.layers[0].odd is odd
    assert identity.fingerprint(model) != identity.fingerprint(plain)
    assert (identity.quantization(model), identity.quantization(plain)) == ("fp8", None)
    del model.model.layers[0].odd
    ids = [1, 2, *[(7 * i) % 97 for i in range(60)], 5, 6]
    expected, other = (each(torch.tensor([ids])).logits[0, -1].float() for each in (model, plain))
    engine = Engine.from_model(model, strategy="full")
    prompt = Prompt.from_tokens(ids[:2], ids[2:-2], ids[-2:])
    torch.testing.assert_close(engine.prefill(prompt).logits, expected, rtol=1e-4, atol=1e-4)
    assert 0.01 < (expected - other).norm() / other.norm() < 0.4  # sharp attention, which small errors turn
    assert engine.generate(prompt, max_new_tokens=2).fingerprint["quantization"] == "fp8"
    engine.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("fp4", "cpu", torch.bfloat16, False), "Unknown quantization 'fp4'; choose fp8"),
        (("fp8", "cuda", torch.float32, False), "results in bfloat16"),
        (("fp8", "cuda", torch.bfloat16, True), "tensor parallelism"),
        (("fp8", "cpu", torch.bfloat16, False), "Ada, Hopper"),
        (("fp8", "cpu", torch.float32, True), "Ada, Hopper"),
    ],
)
def test_refusals(given, said, monkeypatch):
    """Each with what to do, before a weight is read; what cannot be mended here comes first."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    name, device, *rest = given
    with pytest.raises(InputError, match=said):
        float8.check(name, torch.device(device), *rest)


def test_the_command_line_refuses_fp8_on_the_cpu(cli, tmp_path):
    """One sentence, exit code 2."""
    (tmp_path / "text.txt").write_text("A text.")
    asked = (
        "generate",
        "--document",
        tmp_path / "text.txt",
        "--query",
        "What?",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
    )
    cli(*asked, "--quantization", "fp8").refused("Ada, Hopper")
