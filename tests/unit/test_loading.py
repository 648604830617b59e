"""Weights as they come: dtypes, torchao's quantization, peft's adapters; each as transformers itself reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import apb
from apb.hf.loading import load_config, load_model
from apb.hf.supported import check_supported
from families import PROMPT, SMALL, make

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose linear maps are wide enough for quantizers."""
    folder = tmp_path_factory.mktemp("weights")
    make("LlamaForCausalLM", {**SMALL, "hidden_size": 128, "intermediate_size": 128}).save_pretrained(folder)
    return folder


def theirs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPT.token_ids])).logits[0, -1].float()


def ours(model: torch.nn.Module) -> torch.Tensor:
    engine = apb.Engine.from_model(model, strategy="full")
    logits = engine.prefill(PROMPT).logits
    engine.close()
    return logits


@pytest.mark.parametrize("kind", ["rwkv", "xlstm"])
def test_models_without_attention(kind: str) -> None:
    """Refused for what they lack, not for an attribute that is missing."""
    with pytest.raises(apb.InputError, match=f"'{kind}' models .* no attention heads"):
        check_supported(AutoConfig.for_model(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(folder: Path, dtype: torch.dtype) -> None:
    """The dtype asked for, whatever the file's."""
    model = load_model(folder, dtype, CPU)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    torch.testing.assert_close(ours(model), theirs(model), rtol=0.05, atol=0.05 if dtype != torch.float32 else 1e-4)


def test_torchao(folder: Path) -> None:
    """A quantization of transformers is passed through: the same numbers as its own eager attention gives."""
    torchao = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: the extra quantization brings it"
    )
    from transformers import TorchAoConfig

    quantization = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = load_model(folder, torch.float32, CPU, quantization=quantization)
    assert "int8" in str(type(model.model.layers[0].self_attn.q_proj.weight)).lower()
    expected = theirs(model)
    torch.testing.assert_close(ours(model), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, theirs(load_model(folder, torch.float32, CPU)))


def test_adapters(folder: Path, tmp_path: Path) -> None:
    """A folder with an adapter alone is loaded onto the base model that it names."""
    peft = pytest.importorskip("peft", reason="peft is not installed: the extra adapters brings it")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    expected = theirs(adapted)
    adapted.save_pretrained(tmp_path)
    assert load_config(tmp_path).model_type == "llama"
    model = load_model(tmp_path, torch.float32, CPU)
    torch.testing.assert_close(ours(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, theirs(load_model(folder, torch.float32, CPU)))


def test_adapters_without_a_base(tmp_path: Path) -> None:
    """An adapter that does not say what it was made for is refused."""
    pytest.importorskip("peft", reason="peft is not installed: the extra adapters brings it")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(apb.InputError, match="does not name its base model"):
        load_config(tmp_path)
