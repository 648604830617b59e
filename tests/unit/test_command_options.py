"""Parameters of the commands: declared once, derived from the methods' options, and checked before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

import apb
from apb.benchmarks import ceilings
from apb.cli import options, serve
from apb.cli.checks import check_used
from apb.cli.groups import Derived, expanded, values
from apb.cli.main import app
from apb.compressors import COMPRESSORS, Compressor, QueryEdge
from apb.compressors import OPTIONS as COMPRESSOR_OPTIONS
from apb.errors import InputError
from apb.evaluation.settings import Setting, settings
from apb.planning.cost import Ceilings
from apb.planning.methods import APB, METHODS, MInference
from apb.planning.methods import OPTIONS as METHOD_OPTIONS
from apb.planning.options import Share, option, options_of
from apb.planning.plan import Plan
from apb.reading import Reading
from command_line import Cli

TEXT = "The lighthouse keeper of Orrin was called Maud. " * 12

# Every command that reads, or plans to: what it must be given beside options of reading, {} for files.
COMMANDS = {
    "generate": "--document {document} --query Who? --max-new-tokens 1",
    "read": "--document {document} --out {folder}/store",
    "serve": "--port 0",
    "explain": "--document {document} --query Who? --max-new-tokens 1 --out {folder}/page.html",
    "plan": "--length 600",
    "eval synthetic": "--task single --length 800 --samples 1",
    "eval ruler": "--data {folder} --task niah_single_1",
    "eval infinitebench": "--data {folder} --task passkey --length 800",
    "eval jsonl": "--data {folder}/own.jsonl --max-new-tokens 1",
    "eval fidelity": "--task single --length 800 --samples 1 --rows 4",
    "bench prefill": "--length 200 --repeat 1",
    "bench decode": "--length 200 --tokens 1",
}
SAMPLES = {
    "own.jsonl": {"document": TEXT, "query": "Who?", "answers": ["Maud"]},
    "passkey.jsonl": {"context": TEXT, "input": "Who?", "answer": ["Maud"], "id": 0},
    "niah_single_1/validation.jsonl": {
        "input": f"{TEXT} What is the special magic number for Orrin mentioned in the provided text?",
        "outputs": ["Maud"],
        "length": 600,
        "index": 0,
    },
}


@dataclass(frozen=True)
class Seen:
    """What a command asked for: the methods that plans were made of, and the compressors that a model was given."""

    methods: set[Any]
    compressors: set[Compressor]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Notes what comes by, and keeps the measurement of a machine's ceilings short."""
    found = Seen(set(), set())
    plan_of, loaded = Plan.of_method, Compressor.loaded

    def of_method(method: Any, *sizes: Any, **more: Any) -> Plan:
        found.methods.add(method)
        return plan_of(method, *sizes, **more)

    def load(compressor: Compressor, read: Any) -> Compressor:
        found.compressors.add(compressor)
        return loaded(compressor, read)

    def run(processes: int, served: serve.Served, *more: Any) -> None:  # in place of a server, which would not end
        reading = Reading.of(**served.reading)
        found.methods.update(reading.methods)
        found.compressors.add(reading.compressor)

    monkeypatch.setattr(Plan, "of_method", of_method)
    monkeypatch.setattr(Compressor, "loaded", load)
    monkeypatch.setattr(serve, "_run", run)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *_: Ceilings(1e11, 1e11, 0.0, 1e10))
    monkeypatch.setattr(ceilings, "copy_bandwidth", lambda *_: 1e10)
    return found


@pytest.fixture
def call(cli: Cli, checkpoint: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs a command of the table with more options, on the tiny checkpoint."""
    for name, sample in SAMPLES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(sample))
    (tmp_path / "document.txt").write_text(TEXT)

    def run(command: str, *more: object) -> Any:
        needed = COMMANDS[command].format(document=tmp_path / "document.txt", folder=tmp_path)
        place = () if command == "plan" else ("--device", "cpu")
        return cli(*command.split(), *needed.split(), "--model", checkpoint, *place, *more)

    return run


def parameters(command: str) -> dict[str, Any]:
    """The parameters of a command by name, as typer made them."""
    found: Any = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    return {each.name: each for each in found.params}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_lists_every_option(cli: Cli, command: str) -> None:
    """--help has each option of each method and compressor with the text of its field; no other place words it."""
    done = cli(*command.split(), "--help")
    assert done.status == 0
    shown = " ".join(done.out.split())
    taken = parameters(command)
    for kind in (*METHODS.values(), *COMPRESSORS.values()):
        for name in options_of(kind):
            assert f"--{name.replace('_', '-')} " in shown
            assert taken[name].default is None, "what is not given is left to the method"
    for name, field in (METHOD_OPTIONS | COMPRESSOR_OPTIONS).items():
        assert field.metadata["help"].rstrip(".") in shown, name


SPARSE = ("--strategy", "minference", "--vertical-size", 10, "--slash-size", "50%")
PASSING = ("--blocks", 3, "--passing-length", 9, "--longest-edge", 3)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_reach_plan_and_compressor(call: Callable[..., Any], seen: Seen, command: str) -> None:
    """An option of a strategy and one of a compressor do in every command what they do in Python."""
    done = call(command, *PASSING)
    assert done.status == 0, done.err
    assert APB(blocks=3, passing_length=9) in seen.methods
    assert QueryEdge(longest_edge=3) in seen.compressors
    if command == "explain":
        return call(command, *SPARSE).refused("'minference'", "passes nothing")
    seen.methods.clear()
    done = call(command, *(SPARSE[2:] if command == "plan" else SPARSE))
    assert done.status == 0, done.err
    assert MInference(vertical_size=10, slash_size=0.5) in seen.methods


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--blocks", 0), "Blocks must be at least 1, not 0."),
        (("--longest-edge", -1), "Longest edge must be at least 0, not -1."),
        (("--slash-size", "many"), "--slash-size takes a number such as 1000 or a share such as 0.1, not 'many'."),
        (("--heads", "/nowhere/heads.pt"), "The heads file /nowhere/heads.pt does not exist."),
        (("--compressor", "recent", "--longest-edge", 3), "--compressor query-edge.|'longest_edge'; leave it out."),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_limits_are_said_before_a_weight_is_read(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: str, given: tuple[Any, ...], sentence: str
) -> None:
    """Status 2 and the sentence of the option itself, in every command."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    done = call(command, *given)
    done.refused()
    assert any(done.err.endswith(f"{words}\n") for words in sentence.split("|")), done.err


@pytest.mark.parametrize("command", [each for each in COMMANDS if each != "plan"])  # which is of all strategies
def test_options_that_would_do_nothing(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Refused if none of the strategies that were named has them."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    full, star = ("--strategy", "full"), ("--strategy", "star")
    call(command, *full, "--blocks", 4).refused("--blocks is an option of apb and star, not of full;")
    call(command, *full, "--compressor", "random").refused("--compressor is an option of apb, not of full")
    call(command, *star, "--longest-edge", 3).refused("--longest-edge is an option of apb, not of star")
    call(command, *star, "--vertical-size", 10).refused("--vertical-size is an option of minference, not of star")
    if "rounds" in parameters(command):
        call(command, *full, "--rounds", 2).refused("--rounds is an option of apb and star, not of full")


def test_options_of_one_of_several() -> None:
    """An option serves the strategies that have it; star's anchor is its own where sizes are given to all."""
    asked = options.Options(method={"blocks": 4}, scoring={})
    check_used(["full", "star"], asked, rounds=2)
    check_used(["auto"], asked)
    anchor = options.Options(method={"anchor_length": 4}, scoring={})
    check_used(["full", "star"], anchor)
    with pytest.raises(InputError, match="--anchor-length is an option of apb, not of full or star"):
        check_used(["full", "star"], anchor, compared=True)


@pytest.mark.parametrize("command", ["generate", "serve", "explain", "eval synthetic", "eval fidelity", "bench decode"])
def test_what_no_rank_could_do_is_said_at_once(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """One check for all: a dtype, a device and a model that there are not."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    call(command, "--dtype", "float12").refused("'float12'", "bfloat16")
    call(command, "--device", "tpu").refused("'tpu'", "cpu or cuda")
    call(command, "--model", "/nowhere").refused("/nowhere", "does not exist")


@pytest.mark.parametrize("command", ["generate", "serve", "eval jsonl"])
def test_a_strategy_that_the_model_is_not_made_for(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Heads that do not divide by the ranks are refused before the ranks are started."""
    monkeypatch.setattr("apb.distributed.launch.run", None)
    call(command, "--strategy", "ulysses", "--ranks", 3).refused("'ulysses'", "4 do not divide by 3", "'ring'")


def test_the_document_is_tokenized_once(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What checks the request makes the prompt, and the rank reads that one."""
    made, read = [], []
    for_model, stream = apb.Prompt.for_model, apb.Engine.stream

    def tokenize(*given: Any, **options: Any) -> apb.Prompt:
        made.append(for_model(*given, **options))
        return made[-1]

    monkeypatch.setattr(apb.Prompt, "for_model", tokenize)
    monkeypatch.setattr(apb.Engine, "stream", lambda *a, **k: read.append(a[1]) or stream(*a, **k))
    assert call("generate", "--blocks", 3).status == 0
    assert len(made) == 1
    assert made == read


def test_options_count_for_the_compressors_that_have_them() -> None:
    """Where several are compared, each takes its own; an option that none has is refused."""
    assert settings(["apb"], ["recent", "query-edge"], longest_edge=3, heads=None) == [
        Setting.of("apb", "recent"),
        Setting.of("apb", "query-edge", longest_edge=3),
    ]
    assert settings(["apb"], ["query", "retaining"], heads="h.pt") == [
        Setting.of("apb", "query"),
        Setting.of("apb", "retaining", heads="h.pt"),
    ]
    with pytest.raises(InputError, match=r"^Heads were given but no compressor uses them; add --compressor retaining"):
        settings(["apb"], ["query"], heads="h.pt")
    with pytest.raises(InputError, match="Longest edge must be at least 0"):
        settings(["full"], longest_edge=-1)


# --- groups --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """A method with an option of every kind."""

    width: int | None = option(None, "Columns of it.", least=1)
    share: int | float | None = option(None, "So much of it.", kind=Share)
    rate: float = option(0.5, "How fast.", kind=float)
    file: str | Path = option("", "Where it is.", kind=Path)


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: Annotated[int, typer.Option(help="Inside.")] = 7
    toy: Annotated[dict[str, Any], Derived(options_of(Toy), repeatable=("width",))]


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: Annotated[str, typer.Option(help="Outside.")] = "x"
    inner: Inner


def run_toy(*arguments: str) -> Any:
    """The arguments that a command with groups is called with, from a command line."""
    called: list[Any] = []

    @expanded
    def command(first: int, outer: Outer, last: options.AsJson = False) -> None:
        """Documented."""
        called.append((first, outer, last))

    toy = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    toy.command()(command)
    typer.main.get_command(toy).main(list(arguments), standalone_mode=False)
    return called[0] if called else None


def test_a_new_option_is_a_new_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    """A field made by `option` is all it takes; groups lie in one another; help has everything in the written order."""
    assert run_toy("3") == (3, Outer(name="x", inner=Inner(toy={})), False)
    line = "9 --name y --size 1 --width 2 --width 4 --share 0.5 --rate 2 --file a/b --json"
    given = run_toy(*line.split())
    toy = {"width": [2, 4], "share": 0.5, "rate": 2.0, "file": Path("a/b")}
    assert given == (9, Outer(name="y", inner=Inner(size=1, toy=toy)), True)
    assert values(given[1]) == {"name": "y", "size": 1, **toy}
    assert run_toy("--share", "12", "3")[1].inner.toy == {"share": 12}
    run_toy("--help")
    shown = " ".join(capsys.readouterr().out.split())
    texts = ["Documented.", "Outside.", "Inside.", "Columns of it; repeatable.", "So much of it."]
    texts += ["How fast. By default 0.5.", "Where it is.", "--json"]
    places = [shown.index(text) for text in texts]
    assert places == sorted(places)


def test_two_parameters_of_one_name_are_refused() -> None:
    """An option that a command already has a parameter for is seen when the command is made."""

    def command(width: int, inner: Inner) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name: 'width'"):
        expanded(command)


def test_what_is_wrong_is_said_without_torch(tmp_path: Path) -> None:
    """Help and mistakes that need no model are answered at once, before torch and transformers are imported."""
    (tmp_path / "document.txt").write_text(TEXT)
    asked = f"generate --document {tmp_path / 'document.txt'} --query Who?"
    cases = {f"{command} --help": 0 for command in COMMANDS} | {
        "generate --query Who? --document /nowhere": 2,
        f"{asked} --blocks many": 2,
        f"{asked} --blocks 0": 2,
        f"{asked} --vertical-size x": 2,
        f"{asked} --longest-edge -1": 2,
        f"{asked} --strategy magic": 2,
        f"{asked} --compressor magic": 2,
        "plan --length 100 --blocks 101": 2,
        "bench prefill --length 200 --blocks 0": 2,
        "bench decode --length 200 --compressor magic": 2,
    }
    program = (
        "import json, sys, apb.cli.main as main\n"
        "for line, status in json.load(sys.stdin).items():\n"
        "    sys.argv = ['apb', *line.split()]\n"
        "    assert main.run(main.app) == status, line\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), line\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(cases).encode(), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
