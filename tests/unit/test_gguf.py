"""GGUF files, of one part and of several, are read as the checkpoints that they were made from, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import apb
from apb.hf import loading
from command_line import Cli

gguf = pytest.importorskip("gguf", reason="gguf is not installed: the extra gguf brings it")

from gguf_files import save_folder, write  # noqa: E402  needs the package

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and as GGUF files: whole.gguf, and in 4 parts."""
    folder = tmp_path_factory.mktemp("gguf")
    save_folder(folder)
    write(folder, folder / "whole.gguf")
    write(folder, folder / "parts.gguf", tensors=9)
    assert len(list(folder.glob("parts-*"))) == 4
    return folder


def logits(path: Path) -> torch.Tensor:
    engine = apb.Engine.from_pretrained(path, device="cpu", dtype="float32", strategy="full")
    prompt = apb.Prompt.from_chat(engine.tokenizer, "Ein Text über 7 Dinge.\n" * 9, "What?", system="Be brief.")
    return engine.prefill(prompt).logits


@pytest.mark.parametrize("name", ["whole.gguf", "parts-00001-of-00004.gguf", "parts-00003-of-00004.gguf"])
def test_read_as_its_checkpoint(folder: Path, name: str) -> None:
    """Settings, tokens, template and weights are those of the folder, whichever part is named."""
    config, expected = loading.load_config(folder / name), loading.load_config(folder)
    for setting in ("model_type", "head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_parameters"):
        assert getattr(config, setting) == getattr(expected, setting)
    tokenizer, theirs = loading.load_tokenizer(folder / name), loading.load_tokenizer(folder)
    text = "the other naïve 北京 </s> \t😀\r\n"
    assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
    assert tokenizer.chat_template == theirs.chat_template
    model = loading.load_model(folder / name, torch.float32, torch.device("cpu"))
    weights = loading.load_model(folder, torch.float32, torch.device("cpu")).state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())
    assert model.generation_config.eos_token_id == [10, 257]  # where a turn ends, an answer does
    # Equal weights at other addresses: on some processors products of a row are then summed in another order.
    torch.testing.assert_close(logits(folder / name), logits(folder), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rope", "settings"),
    [
        (YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 4096, "finetuned": True}),
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"rope_type": "default"}, {"type": "none"}),
        (LLAMA3, {}),
    ],
    ids=lambda value: str(value.get("rope_type", "")),
)
def test_scaled_rope(tmp_path: Path, rope: dict[str, Any], settings: dict[str, Any]) -> None:
    """Which transformers passes over in GGUF files: read as in a checkpoint with these settings."""
    save_folder(tmp_path, rope)
    factors = None
    if rope["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](loading.load_config(tmp_path))
        factors = 10000.0 ** -(np.arange(0, 16, 2) / 16) / frequencies.numpy()
        assert factors.max() == pytest.approx(8.0)
    write(tmp_path, tmp_path / "scaled.gguf", rope=settings, factors=factors)
    config = loading.load_config(tmp_path / "scaled.gguf")
    assert loading.position_limit(config) == loading.position_limit(loading.load_config(tmp_path))
    torch.testing.assert_close(logits(tmp_path / "scaled.gguf"), logits(tmp_path), rtol=1e-4, atol=1e-4)


def test_what_transformers_does_not_read(folder: Path, tmp_path: Path) -> None:
    """Scaling of another kind, factors of another model, a window or a family that it does not know: one sentence."""
    for options, reason in (
        ({"rope": {"type": "longrope", "factor": 4.0}}, "RoPE scaled by type, factor"),
        ({"rope": {"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.5}}, "yarn_ext_factor"),
        ({"factors": np.full(8, 3.0)}, "rope_freqs.weight"),
        ({"window": 64}, "sliding window of 64"),
        ({"family": "unheard-of"}, "unheard-of"),
    ):
        write(folder, tmp_path / "odd.gguf", **options)
        with pytest.raises(apb.InputError, match=reason):
            loading.load_config(tmp_path / "odd.gguf")


def test_files_that_cannot_be_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    """Missing, damaged, cut short, without a part or the package: status 2 and one sentence, before anything runs."""
    (tmp_path / "text").write_text("a text to read")
    generate = ("generate", "--document", tmp_path / "text", "--query", "what?", "--model")
    cli(*generate, tmp_path / "none.gguf").refused("none.gguf", "does not exist")
    (tmp_path / "noise.gguf").write_bytes(b"no such format" * 100)
    cli(*generate, tmp_path / "noise.gguf").refused("noise.gguf", "magic")
    (tmp_path / "empty.gguf").touch()
    cli(*generate, tmp_path / "empty.gguf").refused("empty.gguf")
    whole = (folder / "whole.gguf").read_bytes()
    for length in (len(whole) // 50, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        cli(*generate, tmp_path / "cut.gguf").refused("cut.gguf", "cannot be read")
    for path in folder.glob("parts-*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "parts-00003-of-00004.gguf").unlink()
    cli(*generate, tmp_path / "parts-00001-of-00004.gguf").refused("Part 3 of 4", "parts-00003-of-00004.gguf")
    with monkeypatch.context() as full, pytest.raises(torch.OutOfMemoryError):  # says what it says of other files
        full.setattr(AutoModelForCausalLM, "from_pretrained", Mock(side_effect=torch.OutOfMemoryError))
        loading.load_model(folder / "whole.gguf", torch.float32, torch.device("cpu"))
    with pytest.raises(apb.InputError, match=r"^The weights of a GGUF file .* leave the quantization out\.$"):
        loading.load_model(folder / "whole.gguf", torch.float32, torch.device("cpu"), quantization=Mock())
    monkeypatch.setattr("apb.hf.gguf.is_gguf_available", lambda: False)
    cli(*generate, folder / "whole.gguf").refused("package gguf", "pip install 'apb-llm[gguf]'")


def test_answers(folder: Path, tmp_path: Path, cli: Cli) -> None:
    """The command gives the checkpoint's answer; and leaves the package as it was."""
    reader = gguf.GGUFReader
    (tmp_path / "text").write_text("a text to read\n" * 20)
    generate = ("generate", "--document", tmp_path / "text", "--query", "what?", "--max-new-tokens", 12, "--json")
    answers = [cli(*generate, "--model", path).json["token_ids"] for path in (folder, folder / "whole.gguf")]
    assert answers[0] == answers[1]
    assert len(answers[0]) > 4
    assert gguf.GGUFReader is reader
