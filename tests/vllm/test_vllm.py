"""vLLM answers from stored documents as apb does: token for token, 24 greedy ones, in fp32 on the CPU.

APB_VLLM_PYTHON names the interpreter of an environment with vLLM (`make test-vllm` makes one); without it nothing runs.
APB_REAL_MODELS may name a folder of public checkpoints, which are tested beside the shipped one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import cache, partial
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
BLOCK = 128  # tokens of a block of vLLM's cache on the CPU
QUESTIONS = ("What is this text about?", "Which of them are exact?")
# By the name of a document: who reads it. Each is another text; the last two are lost on the way.
READERS = {"full": "full", "ring": "ring", "apb": "apb", "gone": "full", "cut": "full"}

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="APB_VLLM_PYTHON names no interpreter with vLLM"),
    pytest.mark.timeout(3600),
]


class Library:
    """Documents of a model in a store, and what apb answers to questions about them."""

    def __init__(self, model: Path, store: Path) -> None:
        tokenizer = load_tokenizer(model)
        encode: Any = partial(tokenizer, add_special_tokens=False)
        pages = sorted(Path(__file__).parents[2].glob("docs/*.md"))
        ids = list(encode("\n".join(page.read_text() for page in pages))["input_ids"])
        self.model, self.store = model, store
        self.questions = [list(encode(f"\n\n{each}")["input_ids"]) for each in QUESTIONS]
        self.texts = {name: ids[LENGTH * n : LENGTH * (n + 1) - 7 * n] for n, name in enumerate(READERS)}
        self._engine = engine_of(model, "full")
        for name in ("full", "gone", "cut") if model == MODELS["needle"] else ("full",):
            self._engine.read(tokens=self.texts[name]).save(store / name)
        launch(ring, 2, str(store), str(model), self.texts["ring"], self.questions[0])
        self.by_ring = json.loads(store.with_suffix(".json").read_text())
        approximate = apb.Engine.from_model(self._engine.model, strategy="apb", blocks=4, verify=False)
        document = approximate.read(tokens=self.texts["apb"], question=self.questions[0])
        document.save(store / "apb")
        self.by_apb = [
            answer(document.prefill(each, max_new_tokens=TOKENS))
            for each in self.questions[: 2 if model == MODELS["needle"] else 1]
        ]
        approximate.close()

    def prompt(self, name: str, question: int) -> list[int]:
        """A document and a question."""
        return self.texts[name] + self.questions[question]

    @cache  # noqa: B019  # lives as long as the test run
    def exact(self, name: str, question: int) -> list[int]:
        """The answer over exact keys and values."""
        return self.after(self.prompt(name, question))

    def after(self, ids: list[int]) -> list[int]:
        """The answer of full attention to a prompt."""
        return answer(self._engine.prefill(apb.Prompt.from_tokens([], ids[:-1], ids[-1:]), max_new_tokens=TOKENS))


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


def ring(folder: str, model: str, text: list[int], question: list[int]) -> None:
    """One rank's part: the document, and the answer to one question."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    document = engine_of(Path(model), "ring").read(tokens=text)
    document.save(Path(folder, "ring"))
    said = answer(document.prefill(question, max_new_tokens=TOKENS))
    if dist.get_rank() == 0:
        Path(folder).with_suffix(".json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=MODELS)
def books(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The library of one model."""
    return Library(MODELS[request.param], tmp_path_factory.mktemp(request.param))


# What does not depend on the model is tested with the shipped one alone: every test starts an engine of vLLM's.
shipped = pytest.mark.parametrize("books", ["needle"], indirect=True, scope="module")


def vllm(
    model: Path, store: Path, folder: Path, steps: list[dict[str, Any]], approximate: str = "", **options: Any
) -> tuple[list[dict[str, Any]], str]:
    """What vLLM answers in each step, and its log."""
    settings = {"store": str(store)} | ({"approximate": approximate} if approximate else {})
    job, out = folder / "job.json", folder / "out.json"
    options = {"max_model_len": 1024, **options}
    job.write_text(json.dumps({"model": str(model), "settings": settings, "steps": steps, "options": options}))
    command = [PYTHON, str(Path(__file__).with_name("in_vllm.py")), str(job), str(out)]
    env = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return json.loads(out.read_text()), log


def ask(*prompts: list[int]) -> dict[str, Any]:
    return {"ask": prompts, "tokens": TOKENS}


@pytest.mark.parametrize("workers", [1, 2])
def test_models(workers: int, books: Library, tmp_path: Path) -> None:
    """Documents of every model, read by one rank or two, exactly or not; one worker or two, each with its own heads."""
    if json.loads((books.model / "config.json").read_text())["num_attention_heads"] % workers:
        # vLLM refuses to start; SmolLM2's nine heads are the model's own, and one worker has compared them.
        pytest.skip("two workers cannot share an odd number of heads")
    prompts = [books.prompt(name, 0) for name in ("full", "ring", "apb")]
    said, log = vllm(books.model, books.store, tmp_path, [ask(*prompts)], tensor_parallel_size=workers)
    assert books.exact("ring", 0) == books.by_ring
    assert [each["token_ids"] for each in said] == [books.exact("full", 0), books.by_ring, books.by_apb[0]]
    assert [each["apb"]["read_for"] for each in said] == ["no question", "no question", "this question"]
    assert log.count(": loaded ") == 3 * workers


# Where steps are scheduled ahead, a request waits for its load; else layers do.
@shipped
@pytest.mark.parametrize("ahead", [False, True], ids=["layer by layer", "ahead"])
def test_answers(ahead: bool, books: Library, tmp_path: Path) -> None:
    """Every kind of document and question, one after the other in one engine, in chunks of 256 tokens."""
    first = books.prompt("full", 0)
    follow_up = [*first, *books.exact("full", 0), *books.questions[1]]
    part = [*books.texts["full"][:PART], *books.questions[1]]
    eight = [books.prompt(name, number) for number in (0, 1, 0, 1) for name in ("full", "ring")]
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
    said, _ = vllm(books.model, books.store, tmp_path, steps, async_scheduling=ahead, max_num_batched_tokens=256)
    tokens = [each["token_ids"] for each in said]
    told = [each["apb"] or {} for each in said]
    assert tokens[0] == books.exact("full", 0)
    assert tokens[1] == books.exact("ring", 0) == books.by_ring
    assert tokens[2] == tokens[4] == books.by_apb[0]
    assert tokens[3] == books.exact("apb", 1)
    assert tokens[5:13] == [books.exact(name, number) for number in (0, 1, 0, 1) for name in ("full", "ring")]
    assert tokens[13:] == [books.after(follow_up), books.after(part)]
    assert [each.get("loaded_tokens") for each in told[:3]] == [LENGTH, LENGTH - 7, len(books.prompt("apb", 0)) - 1]
    assert (told[2]["read_for"], told[2]["exact"]) == ("this question", False)
    assert said[3]["cached"] == 0
    assert told[3] == {"left_out": told[3]["left_out"]}
    assert told[3]["left_out"]["read_for"] == "another question"
    assert told[14]["document_tokens"] == PART
    assert said[14]["cached"] == PART


@shipped
@pytest.mark.parametrize("ahead", [False, True], ids=["layer by layer", "ahead"])
def test_a_store_vanishes(ahead: bool, books: Library, tmp_path: Path) -> None:
    """Promised tokens that cannot be loaded are computed, and nobody finds what was to hold them."""
    here = tmp_path / "store"
    here.mkdir()
    for name in ("gone", "cut", "full"):
        (here / name).mkdir()
        for path in (books.store / name).iterdir():
            (here / name / path.name).write_bytes(path.read_bytes())
    steps: list[dict[str, Any]] = []
    for name, how in (("gone", "remove"), ("cut", "cut")):
        prompt = books.prompt(name, 0)
        steps += [{"then": how, "store": str(here / name)}, ask(prompt, books.prompt("full", 1)), ask(prompt)]
    said, log = vllm(books.model, here, tmp_path, steps, async_scheduling=ahead)
    expected = [books.exact("gone", 0), books.exact("full", 1), books.exact("gone", 0)]
    expected += [books.exact("cut", 0), books.exact("full", 1), books.exact("cut", 0)]
    assert [each["token_ids"] for each in said] == expected
    assert log.count("cannot be loaded for request") == 2


@shipped
@pytest.mark.parametrize(("name", "workers"), [("full", 1), ("apb", 1), ("full", 2)])
def test_many_at_once(name: str, workers: int, books: Library, tmp_path: Path) -> None:
    """Of requests that come together for one document, where each waits for its load, one loads it for all."""
    eight = [books.prompt(name, number if name == "full" else 0) for number in (0, 1) * 4]
    options = {"async_scheduling": True, "tensor_parallel_size": workers}
    said, log = vllm(books.model, books.store, tmp_path, [ask(*eight)], **options)
    expected = [books.exact(name, number) if name == "full" else books.by_apb[0] for number in (0, 1) * 4]
    assert [each["token_ids"] for each in said] == expected
    assert all(each["cached"] >= len(books.texts[name]) for each in said)
    loads = [int(count) for count in re.findall(r": loaded (\d+) tokens", log)]
    assert len([count for count in loads if count >= BLOCK]) == workers


@shipped
def test_preempted(books: Library, tmp_path: Path) -> None:
    """Requests that lose their blocks half-way get their documents again."""
    eight = [books.prompt("full", number % 2) for number in range(8)]
    few = {"num_gpu_blocks_override": 15, "enable_prefix_caching": False, "max_num_batched_tokens": 256}
    said, log = vllm(books.model, books.store, tmp_path, [ask(*eight)], **few)
    assert [each["token_ids"] for each in said] == [books.exact("full", number) for number in range(2)] * 4
    assert log.count("come from the document full") > 8


@shipped
def test_another_question_if_allowed(books: Library, tmp_path: Path) -> None:
    """An approximate document serves the questions that the setting allows, as apb itself answers them, and says so."""
    prompts = [ask(books.prompt("apb", number)) for number in (1, 0)]
    said, _ = vllm(books.model, books.store, tmp_path, prompts, "another question")
    assert [each["token_ids"] for each in said] == [books.by_apb[1], books.by_apb[0]]
    assert [each["apb"]["read_for"] for each in said] == ["another question", "this question"]
    said, _ = vllm(books.model, books.store, tmp_path, prompts, "never")
    assert [each["token_ids"] for each in said] == [books.exact("apb", 1), books.exact("apb", 0)]
