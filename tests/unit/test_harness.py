"""The engine as a model of lm-evaluation-harness: the answers and likelihoods of the harness's own `hf`, and tasks on
disk: nothing is downloaded."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import apb
from byte_checkpoint import BOS, EOS, TEMPLATE, byte_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra lm-eval brings it")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from apb.evaluation.harness import EngineLM  # noqa: E402
from apb.evaluation.questions import split  # noqa: E402

TEXT = "The keeper was called Maud. " * 20
TASK = """
task: local_needles
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}\\n\\nWho?"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_gen_toks: 12
  until: ["{stop}"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}<{{ m.role }}>\n\n{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> Iterator[tuple[EngineLM, HFLM]]:
    """Ours, and the harness's."""
    ours = EngineLM(pretrained=str(checkpoint), device="cpu", strategy="full")
    yield ours, HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32")
    ours.engine.close()


def requests(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def run(command: Sequence[str], folder: Path) -> None:
    """The harness's command line, with the model registered, without network."""
    offline = {"HF_HOME": str(folder / "home"), "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "apb.evaluation.harness", "run", "--tasks", "local_needles", *command]
    command += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
    done = subprocess.run(command, capture_output=True, timeout=280, env={**os.environ, **offline}, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def test_answers_are_the_engines_up_to_the_stop(checkpoint: Path, tmp_path: Path) -> None:
    """Every option reaches the engine; a stop string ends the answer and is no part of it. No device is named, so the
    one there is is used. The harness's own models are still known."""
    engine = apb.Engine.from_pretrained(checkpoint, blocks=3, device="cpu")
    prompt = split(f"{TEXT}\n\nWho?", engine.tokenizer, special=True)  # type: ignore[arg-type]
    expected = engine.generate(prompt, max_new_tokens=12).text
    engine.close()
    stop = expected[5]
    data = tmp_path / "data.jsonl"
    answer = expected[: expected.index(stop)]
    data.write_text("".join(json.dumps({"text": TEXT, "answer": wanted}) + "\n" for wanted in (answer, "no")))
    (tmp_path / "local_needles.yaml").write_text(TASK.format(data=data, stop=stop))
    run(["--model", "apb", "--model_args", f"pretrained={checkpoint},blocks=3,dtype=float32"], tmp_path)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    said = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    if not torch.cuda.is_available():  # a GPU rounds in its own way
        assert json.loads(results.read_text())["results"]["local_needles"]["exact_match,none"] == 0.5
        assert said == [[answer]] * 2
    run(["--model", "hf", "--model_args", f"pretrained={checkpoint}"], tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"until": ["\n\n"]},
        {},
        {"until": None, "max_gen_toks": None},
        {"until": "e", "max_gen_toks": 9},
        {"max_new_tokens": 5},
        {"max_tokens": 7, "max_completion_tokens": 3},
        {"until": ["zzz", "</s>"], "temperature": 0.7, "do_sample": False, "max_gen_toks": 20},
    ],
)
def test_answers_are_those_of_hf(models: tuple[EngineLM, HFLM], options: dict[str, Any]) -> None:
    """Of plain texts and of chats, whatever the names of the options."""
    theirs = {name: value for name, value in options.items() if value is not None}
    ours, hf = models
    texts = [TEXT, f"{TEXT}\n\nWho?", "ab", "<s>begun by the text"]
    ours.tokenizer.chat_template = hf.tokenizer.chat_template = TEMPLATE
    for chat in ([("user", TEXT)], [("system", "Be brief."), ("user", f"{TEXT}\n\nWho?"), ("assistant", "It was")]):
        turns = [{"role": role, "content": text} for role, text in chat]
        texts.append(ours.apply_chat_template(turns, add_generation_prompt=chat[-1][0] == "user"))
        assert texts[-1] == hf.apply_chat_template(turns, add_generation_prompt=chat[-1][0] == "user")
    ours.max_gen_toks = 32
    expected = hf.generate_until(requests("generate_until", [(text, {"max_gen_toks": 32, **theirs}) for text in texts]))
    if "max_gen_toks" not in theirs and len(theirs) > ("until" in theirs):
        expected = hf.generate_until(requests("generate_until", [(text, theirs) for text in texts]))
    given = deepcopy(options)
    assert ours.generate_until(requests("generate_until", [(text, options) for text in texts])) == expected
    assert options == given  # the harness keeps answers by them
    assert len(set(expected)) > 3


def test_generation_options_in_other_words(models: tuple[EngineLM, HFLM], caplog: pytest.LogCaptureFixture) -> None:
    """Strings mean what they mean on the command line; an empty stop string stops nothing; no tokens are no answer;
    what is not followed is said."""
    ours, _ = models
    greedy = {"max_gen_toks": 12}
    others = [
        {"max_gen_toks": "12", "do_sample": "false", "temperature": "0.9"},
        {"max_gen_toks": 12, "until": ["", "\x00never"]},
        {"max_gen_toks": 12, "num_beams": 4},
        {"max_gen_toks": 0},
    ]
    answers = ours.generate_until(requests("generate_until", [(TEXT, each) for each in (greedy, *others)]))
    assert answers[0]
    assert answers[1:] == [answers[0]] * 3 + [""]
    assert "Left out of the task's generation options: num_beams." in caplog.messages
    drawn = [(TEXT, {"max_gen_toks": 12, "do_sample": "true", "temperature": 5.0})] * 2
    assert len({answers[0], *ours.generate_until(requests("generate_until", drawn))}) == 3


def test_stops_are_not_found_in_a_question_asked_twice(checkpoint: Path) -> None:
    """With the question in front the prompt is longer than its text, and a stop string in it ends no answer."""
    lm = EngineLM(pretrained=str(checkpoint), device="cpu", strategy="full", question_first="true")
    text = f"{TEXT}\n\nWho?"
    expected = lm.engine.generate(split(text, lm.tokenizer, special=True), max_new_tokens=12).text
    asked = requests("generate_until", [(text, {"max_gen_toks": 12, "until": ["Who?"]})])
    assert lm.generate_until(asked) == [expected]
    lm.engine.close()


def test_stops_at_eos_of_the_tokenizer(models: tuple[EngineLM, HFLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the checkpoint's generation settings name another token."""
    ours, hf = models
    asked = requests("generate_until", [(TEXT, {"max_gen_toks": 12})])
    tokens = ours.engine.generate(split(TEXT, ours.tokenizer, special=True), max_new_tokens=12).token_ids
    assert len(set(tokens[:4])) == 4
    for model in (ours.engine.model, hf.model):
        monkeypatch.setattr(model.generation_config, "eos_token_id", 3)
        # EOS, which no answer of a random model has, comes after the fourth token.
        monkeypatch.setattr(model.generation_config, "sequence_bias", [[[tokens[3], EOS], 1e3]])
    answers = ours.generate_until(asked)
    assert answers == hf.generate_until(asked) == [ours.tokenizer.decode(tokens[:4])]


def test_tokenizers_without_special_tokens(models: tuple[EngineLM, HFLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers need neither BOS nor EOS; a text without a context does."""
    ours, _ = models
    bare = byte_tokenizer(adds_bos=False)
    bare.bos_token = bare.eos_token = None  # type: ignore[assignment]
    monkeypatch.setattr(ours, "tokenizer", bare)
    assert ours.generate_until(requests("generate_until", [(TEXT, {"max_gen_toks": 4})]))[0]
    with pytest.raises(apb.InputError, match="BOS or EOS"):
        ours.loglikelihood(requests("loglikelihood", [("", "a")]))


@pytest.mark.parametrize("template", [None, LLAMA])
def test_likelihoods_are_those_of_hf(models: tuple[EngineLM, HFLM], template: str | None) -> None:
    """Of one token and of several, after spaces, after nothing; a context is read once for all its continuations."""
    ours, hf = models
    contexts = [TEXT, f"{TEXT}\n\nWho?", f"{TEXT}\n\nWho?  "]
    if template is not None:
        ours.tokenizer.chat_template = hf.tokenizer.chat_template = template
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": contexts[1]}]
        contexts = [ours.apply_chat_template(turns)]
        assert contexts == [hf.apply_chat_template(turns)]
    pairs = [(context, each) for each in (" Maud", "x", "\nOrrin it was") for context in (*contexts, "")]
    likeliest = ((text, ours.engine.prefill(ours._prompt(text, {})).logits.argmax().item()) for text in "cdefghijklmno")
    greedy = next((text, chr(token)) for text, token in likeliest if 32 < token < 127)
    pairs += [("", "<s>ab"), greedy, (greedy[0], "\t")]
    read: list[apb.Prompt] = []
    prefill = ours.engine.prefill

    def counted(prompt: apb.Prompt, **options: Any) -> apb.Session:
        read.append(prompt)
        return prefill(prompt, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.engine, "prefill", counted)
        mine = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    theirs = hf.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for pair, (score, is_greedy), (expected, is_theirs) in zip(pairs, mine, theirs, strict=True):
        assert score == pytest.approx(expected, abs=1e-3), pair
        assert is_greedy == is_theirs, pair
    assert {is_greedy for _, is_greedy in mine} == {True, False}
    long = [prompt for prompt in read if len(prompt) > 100]
    assert len(long) == len({prompt.token_ids for prompt in long})
    assert max(len(prompt.query) for prompt in long) < 60


def test_whole_texts_are_scored_as_by_hf(models: tuple[EngineLM, HFLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those longer than the model reads, in windows."""
    _, hf = models
    monkeypatch.setattr("apb.evaluation.harness.position_limit", lambda config: 100)
    monkeypatch.setattr(hf, "_max_length", 100)
    asked = requests("loglikelihood_rolling", [("",), ("a",), ("short",), (TEXT,)])
    mine, theirs = (model.loglikelihood_rolling(asked, disable_tqdm=True) for model in models)
    assert mine == pytest.approx(theirs, abs=1e-3)


def test_texts_without_a_document_are_scored_exactly(models: tuple[EngineLM, HFLM], checkpoint: Path) -> None:
    """There is nothing in them that a strategy could cut; after a context, its blocks count."""
    ours, _ = models
    blocks = EngineLM(pretrained=str(checkpoint), device="cpu", strategy="star", blocks=8)
    alone, after = (requests("loglikelihood", [(context, " Maud")]) for context in ("", f"{TEXT}\n\nWho?"))
    whole = requests("loglikelihood_rolling", [(TEXT,)])
    assert blocks.loglikelihood(alone) == ours.loglikelihood(alone)
    assert blocks.loglikelihood_rolling(whole) == ours.loglikelihood_rolling(whole)
    assert blocks.loglikelihood(after)[0][0] != pytest.approx(ours.loglikelihood(after)[0][0], abs=1e-3)
    blocks.engine.close()


@pytest.mark.parametrize("adds", [None, True, False, "false"])
@pytest.mark.parametrize("usual", [True, False])
def test_bos_is_added_as_by_hf(checkpoint: Path, tmp_path: Path, adds: bool | None, usual: bool) -> None:
    """As asked, else in the tokenizer's own way; a text that begins with it gets no second one."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    byte_tokenizer(adds_bos=usual).save_pretrained(tmp_path)
    ours = EngineLM(pretrained=str(tmp_path), device="cpu", strategy="full", add_bos_token=adds)
    asked = {} if adds is None else {"add_bos_token": adds is True}
    theirs = AutoTokenizer.from_pretrained(tmp_path, **asked)
    assert ours.tok_encode("ab") == theirs("ab", add_special_tokens=adds not in (False, "false"))["input_ids"]
    assert ours._prompt("ab\nc", {}).token_ids == tuple(ours.tok_encode("ab\nc"))
    assert ours.tok_encode("<s>ab") == [BOS, *b"ab"]
    assert (ours.tok_encode("ab")[0] == BOS) == (usual if adds is None else adds is True)
    ours.engine.close()


def test_chats_rendered_before_are_split_as_well(models: tuple[EngineLM, HFLM]) -> None:
    """The harness can keep the texts of requests; then the template's closing is found in them."""
    ours, _ = models
    ours.tokenizer.chat_template = LLAMA
    ours.__dict__.pop("_frame", None)
    text = ours.apply_chat_template([{"role": "user", "content": f"{TEXT}\n\n{TEXT}\nWho?"}])
    known = ours._prompt(text, {})
    assert bytes(token for token in known.query if token < BOS) == b"\nWho?<assistant>\n\n"
    ours._turns.clear()
    assert ours._prompt(text, {}) == known
    assert bytes(ours._prompt(f"{TEXT}\n\nWho?", {}).query) == b"\n\nWho?"


def test_a_document_of_fewer_tokens_than_blocks(models: tuple[EngineLM, HFLM], checkpoint: Path) -> None:
    """One short prompt among long ones does not end the run: it is read in full."""
    model = EngineLM(pretrained=str(checkpoint), device="cpu", strategy="apb", blocks=64)
    asked = [("ab Who?", {"until": [], "max_gen_toks": 6})]
    requests = [Instance("generate_until", {}, args, 0) for args in asked]
    assert model.generate_until(requests) == models[0].generate_until(requests)
    scored = [Instance("loglikelihood", {}, ("ab Who?", " Maud"), 0)]
    assert model.loglikelihood(scored) == models[0].loglikelihood(scored)
    model.engine.close()


def test_what_is_refused(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Batches, and a GPU where there is none, if it was asked for; the harness's default is not."""
    with pytest.raises(apb.InputError, match="one at a time"):
        EngineLM(pretrained=str(checkpoint), batch_size=8)
    if torch.cuda.is_available():
        return
    with pytest.raises(apb.InputError, match="torch sees no GPU"):
        EngineLM(pretrained=str(checkpoint), device="cuda")
    with caplog.at_level(logging.WARNING):
        model = EngineLM(pretrained=str(checkpoint), device="cuda:0", batch_size="auto:4", blocks="2", graphs="false")
    assert "There is no GPU here; the model runs on the CPU." in caplog.messages
    assert not model.engine.graphs
    assert model.rank == 0
    model.engine.close()
