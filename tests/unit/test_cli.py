"""The command line: what it prints where, the JSON it promises, and a sentence with exit status 2 for what is wrong.

Most commands run in this process; a real one costs seconds of imports, and is started only where the process matters.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import apb
from apb.cli import demo
from apb.cli.quiet import silence
from apb.hf import hub
from apb.planning.methods import METHODS
from command_line import Cli, Outcome
from models import tiny_heads, tiny_model

TEXT = "The lighthouse keeper of Orrin was called Maud. " * 12  # 576 bytes, as many tokens


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A text file."""
    path = tmp_path / "document.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def ask(cli: Cli, checkpoint: Path, document: Path) -> Cli:
    """`apb generate` on the tiny checkpoint and the document; options given replace or follow these."""

    def call(*more: object, **replaced: object) -> Outcome:
        options: dict[str, object] = {"model": checkpoint, "document": document, "query": "Who?", "device": "cpu"}
        options |= replaced
        given = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
        return cli("generate", *given, *more)

    return call


def started(*arguments: object, **options: Any) -> Outcome:
    """Run a real `apb` process."""
    command = [sys.executable, "-m", "apb.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False, **options)
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


# --- generate ------------------------------------------------------------------------------------------------------


def test_the_answer_alone_is_on_standard_output(ask: Cli, checkpoint: Path) -> None:
    """stdout is the answer's text and a newline; progress and a note of what was done are on stderr."""
    engine = apb.Engine.from_pretrained(checkpoint, blocks=4, device="cpu")
    prompt = apb.Prompt.from_text(engine.tokenizer, TEXT, "Who?")  # type: ignore[arg-type]
    expected = engine.generate(prompt, max_new_tokens=12)
    done = ask("--blocks", 4, "--max-new-tokens", 12)
    assert (done.status, done.out) == (0, expected.text + "\n")
    assert "apb: apb (approximate), 4 blocks on 1 rank: read 583 tokens" in done.err
    # No terminal, no bar: a line that a log can keep.
    assert "Reading: token 583 of 583" in done.err.splitlines()


FIELDS: dict[str, Any] = {
    "text": str,
    "token_ids": list,
    "finish_reason": str,
    "strategy": str,
    "exact": bool,
    "plan": {
        "blocks": int,
        "ranks": int,
        "rounds": int,
        "anchor_length": int,
        "passing_length": int,
        "document_tokens": int,
        "query_tokens": int,
    },
    "timing": {"prefill_s": float, "decode_s": float, "decode_tokens_per_s": float},
    "memory": {"peak_bytes": int},
    "fingerprint": {"apb": str, "torch": str, "transformers": str, "python": str, "device": str, "dtype": str},
    "decode": {"method": str, "exact": bool, "share": float},
}


def kinds(value: Any) -> Any:
    return {name: kinds(part) for name, part in value.items()} if isinstance(value, dict) else type(value)


@pytest.mark.parametrize("strategy", ["apb", "full"])
def test_generate_json(ask: Cli, strategy: str) -> None:
    """--json prints one object with exactly the promised fields, of the promised types."""
    cut = () if strategy == "full" else ("--blocks", 4)
    report = ask("--json", "--strategy", strategy, *cut, "--max-new-tokens", 7).json
    assert kinds(report) == FIELDS
    assert (report["strategy"], report["exact"]) == (strategy, strategy == "full")
    plan = {"blocks": 4, "ranks": 1, "rounds": 1, "anchor_length": 36, "passing_length": 18}
    if strategy == "full":
        plan |= {"blocks": 1, "anchor_length": 0, "passing_length": 0}
    assert report["plan"] == plan | {"document_tokens": 576, "query_tokens": 6}
    assert len(report["token_ids"]) == 7
    assert all(type(token) is int for token in report["token_ids"])
    assert report["finish_reason"] == "length"
    assert report["fingerprint"]["dtype"] == "float32"
    assert report["fingerprint"]["apb"] == apb.__version__


def test_document_from_standard_input(cli: Cli, ask: Cli, checkpoint: Path) -> None:
    """A document of - is standard input; a byte order mark is no part of the text."""
    options = (
        "--query",
        "Who?",
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--blocks",
        4,
        "--json",
        "--max-new-tokens",
        7,
    )
    piped = cli("generate", "--document", "-", *options, stdin=b"\xef\xbb\xbf" + TEXT.encode())
    assert piped.json["token_ids"] == ask("--blocks", 4, "--json", "--max-new-tokens", 7).json["token_ids"]


def test_options_reach_the_engine(ask: Cli, tmp_path: Path) -> None:
    """Lengths, compressor, heads, dtype, seed and temperature do what they say."""
    more = ("--json", "--blocks", 4, "--max-new-tokens", 7)
    plain = ask(*more).json
    lengths = ask(*more, "--anchor-length", 50, "--passing-length", 9).json
    assert (lengths["plan"]["anchor_length"], lengths["plan"]["passing_length"]) == (50, 9)
    assert ask(*more, "--dtype", "bfloat16").json["fingerprint"]["dtype"] == "bfloat16"
    hot = [ask(*more, "--temperature", 2, "--seed", seed).json["token_ids"] for seed in (1, 1, 2)]
    assert hot[0] == hot[1]
    assert hot[0] != hot[2]
    assert ask(*more, "--temperature", 2, "--seed", 1, "--top-k", 1).json["token_ids"] == plain["token_ids"]
    heads = tmp_path / "heads.safetensors"
    save_file(tiny_heads(tiny_model("llama", heads=4, kv_heads=2, head_dim=16)), heads)
    with_heads = ask(*more, "--heads", heads).json
    assert with_heads["token_ids"] != plain["token_ids"]
    assert with_heads == ask(*more, "--heads", heads, "--compressor", "retaining").json | {
        name: with_heads[name] for name in ("timing", "memory")
    }


# --- refusals ------------------------------------------------------------------------------------------------------


def test_documents_that_cannot_be_read(ask: Cli, tmp_path: Path) -> None:
    """Missing, a folder, empty, blank, not UTF-8: each is named with its path or its lack."""
    ask(document=tmp_path / "nowhere.txt").refused("nowhere.txt", "No such file")
    ask(document=tmp_path).refused(str(tmp_path), "directory")
    for content in (b"", b" \n\n\t"):
        (tmp_path / "empty.txt").write_bytes(content)
        ask(document=tmp_path / "empty.txt").refused("document is empty")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    ask(document=tmp_path / "latin.txt").refused("latin.txt", "UTF-8", "byte 2")
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0 words")
    ask(document=tmp_path / "binary").refused("binary", "NUL bytes", "no text")
    ask(document="").refused("empty name", "- for standard input")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--strategy", "magic"], ["'magic'", "apb", "full", "or auto"]),
        (["--compressor", "magic"], ["'magic'", "query"]),
        (["--compressor", ""], ["''", "query"]),
        (["--model", ""], ["empty name", "leave the option out"]),
        (["--compressor", "retaining"], ["'retaining'", "heads"]),
        (["--heads", "/nowhere/heads.pt"], ["/nowhere/heads.pt"]),
        (["--blocks", "0"], ["Blocks", "at least 1", "0"]),
        (["--blocks", "-2"], ["Blocks", "at least 1", "-2"]),
        (["--blocks", "577"], ["577 blocks", "576 tokens"]),
        (["--passing-length", "1" + 20 * "0"], ["Passing length", "at most"]),
        (["--heads", "."], ["heads file .", "folder"]),
        (["--blocks", "many"], ["--blocks", "integer"]),
        (["--blocks", "4", "--anchor-length", "6"], ["6 tokens", "at least 7"]),
        (["--blocks", "4", "--passing-length", "-1"], ["Passing length", "-1"]),
        (["--ranks", "0"], ["Ranks", "at least 1", "0"]),
        (["--ranks", "9999"], ["9999 ranks", "at most"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens must", "at least 1"]),
        (
            ["--max-new-tokens", "4000"],
            [f"{583 + 4000} positions", f"{583 + 4000 - 4096} more", "--allow-extrapolation"],
        ),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--top-p", "0.5"], ["--top-p goes with", "--temperature above 0"]),
        (["--approximate"], ["--approximate goes with --strategy auto", "apb"]),
        (["--temperature", "1", "--seed", str(2**64)], ["seed", "2**64 - 1", str(2**64)]),
        (["--temperature", "1", "--seed", "-9223372036854775809"], ["seed", "-2**63"]),
        (["--top-k", "0"], ["--top-k must", "at least 1"]),
        (["--top-p", "2"], ["--top-p must", "2.0"]),
        (["--dtype", "float12"], ["'float12'", "bfloat16"]),
        (["--device", "tpu"], ["'tpu'", "cpu or cuda"]),
        (["--device", "meta"], ["'meta'", "cpu or cuda"]),
        (["--strategy", "ulysses", "--ranks", "3"], ["'ulysses'", "4 do not divide by 3", "'ring'"]),
        (["--blok", "3"], ["--blok", "apb generate --help"]),
        (["surplus"], ["surplus"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else None,
)
def test_requests_that_cannot_be_served(ask: Cli, options: list[str], fragments: list[str]) -> None:
    """Exit status 2 and one sentence with the value and the way out; nothing has run by then."""
    ask(*options).refused(*fragments)


def test_a_gpu_that_is_not_there(ask: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA asked for where torch sees none is refused, with the way out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ask(device="cuda").refused("CUDA", "--device cpu")


def test_questions_that_are_missing(ask: Cli) -> None:
    """No query, or a blank one, is refused; so is no document."""
    ask(query=None).refused("--query")
    ask(query="  ").refused("query is empty")
    ask(document=None).refused("--document")


def test_models_that_are_not_there(ask: Cli, tmp_path: Path) -> None:
    """A folder that does not exist, an id that is nowhere, a folder without a model, weights that are garbage."""
    ask(model=tmp_path / "nowhere").refused("nowhere", "does not exist")
    ask(model="no-such-owner/no-such-model").refused("no-such-owner/no-such-model", "cannot be loaded")
    ask(model=tmp_path).refused(str(tmp_path), "cannot be loaded")


@pytest.mark.parametrize(
    ("model", "offline", "sentence"),
    [
        ("/nowhere/model", "0", "The model folder '/nowhere/model' does not exist."),
        ("org/model", "0", "http://127.0.0.1:9 does not answer (HF_ENDPOINT names a mirror"),
        ("org/model", "1", "HF_HUB_OFFLINE is set; name a local folder"),
    ],
)
def test_missing_models_cost_no_time(model: str, offline: str, sentence: str) -> None:
    """They are refused before torch is imported, and the hub is not asked again and again where there is no network."""
    code = f"""import sys
sys.argv = ["apb", "serve", "--model", {model!r}]
from apb.cli import main
sys.exit(100 if "torch" in sys.modules else main.run(main.app) + 100 * ("torch" in sys.modules))"""
    environment = os.environ | {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and sentence in done.stderr


def test_a_hub_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a connection and then says nothing is given up soon; any answer, an error too, is one."""
    monkeypatch.setattr(hub, "_PATIENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert not hub._answers(url)

        def refuse() -> None:
            for _ in range(2):  # the one that was given up, and this one
                connection, _ = silent.accept()
                with connection, suppress(OSError):
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.0 401 Unauthorized\r\n\r\n")

        threading.Thread(target=refuse, daemon=True).start()
        assert hub._answers(url)


def test_weights_that_may_run_code(ask: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """A pickle that names a function is refused by that name, without torch's advice, and nothing of it is run."""

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Harmful()}, folder / "pytorch_model.bin")
    done = ask(model=folder)
    done.refused("posix.mkdir", "safetensors")
    assert "weights_only" not in done.err and not (tmp_path / "ran").exists()


def test_an_answer_larger_than_memory(ask: Cli) -> None:
    """Where the answer's room is what does not fit, the way out is a shorter answer, not another model."""
    ask("--max-new-tokens", 10**12, "--allow-extrapolation").refused("new tokens alone", "shorter answer")


def test_heads_that_are_no_heads(ask: Cli, tmp_path: Path) -> None:
    """A file of something else is refused without torch's advice to run what is in it."""
    path = tmp_path / "heads.pt"
    path.write_text("the lighthouse keeper")
    done = ask("--heads", path)
    done.refused("heads.pt", "cannot be read")
    assert "arbitrary code" not in done.err
    assert "weights_only" not in done.err


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"num_hidden_layers": 4}, ["lacks weights", "model.layers.3.", "more", "configuration"]),
        ({"vocab_size": 300}, ["shape (258, 64)", "(300, 64)", "configuration"]),
        ({"hidden_size": "big"}, ["cannot be loaded", "hidden_size"]),
        ({"num_attention_heads": 0}, ["config"]),
        ({"rope_parameters": {"rope_type": "weird"}}, ["weird"]),
        ({"model_type": "t5"}, ["'t5'", "not causal decoders"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_configurations_that_do_not_fit_the_weights(
    ask: Cli, checkpoint: Path, tmp_path: Path, changes: dict[str, Any], fragments: list[str]
) -> None:
    """Weights are never drawn by lot in silence: what the checkpoint lacks is named, and so is what makes no model."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    ask(model=tmp_path).refused(*fragments)


def test_a_model_without_a_tokenizer(ask: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """A folder of weights alone is refused with what it lacks."""
    for file in checkpoint.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    ask(model=tmp_path).refused("no tokenizer", str(tmp_path))


def test_models_that_are_damaged(ask: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint whose weights or configuration cannot be read is refused with its path."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    ask(model=tmp_path).refused(str(tmp_path), "weights", "cannot be loaded")
    weights.unlink()
    ask(model=tmp_path).refused(str(tmp_path), "weights", "cannot be loaded")
    (tmp_path / "config.json").write_text("{")
    ask(model=tmp_path).refused(str(tmp_path), "cannot be loaded")


def test_ranks_that_contradict_torchrun(ask: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun the number of ranks is torchrun's; another one asked for is refused before anything is joined."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    ask("--ranks", 3).refused("--ranks 3", "torchrun started 2")


def test_unforeseen_errors_are_one_line(ask: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw is status 1 and one line that says how to see more."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(apb.Engine, "from_pretrained", fail)
    done = ask()
    assert (done.status, done.out) == (1, "")
    assert done.err == "apb: RuntimeError: first second (set APB_TRACEBACK=1 to see where)\n"
    monkeypatch.setenv("APB_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="first"):
        ask()


def test_a_full_gpu(ask: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much was wanted and how much is free, and what helps; not torch's advice on its allocator."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.21 "
            "GiB is free. Process 71 has 138.58 GiB memory in use. If reserved but unallocated memory is large try x=y."
        )

    monkeypatch.setattr(apb.Engine, "from_pretrained", fail)
    done = ask()
    assert done.status == 1
    assert done.err == (
        "apb: The GPU ran out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which "
        "1.21 GiB is free. Read in more rounds (--rounds), on more ranks (--ranks), or end other programs that use the "
        "GPU (set APB_TRACEBACK=1 to see where)\n"
    )


def test_interrupted(ask: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is status 130 and one word, not a traceback."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(apb.Engine, "from_pretrained", interrupt)
    done = ask()
    assert (done.status, done.out, done.err) == (130, "", "apb: interrupted\n")


# --- plan, doctor, eval --------------------------------------------------------------------------------------------


def test_plan_json(cli: Cli, checkpoint: Path) -> None:
    """Ten million tokens are planned at once: every strategy side by side, with what it would cost."""
    report = cli("plan", "--length", 10_000_000, "--ranks", 4, "--model", checkpoint, "--json").json
    assert report["length"] == 10_000_000
    assert report["max_positions"] == 4096
    rows = {row["strategy"]: row for row in report["strategies"]}
    assert set(rows) == set(METHODS)
    for name, row in rows.items():
        assert row["exact"] is METHODS[name].exact
        assert row["plan"]["document_tokens"] == 10_000_000
        assert len(row["per_rank"]) == row["plan"]["ranks"]
        for field in ("flops", "linear_flops", "attention_flops", "cache_bytes_per_rank", "peak_bytes_per_rank"):
            assert type(row[field]) is int
            assert row[field] > 0
        assert type(row["sent_bytes_per_rank"]) is int
        assert row["seconds"] is None or row["seconds"] > 0
    assert (rows["apb"]["plan"]["blocks"], rows["apb"]["plan"]["ranks"]) == (64, 4)
    assert rows["full"]["plan"] == rows["full"]["plan"] | {"blocks": 1, "ranks": 1, "anchor_length": 0}


def test_plan_as_a_picture(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """A bar for every block, at its place, on its rank's row."""
    drawn = tmp_path / "plan.svg"
    options = ("--length", 1600, "--model", checkpoint, "--ranks", 2, "--blocks", 4)
    assert cli("plan", *options, "--plot", drawn).status == 0
    text = drawn.read_text()
    one = tmp_path / "one.svg"
    assert cli("plan", "--length", 1600, "--model", checkpoint, "--blocks", 1, "--plot", one).status == 0
    bars = [picture.count("PolyCollection") for picture in (text, one.read_text())]
    # full, minference 1 each; apb, star 4 and two shares of an anchor; ring 4, ulysses 2; on one rank ring has 2
    assert bars == [1 + 1 + 6 + 6 + 4 + 2, 6 + 1] and "xmlns" in text
    cli("plan", *options, "--plot", tmp_path / "plan.png").refused(".svg", "plan.png")
    cli("plan", *options, "--plot", tmp_path / "none/plan.svg").refused("no folder")


def test_plan_as_a_table(cli: Cli, checkpoint: Path) -> None:
    """Without --json the same numbers are a table, and a length beyond the model's positions is remarked on."""
    done = cli("plan", "--length", 100_000, "--blocks", 5, "--model", checkpoint)
    assert done.status == 0
    for word in ("100,000 tokens", "apb", "full", "anchor", "FLOPs", "4,096 positions"):
        assert word in done.out
    assert "passing budget" not in done.out
    bounded = cli("plan", "--length", 100_000, "--blocks", 5, "--passing-budget", 3100, "--model", checkpoint)
    assert re.search(r"passing budget\W+3,100", bounded.out)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--length", "0"], ["Length", "at least 1", "0"]),
        (["--length", "1e6"], ["--length", "integer"]),
        ([], ["--length"]),
        (["--length", "1" + 20 * "0"], ["Length", "at most"]),
        (["--length", "100", "--random-weights", ""], ["empty name"]),
        (["--length", "100", "--blocks", "101"], ["101 blocks", "100 tokens"]),
        (["--length", "100", "--ranks", "0"], ["Ranks", "at least 1"]),
        (["--length", "100", "--rounds", "0"], ["Rounds", "at least 1"]),
        (["--length", "100", "--blocks", "4", "--anchor-length", "5"], ["5 tokens", "at least 33"]),
        (["--length", "100", "--model", "/nowhere"], ["/nowhere", "does not exist"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else None,
)
def test_plans_that_cannot_be_made(cli: Cli, options: list[str], fragments: list[str]) -> None:
    """A plan that cannot be made is refused like a request that cannot be served."""
    cli("plan", *options).refused(*fragments)


def test_eval_json(cli: Cli, checkpoint: Path) -> None:
    """Every combination of repeated options that differs is one row with the promised fields; scores are 0 to 100."""
    given = {"task": ["single", "headings"], "strategy": ["full", "apb"], "compressor": ["query", "recent"]}
    repeated = [part for name, values in given.items() for value in values for part in (f"--{name}", value)]
    length = ("--length", 2000, "--samples", 1, "--seed", 3, "--blocks", 4)
    report = cli("eval", "synthetic", *repeated, *length, "--model", checkpoint, "--device", "cpu", "--json").json
    rows = report["results"]
    assert [(row["task"], row["strategy"], row["compressor"], row["blocks"]) for row in rows] == [
        (task, *setting)
        for task in given["task"]
        for setting in (("full", None, 1), ("apb", "query", 4), ("apb", "recent", 4))
    ]
    for row in rows:
        assert (row["length"], row["samples"]) == (2000, 1)
        assert 0 <= row["score"] <= 100


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--task", "magic"], ["'magic'", "single", "headings"]),
        (["--strategy", "magic"], ["'magic'", "apb"]),
        (["--samples", "0"], ["Samples", "at least 1"]),
        (["--length", "9999"], ["positions", "4096"]),
        (["--blocks", "4000"], ["4000 blocks"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_evaluations_that_cannot_be_done(cli: Cli, checkpoint: Path, options: list[str], fragments: list[str]) -> None:
    """What cannot be evaluated is refused before or as soon as it shows: status 2, nothing on stdout."""
    defaults = {"--task": "single", "--length": "2000", "--samples": "1", "--model": str(checkpoint), "--device": "cpu"}
    given = {**defaults, **dict([options])}
    done = cli("eval", "synthetic", *(part for pair in given.items() for part in pair))
    assert (done.status, done.out) == (2, "")
    assert "Traceback" not in done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("apb: ")
    assert all(fragment in last for fragment in fragments), done.err


def test_lengths_are_checked_before_anything_is_answered(cli: Cli, checkpoint: Path, monkeypatch) -> None:
    """A length that the model cannot read is refused at once, not after the shorter ones, nor after it was made."""
    monkeypatch.setattr(apb.Engine, "from_pretrained", None)
    for suite in ("synthetic", "fidelity"):
        given = ("eval", suite, "--task", "single", "--model", checkpoint, "--length", 2000, "--length")
        cli(*given, 10**9).refused("positions", "4096", "at most")
        cli(*given, 20).refused("20 tokens is too short")


def test_doctor_json(cli: Cli) -> None:
    """The machine, every back-end with whether it is used and why, and the ways ranks can talk."""
    report = cli("doctor", "--json").json
    assert set(report) == {"machine", "backends", "fusing", "communication", "extras", "model"}
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["cores"] == os.cpu_count()
    cpu = [row for row in report["backends"] if row["device"] == "cpu"]
    assert {row["dtype"] for row in cpu} == {"float32", "bfloat16"}
    for dtype in ("float32", "bfloat16"):
        assert [row["backend"] for row in cpu if row["dtype"] == dtype and row["used"]] == ["torch"]
    assert all(row["why"] for row in report["backends"] + report["fusing"] + report["communication"])
    assert {row["name"]: row["usable"] for row in report["communication"]}["gloo"] is True
    assert report["fusing"][0]["usable"] is False
    assert all(row["usable"] for row in report["model"]) and "positions" in {row["name"] for row in report["model"]}


def test_doctor_of_a_model(cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read says why; weights that do not fit, and packages that lack, say what to do."""

    def rows(part: str, *options: object) -> dict[str, Any]:
        return {row["name"]: row for row in cli("doctor", *options, "--json").json[part]}

    read = rows("model", "--model", checkpoint, "--ranks", 2)
    tokens = int(read["longest document"]["why"].split()[0].replace(",", ""))
    assert tokens > 100_000 and "2 ranks" in read["longest document"]["why"]
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert not rows("model", "--model", tmp_path)["model"]["usable"]
    cli("doctor", "--model", tmp_path / "nowhere").refused("does not exist")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 200_000}))
    small = rows("model", "--model", checkpoint)["weights"]
    assert not small["usable"] and "--tensor-parallel" in small["why"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else True)
    assert "pip install 'apb-llm[adapters]'" in rows("extras")["adapters"]["why"]


def test_doctor_as_tables(cli: Cli) -> None:
    """Without --json it is for people to read."""
    done = cli("doctor")
    assert done.status == 0
    for word in ("processor", "Attention back-ends", "reference", "gloo"):
        assert word in done.out


@pytest.mark.parametrize("arguments", [[], ["frobnicate"]])
def test_no_such_command(cli: Cli, arguments: list[str]) -> None:
    """No command, or an unknown one, is wrong input."""
    cli(*arguments).refused("apb --help")


# --- real processes ------------------------------------------------------------------------------------------------


def test_a_process_that_answers(checkpoint: Path, document: Path) -> None:
    """A real process: document through a pipe, the JSON alone on stdout, status 0."""
    options = (
        "--query",
        "Who?",
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--blocks",
        4,
        "--json",
        "--max-new-tokens",
        5,
    )
    done = started("generate", "--document", "-", *options, input=TEXT.encode())
    assert kinds(done.json) == FIELDS
    assert "Traceback" not in done.err


def test_bench_attention(cli: Cli, tmp_path: Path) -> None:
    """One row a shape and kernel, on stdout and in the file; a shape that makes no sense is refused."""
    options = ("bench", "attention", "--device", "cpu", "--repeat", "1", "--kernel", "torch, two calls")
    file = tmp_path / "figures.json"
    report = cli(*options, "--shape", "4/2,64,40,9,7", "--out", file, "--json").json
    assert report == json.loads(file.read_text())
    (row,) = report["rows"]
    assert (row["shape"], row["kernel"], row["note"]) == ("4/2,64,40,9,7", "torch, two calls", None)
    assert row["error"] < 1e-5
    cli(*options, "--shape", "4/3,64,40,9,7").refused("multiple of the KV heads", "4/3")


def test_a_process_that_refuses(checkpoint: Path) -> None:
    """A real process: status 2, one line on stderr, no traceback, nothing on stdout."""
    options = ("--query", "Who?", "--model", checkpoint)
    started("generate", "--document", "/nowhere", *options).refused("/nowhere")


def test_help_needs_no_torch() -> None:
    """`apb --help` is there at once: torch and transformers are imported only by a command that runs."""
    program = (
        "import sys, apb.cli.main as main; sys.argv = ['apb', '--help']; status = main.run(main.app); "
        "assert status == 0, status; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    for command in ("generate", "plan", "doctor"):
        assert command in done.stdout.decode()


def test_the_version_and_completion() -> None:
    """What shells ask for is answered in a process of its own, without torch."""
    assert started("--version").out == f"apb {apb.__version__}\n"
    asking = {"COMP_WORDS": "apb gen", "COMP_CWORD": "1", "_APB_COMPLETE": "complete_bash"}
    assert started(env=os.environ | asking).out == "generate\n"


def test_demo(cli: Cli, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both strategies on a generated text, whose answer is checked, or on one's own."""
    monkeypatch.setattr(demo, "DOCUMENT_TOKENS", 2000)
    done = cli("demo", "--out", tmp_path / "demo.json")
    written = json.loads((tmp_path / "demo.json").read_text())
    assert done.status == 0 and f"The document says {written['expected']}: apb's answer is right." in done.out
    assert [result["strategy"] for result in written["results"]] == ["apb", "full"]
    full, fast = demo.bars(*written["results"])
    assert f"{full}\n{fast}\n" in done.out
    assert full.endswith(" s   exact") and fast.endswith(" blocks, the same answer")
    other = {**written["results"][0], "text": " another"}
    assert demo.bars(other, written["results"][1])[1].endswith(f"answers {written['expected']!r}")
    own = cli("demo", "--document", document, "--query", "Who?")
    assert own.status == 0 and "document.txt, " in own.out and "The document says" not in own.out
    assert "so short a text is not cut, the same answer" in own.out
    cli("demo", "--document", document).refused("--query")
    for place, reason in ((tmp_path, "it is a folder"), (tmp_path / "no" / "demo.json", "there is no folder")):
        cli("demo", "--out", place).refused("cannot be written", reason)


def test_interrupted_within_an_import(tmp_path: Path) -> None:
    """Ctrl-C while a library is loaded that takes it for a missing module: status 130 and one word all the same."""
    (tmp_path / "swallows.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(20)\n"
        "except KeyboardInterrupt:\n    raise ModuleNotFoundError('no such module')\n"
    )
    program = (
        # In the background of a script Ctrl-C is ignored, and so it would be here.
        "import signal, sys, typer, apb.cli.main as main\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "app = typer.Typer()\n@app.command()\ndef go() -> None:\n    import swallows\n"
        f"sys.path.append({str(tmp_path)!r}); sys.argv = ['apb']; sys.exit(main.run(app))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, b"apb: interrupted\n")
    (tmp_path / "swallows.py").rename(tmp_path / "typer.py")  # among the first imports of the commands themselves
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(tmp_path)!r}); from apb.cli.start import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, b"apb: interrupted\n")


def test_a_full_disk() -> None:
    """What cannot be written for lack of room is a sentence, and a failure."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "apb.cli.main", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    said = b"apb: The output cannot be written: No space left on device; make room, or write elsewhere.\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_libraries_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """Also those that are imported later: what torchao says while transformers imports it, if it is installed."""
    try:
        silence()
        logging.getLogger("torchao").error("Failed to load _C.so")
        for module in ("torch.utils._pytree", "torchao.quantization"):
            warnings.warn_explicit("KernelPreference is registered", UserWarning, "_pytree.py", 1, module=module)
    finally:
        logging.disable(logging.NOTSET)
    assert capfd.readouterr() == ("", "")


def test_a_reader_that_goes_away(checkpoint: Path, document: Path) -> None:
    """A closed pipe behind us (head, less) is no error of ours: no traceback, status 0."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "apb.cli.main", "doctor", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
