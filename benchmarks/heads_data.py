"""Training data of retaining heads for a chat model: the generated tasks, the same in source code, questions on code.

`python benchmarks/heads_data.py OUT.jsonl --model MODEL`. Texts are the source code of this Python's standard library,
so the same version of Python gives the same file. Seeds are above all those of evaluation.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from random import Random

from apb.errors import at_least
from apb.evaluation.tasks import TASKS, TAUGHT, generate
from apb.evaluation.tasks.base import arrange, encoder_of
from apb.evaluation.tasks.filler import Sentence
from apb.evaluation.tasks.material import Encoder, Fact
from apb.training.heads.generated import FIRST_SEED, tokenizer_of, write
from apb.training.heads.generated import TASKS as NEEDLES

KINDS = [name for name in TASKS if name != "qa" and name not in (set(TAUGHT) - set(NEEDLES))]
"""Generated kinds whose answers stand in few places; those that count words need the whole text."""
LENGTHS = (4096, 8192, 12288)
ROOM = 128  # tokens for the chat template, the question (at times twice) and the answer
SLICE = 300  # most lines of a file in one document
Asked = tuple[str, str, str]  # document, query, answer


@dataclass(frozen=True)
class Function:
    """A function of a file: its lines, from 0, its docstring's first line, and its arguments' defaults as source."""

    name: str
    first: int
    last: int
    summary: str
    defaults: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Source:
    """A file of the standard library."""

    name: str
    lines: tuple[str, ...]
    functions: tuple[Function, ...]


@lru_cache
def sources() -> tuple[Source, ...]:
    """The standard library's files with functions in them, without tests and generated tables."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in ("test", "site-packages", "dist-packages", "encodings", "pydoc_data")):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        functions = sorted(map(described, defined(text)), key=lambda function: function.first)
        if functions:
            found.append(Source(name, tuple(text.split("\n")), tuple(functions)))
    return tuple(found)


def defined(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions and methods of a file."""
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def described(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
    """What questions ask of a function."""
    names, values = [*node.args.posonlyargs, *node.args.args], node.args.defaults
    last = names[len(names) - len(values) :]
    pairs = [*zip(last, values, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    defaults = tuple((name.arg, ast.unparse(value)) for name, value in pairs if value is not None)
    summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    return Function(node.name, node.lineno - 1, (node.end_lineno or node.lineno) - 1, summary, defaults)


def about_code(rng: Random, encoder: Encoder, room: int) -> Asked:
    """Parts of files, each under its name, and a question whose answer the code itself gives."""
    parts: list[str] = []
    asked: list[tuple[str, str, str]] = []  # function, question, answer
    while room > 200:
        source = rng.choice(sources())
        start = rng.randrange(max(1, len(source.lines) - SLICE // 2))
        lines = source.lines[start : start + SLICE]
        sizes = [encoder.count([line + "\n"]) for line in lines]
        while sum(sizes) > room - 20:
            sizes.pop()
        room -= sum(sizes) + 20
        stop = start + len(sizes)
        parts.append(f"# File: {source.name}\n" + "\n".join(lines[: len(sizes)]))
        functions = [each for each in source.functions if start <= each.first and each.last < stop]
        for index, each in enumerate(functions):
            asked.append((each.name, f"Which file defines `{each.name}`?", source.name))
            if each.summary:
                asked.append((each.name, f"What is the first line of the docstring of `{each.name}`?", each.summary))
            for name, value in each.defaults:
                asked.append((each.name, f"What is the default of the argument `{name}` of `{each.name}`?", value))
            if index + 1 < len(functions):
                following = functions[index + 1].name
                asked.append((each.name, f"Which function is defined next after `{each.name}`?", following))
    document = "\n\n".join(parts)
    clear = [(query, answer) for name, query, answer in asked if document.count(f"def {name}(") == 1]
    return (document, *rng.choice(clear)) if clear else about_code(rng, encoder, room + encoder.count([document]))


def lines_of_code(rng: Random) -> Callable[[], Sentence]:
    """Filler: lines of random files."""

    def endless() -> Iterator[str]:
        while True:
            lines = rng.choice(sources()).lines
            start = rng.randrange(len(lines))
            yield from lines[start : start + SLICE]

    lines = endless()
    return lambda: ["\n" + next(lines)]


def in_code(rng: Random, encoder: Encoder, room: int) -> Asked:
    """A generated task whose facts are lines between lines of code."""
    material = TASKS[rng.choice(NEEDLES)](rng, room, encoder)
    material.facts = [Fact(fact.place, ["\n" + "".join(fact.segments).strip()]) for fact in material.facts]
    material.filler = lines_of_code
    question = material.questions[0]
    return arrange(material, rng, room, encoder), question.text, ", ".join(question.answers)


def line(index: int, model: str) -> str:
    """Sample ``index`` as JSON: half are generated, a quarter each of the others.

    Three of four begin with the question: in apb every block but the first reads it in the anchor.
    """
    rng = Random(f"heads {FIRST_SEED + index}")
    tokenizer, room = tokenizer_of(model), rng.choice(LENGTHS) - ROOM
    encoder = encoder_of(tokenizer)
    if index % 4 == 0:
        document, query, answer = in_code(rng, encoder, room)
    elif index % 4 == 1:
        document, query, answer = about_code(rng, encoder, room)
    else:
        task = KINDS[(index // 4 * 2 + index % 2) % len(KINDS)]
        sample = generate(task, tokenizer, room, FIRST_SEED + index)
        document, query, answer = sample.document, sample.query, sample.answer
    if rng.random() < 0.75:
        document = f"\n\n{query}\n\n{document}"
    return json.dumps({"document": document, "query": query, "answer": answer}) + "\n"


def main() -> None:
    """Write the file, with ``--jobs`` processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="whose tokenizer counts the tokens")
    parser.add_argument("--samples", type=int, default=1600)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    at_least("samples", arguments.samples, 1)
    write(arguments.out, partial(line, model=arguments.model), arguments.samples, arguments.jobs)


if __name__ == "__main__":
    main()
