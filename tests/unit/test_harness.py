"""The engine as a model of lm-evaluation-harness, on a task on disk: nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import apb
from byte_checkpoint import byte_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra lm-eval brings it")

from apb.evaluation.harness import EngineLM, split  # noqa: E402

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


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("One.\n\nTwo.\n\nThree?\n\n", b"\n\nThree?\n\n"),
        ("One.\nTwo.", b"\nTwo."),
        ("x" * 100, b"x" * 32),
        ("ab", b"b"),
    ],
)
def test_the_question_is_the_last_paragraph(text: str, query: bytes) -> None:
    """Else the last line, else the last tokens; document and query together are the text."""
    prompt = split(text, byte_tokenizer())
    assert bytes(prompt.document + prompt.query) == text.encode()
    assert bytes(prompt.query) == query
    assert prompt.prefix == (256,)


def test_rendered_templates_keep_their_markers() -> None:
    """What looks like a control token is one, and a BOS that a template wrote is the only one."""
    text = "<s>[user]One.\n\nTwo?</s>[assistant]"
    prompt = split(text, byte_tokenizer())
    assert prompt.prefix == ()
    assert prompt.document == (256, *b"[user]One.")
    assert prompt.query == (*b"\n\nTwo?", 257, *b"[assistant]")


def test_answers_are_the_engines_up_to_the_stop(checkpoint: Path, tmp_path: Path) -> None:
    """Every option reaches the engine; a stop string ends the answer and is no part of it."""
    engine = apb.Engine.from_pretrained(checkpoint, blocks=3, device="cpu")
    expected = engine.generate(split(f"{TEXT}\n\nWho?", engine.tokenizer), max_new_tokens=12).text
    engine.close()
    stop = expected[5]
    data = tmp_path / "data.jsonl"
    answer = expected[: expected.index(stop)]
    data.write_text("".join(json.dumps({"text": TEXT, "answer": wanted}) + "\n" for wanted in (answer, "no")))
    (tmp_path / "local_needles.yaml").write_text(TASK.format(data=data, stop=stop))
    command = [sys.executable, "-m", "apb.evaluation.harness", "run", "--model", "apb", "--tasks", "local_needles"]
    command += ["--model_args", f"pretrained={checkpoint},blocks=3", "--device", "cpu", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, timeout=280, env={**os.environ, **offline}, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["local_needles"]["exact_match,none"] == 0.5
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    said = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert said == [[answer]] * 2


def test_what_is_refused(checkpoint: Path) -> None:
    model = EngineLM(pretrained=str(checkpoint), device="cpu", strategy="full")
    with pytest.raises(apb.InputError, match="likelihoods"):
        model.loglikelihood([])
    with pytest.raises(apb.InputError, match="one at a time"):
        EngineLM(pretrained=str(checkpoint), batch_size=8)
