"""Checkpoints that cannot be loaded: one sentence each, as a wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import BitsAndBytesConfig

import apb
from apb.hf.damaged import quantizer
from command_line import Cli


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def ask(cli: Cli, folder: Path, tmp_path: Path) -> Cli:
    document = tmp_path / "document.txt"
    document.write_text("The keeper was called Maud. " * 20)
    return lambda: cli("generate", "--model", folder, "--document", document, "--query", "Who?", "--device", "cpu")


@pytest.mark.parametrize("index", ['{"metadata": {}, "weight_map": {}}', "{}", "[]", '{"weight_map": []}', "{"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_that_names_nothing(ask: Cli, folder: Path, weights: str, index: str) -> None:
    """It is named; a whole file of weights beside it is read all the same."""
    (folder / f"{weights}.index.json").write_text(index)
    if weights == "model.safetensors":
        assert ask().status == 0
    (folder / "model.safetensors").unlink()
    ask().refused(f"'{weights}.index.json'", str(folder), "names no weights")


@pytest.mark.parametrize(
    "tokenizer",
    [
        '{"version": "9.9", "added_tokens": [], "model": {"type": "Runes", "vocab": {}}}',
        '{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
        "[]",
        "runes",
    ],
)
def test_tokenizers_of_an_unknown_kind(ask: Cli, folder: Path, tokenizer: str) -> None:
    """Whatever the library that reads them raises."""
    (folder / "tokenizer.json").write_text(tokenizer)
    ask().refused(f"The tokenizer of '{folder}' cannot be loaded", "put a tokenizer.json there")


@pytest.mark.parametrize(
    ("method", "package"), [("aqlm", "aqlm[gpu,cpu]"), ("vptq", "vptq"), ("auto-round", "auto-round")]
)
def test_quantizers_that_are_not_installed(ask: Cli, folder: Path, method: str, package: str) -> None:
    """The package to install is named, in the same words for all."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": method}}))
    ask().refused(f"are quantized by '{method}', which needs a package of its own: pip install -U {package}.")


def test_names_of_quantizers(checkpoint: Path) -> None:
    """From a checkpoint's configuration or the caller's, whichever class it is."""
    config = apb.hf.loading.load_config(checkpoint)
    assert quantizer(config) is None
    config.quantization_config = {"quant_method": "gptq"}
    assert quantizer(config) == "gptq"
    assert quantizer(config, BitsAndBytesConfig(load_in_8bit=True)) == "bitsandbytes"
