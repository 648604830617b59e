"""Generated samples as a model reads them: all of the prompt is counted, with RULER's room for the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import apb
from answers import record, run_of
from apb.evaluation.items import Item, Skipped, each_with_another_query
from apb.evaluation.records import Store, read_records
from apb.evaluation.runner import Runner
from apb.evaluation.settings import Setting
from apb.evaluation.statistics import compare
from apb.evaluation.summary import summarize
from apb.evaluation.synthetic import items
from apb.evaluation.tasks import TASKS, TaskError
from byte_checkpoint import TEMPLATE, byte_tokenizer
from command_line import Cli

MODEL = Path(__file__).parents[2] / "models" / "needle"
GENERATED = [task for task in TASKS if task != "qa"]
LONGEST = {"variable_tracking": 30, "common_words": 120, "frequent_words": 50}


def words(template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("task", GENERATED)
@pytest.mark.parametrize(
    ("tokenizer", "length"),
    [(words(None), 1024), (words(TEMPLATE + "{# long #}" + "note " * 40), 1024), (byte_tokenizer(TEMPLATE), 5000)],
    ids=["plain", "template", "bytes"],
)
def test_prompt_and_answer_fit_into_the_length(task: str, tokenizer: Any, length: int) -> None:
    """With the question in front as well, the beginning of the answer and RULER's room for it; nearly all is used."""
    for item in items(tokenizer, task, length, 2, seed=5):
        assert item.max_new_tokens == LONGEST.get(task, 128)
        whole = len(item.prompt(tokenizer).question_first) + item.max_new_tokens
        assert 0.95 * length <= whole <= length
        assert bool(item.answer_prefix) == (tokenizer.chat_template is not None and task in LONGEST)
        assert not any(answer in item.answer_prefix for answer in item.answers)


def test_the_room_for_the_answer_can_be_chosen() -> None:
    (item,) = items(words(None), "single", 1024, 1, seed=0, budget=300)
    assert item.max_new_tokens == 300
    assert 0.95 * 1024 <= len(item.prompt(words(None)).question_first) + 300 <= 1024


def test_frequent_words_of_many_tokens_each() -> None:
    """Words are as long as seven tokens here: the most frequent ones may not take more room than there is."""
    for length in (4000, 16000):
        assert list(items(byte_tokenizer(), "frequent_words", length, 3, seed=1))


def test_what_cannot_be_made_is_left_out_with_a_word() -> None:
    """A JSON object of two codes does not fit beside the answer; without a place for the word it is an error."""
    skipped = Skipped()
    assert list(items(byte_tokenizer(), "kv_retrieval", 300, 3, seed=0, skipped=skipped)) == []
    (reason,) = skipped.reasons
    assert reason.startswith("3 of 3 samples of kv_retrieval at 300 tokens were left out: ")
    with pytest.raises(TaskError):
        list(items(byte_tokenizer(), "kv_retrieval", 300, 1, seed=0))


def test_the_run_goes_on_without_them(cli: Cli, checkpoint: Path) -> None:
    given = ("eval", "synthetic", "--model", checkpoint, "--device", "cpu", "--samples", 1, "--strategy", "full")
    done = cli(*given, "--task", "kv_retrieval", "--task", "single", "--length", 440, "--max-new-tokens", 200, "--json")
    assert [row["task"] for row in done.json["results"]] == ["single"]
    assert "apb: 1 of 1 samples of kv_retrieval at 440 tokens were left out: " in done.err
    assert done.json["skipped_lines"] == 1
    cli(*given, "--task", "kv_retrieval", "--length", 440, "--max-new-tokens", 200).refused("greater length")


def test_a_sample_that_fails_is_a_record_with_its_error(checkpoint: Path, tmp_path: Path) -> None:
    """Its score is 0 and the run goes on; once it can be answered, a resumed run does so, and the answer counts."""
    engine = apb.Engine.from_pretrained(checkpoint, device="cpu")
    good, long = (
        Item("own", "t", 64, name, "word " * 9, "Which?", ("yes",), "words", n) for name, n in (("a", 2), ("b", 5000))
    )
    path = tmp_path / "a.jsonl"
    store = Store(path)
    runner = Runner(engine, "small", [Setting.of("full")], store)
    (answered,), (failed,) = runner.run([good, long])
    assert answered.error is None
    assert failed.error is not None and "positions" in failed.error
    assert (failed.score, failed.prediction, failed.prompt) == (0.0, "", answered.prompt)
    store.close()
    assert list(read_records(path)) == [answered, failed]
    assert Store(path).get(answered.key) == answered
    assert Store(path).get(failed.key) is None
    later = Store(path)
    mended = record(**{**json.loads(failed.line()), "answers": ("yes",), "score": 50.0, "error": None})
    later.add(mended)
    assert list(later) == [answered, mended]
    assert list(Store(path)) == [answered, mended]
    ((table),) = summarize(list(read_records(path))).tables
    assert (table.cells["full"]["t"].samples, table.cells["full"]["t"].failed) == (2, 0)
    ((before),) = summarize([answered, failed]).tables
    assert before.cells["full"]["t"].failed == 1


def test_records_of_older_versions_have_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.loads(record().line())
    del line["error"]
    path.write_text(json.dumps(line) + "\n")
    assert list(read_records(path)) == [record()]


def test_the_question_in_front_is_a_baseline_of_its_own() -> None:
    """Both kinds of full attention are compared with; pairs are found though they read different tokens."""
    first = {"asked": {"strategy": "full", "question_first": True}}
    records = run_of("full", {"a": [0, 100]}) + run_of("full", {"a": [100, 100]}, **first)
    records += run_of("star", {"a": [0, 0]})
    told = {(row["baseline"], row["reading"]): row["difference"] for row in compare(records)}
    assert told == {
        ("full", "full, question first"): 50,
        ("full", "star"): -50,
        ("full, question first", "full"): -50,
        ("full, question first", "star"): -100,
    }
    (table,) = summarize(records).tables
    assert {one.baseline: one.whole["star"].difference for one in table.comparisons} == {
        "full": -50,
        "full, question first": -100,
    }
    assert not table.cells["full"]["a"].question_first
    assert table.cells["full, question first"]["a"].question_first


def test_only_plain_full_attention_is_a_baseline() -> None:
    """Not on ranks, with another decode method, or asked after reading; without it the first reading is."""
    asked = {"asked": {"strategy": "full", "ask_after": "none"}}
    records = run_of("star", {"a": [0]}) + run_of("full", {"a": [9]}, **asked) + run_of("full", {"a": [5]}, ranks=2)
    assert {row["baseline"] for row in compare(records)} == {"star"}
    assert {row["baseline"] for row in compare(records + run_of("full", {"a": [7]}))} == {"full"}


def test_models_have_tables_of_their_own() -> None:
    records = run_of("full", {"a": [0]}) + run_of("full", {"a": [100]}, model="n", prefill_s=4.0)
    assert [(table.model, table.average("full")) for table in summarize(records).tables] == [
        ("m, float32", 0),
        ("n, float32", 100),
    ]
    assert [(speed.place[0], speed.seconds) for speed in summarize(records).speeds] == [
        ("m, float32", 1.0),
        ("n, float32", 4.0),
    ]


def test_another_budget_is_another_reading(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Answers that a small budget has cut off are not taken for those of a larger one, though the prompts are equal."""
    data, path = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    data.write_text('{"document": "The cat sat on the mat.", "query": "Who sat?", "answers": ["cat"]}\n')
    given = ("eval", "jsonl", "--data", data, "--model", checkpoint, "--device", "cpu", "--strategy", "full")
    for budget in (3, 9, 9):
        assert cli(*given, "--out", path, "--max-new-tokens", budget, "--json").status == 0
    short, long = read_records(path)
    assert len(short.prediction) < len(long.prediction)
    assert [row["reading"] for row in compare([short, long])] == ["full, max new tokens 9", "full, max new tokens 3"]


def test_evaluation_with_the_question_in_front(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Two commands, one file: the same samples, told apart, and paired in the report."""
    path = tmp_path / "a.jsonl"
    given = ("eval", "synthetic", "--task", "single", "--length", 800, "--samples", 1, "--model", checkpoint)
    for more in ((), ("--question-first",)):
        rows = cli(*given, "--device", "cpu", "--strategy", "full", "--out", path, "--json", *more).json["results"]
        assert [row["question_first"] for row in rows] == [bool(more)]
    plain, first = read_records(path)
    assert plain.prompt == first.prompt
    assert first.prompt_tokens > plain.prompt_tokens
    assert len(compare([plain, first])) == 2


def test_questions_asked_after_reading(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """For this question: the answers of reading at once; for others or none, told apart in the report. Full attention
    says the same whatever it has read for."""
    path = tmp_path / "a.jsonl"
    given = ("eval", "synthetic", "--task", "single", "--length", 800, "--samples", 2, "--model", checkpoint)
    more = ("--device", "cpu", "--strategy", "full", "--strategy", "apb", "--blocks", 4, "--out", path, "--json")
    for when in (None, "this", "other", "none"):
        cli(*given, *more, *(() if when is None else ("--ask-after", when)), "--max-new-tokens", 9)
    said: dict[tuple[str, str | None], list[str]] = {}
    for each in read_records(path):
        said.setdefault((each.strategy, each.asked.get("ask_after")), []).append(each.prediction)
    assert len(said) == 8
    assert all(said["full", when] == said["full", None] for when in ("this", "other", "none"))
    assert said["apb", "this"] == said["apb", None]
    assert len({tuple(said["apb", when]) for when in ("this", "other", "none")}) > 1
    assert "apb, query-edge, 4 blocks, ask after other, max new tokens 9" in {
        each.reading_name for each in read_records(path)
    }
    cli(*given, "--ask-after", "never").refused("this, other, none", "'never'")


def test_other_questions_are_of_the_same_task() -> None:
    items_of = [
        Item("s", task, 9, str(n), "d", query, ("a",), "words", 1)
        for n, (task, query) in enumerate((("t", "1"), ("u", "2"), ("t", "3"), ("t", "4")))
    ]
    assert [item.other_query for item in each_with_another_query(items_of)] == ["3", "2", "4", "1"]
    (item,) = items(words(None), "single", 1024, 1, seed=0)
    assert item.other_query not in ("", item.query)
