"""Suites of files: what becomes of a line of RULER's, InfiniteBench's, LongBench's and a user's, and of bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase

from apb.errors import InputError
from apb.evaluation import infinitebench, jsonl, longbench2, ruler
from apb.evaluation.items import Item, Skipped, without_middle
from apb.evaluation.limits import needed_limit
from apb.hf.control import control_tokens
from byte_checkpoint import BOS, TEMPLATE, byte_tokenizer
from command_line import Cli
from small_tokenizers import byte_level, space_first

ASKED = "What is the special magic number for a-b in the text?"
NIAH = f"A special magic number. Read this.\nOne of the special magic numbers for a-b is: 7.\n{ASKED}"
# A sample that begins with an example, as RULER's vt and cwe have them.
VT = (
    "Memorize and track the chain.\n\nVAR X = 1\nQuestion: Find all of value 1. Answer: X\n\n"
    "Memorize and track the chain.\n\nVAR ABCDE = 5\nQuestion: Find all of value 5."
)
QA = (
    "Answer the question based on the given documents. Only the answer.\n\nDocument 1:\nQuestion: no.\n\n"
    "Answer the question based on the given documents. Only the answer.\n\nQuestion: Who? "
)
# A sample of every kind: its text, and the question in it.
TEXTS = {
    "niah": (NIAH, ASKED),
    "vt": (VT, "Question: Find all of value 5."),
    "cwe": ("\nBelow is a numbered list of words.\n1. a  2. b\nQuestion: Which?", "Question: Which?"),
    "fwe": ("Read the following coded text. x x y\nQuestion: Do not explain.", "Question: Do not explain."),
    "qa": (QA, QA[QA.rindex("Answer the") :]),
}


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def sample(text: str, outputs: list[str], length: int = 4000, **more: object) -> dict[str, object]:
    return {"index": 0, "input": text, "outputs": outputs, "length": length, **more}


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_ruler_prompt_is_the_input_to_the_letter(task: str, template: str | None, tmp_path: Path) -> None:
    """With the line ends or, as RULER can, spaces for them; the query begins where its question does."""
    text, asked = TEXTS[task.split("_")[0]]
    texts = [text, " ".join(text.split())]
    path = write(tmp_path / "x.jsonl", *(sample(each, ["7"], answer_prefix=" They are: ") for each in texts))
    tokenizer = byte_tokenizer(template)
    around = ("<s>", "") if template is None else ("<s>[user]", "[assistant]")
    read = list(ruler.items(path, task, tokenizer, Skipped()))
    for each, item, question in zip(texts, read, (asked, " ".join(asked.split())), strict=True):
        prompt = item.prompt(tokenizer)
        assert tokenizer.decode(prompt.token_ids) == f"{around[0]}{each}{around[1]} They are: "
        assert tokenizer.decode(prompt.query) == f"{item.separator}{question}{around[1]} They are: "
        assert not item.separator.strip()


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
        sample(NIAH, ["7"]) | {"length": 0},
    ]
    path = write(tmp_path / "niah_single_1" / "validation.jsonl", good, *bad, "", sample(NIAH, ["8"]))
    write(tmp_path / "qa_2.jsonl", sample(QA, ["Maud", "Ann"]))
    files = ruler.find(tmp_path, [])
    assert list(files) == ["niah_single_1", "qa_2"]
    assert files["niah_single_1"] == path
    skipped = Skipped()
    first, last = ruler.items(path, "niah_single_1", byte_tokenizer(), skipped)
    assert (first.sample, last.sample, first.answers, last.answers) == ("1", "10", ("7",), ("8",))
    assert (first.length, first.metric, first.max_new_tokens) == (4096, "ruler_all", 128)
    assert first.answer_prefix == " The number is"
    assert [reason.split()[1] for reason in skipped.reasons] == ["2", "3", "4", "5", "6", "7", "8"]
    assert all(str(path) in reason and "was skipped" in reason for reason in skipped.reasons)
    (question,) = ruler.items(files["qa_2"], "qa_2", byte_tokenizer(), skipped)
    assert (question.metric, question.max_new_tokens, question.answers) == ("ruler_part", 32, ("Maud", "Ann"))
    assert not skipped.notes


def test_ruler_of_lm_evaluation_harness(tmp_path: Path) -> None:
    """Its generator names the prefix otherwise, and the harness puts a space before it."""
    path = write(tmp_path / "vt.jsonl", sample(VT, ["7"], gen_prefix="Answer: They are"))
    (item,) = ruler.items(path, "vt", byte_tokenizer(), Skipped())
    assert item.answer_prefix == " Answer: They are"


LLAMA3 = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant"
VICUNA = "A chat. USER: {} ASSISTANT:"


@pytest.mark.parametrize(
    ("make", "template", "opening", "control"),
    [
        (byte_level, "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\n", 3),
        (space_first, "[INST] {} [/INST]", "<s> [INST] ", 1),  # names that are text in a template of this tokenizer
        (space_first, "<s>[INST] {} [/INST]", "<s>[INST] ", 1),
        (lambda: byte_tokenizer(TEMPLATE), "<s>[user]{}[assistant]", "<s>[user]", 1),  # named by the turn's role
    ],
    ids=["control tokens", "words", "BOS", "roles"],
)
@pytest.mark.parametrize("task", ["niah_single_1", "vt", "cwe"])
def test_ruler_files_with_the_models_template(
    make: Callable[[], PreTrainedTokenizerBase], template: str, opening: str, control: int, task: str, tmp_path: Path
) -> None:
    """They are read as they are: no second template, no second BOS; the turn's end stays with the question."""
    tokenizer = make()
    text, asked = TEXTS[task.split("_")[0]]
    text = template.format(text.strip())
    path = write(tmp_path / "x.jsonl", *[sample(text, ["7"], answer_prefix=" It is")] * 2)
    skipped = Skipped()
    item, _ = ruler.items(path, task, tokenizer, skipped)
    prompt = item.prompt(tokenizer)
    begun = text.startswith("<s>")
    assert prompt.token_ids == tuple(tokenizer(text + " It is", add_special_tokens=not begun)["input_ids"])
    assert tokenizer.decode(prompt.prefix) == opening
    assert tokenizer.decode(prompt.query).strip() == asked + template.partition("{}")[2] + " It is"
    names = set(control_tokens(tokenizer, tokenizer.chat_template))
    assert sum(token in names for token in prompt.token_ids) == control
    assert len(skipped.notes) == 1
    assert str(path) in skipped.notes[0]
    assert "without a second" in skipped.notes[0]


@pytest.mark.parametrize(("template", "mark"), [(LLAMA3, "'<|begin_of_text|>'"), (VICUNA, "'USER:'")])
def test_ruler_files_with_another_models_template(template: str, mark: str, tmp_path: Path) -> None:
    """Two templates in one another are an error; a model without a template gets the text as RULER gives it."""
    path = write(tmp_path / "x.jsonl", sample(template.format(NIAH), ["7"]))
    with pytest.raises(InputError, match="--model_template_type base") as raised:
        list(ruler.items(path, "niah_single_1", byte_level(), Skipped()))
    assert mark in str(raised.value)
    tokenizer = byte_tokenizer()
    (item,) = ruler.items(path, "niah_single_1", tokenizer, Skipped())
    assert tokenizer.decode(item.prompt(tokenizer).token_ids) == "<s>" + template.format(NIAH)


def test_ruler_texts_with_names_of_control_tokens_hold_no_template(tmp_path: Path) -> None:
    """Only what stands before a sample's first words is one: names in the text are text."""
    tokenizer = byte_tokenizer(TEMPLATE)
    path = write(tmp_path / "x.jsonl", sample(NIAH.replace("Read", "</s> <|im_start|>"), ["7"]))
    (item,) = ruler.items(path, "niah_single_1", tokenizer, Skipped())
    assert [token for token in item.prompt(tokenizer).token_ids if token > 255] == [BOS]


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
    prompt, cut = item.fitted(byte_tokenizer())
    assert len(prompt.question_first) + 20 == 60
    assert bytes(prompt.document) == b"a" * 13 + b"b" * 14
    assert bytes(prompt.query) == b"\n\nWho?"
    assert cut == 73
    just = replace(item, limit=1 + 100 + 6 + 20)
    assert just.fitted(byte_tokenizer())[1] == 0
    assert just.fitted(byte_tokenizer(), question_first=True)[1] == 6
    assert replace(item, limit=1000).fitted(byte_tokenizer())[1] == 0
    with pytest.raises(InputError, match="does not fit into 20 tokens"):
        Item("x", "y", 20, "1", "a", "Who?", ("z",), "words", 20, limit=20).prompt(byte_tokenizer())


def test_a_limit_that_a_suite_needs() -> None:
    """The length asked for, else the model's positions; an error if its configuration gives none."""
    config = LlamaConfig(max_position_embeddings=500)
    assert (needed_limit(300, config), needed_limit(None, config)) == (300, 500)
    with pytest.raises(InputError, match="--length"):
        needed_limit(None, PreTrainedConfig())


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


CHOICE = {
    "_id": "66f",
    "domain": "Law",
    "difficulty": "hard",
    "length": "medium",
    "question": " Who keeps it?\n",
    **{f"choice_{letter}": f"option {letter} " for letter in "ABCD"},
    "answer": "C",
    "context": "\nMaud keeps it.\n\n",
}
CHOICE_PROMPT = """Please read the following text and answer the question below.

<text>
Maud keeps it.
</text>

What is the correct answer to this question: Who keeps it?
Choices:
(A) option A
(B) option B
(C) option C
(D) option D

Format your response as follows: "The correct answer is (insert answer here)"."""


@pytest.mark.parametrize("listed", [True, False], ids=["list", "lines"])
def test_longbench2_file(tmp_path: Path, listed: bool) -> None:
    """Its prompt to the letter; classes of length are tasks; unusable entries are named by number."""
    bad = [
        CHOICE | {"answer": "AB"},
        CHOICE | {"length": "huge"},
        CHOICE | {"context": " "},
        {key: value for key, value in CHOICE.items() if key != "choice_D"},
        [1],
    ]
    entries = [*bad, CHOICE, CHOICE | {"length": "short"}, CHOICE | {"_id": "67a"}]
    path = tmp_path / "data.json"
    if listed:
        path.write_text("\ufeff " + json.dumps(entries, indent=1), encoding="utf-8")
    else:
        write(path, *bad[:4], "7", *entries[5:])
    skipped = Skipped()
    short, medium, other = longbench2.items(path, [], skipped, limit=900)
    found = [(item.task, item.sample) for item in (short, medium, other)]
    assert found == [("short", "66f"), ("medium", "66f"), ("medium", "67a")]
    assert (medium.length, medium.limit, medium.answers, medium.max_new_tokens) == (900, 900, ("C",), 128)
    tokenizer = byte_tokenizer()
    prompt = medium.prompt(tokenizer)
    assert tokenizer.decode(prompt.token_ids) == "<s>" + CHOICE_PROMPT
    assert tokenizer.decode(prompt.document).endswith("Maud keeps it.")
    assert [reason.split()[:2] for reason in skipped.reasons] == [
        ["entry" if listed else "line", str(number)] for number in (1, 2, 3, 4, 5)
    ]
    assert [item.sample for item in longbench2.items(path, ["medium"], Skipped(), limit=900, count=1)] == ["66f"]


def test_longbench2_file_that_is_cut_short(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([CHOICE])[:-5])
    with pytest.raises(InputError, match=r"data.json' begins as a list but is not JSON"):
        list(longbench2.items(tmp_path / "data.json", [], Skipped(), limit=900))


def test_infinitebench_answer_that_is_no_number(tmp_path: Path) -> None:
    """Math.Find compares values: a line without one is unusable."""
    line = {"id": 3, "context": "1 2"} | LINES["math_find"][0]
    path = write(tmp_path / "math_find.jsonl", line | {"answer": "x"}, line | {"answer": "-1.5"})
    skipped = Skipped()
    (item,) = infinitebench.items(path, "math_find", skipped, limit=1000)
    assert item.answers == ("-1.5",)
    assert "has no number in field 'answer'" in skipped.reasons[0]


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
        (["infinitebench", "--data", "there.json"], ["there.json' is a file", "passkey.jsonl"]),
        (["ruler", "--data", "there.json"], ["there.json' is a file", "niah_single_1.jsonl"]),
        (["longbench2", "--data", "nowhere.json"], ["nowhere.json", "data.json"]),
        (["longbench2", "--data", "there.json", "--task", "x"], ["'x'", "medium"]),
        (["longbench2", "--data", "."], ["'.' is a folder", "data.json"]),
        (["jsonl", "--data", "."], ["'.' is a folder", "document, query and answers"]),
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
    write(tmp_path / "there.json", {})
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
    assert [row["reading"] for row in report["differences"]] == ["star, 3 blocks, max new tokens 3"]
    write(tmp_path / "data.json", json.dumps([CHOICE], indent=1))
    (row,) = cli("eval", "longbench2", "--data", tmp_path / "data.json", *here, "--json").json["results"]
    assert (row["suite"], row["task"], row["length"]) == ("longbench2", "medium", 4096)
    table = cli("eval", "jsonl", "--data", tmp_path / "own.jsonl", "--max-new-tokens", 3, *here)
    assert "own" in table.out
    assert "apb" in table.out


def test_documents_longer_than_the_model(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Without --length they lose their middle down to the model's 4096 positions, and a note says so."""
    long = {"document": "Word. " * 700, "query": "Which?", "answers": ["5"]}
    write(tmp_path / "own.jsonl", long, long | {"document": "Word. " * 10})
    place = ["--data", tmp_path / "own.jsonl", "--model", checkpoint, "--device", "cpu", "--strategy", "full"]
    out = tmp_path / "answers.jsonl"
    done = cli("eval", "jsonl", *place, "--max-new-tokens", 8, "--out", out, "--json")
    # BOS, the document, the question with an empty line behind and in front of it, room for the answer.
    lost = 1 + 4200 + 2 * (2 + len("Which?")) + 8 - 4096
    assert (done.json["cut_documents"], done.json["most_cut_tokens"]) == (1, lost)
    assert [row["length"] for row in done.json["results"]] == [4096, 64]
    assert f"apb: 1 of 2 documents lost their middle, at most {lost} tokens" in done.err
    assert [json.loads(line)["prompt_tokens"] for line in out.read_text().splitlines()] == [4080, 69]
    cli("eval", "jsonl", *place, "--length", 5000).refused("5000", "4096 positions")
