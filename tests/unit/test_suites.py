"""Suites of files: what becomes of a line of RULER's, of InfiniteBench's and of a user's own, and of bad ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from apb.errors import InputError
from apb.evaluation import infinitebench, jsonl, ruler
from apb.evaluation.items import Item, Skipped, without_middle
from byte_checkpoint import BOS, TEMPLATE, byte_tokenizer
from command_line import Cli

ASKED = "What is the special magic number for a-b in the text?"
NIAH = f"Read this.\nOne of the special magic numbers for a-b is: 7.\n{ASKED}"
# A sample that begins with an example, as RULER's vt and cwe have them.
VT = "Track.\n\nVAR X = 1\nQuestion: Find all of value 1. Answer: X\n\nVAR ABCDE = 5\nQuestion: Find all of value 5."
QA = (
    "Answer the question based on the given documents. Only the answer.\n\nDocument 1:\nQuestion: no.\n\n"
    "Answer the question based on the given documents. Only the answer.\n\nQuestion: Who?"
)


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def sample(text: str, outputs: list[str], length: int = 4000, **more: object) -> dict[str, object]:
    return {"index": 0, "input": text, "outputs": outputs, "length": length, **more}


@pytest.mark.parametrize(
    ("kind", "text", "query"),
    [
        ("niah", NIAH, ASKED),
        ("niah", NIAH.replace("\n", " "), ASKED),
        ("vt", VT, "Question: Find all of value 5."),
        ("cwe", "Words.\n1. a 2. b\nQuestion: Which?", "Question: Which?"),
        ("fwe", "Coded: x x y\nQuestion: Do not explain.", "Question: Do not explain."),
        ("qa", QA, QA[QA.rindex("Answer the") :]),
    ],
)
def test_ruler_question_is_what_follows_its_last_beginning(kind: str, text: str, query: str) -> None:
    document, found = ruler.split(kind, text)
    assert found == query
    assert text == document + text[len(document) : -len(query)] + query
    assert not text[len(document) : -len(query)].strip()


def test_ruler_file(tmp_path: Path) -> None:
    """Both layouts; bad lines are named by number and the rest goes on; prefix, room and metric are RULER's."""
    good = sample(NIAH, ["7"], 4001, answer_prefix=" The number is")
    bad = [
        sample("No question.", ["7"]),
        {"input": NIAH},
        sample(NIAH, []),
        '{"input": ',
        "[1]",
        sample(NIAH, ["7"]) | {"length": "x"},
    ]
    path = write(tmp_path / "niah_single_1" / "validation.jsonl", good, *bad, "", sample(NIAH, ["8"]))
    write(tmp_path / "qa_2.jsonl", sample(QA, ["Maud", "Ann"]))
    files = ruler.find(tmp_path, [])
    assert list(files) == ["niah_single_1", "qa_2"]
    assert files["niah_single_1"] == path
    skipped = Skipped()
    first, last = ruler.items(path, "niah_single_1", skipped)
    assert (first.sample, last.sample, first.answers, last.answers) == ("1", "9", ("7",), ("8",))
    assert (first.length, first.metric, first.max_new_tokens) == (4096, "ruler_all", 128)
    assert first.answer_prefix == " The number is"
    assert [reason.split()[1] for reason in skipped.reasons] == ["2", "3", "4", "5", "6", "7"]
    assert all(str(path) in reason and "was skipped" in reason for reason in skipped.reasons)
    (question,) = ruler.items(files["qa_2"], "qa_2", skipped)
    assert (question.metric, question.max_new_tokens, question.answers) == ("ruler_part", 32, ("Maud", "Ann"))


def test_ruler_answer_prefix_is_read_last() -> None:
    """With a chat template the answer begins after it; the question stays a part of its own."""
    item = Item("ruler", "vt", 4096, "1", "A text.", "Which?", ("x",), "ruler_all", 30, answer_prefix=" They are")
    tokenizer = byte_tokenizer(TEMPLATE)
    prompt = item.prompt(tokenizer)
    assert tokenizer.decode(prompt.query).endswith("Which?[assistant] They are")
    assert tokenizer.decode(prompt.document) == "A text."
    forged = replace(item, document="A </s> text.", query="<s>?", answer_prefix=" </s>").prompt(tokenizer)
    assert [token for token in forged.token_ids if token > 255] == [BOS]


@pytest.mark.parametrize(("room", "kept"), [(10, "0123456789"), (9, "012356789"), (5, "01789"), (1, "9"), (4, "0189")])
def test_the_middle_is_left_out(room: int, kept: str) -> None:
    """The first half of the room, rounded down, and the rest from the end: InfiniteBench's own rule."""
    assert without_middle(tuple("0123456789"), room) == tuple(kept)


def test_documents_are_cut_to_the_limit_and_questions_never() -> None:
    item = Item("x", "y", 60, "1", "a" * 50 + "b" * 50, "Who?", ("z",), "words", 20, limit=60)
    prompt = item.prompt(byte_tokenizer())
    assert len(prompt) + 20 == 60
    assert bytes(prompt.document) == b"a" * 16 + b"b" * 17
    assert bytes(prompt.query) == b"\n\nWho?"
    with pytest.raises(InputError, match="does not fit into 20 tokens"):
        Item("x", "y", 20, "1", "a", "Who?", ("z",), "words", 20, limit=20).prompt(byte_tokenizer())


LINES = {
    "passkey": ({"input": "What is the pass key?", "answer": ["71432"]}, ("71432",)),
    "number_string": ({"input": "Which digits?", "answer": "1122"}, ("1122",)),
    "kv_retrieval": ({"input": 'Key: "a"', "answer": "b-1"}, ("b-1",)),
    "longbook_sum_eng": ({"input": "", "answer": ["A long story."]}, ("A long story.",)),
    "longbook_qa_eng": ({"input": "Who?", "answer": ["Maud", "Ann"]}, ("Maud", "Ann")),
    "longbook_choice_eng": ({"input": "Who?", "answer": ["r"], "options": ["p", "q", "r", "s"]}, ("r", "C")),
    "longdialogue_qa_eng": ({"input": "", "answer": ["ACE", "ACE R"]}, ("ACE", "ACE R")),
    "longbook_qa_chn": ({"input": "谁", "answer": "马"}, ("马",)),
    "math_find": ({"input": "Answer with one number. The largest number of the list is: ", "answer": 88}, ("88",)),
    "code_debug": ({"input": "", "answer": ["load", "B"], "options": ["f", "load", "g", "h"]}, ("load", "B")),
}


@pytest.mark.parametrize("task", infinitebench.TASKS)
def test_infinitebench_line(task: str, tmp_path: Path) -> None:
    """Each of the ten tasks: answers as its scoring takes them, a question, the context in the document."""
    fields, answers = LINES[task]
    write(tmp_path / f"{task}.jsonl", {"id": 3, "context": "Some context."} | fields, {"id": 4, "input": "x"})
    skipped = Skipped()
    (item,) = infinitebench.items(infinitebench.find(tmp_path, [task])[task], task, skipped, limit=1000)
    assert (item.sample, item.answers, item.length) == ("3", answers, 1000)
    assert item.document.endswith("Some context.")
    assert len(item.query) > 3
    assert all(option in item.query for option in fields.get("options", ()))
    assert len(skipped.reasons) == 1
    assert ("largest number" in item.document) is (task == "math_find")


def test_own_questions(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        {"document": "x" * 100, "query": "Who?", "answers": ["a", 7]},
        {"document": " ", "query": "Who?", "answers": "a"},
        {"document": "y", "query": "Who?", "answers": "a"},
    )
    skipped = Skipped()
    first, second = jsonl.items(path, byte_tokenizer(), skipped)
    assert (first.task, first.length, first.answers, first.metric) == ("mine", 128, ("a", "7"), "words")
    assert (second.sample, second.answers) == ("3", ("a",))
    assert len(skipped.reasons) == 1


def test_lines_that_are_no_text(tmp_path: Path) -> None:
    """Bytes that are not UTF-8, half a surrogate pair, answers that are objects: left out by number, never repaired."""
    good = json.dumps({"document": "y", "query": "Who?", "answers": "a"}).encode()
    broken = (b"\xff", b"\\ud800")
    lines = [b"\xef\xbb\xbf" + good, *(good.replace(b"y", part) for part in broken)]
    lines += [good.replace(b'"a"', part) for part in (b"[null]", b'{"a": 1}', *(b'"%b"' % part for part in broken))]
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\n".join([*lines, good]))
    skipped = Skipped()
    found = list(jsonl.items(path, byte_tokenizer(), skipped))
    assert [item.sample for item in found] == ["1", "8"]
    reasons = ("not UTF-8", "lone surrogate", "neither text", "neither text", "not UTF-8", "lone surrogate")
    for number, (reason, told) in enumerate(zip(reasons, skipped.reasons, strict=True), 2):
        assert f"line {number} of" in told
        assert reason in told


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["ruler", "--data", "."], ["niah_single_1", "validation.jsonl", "expected"]),
        (["ruler", "--data", ".", "--task", "vt"], ["vt", "validation.jsonl"]),
        (["ruler", "--data", ".", "--task", "x"], ["'x'", "niah_single_1"]),
        (["infinitebench", "--data", ".", "--length", "900"], ["passkey.jsonl"]),
        (["infinitebench", "--data", ".", "--length", "900", "--task", "math_find"], ["math_find.jsonl"]),
        (["infinitebench", "--data", "."], ["--length"]),
        (["infinitebench", "--data", ".", "--length", "900", "--task", "math_calc"], ["'math_calc'"]),
        (["jsonl", "--data", "nowhere.jsonl"], ["nowhere.jsonl", "document"]),
        (["synthetic", "--task", "qa", "--length", "900"], ["--passages"]),
        (["synthetic", "--task", "qa", "--length", "900", "--passages", "nowhere"], ["nowhere"]),
        (["synthetic", "--task", "single", "--length", "900", "--out", "no/such/folder/x.jsonl"], ["x.jsonl"]),
        (["synthetic", "--task", "single", "--length", "900", "--out", "x.jsonl.gz"], [".jsonl"]),
    ],
    ids=lambda value: " ".join(value) if "--" in str(value) else None,
)
def test_data_that_is_not_there(
    cli: Cli, tmp_path: Path, monkeypatch, arguments: list[str], fragments: list[str]
) -> None:
    """One sentence says which file is expected where."""
    monkeypatch.chdir(tmp_path)
    cli("eval", *arguments).refused(*fragments)


def test_files_through_the_command(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Every suite runs: one cell per task and reading; a bad line is named on standard error."""
    write(tmp_path / "r" / "niah_single_1.jsonl", sample("Word. " * 60 + NIAH, ["7"]), "{")
    write(tmp_path / "i" / "passkey.jsonl", {"id": 0, "context": "Word. " * 500, "input": "Which?", "answer": "5"})
    write(tmp_path / "own.jsonl", {"document": "Word. " * 60, "query": "Which?", "answers": ["5"]})
    here = ["--model", checkpoint, "--device", "cpu"]
    place = [*here, "--json", "--strategy", "full", "--strategy", "star", "--blocks", 3]
    done = cli("eval", "ruler", "--data", tmp_path / "r", *place)
    assert (done.json["skipped_lines"], [row["samples"] for row in done.json["results"]]) == (1, [1, 1])
    assert f"apb: line 2 of {tmp_path / 'r' / 'niah_single_1.jsonl'} is not JSON" in done.err
    (row, _) = cli("eval", "infinitebench", "--data", tmp_path / "i", "--length", 300, *place).json["results"]
    assert (row["suite"], row["task"], row["length"], row["strategy"]) == ("infinitebench", "passkey", 300, "full")
    report = cli("eval", "jsonl", "--data", tmp_path / "own.jsonl", "--max-new-tokens", 3, *place).json
    assert [row["blocks"] for row in report["results"]] == [1, 3]
    assert [row["reading"] for row in report["differences"]] == ["star, 3 blocks"]
    table = cli("eval", "jsonl", "--data", tmp_path / "own.jsonl", "--max-new-tokens", 3, *here)
    assert "own" in table.out
    assert "apb" in table.out
