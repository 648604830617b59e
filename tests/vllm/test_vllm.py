"""vLLM answers from stored documents as apb does: token for token, 24 greedy ones, in fp32 on the CPU.

APB_VLLM_PYTHON names the interpreter of an environment with vLLM (`make test-vllm` makes one); without it nothing runs.
APB_REAL_MODELS may name a folder of public checkpoints, which are tested beside the shipped one.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import apb
from apb.distributed.launch import launch
from apb.hf.loading import load_tokenizer, shipped_model

PYTHON = os.environ.get("APB_VLLM_PYTHON", "")
REAL = Path(os.environ.get("APB_REAL_MODELS") or "not given")
SOURCE = Path(__file__).parents[2] / "src"
MODELS = {"needle": Path(shipped_model())} | {
    name: REAL / name for name in ("smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m") if (REAL / name).is_dir()
}
TOKENS, LENGTH, PART = 24, 500, 300
QUESTIONS = ("What is this text about?", "Which of them are exact?", "Who is it for?", "What is missing?")
# By the name of a document: who reads it. Each is another text.
READERS = {"full": "full", "ring": "ring", "apb": "apb", "gone": "full", "cut": "full"}

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="APB_VLLM_PYTHON names no interpreter with vLLM"),
    pytest.mark.timeout(3600),
]


@dataclass
class Library:
    """Documents of a model in a store, and what apb answers to the questions about them.

    ``exact`` are answers over exact keys and values, ``own`` those over the keys and values that a document keeps.
    """

    model: Path
    texts: dict[str, list[int]]
    questions: list[list[int]]
    own: dict[str, list[list[int]]] = field(default_factory=dict)
    exact: dict[str, list[list[int]]] = field(default_factory=dict)

    def prompt(self, name: str, question: int) -> list[int]:
        """A document and a question."""
        return self.texts[name] + self.questions[question]


def answer(session: apb.Session) -> list[int]:
    """The most likely tokens, whatever they are."""
    said: list[int] = []
    while len(said) < TOKENS:
        said.append(int(session.logits.argmax()))
        session.extend(said[-1:])
    return said


def engine_of(model: Path, strategy: str) -> apb.Engine:
    options = {"blocks": 4} if strategy == "apb" else {}
    return apb.Engine.from_pretrained(model, strategy=strategy, dtype="float32", device="cpu", verify=False, **options)


def asked(document: apb.Document, questions: Sequence[Sequence[int]]) -> list[list[int]]:
    return [answer(document.prefill(question, max_new_tokens=TOKENS)) for question in questions]


def ring(folder: str, model: str, text: list[int], question: list[int]) -> None:
    """One rank's part: the document, and the answer to one question."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    document = engine_of(Path(model), "ring").read(tokens=text)
    document.save(Path(folder, "ring"))
    (said,) = asked(document, [question])
    if dist.get_rank() == 0:
        Path(folder).with_suffix(".json").write_text(json.dumps(said))
    dist.destroy_process_group()


@cache
def pages(model: Path) -> list[int]:
    tokenizer = load_tokenizer(model)
    text = "\n".join(page.read_text() for page in sorted(Path(__file__).parents[2].glob("docs/*.md")))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module", params=MODELS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, Path]:
    """What apb has read of one model, and answered."""
    model, store = MODELS[request.param], tmp_path_factory.mktemp(request.param)
    tokenizer, text = load_tokenizer(model), pages(model)
    questions = [list(tokenizer(f"\n\n{each}", add_special_tokens=False)["input_ids"]) for each in QUESTIONS]
    texts = {name: text[LENGTH * place : LENGTH * (place + 1) - 7 * place] for place, name in enumerate(READERS)}
    found = Library(model, texts, questions)
    engine = engine_of(model, "full")
    for name in READERS:
        document = engine.read(tokens=texts[name])
        if READERS[name] == "full":
            document.save(store / name)
        found.exact[name] = asked(document, questions[: {"full": 4, "ring": 4, "apb": 2}.get(name, 1)])
    engine.close()
    document = engine_of(model, "apb").read(tokens=texts["apb"], question=questions[0])
    document.save(store / "apb")
    found.own["apb"] = asked(document, questions[:2])
    launch(ring, 2, str(store), str(model), texts["ring"], questions[0])
    found.own["ring"] = [json.loads(store.with_suffix(".json").read_text())]
    return found, store


def vllm(
    library: Library, store: Path, folder: Path, steps: list[dict[str, Any]], approximate: str = "", **options: Any
) -> tuple[list[dict[str, Any]], str]:
    """What vLLM answers in each step, and its log."""
    settings = {"store": str(store)} | ({"approximate": approximate} if approximate else {})
    job, out = folder / "job.json", folder / "out.json"
    options = {"max_model_len": 1024, **options}
    job.write_text(json.dumps({"model": str(library.model), "settings": settings, "steps": steps, "options": options}))
    command = [PYTHON, str(Path(__file__).with_name("in_vllm.py")), str(job), str(out)]
    env = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return json.loads(out.read_text()), log


def ask(*prompts: list[int]) -> dict[str, Any]:
    return {"ask": prompts, "tokens": TOKENS}


# Where steps are scheduled ahead, a request waits for its load; else layers do.
@pytest.mark.parametrize("ahead", [False, True], ids=["layer by layer", "ahead"])
def test_answers(ahead: bool, library: tuple[Library, Path], tmp_path: Path) -> None:
    """Every kind of document and question, one after the other in one engine, in chunks of 256 tokens."""
    books, store = library
    first = books.prompt("full", 0)
    follow_up = [*first, *books.exact["full"][0], *books.questions[1]]
    part = [*books.texts["full"][:PART], *books.questions[1]]
    eight = [books.prompt(name, number) for number in range(4) for name in ("full", "ring")]
    exact = books.exact
    steps = [
        ask(first),
        ask(books.prompt("ring", 0)),
        ask(books.prompt("apb", 0)),  # its own question
        ask(books.prompt("apb", 1)),  # another, which must find nothing of the one before
        ask(books.prompt("apb", 0)),
        ask(*eight),
        ask(follow_up),
        ask(part),
    ]
    said, _ = vllm(books, store, tmp_path, steps, async_scheduling=ahead, max_num_batched_tokens=256)
    tokens = [each["token_ids"] for each in said]
    told = [each["apb"] or {} for each in said]
    assert tokens[0] == exact["full"][0]
    assert tokens[1] == exact["ring"][0] == books.own["ring"][0]
    assert tokens[2] == tokens[4] == books.own["apb"][0]
    assert tokens[3] == exact["apb"][1]
    assert tokens[5:13] == [exact[name][number] for number in range(4) for name in ("full", "ring")]
    engine = engine_of(books.model, "full")
    expected = [answer(engine.prefill(apb.Prompt.from_tokens([], ids[:-1], ids[-1:]))) for ids in (follow_up, part)]
    assert tokens[13:] == expected
    assert [each.get("loaded_tokens") for each in told[:3]] == [LENGTH, LENGTH - 7, len(books.prompt("apb", 0)) - 1]
    assert (told[2]["read_for"], told[2]["exact"]) == ("this question", False)
    assert said[3]["cached"] == 0
    assert told[3] == {"left_out": told[3]["left_out"]}
    assert told[3]["left_out"]["read_for"] == "another question"
    assert told[14]["document_tokens"] == PART
    assert said[14]["cached"] == PART


@pytest.mark.parametrize("ahead", [False, True], ids=["layer by layer", "ahead"])
def test_a_store_vanishes(ahead: bool, library: tuple[Library, Path], tmp_path: Path) -> None:
    """Promised tokens that cannot be loaded are computed, and nobody finds what was to hold them."""
    books, store = library
    here = tmp_path / "store"
    here.mkdir()
    for name in ("gone", "cut", "full"):
        (here / name).mkdir()
        for path in (store / name).iterdir():
            (here / name / path.name).write_bytes(path.read_bytes())
    steps: list[dict[str, Any]] = []
    for name, how in (("gone", "remove"), ("cut", "cut")):
        prompt = books.prompt(name, 0)
        steps += [{"then": how, "store": str(here / name)}, ask(prompt, books.prompt("full", 1)), ask(prompt)]
    said, log = vllm(books, here, tmp_path, steps, async_scheduling=ahead)
    expected = [books.exact["gone"][0], books.exact["full"][1], books.exact["gone"][0]]
    expected += [books.exact["cut"][0], books.exact["full"][1], books.exact["cut"][0]]
    assert [each["token_ids"] for each in said] == expected
    assert log.count("cannot be loaded for request") == 2


def test_preempted(library: tuple[Library, Path], tmp_path: Path) -> None:
    """Requests that lose their blocks half-way get their documents again."""
    books, store = library
    eight = [books.prompt("full", number % 4) for number in range(8)]
    few = {"num_gpu_blocks_override": 15, "enable_prefix_caching": False, "max_num_batched_tokens": 256}
    said, log = vllm(books, store, tmp_path, [ask(*eight)], **few)
    assert [each["token_ids"] for each in said] == books.exact["full"] * 2
    assert log.count("come from the document full") > 8


def test_another_question_if_allowed(library: tuple[Library, Path], tmp_path: Path) -> None:
    """An approximate document serves the questions that the setting allows, as apb itself answers them, and says so."""
    books, store = library
    prompts = [ask(books.prompt("apb", number)) for number in (1, 0)]
    said, _ = vllm(books, store, tmp_path, prompts, "another question")
    assert [each["token_ids"] for each in said] == [books.own["apb"][1], books.own["apb"][0]]
    assert [each["apb"]["read_for"] for each in said] == ["another question", "this question"]
    said, _ = vllm(books, store, tmp_path, prompts, "never")
    assert [each["token_ids"] for each in said] == [books.exact["apb"][1], books.exact["apb"][0]]
