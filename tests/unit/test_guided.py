"""Answers that follow a JSON schema, whatever the model would rather say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import apb
from apb.hf import guiding
from byte_checkpoint import VOCABULARY, byte_tokenizer
from models import tiny_model, without_eos

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"enum": ["Maud", "Orrin"]},
            "lights": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
            "no": {"type": "integer", "minimum": 10, "maximum": 99},
        },
        "required": ["name", "lights", "no"],
        "additionalProperties": False,
    }
)
PROMPT = apb.Prompt.from_tokens([], list(b"The keeper of Orrin was called Maud. "), list(b"Who?"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> apb.Engine:
    return apb.Engine.from_pretrained(checkpoint, strategy="full", device="cpu")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_follow_a_schema(engine: apb.Engine, temperature: float) -> None:
    """A model of random weights writes JSON of that form, and ends with it; what it says is drawn by the seed."""
    answers = [
        engine.generate(PROMPT, max_new_tokens=200, temperature=temperature, seed=seed, schema=SCHEMA)
        for seed in range(3 if temperature else 1)
    ]
    for answer in answers:
        said = json.loads(answer.text)
        assert answer.finish_reason == "stop" and list(said) == ["name", "lights", "no"]
        assert said["name"] in ("Maud", "Orrin") and 10 <= said["no"] <= 99
        assert 1 <= len(said["lights"]) <= 2 and {type(each) for each in said["lights"]} == {bool}
    assert (len({answer.text for answer in answers}) > 1) == (temperature > 0)


def test_penalties_and_few_choices_leave_it_whole(engine: apb.Engine) -> None:
    """A schema rules before top_k: what is drawn is likely among what is allowed, not the other way round."""
    sampling = {"temperature": 1.0, "top_k": 1, "seed": 1, "repetition_penalty": 2.0, "frequency_penalty": 1.0}
    answer = engine.generate(PROMPT, max_new_tokens=200, schema=SCHEMA, **sampling)
    assert json.loads(answer.text)["name"] in ("Maud", "Orrin")


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ('{"type": "nonsense"}', "Invalid type: nonsense"),
        ('{"not": {"type": "string"}}', "Unimplemented keys"),
        ('{"type": "string", "pattern": "(a"}', "unclosed group"),
        ("[1]", "Expecting object schema"),
        ("{", "cannot follow this JSON schema"),
        ("[" * 100_000, "cannot follow this JSON schema"),
    ],
)
def test_schemas_that_cannot_be_followed(schema: str, sentence: str) -> None:
    """They are refused before anything is read, with the library's reason on one line."""
    with pytest.raises(apb.InputError, match=sentence) as caught:
        apb.generation.Sampling(schema=schema)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_models_whose_answers_cannot_end() -> None:
    """What is complete could not be ended, so it is not begun."""
    model = without_eos(tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY))
    engine = apb.Engine.from_model(model, byte_tokenizer(), strategy="full")
    with pytest.raises(apb.InputError, match="a token that ends an answer"):
        engine.generate(PROMPT, schema=SCHEMA)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the way to install it."""
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(apb.InputError, match=r"need llguidance: pip install 'apb-llm\[guided\]'"):
        guiding.check_schema('{"type": "null"}')
