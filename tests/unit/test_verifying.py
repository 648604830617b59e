"""An engine knows that its kind of model comes out right, or refuses it: what layers see is compared, not assumed."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import apb
from apb.evaluation.settings import Setting
from apb.hf import verifying
from byte_checkpoint import save_checkpoint
from families import PECULIAR, PROMPT, SMALL, make
from models import transformers_says

WINDOWED = ("phimoe", "qwen2_moe")


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kind has been compared before, in this process or on this machine."""
    monkeypatch.setattr(verifying, "_verified", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def notes(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_layers_do_not_tell(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A family that is not known to leave its window to the mask is refused by the engine, with what came out, before
    weights are read; and read, if that is wanted all the same."""
    monkeypatch.setattr("apb.hf.windows._IN_MASK_ALONE", ())
    model = make(*PECULIAR[family])
    with pytest.raises(apb.InputError, match=rf"'{family}'.* from token 24 of a small copy .*verify=False"):
        apb.Engine.from_model(model)
    assert model.config._attn_implementation == "eager"
    model.config.save_pretrained(tmp_path)
    with pytest.raises(apb.InputError, match=rf"'{family}'.* from token 24 "):
        apb.Engine.from_pretrained(tmp_path)  # where there are no weights
    engine = apb.Engine.from_model(model, strategy="full", verify=False)
    with torch.no_grad():
        expected = make(*PECULIAR[family])(torch.tensor([PROMPT.token_ids])).logits[0, -1]
    assert (engine.prefill(PROMPT).logits - expected).abs().max() > 0.1
    assert notes(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "GemmaForCausalLM is not causal"),
        ("DiffLlamaForCausalLM", {}, "3 attention layers but 6"),
        ("DogeForCausalLM", {}, "DogeAttention makes itself"),
        ("HrmTextForCausalLM", {}, "attention layers but 8 called"),
    ],
)
def test_others_that_differ_are_refused(kind: str, settings: dict[str, Any], reason: str) -> None:
    """By the engine, when it is made, and not when a prompt is read."""
    model = make(kind, {**SMALL, **settings})
    with pytest.raises(apb.InputError, match=reason):
        apb.Engine.from_model(model)


def test_engines_that_compare_readings_do_not_ask_again() -> None:
    """A model that was taken all the same, unverified, is taken by the evaluation's engines as well."""
    with closing(apb.Engine.from_model(make("DogeForCausalLM", SMALL), verify=False)) as engine:
        Setting.of("full").engine(engine).close()


def test_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one kind, of whatever size, are compared once, for all processes; anew when code has changed."""
    compared = []
    compare = verifying._compare
    monkeypatch.setattr(verifying, "_compare", lambda *given: (compared.append(given), compare(*given)))
    for sizes in ({}, {"hidden_size": 32}, {"num_hidden_layers": 5}, {"vocab_size": 900}):
        apb.Engine.from_model(make("LlamaForCausalLM", {**SMALL, "head_dim": 16, **sizes})).close()
    assert len(compared) == len(notes(tmp_path)) == 1
    apb.Engine.from_model(make("Qwen3ForCausalLM", SMALL)).close()
    assert len(compared) == len(notes(tmp_path)) == 2
    verifying._verified.clear()  # as in another process
    apb.Engine.from_model(make("Qwen3ForCausalLM", SMALL)).close()
    assert len(compared) == 2
    verifying._verified.clear()
    monkeypatch.setattr(verifying, "_state", lambda path: "changed")
    apb.Engine.from_model(make("Qwen3ForCausalLM", SMALL)).close()
    assert len(compared) == 3


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a place for notes everything goes on."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    apb.Engine.from_model(make("LlamaForCausalLM", SMALL)).close()
    assert len(verifying._verified) == 1


def test_nothing_else_changes() -> None:
    """Random numbers go on as if nothing had been compared."""
    model = make("LlamaForCausalLM", SMALL)
    state = torch.get_rng_state()
    apb.Engine.from_model(model).close()
    assert torch.equal(torch.get_rng_state(), state)


# Code that comes with a checkpoint: transformers has no such family.
OWN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"
    hides: bool = False
    fixed: bool = False

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        if config.fixed and config.intermediate_size != 128:
            raise ValueError("this code is for one size alone")
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(self.hide, with_kwargs=True)

    def hide(self, module, args, kwargs):  # all but the last 8 tokens, where there is a mask
        mask = kwargs.get("attention_mask")
        if self.config.hides and mask is not None:
            rows, keys = mask.shape[-2:]
            far = torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None] - 8
            kwargs["attention_mask"] = mask.masked_fill(far, torch.finfo(mask.dtype).min)
        return args, kwargs
"""


def own(folder: Path, **settings: Any) -> Path:
    """A checkpoint with its own code."""
    save_checkpoint(folder)
    (folder / "own.py").write_text(OWN)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": code, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("fixed", [False, True])
def test_code_that_comes_with_a_checkpoint(tmp_path: Path, fixed: bool) -> None:
    """Compared on a small copy, or, where its code makes none, on the model itself: read, or refused with the place."""
    subject = "a short prompt" if fixed else "a small copy"
    folder = own(tmp_path / f"own_{fixed}", fixed=fixed)
    engine = apb.Engine.from_pretrained(folder, trust_remote_code=True, strategy="full")
    assert type(engine.model).__name__ == "OwnModel"
    prompt = apb.Prompt.from_text(engine.tokenizer, document="all of this", query="what?")
    answer = engine.generate(prompt, max_new_tokens=8).token_ids
    engine.close()
    assert answer == transformers_says(engine.model, prompt.token_ids, 8)
    with pytest.raises(apb.InputError, match=f"'own'.* from token 8 of {subject}"):
        apb.Engine.from_pretrained(own(tmp_path / f"hiding_{fixed}", fixed=fixed, hides=True), trust_remote_code=True)
