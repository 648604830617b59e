"""Answers kept and compared: files that runs resume from, intervals, paired differences."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import apb
from answers import record, run_of
from apb import answering
from apb.compressors import Random, Recent
from apb.decoding import Dense, Pages, Retrieval, Squeezed
from apb.distributed.collectives import Group
from apb.distributed.mesh import Mesh
from apb.errors import InputError
from apb.evaluation.items import Item
from apb.evaluation.records import Record, Store, model_name, read_records, write_records
from apb.evaluation.report import score
from apb.evaluation.runner import Runner
from apb.evaluation.settings import Setting, settings
from apb.evaluation.statistics import compare, difference, interval
from apb.evaluation.summary import summarize
from apb.methods import APB, option
from apb.passes import prefill
from apb.session import Session
from command_line import Cli
from together import together


def test_interval_is_wilsons() -> None:
    """Textbook cases: 8 of 10; all of 100; none of 20; symmetric."""
    assert interval(80, 10) == pytest.approx((49.02, 94.33), abs=0.01)
    assert interval(100, 100) == pytest.approx((96.30, 100), abs=0.01)
    assert interval(0, 20) == pytest.approx((0, 16.11), abs=0.01)
    low, high = interval(30, 50)
    assert interval(70, 50) == pytest.approx((100 - high, 100 - low))


def test_differences_are_paired_and_averaged_over_tasks() -> None:
    """Means of tasks count alike however many samples they have; samples that one side lacks do not count."""
    full = run_of("full", {"a": [100, 100], "b": [100] * 8})
    star = run_of("star", {"a": [100, 0, 0], "b": [100] * 6 + [0] * 2})
    found = difference(star, full)
    assert found is not None
    assert (found.tasks, found.samples, found.differing) == (2, 10, 3)
    assert found.difference == pytest.approx((-50 - 25) / 2)
    assert found.interval[0] < found.difference < found.interval[1] <= 0
    assert difference(star, full) == found
    assert difference(run_of("star", {"c": [1]}), full) is None


def test_the_bootstraps_interval_is_that_of_the_normal_distribution_where_that_holds() -> None:
    """400 samples, half of them lost: -50 plus or minus 1.96 * 50 / 20; of two such tasks that over the root of 2."""
    full = run_of("full", {"a": [100] * 400, "b": [100] * 400})
    half = run_of("star", {"a": [100, 0] * 200, "b": [100, 0] * 200})
    for tasks, wanted in (("a", (-54.9, -45.1)), ("ab", (-53.46, -46.54))):
        found = difference([one for one in half if one.task in tasks], full)
        assert found is not None
        assert found.interval == pytest.approx(wanted, abs=0.6)
    same = difference(run_of("star", {"a": [100] * 400}), full)
    assert same is not None
    assert (same.difference, same.interval, same.differing) == (0, (0, 0), 0)


def test_comparison_is_with_full_attention_wherever_it_stands() -> None:
    records = run_of("star", {"a": [0, 100]}) + run_of("full", {"a": [100, 100]})
    (row,) = compare(records)
    assert (row["baseline"], row["reading"], row["difference"]) == ("full", "star", -50)
    assert json.loads(json.dumps(row))["samples"] == 2
    assert compare(run_of("star", {"a": [1]})) == []


def test_settings_that_differ() -> None:
    """Blocks count where a strategy cuts, compressors and heads where it passes."""
    assert settings(["full", "star", "apb"], ["query", "recent"], blocks=[4, 8], passing_length=9) == [
        Setting.of("full"),
        Setting.of("star", blocks=4),
        Setting.of("star", blocks=8),
        *(Setting.of("apb", name, blocks=n, passing_length=9) for n in (4, 8) for name in ("query", "recent")),
    ]
    assert settings(["full"], ["query"], blocks=[4], anchor_length=9, passing_length=9) == [Setting.of("full")]
    assert settings(["star"], blocks=[4], anchor_length=9, passing_length=9) == [
        Setting.of("star", blocks=4, anchor_length=9)
    ]
    methods = [Dense(), Pages(0.2)]
    assert settings(["full", "star"], decodings=methods, blocks=[4]) == [
        replace(Setting.of(name, **blocks), decoding=method)
        for name, blocks in (("full", {}), ("star", {"blocks": 4}))
        for method in methods
    ]
    assert settings(["apb"], heads="h.pt") == [Setting.of("apb", "retaining", heads="h.pt")]
    with pytest.raises(InputError, match="Unknown strategy"):
        settings(["magic"])


def test_records_tell_objects_apart_by_all_that_they_were_made_with() -> None:
    """A field that is no option counts too, and an option of the compressor whose name the strategy's has as well:
    else the answers of one reading would be taken for those of another."""

    @dataclass(frozen=True)
    class Shifted(Recent):
        name: ClassVar[str] = "shifted"
        blocks: int = option(1, "Blocks to shift by.")

    method = APB(blocks=4)
    made = [Random(1), Random(2), Random(), Shifted(2), Shifted(3)]
    asked = [Setting(method, compressor).asked for compressor in made]
    assert asked == [
        {"strategy": "apb", "blocks": 4, "compressor": "random", "seed": 1},
        {"strategy": "apb", "blocks": 4, "compressor": "random", "seed": 2},
        {"strategy": "apb", "blocks": 4, "compressor": "random"},
        {"strategy": "apb", "blocks": 4, "compressor": "shifted", "shifted blocks": 2},
        {"strategy": "apb", "blocks": 4, "compressor": "shifted", "shifted blocks": 3},
    ]


def test_readings_have_names() -> None:
    asked = {"strategy": "apb", "compressor": "query", "blocks": 8}
    assert record(strategy="apb", asked=asked).reading_name == "apb, query, 8 blocks"
    bare = record(strategy="apb", asked=asked | {"anchor_length": 0, "passing_length": 0}, heads="h 1f", ranks=2)
    assert bare.reading_name == "apb, 8 blocks, no anchor, no passing, 2 ranks"
    asked = {"strategy": "minference", "vertical_size": 0.1, "decode": "nearest", "last": 5}
    assert record(strategy="minference", asked=asked).reading_name == (
        "minference, vertical size 0.1, decode nearest, last 5"
    )


def test_a_reading_is_one_row_whatever_the_plan_chose() -> None:
    """Blocks that were left open vary with the document, and a sample that fails has no plan: neither is a reading
    of its own. A failed sample counts as 0, but it took no time."""
    asked = {"strategy": "apb", "compressor": "query"}
    plans: list[dict[str, Any]] = [
        {"error": "It does not fit.", "score": 0.0, "prefill_s": 0.0},
        {"blocks": 16, "compressor": "query", "passing_length": 255, "prefill_s": 3.0},
        {"blocks": 1, "prefill_s": 1.0},
    ]
    records = [record("t", number, strategy="apb", asked=asked, **plan) for number, plan in enumerate(plans)]
    (table,) = summarize(records).tables
    assert list(table.cells) == ["apb, query"]
    found = table.cells["apb, query"]["t"]
    assert (found.samples, found.failed, found.blocks, found.prefill_s) == (3, 1, 16, 2.0)
    assert found.score == pytest.approx(200 / 3)
    assert score(found, with_count=True)[1].endswith(", n 3, 1 failed")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_records_come_back(tmp_path: Path, name: str) -> None:
    records = [*run_of("apb", {"a": [1, 2]}, prediction='ü "x"\n', heads="h 1f"), record(compressor="query")]
    write_records(tmp_path / name, records)
    assert list(read_records(tmp_path / name)) == records


def test_a_store_goes_on_after_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first, second = run_of("full", {"a": [1, 2]})
    store = Store(path)
    store.add(first)
    assert list(read_records(path)) == [first]  # before it is closed: a run may end at any moment
    store.close()
    with path.open("a") as file:
        file.write(second.line()[:50])
    store = Store(path)
    assert store.get(first.key) == first
    assert store.get(second.key) is None
    store.add(second)
    store.close()
    assert list(read_records(path)) == [first, second]
    path.write_text("{}\n" + first.line())
    with pytest.raises(InputError, match="Line 1 of"):
        Store(path)


def test_a_line_may_be_cut_anywhere(tmp_path: Path) -> None:
    """Also within a character of several bytes; what comes next begins a line of its own."""
    path = tmp_path / "a.jsonl"
    first, second, third = run_of("full", {"a": [1, 2, 3]}, prediction="é漢😀\u2028\x85")
    lines = [record.line().encode() for record in (first, second)]
    for cut in range(len(lines[1])):
        path.write_bytes(lines[0] + lines[1][:cut])
        whole = cut == len(lines[1]) - 1  # only the line break is missing
        assert list(read_records(path)) == [first, second][: 1 + whole]
        store = Store(path)
        store.add(third)
        store.close()
        assert list(read_records(path)) == [first, second, third] if whole else [first, third]
    with pytest.raises(InputError, match="cannot be written"):
        Store(tmp_path)


APPEND = """
import sys
from dataclasses import replace
from pathlib import Path
from apb.evaluation.records import Store, read_records

blank, path, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
(record,) = read_records(blank)
store = Store(path)
print("ready", flush=True)
sys.stdin.readline()
for number in range(300):
    for sample in (f"both {number}", f"{name} {number}"):
        store.add(replace(record, sample=sample, prediction=name * 200))
print(len(list(store)))
"""


def test_two_runs_append_to_one_file(tmp_path: Path) -> None:
    """Nothing is lost and nothing stands twice, though a run before them left a line half written; the last one to end
    knows all that the file holds."""
    blank, path = tmp_path / "blank.jsonl", tmp_path / "a.jsonl"
    write_records(blank, [record()])
    path.write_bytes(record(sample="before").line().encode() + b'{"suite": "cut')
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, "-c", APPEND, blank, path, name], **pipes) for name in "xy"]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    told = [int(run.communicate()[0]) for run in runs]
    kept = list(read_records(path))
    samples = [each.sample for each in kept]
    assert len(samples) == len(set(samples)) == 1 + 3 * 300
    assert {each.prediction for each in kept if each.sample != "before"} == {"x" * 200, "y" * 200}
    assert max(told) == len(kept)
    assert Store(path).get(kept[-1].key) == kept[-1]


def test_a_run_sees_what_another_has_answered(tmp_path: Path) -> None:
    """So that it is not answered twice; whichever came first stays."""
    first, second = (Store(tmp_path / "a.jsonl") for _ in range(2))
    one, other = record(sample="1"), record(sample="1", seconds=9.0)
    assert second.get(one.key) is None
    first.add(one)
    assert second.get(one.key) == one
    second.add(other)
    assert list(read_records(tmp_path / "a.jsonl")) == [one] == list(second)


@pytest.mark.parametrize(
    "change", [{"answers": None}, {"answers": [1]}, {"asked": []}, {"asked": {"blocks": [1]}}, {"score": "x"}]
)
def test_fields_of_another_kind_are_no_record(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(json.loads(record().line()) | change) + "\n")
    with pytest.raises(InputError, match=f"Line 1 of .* the field '{next(iter(change))}' cannot be"):
        Store(path)


def test_what_tells_samples_and_readings_apart() -> None:
    """Other text, model, dtype, options, heads or ranks are other answers; times and devices are not."""
    keys = {
        record(**change).key
        for change in (
            {},
            {"prompt": "x"},
            {"model": "x"},
            {"dtype": "bfloat16"},
            {"asked": {"strategy": "full", "blocks": 2}},
            {"heads": "x"},
            {"ranks": 2},
        )
    }
    assert len(keys) == 7
    assert record(seconds=9.0, device="x", anchor_length=5, processes=4).key in keys


def test_model_names_follow_weights(checkpoint: Path) -> None:
    model = apb.Engine.from_pretrained(checkpoint, device="cpu").model
    name = model_name(model, str(checkpoint))
    assert name.startswith(checkpoint.name + " ")
    assert model_name(model, "owner/id").split() == ["owner/id", name.split()[1]]
    values = next(model.parameters()).data[0]
    for place in (0, 63):  # of the first 64 values of a parameter each counts
        before = values[place].clone()
        values[place] += 1
        assert model_name(model, str(checkpoint)) != name
        values[place] = before
        assert model_name(model, str(checkpoint)) == name


def test_a_record_says_how_its_answer_came_about(checkpoint: Path) -> None:
    """By the plan, with what was asked and how many runs shared the machine; nobody answers without a tokenizer."""
    engine = apb.Engine.from_pretrained(checkpoint, device="cpu")
    item = Item("own", "notes", 64, "7", "many words " * 9, "Which?", ("yes",), "words", 2)
    ways = [Setting.of("full"), Setting.of("apb", "recent", blocks=3, passing_length=2)]
    ((full, passing),) = Runner(engine, "small", ways, Store(), processes=5).run([item])
    assert (full.model, full.suite, full.task, full.sample, full.length) == ("small", "own", "notes", "7", 64)
    assert (full.processes, full.asked, full.exact, full.blocks) == (5, {"strategy": "full"}, True, 1)
    assert (full.compressor, full.passing_length) == (None, 0)
    assert (passing.compressor, passing.blocks, passing.passing_length, passing.exact) == ("recent", 3, 2, False)
    assert passing.asked == {"strategy": "apb", "blocks": 3, "compressor": "recent", "passing_length": 2}
    assert full.prompt == passing.prompt
    assert full.prompt_tokens == len(item.prompt(engine.tokenizer))
    with pytest.raises(InputError, match="needs a tokenizer"):
        Runner(apb.Engine.from_model(engine.model), "small", ways, Store())


def test_decode_methods_answer_from_one_reading(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as if it had read for itself, and the record says what its tokens attended to; exact ones stay so."""
    engine = apb.Engine.from_pretrained(checkpoint, device="cpu")
    item = Item("own", "notes", 600, "7", "many words are here " * 25, "Which?", ("yes",), "words", 6)
    methods = [Dense(), Pages(0.2, page_size=4), Squeezed(1.0), Retrieval(0.2), Dense()]
    ways = settings(["full", "apb"], decodings=methods, blocks=[3], question_first=True)
    assert len(ways) == 8
    alone = [next(Runner(engine, "small", [way], Store()).run([item]))[0] for way in ways]
    read = []
    reading = prefill.read
    monkeypatch.setattr(prefill, "read", lambda *given, **more: (read.append(1), reading(*given, **more))[1])
    (together,) = Runner(engine, "small", ways, Store(), batch_size=3).run(
        [item]
    )  # they are written alone all the same
    assert len(read) == 2
    for mine, wanted in zip(together, alone, strict=True):
        assert replace(mine, seconds=0, prefill_s=0) == replace(wanted, seconds=0, prefill_s=0)
    assert [each.prefill_s for each in together] == [together[0].prefill_s] * 4 + [together[4].prefill_s] * 4
    told = [(each.decode["method"], each.decode["exact"]) for each in together[:4]]
    assert told == [("exact", True), ("pages", False), ("squeezed", True), ("retrieval", False)]
    assert [each.exact for each in together] == [True, False, True, False, *[False] * 4]
    assert together[1].decode["share"] < 0.5


@pytest.mark.parametrize("size", [1, 2])
def test_answers_are_written_together(size: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In passes of a token for each, whatever their lengths and readings, they are what each is alone; fewer where no
    more caches fit. What cannot be read is a record with its error."""
    items = [
        Item("own", "notes", 600, str(number), "many words are here " * count, "Which?", ("yes",), "words", budget)
        for number, (count, budget) in enumerate(((25, 6), (4, 3), (12, 9)))
    ]
    items.insert(1, replace(items[0], sample="none", max_new_tokens=10**6))
    ways = [Setting.of("full"), Setting.of("star", blocks=3), Setting.of("apb", "recent", blocks=3)]
    read, passes = answering.extend_together, []

    def counted(sessions: Any, tokens: Any, rows: int) -> None:
        passes.append((len(sessions), rows))
        read(sessions, tokens, rows)

    monkeypatch.setattr(answering, "extend_together", counted)

    # One after the other: transformers changes what is global while it loads.
    loaded = [apb.Engine.from_pretrained(checkpoint, device="cpu") for _ in range(size)]

    def answered(group: Any, batch_size: int) -> list[list[Record]]:
        mine = loaded[group.rank]
        engine = apb.Engine.from_model(mine.model, mine.tokenizer, mesh=Mesh.of(group))
        return list(Runner(engine, "small", ways, Store(), batch_size=batch_size).run(items))

    def told(rows: list[list[Record]]) -> list[list[Record]]:
        return [[replace(each, seconds=0, prefill_s=0, processes=0, ranks=1) for each in row] for row in rows]

    alone = together(lambda group: answered(group, 1), 1)[0]
    assert [record.error is None for row in alone for record in row] == [*[True] * 3, *[False] * 3, *[True] * 6]
    assert passes == []
    rows, *others = together(lambda group: answered(group, 5), size)
    assert told(rows) == told(alone)
    assert others == [[[]] * 4] * (size - 1)
    assert [{record.processes for record in row} for row in rows] == [{5}, {1}, {5, 4}, {4}]
    assert all(record.seconds > record.prefill_s > 0 for row in rows for record in row if record.error is None)
    assert passes[0] == (5, 5)  # two of the third item's, whose first answer opens the next pass
    assert (4, 5) in passes
    passes.clear()
    monkeypatch.setattr(apb.Engine, "demand", lambda *_: (1, 1, 3))
    assert told(together(lambda group: answered(group, 5), size)[0]) == told(alone)
    assert max(passes) == (3, 5)
    with pytest.raises(InputError, match="Batch size must be"):
        answered(Group(), 0)


def test_an_answer_that_fails_ends_no_other(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are not finite, settings that cannot be followed, memory that is full: of one answer, while others
    are written or are to be, which free theirs. No session outlives its batch, nor is kept by an error."""
    engine = apb.Engine.from_pretrained(checkpoint, device="cpu")
    items = [Item("own", "notes", 600, str(n), "word " * (40 + n), "Which?", ("yes",), "words", 5) for n in range(4)]
    alive: list[weakref.ref[Session]] = []
    prefill, extend, read = apb.Engine.prefill, Session.extend, answering.extend_together

    def kept(*given: Any, **more: Any) -> Session:
        session = prefill(*given, **more)
        alive.append(weakref.ref(session))
        return session

    def answered(batch_size: int) -> list[Record]:
        alive.clear()
        gc.disable()
        try:
            full = Runner(engine, "small", [Setting.of("full")], Store(), batch_size=batch_size)
            found = [record for row in full.run(items) for record in row]
            assert all(session() is None for session in alive)
        finally:
            gc.enable()
        return found

    monkeypatch.setattr(apb.Engine, "prefill", kept)
    wanted = [record.prediction for record in answered(1)]

    def spoiled(sessions: Any, tokens: Any, rows: int) -> None:
        read(sessions, tokens, rows)
        if len(sessions) == 3:
            sessions[1].logits = torch.full_like(sessions[1].logits, torch.nan)

    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    def too_much_for_one(session: Session, tokens: Any) -> Any:
        return too_much() if len(session.token_ids) == longest + 2 else extend(session, tokens)

    def beside_others(*given: Any, **more: Any) -> Session:
        return too_much() if sum(session() is not None for session in alive) > 1 else kept(*given, **more)

    longest = max(len(item.prompt(engine.tokenizer)) for item in items)
    for place, name, stands_in, failing, why in (
        (answering, "extend_together", spoiled, [1], "NaN or infinite"),
        (answering, "extend_together", too_much, [], ""),
        (Session, "extend", too_much_for_one, [3], "memory"),
        (apb.Engine, "prefill", beside_others, [], ""),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stands_in)
            if name == "extend":
                patch.setattr(answering, "extend_together", too_much)
            found = answered(3)
        assert [n for n, record in enumerate(found) if record.error is not None] == failing
        assert all(why in str(found[n].error) for n in failing)
        assert [r.prediction for r in found if r.error is None] == [w for n, w in enumerate(wanted) if n not in failing]
    engine.model.generation_config.repetition_penalty = -1.0
    for batch_size in (1, 3):
        assert all("cannot be followed" in str(record.error) for record in answered(batch_size))


def test_decode_methods_of_a_command(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Options go to the methods that have them, several shares make several readings; what none has is refused."""
    place = ("--model", checkpoint, "--device", "cpu", "--json")
    given = ("eval", "synthetic", "--task", "single", "--length", 800, "--samples", 1, "--strategy", "full", *place)
    ways = ("--decode", "exact", "--decode", "pages", "--share", 0.1, "--share", 0.3, "--page-size", 8)
    cells = cli(*given, *ways, "--out", tmp_path / "a.jsonl").json["results"]
    assert [each["decode"] for each in cells] == ["exact", "pages", "pages"]
    assert cells[0]["share"] == 1 > cells[2]["share"] > cells[1]["share"]
    records = list(read_records(tmp_path / "a.jsonl"))
    names = ["full", *(f"full, decode pages{share}, page size 8" for share in (", share 0.1", ", share 0.3"))]
    assert [each.reading_name.replace("page size 8, share 0.3", "share 0.3, page size 8") for each in records] == names
    cli(*given, "--decode", "squeezed", "--page-size", 8).refused("'squeezed' has no option 'page_size'")
    cli(*given, "--share", 0.3).refused("'exact' has no option 'share'")
    cli("eval", "fidelity", *given[2:-1], "--decode", "pages").refused("apb eval decode")


def test_a_run_is_resumed(cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are in the file are not given again; the result is that of a run in one go, of any batch size."""
    path, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    given = ["eval", "synthetic", "--task", "single", "--length", 800, "--strategy", "full", "--strategy", "star"]
    place = ["--blocks", 3, "--model", checkpoint, "--device", "cpu", "--json"]
    cli(*given, *place, "--samples", 2, "--out", path)
    before = path.read_text()
    answers = []
    prefill = apb.Engine.prefill
    monkeypatch.setattr(apb.Engine, "prefill", lambda *a, **k: answers.append(1) or prefill(*a, **k))
    resumed = cli(*given, *place, "--samples", 3, "--out", path, "--batch-size", 4).json
    assert len(answers) == 2
    assert [record.processes for record in read_records(path)] == [1] * 4 + [2] * 2
    assert "--batch-size must be at least 1" in cli(*given, *place, "--batch-size", 0).err
    assert path.read_text().startswith(before)
    fresh = cli(*given, *place, "--samples", 3, "--out", whole).json
    assert len(answers) == 8

    def told(report: Any) -> Any:
        cells = [{**cell, "prefill_s": None} for cell in report["results"]]
        return cells, report["differences"]

    assert told(resumed) == told(fresh)
    assert [r.prediction for r in read_records(path)] == [r.prediction for r in read_records(whole)]
    cli(*given, *place, "--samples", 3, "--out", path, "--dtype", "bfloat16")
    assert len(answers) == 14


def test_summary_counts_a_sample_once_and_times_only_undisturbed_runs() -> None:
    records = run_of("full", {"a": [100, 0]}) + run_of("full", {"a": [0, 0]}, processes=8, prefill_s=99.0)
    records += run_of("star", {"a": [100, 0], "b": [50]}, processes=8)
    summary = summarize(records)
    (table,) = summary.tables
    assert (summary.answers, table.tasks, [one.baseline for one in table.comparisons]) == (5, ["a", "b"], ["full"])
    assert table.cells["full"]["a"].score == 50
    assert table.average("full") is None
    assert table.average("star") == 50
    (speed,) = summary.speeds
    assert (speed.reading, speed.tokens_per_s, speed.samples) == ("full", 4000, 2)


def test_speed_is_the_median_of_samples() -> None:
    records = [record(sample=number, prefill_s=seconds) for number, seconds in enumerate((8.0, 1.0, 2.0))]
    assert [speed.tokens_per_s for speed in summarize(records).speeds] == [2000]
