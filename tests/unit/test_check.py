"""`apb check` finds what is wrong, and the table in docs/models.md says what it finds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

import apb
from apb.check import check
from apb.hf.shrinking import shrink
from apb.hf.supported import check_supported
from apb.layers import shards
from apb.layers.base import AttentionInput
from command_line import Cli
from families import OLD

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("table", ROOT / "docs" / "table.py")
assert spec is not None and spec.loader is not None
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)


@pytest.mark.parametrize("vocabulary", [256000, 300])
def test_a_sound_model_passes(vocabulary: int) -> None:
    """Every comparison is made and is within rounding, and not because there is nothing to see."""
    card = check(AutoConfig.for_model("gemma2", vocab_size=vocabulary))
    assert card.supported
    assert {"full = transformers", "apb, everything passed = full", "ring = full"} <= {r.name for r in card.results}
    errors = [result.error for result in card.results if "=" in result.name]
    assert all(error is not None and 0 < error < 1e-5 for error in errors)
    assert json.loads(json.dumps(card.to_dict()))["supported"] is True


@pytest.mark.parametrize("broken", ["settle", "window"])
def test_a_wrong_result_is_found(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sinks forgotten, or the window one token too long, the card says no."""
    if broken == "settle":
        monkeypatch.setattr(AttentionInput, "settle", lambda layer, out, lse, heads=None: out.to(layer.q.dtype))
    else:
        whole = shards.window_attention
        monkeypatch.setattr(shards, "window_attention", lambda *given: whole(*given[:-1], given[-1] + 1))
    card = check(AutoConfig.for_model("gpt_oss"))
    assert not card.supported
    assert card.refused is None
    assert not card.results[0].passed


@pytest.mark.parametrize("model_type", ["mamba", "bert", "t5", "musicgen", "diffllama", "doge", "moshi"])
def test_what_cannot_work_is_refused(model_type: str) -> None:
    """By name, with the reason; Moshi's because transformers' own decode differs from its pass over a whole text."""
    parts = {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"}
    own = {name: {"model_type": part} for name, part in parts.items()} if model_type == "musicgen" else {}
    card = check(AutoConfig.for_model(model_type, **own))
    assert card.refused or (model_type == "moshi" and OLD)  # then it is compared, and differs
    assert not card.supported


def test_recurrent_layers_are_compared() -> None:
    """Every exact strategy gives transformers' logits, after the prompt and after further tokens."""
    card = check(AutoConfig.for_model("jamba"))
    assert card.supported, card.results


def test_shrinking_keeps_what_is_peculiar() -> None:
    """Few layers, of every kind there is; the ratio of heads; the width of a head."""
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2)
    small = shrink(config)
    assert small.num_hidden_layers == 4
    assert small.layer_types == ["sliding_attention"] * 3 + ["full_attention"]
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (4, 1, config.head_dim)
    assert config.num_hidden_layers == 12
    assert shrink(AutoConfig.for_model("marian", decoder_vocab_size=300)).decoder_vocab_size == small.vocab_size
    llama = shrink(LlamaConfig(hidden_size=4096, num_attention_heads=32))
    assert llama.hidden_size // llama.num_attention_heads == 128


def test_every_family_is_in_the_table() -> None:
    """docs/models.md, which `python docs/table.py` writes, has every family of the installed transformers, and those
    that are refused before anything runs are refused there: none is accepted that was never run."""
    page = (ROOT / "docs" / "models.md").read_text()
    assert page.startswith(table.TITLE)
    known = table.rows(page)
    assert set(table.families()) <= set(known), "look at the new ones: python docs/table.py FAMILY ..."
    for family in table.families():
        config = table.config_of(family)
        result = known[family].split(" | ")[1]
        if config is None or result.startswith("as "):
            continue
        try:
            check_supported(config)
        except apb.InputError:
            assert result in ("refused", "not a decoder"), family
        else:
            assert result in ("works", "differs"), family


@pytest.mark.parametrize("family", ["gemma4_text", "mamba2", "roberta", "qwen2_5_vl"])
def test_the_table_is_true(family: str) -> None:
    """What it says of a family is what running it says."""
    assert table.rows((ROOT / "docs" / "models.md").read_text())[family] == table.row(family)


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    """Two ranks agree; a refused model ends with status 2 and one sentence."""
    card = cli("check", "--json", "--ranks", 2).json
    assert card["supported"]
    assert card["ranks"] == 2
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    done = cli("check", "--json", "--model", tmp_path)
    assert done.status == 2
    assert "'mamba'" in json.loads(done.out)["refused"]
    assert len(done.err.splitlines()) == 1
