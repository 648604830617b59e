"""The rules of the house: which way imports run, and that strategies are objects that nobody knows by name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import apb
from apb.compressors import COMPRESSORS
from apb.decoding import DECODINGS
from apb.methods import METHODS

PACKAGE = Path(apb.__file__).parent
TESTS = Path(__file__).parents[1]
SOURCES = sorted(PACKAGE.rglob("*.py"))


def picture() -> dict[str, int]:
    """{module or folder: its row from the bottom}, of the picture in CONTRIBUTING.md; notes stand behind wide gaps."""
    _, _, rest = (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text().partition("```text\n")
    lines = rest.partition("```")[0].splitlines()
    rows = [re.split(r" {3,}", line)[0].split() for line in reversed(lines)]
    return {name: row for row, names in enumerate(rows) for name in names}


HOME = picture()
# Where strategies, compressors and decode methods live, which know themselves.
OWN = ("planning/methods", "strategies", "compressors", "decoding")
NAMES = {*METHODS, *COMPRESSORS, *DECODINGS}
CLASSES = {kind.__name__ for kind in (*METHODS.values(), *COMPRESSORS.values(), *DECODINGS.values())}


def room(path: Path) -> str:
    """The top-level module or folder of a source file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """(top-level module or folder of this package, line) of everything a source file imports, but for types alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level or (node.module or "").split(".")[0] != "apb", f"{path}:{node.lineno} is not relative"
        if not isinstance(node, ast.ImportFrom) or id(node) in typing_only or node.level < depth:
            continue
        if node.module is not None:
            yield node.module.split(".")[0], node.lineno
        else:
            yield from ((alias.name, node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    """From the command line down to planning, within functions too."""
    if path == PACKAGE / "__init__.py":
        return  # imports lazily what the package offers
    assert room(path) in HOME, f"{room(path)} has no place in the picture of CONTRIBUTING.md"
    for name, line in imported(path):
        if name in HOME and name != room(path):
            assert HOME[name] <= HOME[room(path)], f"{path}:{line} imports {name}, which stands above it"


def test_planning_and_methods_know_no_torch() -> None:
    """No module of planning imports torch or transformers, not even within a function."""
    for path in (PACKAGE / "planning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] in ("torch", "transformers") for name in names), path


def test_transformers_is_known_in_one_folder() -> None:
    """Only `hf/` and the training of models import transformers, types aside, or look into configurations."""
    for path in SOURCES:
        if room(path) in ("hf", "training"):
            continue
        text = path.read_text()
        tree = ast.parse(text)
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            found = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers"
            quiet = path.name == "quiet.py"  # silences its log
            assert not found or quiet or id(node) in typing_only, f"{path}:{getattr(node, 'lineno', 0)}"
        assert "get_text_config" not in text, path


@pytest.mark.parametrize(
    "made", ["methods.APB(blocks=8)", "compressors.QueryEdge(longest_edge=3)", "decoding.Dense()", "methods.METHODS"]
)
def test_objects_are_found_where_they_are_named(made: str) -> None:
    """In a fresh process `import apb` is enough, and does not import torch."""
    code = f"import sys, apb; apb.{made}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def own(path: Path) -> bool:
    return str(path.relative_to(PACKAGE)).startswith(OWN)


@pytest.mark.parametrize("path", [path for path in SOURCES if not own(path)], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_asks_for_a_strategys_name(path: Path) -> None:
    """No comparison with the name of a strategy, compressor or decode method, no isinstance of one, no subclass of
    Plan or Engine."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            sides += [each for side in sides if isinstance(side, (ast.Tuple, ast.List, ast.Set)) for each in side.elts]
            named = {side.value for side in sides if isinstance(side, ast.Constant)} & NAMES
            # "query" is the question too; only beside a strategy or a compressor is it a name.
            beside = ast.unparse(node)
            if named == {"query"} and not any(word in beside for word in ("strategy", "compressor", "scorer")):
                continue
            assert not named, f"{path}:{node.lineno} compares with {named}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            kinds = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
            assert not kinds & CLASSES, f"{path}:{node.lineno} asks for {kinds & CLASSES}"
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
            assert not bases & {"Plan", "Engine"}, f"{path}:{node.lineno} subclasses {bases}"


def test_no_test_writes_an_engines_private_state() -> None:
    """Tests make engines by their arguments; none assigns to an attribute of one, or patches a private one."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                held = isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)
                assert not (held and target.value.id.endswith("engine")), f"{path}:{node.lineno}"  # type: ignore[attr-defined]
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr") and len(node.args) > 2:
                owner, name = ast.unparse(node.args[0]), ast.unparse(node.args[1])
                assert not (owner.endswith("engine") and name.strip("'\"").startswith("_")), f"{path}:{node.lineno}"
