"""benchmarks/heads_data.py: questions on code have the answers that the code gives."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from random import Random

import pytest

from apb.evaluation.tasks.base import encoder_of
from apb.hf.loading import load_tokenizer, shipped_model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import heads_data
from heads_data import Source, about_code, defined, described, line

TEXT = '''
def first(a, b=3, *, c="x"):
    """Say so.

    More.
    """
    return a

async def waits(): ...

class Some:
    def __init__(self): ...
    def second(self, /, d=None): return d
'''


FUNCTIONS = tuple(map(described, defined(TEXT)))


@pytest.fixture(autouse=True)
def one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are made of one small file."""
    source = Source("some/file.py", tuple(TEXT.split("\n")), tuple(sorted(FUNCTIONS, key=lambda each: each.first)))
    monkeypatch.setattr(heads_data, "sources", lambda: (source,))


def test_functions_as_the_source_has_them() -> None:
    """Lines, the docstring's first line, defaults of every kind of argument."""
    found = {function.name: function for function in FUNCTIONS}
    assert set(found) == {"first", "waits", "__init__", "second"}
    first, second = found["first"], found["second"]
    assert (first.first, first.last, first.summary) == (1, 6, "Say so.")
    assert first.defaults == (("b", "3"), ("c", "'x'"))
    assert (second.first, second.summary, second.defaults) == (12, "", (("d", "None"),))


def test_answers_are_those_of_the_code() -> None:
    """Each of the questions, in many draws: the answer is that of the only function of this name in the text."""
    encoder = encoder_of(load_tokenizer(shipped_model()))
    right = {
        **{f"Which file defines `{name}`?": "some/file.py" for name in ("first", "waits", "__init__", "second")},
        "What is the first line of the docstring of `first`?": "Say so.",
        "What is the default of the argument `b` of `first`?": "3",
        "What is the default of the argument `c` of `first`?": "'x'",
        "What is the default of the argument `d` of `second`?": "None",
        "Which function is defined next after `first`?": "waits",
        "Which function is defined next after `waits`?": "__init__",
        "Which function is defined next after `__init__`?": "second",
    }
    drawn = {}
    for seed in range(300):
        document, query, answer = about_code(Random(seed), encoder, 260)
        assert document.startswith("# File: some/file.py\n")
        assert document.count(f"def {re.findall('`(.*?)`', query)[-1]}(") == 1
        drawn[query] = answer
    assert drawn == right


def test_lines_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line depends on its number alone; some begin with their question."""
    monkeypatch.setattr(heads_data, "LENGTHS", (1024,))
    monkeypatch.setattr(heads_data, "about_code", lambda *_: ("def f(): ...", "Which?", "f"))
    model = str(shipped_model())
    lines = [line(index, model) for index in range(24)]
    assert lines == [line(index, model) for index in range(24)]
    begins = [fields["document"].startswith(f"\n\n{fields['query']}\n\n") for fields in map(json.loads, lines)]
    assert {*begins} == {True, False}
