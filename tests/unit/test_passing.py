"""What the server tells of a document's reading: the tokens that most layers and KV heads of its blocks passed on."""

from __future__ import annotations

import torch

import apb
from apb.serving.answers import Passed
from apb.serving.kept import KeptDocuments, Places
from apb.serving.passing import Passing
from byte_checkpoint import byte_tokenizer
from models import tiny_model

TEXT = "The lighthouse keeper of Orrin was called Maud. " * 24


def engine(**options: object) -> apb.Engine:
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258)
    return apb.Engine.from_model(model, byte_tokenizer(), **({"blocks": 4, "passing_length": 40} | options))  # type: ignore[arg-type]


def test_what_most_chose() -> None:
    """By hand: two layers of two heads; as many tokens as one head passes, gaps of up to three tokens filled."""
    made = engine(passing_length=3)
    plan = made.plan(prompt := apb.Prompt((1, 2), tuple(range(200)), (9,)))
    passing, start = Passing(plan), plan.block(1).start
    for layer, chosen in enumerate(([[5, 8, 30], [5, 8, 31]], [[5, 9, 31], [5, 8, 32]])):
        passing.seen(layer, 1, torch.tensor(chosen) + start)
    found = passing.found(made, made.prefill(prompt))
    assert found.passages == [(start + 5, start + 9, 1.0), (start + 31, start + 32, 0.5)]
    assert found.within(start + 8, start + 31, "x") == Passed([(0, 1, 1.0)], [], "x")
    made.close()


def test_told_when_read_and_when_found() -> None:
    """The same for another question on the text, and on a text that goes on; in tokens of the document."""
    made = engine()
    kept = KeptDocuments(made, 1 << 40, Places())

    def open_(text: str, question: str) -> Passed:
        prompt = apb.Prompt.for_model(made.tokenizer, text, question)  # type: ignore[arg-type]
        _, passed, close = kept.open(prompt, 3, lambda done, total: None, lambda: None)
        close()
        return passed

    first = open_(TEXT, "Who?")
    assert first.read_for == "this question" and len(first.passages) >= 3
    chosen: list[torch.Tensor] = []
    prompt = apb.Prompt.for_model(made.tokenizer, TEXT, "Who?")  # type: ignore[arg-type]
    made.prefill(prompt, on_selection=lambda layer, block, positions: chosen.append(positions.flatten()))
    every = set((torch.cat(chosen) - len(prompt.prefix)).tolist())
    assert all(start in every and stop - 1 in every for start, stop, _ in first.passages)
    other = open_(TEXT, "Where is it?")
    assert other.read_for == "another question" and other.passages == first.passages
    assert kept.told.hits == 1
    kept._passed.clear()  # as after a restart
    assert open_(TEXT, "Where is it?").passages is None
    made.close()


def test_where_nothing_is_passed() -> None:
    """Star passes nothing on, and with propagation what went on is told as well."""
    prompt = apb.Prompt.for_model(byte_tokenizer(), TEXT, "Who?")
    for options, on in (
        ({"strategy": "star", "passing_length": None}, False),
        ({"propagation": apb.Propagation(0, 0.3)}, True),
    ):
        made = engine(**options)
        _, passed, _ = KeptDocuments(made, 1 << 40, Places()).open(prompt, 3, lambda done, total: None, lambda: None)
        assert bool(passed.passages) is on
        rows = made.plan(prompt).going_on
        assert sum(stop - start for start, stop in passed.went_on) == (rows if on else 0)
        made.close()
