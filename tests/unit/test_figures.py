"""Figures in README and docs are those of committed results."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from apb.cli import demo
from apb.evaluation.records import read_records
from apb.evaluation.statistics import bootstrap, difference
from apb.hf.counting import model_shape
from apb.hf.random_weights import shape_config
from apb.methods import APB
from apb.planning.cost import Ceilings, predict
from apb.planning.plan import Plan

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def page(name: str) -> str:
    """A page's text, with single spaces."""
    return re.sub(r"\s+", " ", (ROOT / name).read_text(encoding="utf-8"))


def table(name: str, head: str) -> list[str]:
    """The rows of a page's table that begins so."""
    return (ROOT / name).read_text(encoding="utf-8").split(head)[1].split("\n\n")[0].splitlines()[2:]


def result(name: str) -> Any:
    """A result file."""
    return json.loads((RESULTS / name).read_text())


def prefill(name: str, strategy: str, length: int) -> dict[str, Any]:
    """A row of a file of `apb bench prefill`."""
    return next(row for row in result(name)["rows"] if (row["strategy"], row["length"]) == (strategy, length))


def test_the_demo() -> None:
    """README shows what the demo printed."""
    for line in demo.bars(*result("demo_cpu.json")["results"]):
        assert f"    {line}\n" in (ROOT / "README.md").read_text()


def test_what_the_picture_says_in_words() -> None:
    """The text for those who do not see README's picture."""
    full, apb = (prefill("prefill_bf16_h200.json", name, 131_072)["seconds"] for name in ("full", "apb"))
    ring, both = (prefill("prefill_two_merged_h200.json", name, 131_072)["seconds"] for name in ("ring", "apb"))
    star = prefill("prefill_two_h200.json", "star", 131_072)["seconds"]
    parts = [row for row in result("vllm_hand_over_h200.json")["parts"] if row.get("length") == 131_072]
    alone, stored = (
        [median(row["first_token_s"]) for row in parts if row["part"] == "answer" and row["store"] is kept]
        for kept in (False, True)
    )
    fp8 = prefill("prefill_fp8_h200.json", "apb", 131_072)["seconds"]
    (row,) = result("follow_up_h200.json")["rows"]
    near, far = row["device"]["first_token_s"], row["disk"]["page_cache"]["first_token_s"]
    said = (
        f"vLLM reads them in {alone[0]:.1f} seconds, full attention in {full:.1f}, apb in {apb:.1f}, in fp8 in "
        f"{fp8:.1f}; on two vLLM in {alone[1]:.1f}, ring attention in {ring:.1f}, Star in {star:.1f}, "
        f"apb in {both:.1f}; the next question about them takes"
    )
    assert f"{said} {near:.2f} to {far:.2f} seconds" in page("README.md")
    assert f"vLLM answers from what it has read in {stored[0]:.1f} on one" in page("README.md")


def test_accuracy_of_a_real_model() -> None:
    """README's table: each row's mean and intervals stand in one row of the report, in this order."""
    report = (RESULTS / "real_models.md").read_text().splitlines()
    told = table("README.md", "| | mean score |")
    assert len(told) == 6
    for row in told:
        figures = re.findall(r"[+-]?\d+\.\d", "|".join(row.split("|")[2:5]))
        held = [re.findall(r"[+-]?\d+\.\d", line) for line in report]
        assert figures in held, row


def section(model: str, tokens: str) -> dict[str, list[str]]:
    """The first table of a model and length in the report on real models: a reading's cells by its name."""
    sections = (RESULTS / "real_models.md").read_text().split("\n## ")
    (found,) = (
        each for each in sections if each.startswith(model.lower()) and f"{tokens} tokens" in each.splitlines()[0]
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.split("\n\n")[1].splitlines()]
    return {name: cells for name, *cells in rows}


def test_default_plans_of_real_models() -> None:
    """The table of docs/plan.md, of long texts by the default plan, and README's sentence on it."""
    lines = table("docs/plan.md", "| | tokens |")
    model, below = "", []
    for line in lines:
        name, tokens, full, first, ours, to_full, to_first = (cell.strip() for cell in line.split("|")[1:-1])
        model = name.replace("Gemma-3", "Gemma3") or model
        rows = section(model, tokens)
        length, blocks = int(tokens.replace(",", "")), int(ours.split()[0])
        assert Plan.of_method(APB(), 0, length - 300, 64).blocks == (blocks if length > 8192 else 1)
        assert [full, first] == [rows["full"][0], rows["full, question first"][0]]
        score, *differences = rows[f"apb, query-edge, {blocks} blocks"]
        assert [ours, to_full, to_first] == [f"{blocks} blocks: {score}", *differences]
        assert float(to_full.split()[0]) > 0  # the mean: the intervals of some reach below
        if float(to_first.split()[3].strip(",")) < 0:  # even the interval's upper end
            below.append(f"{model} at {length // 1024}K")
    assert below == ["SmolLM2-135M at 4K"]
    assert "in one case of eight: SmolLM2-135M at 4K" in page("README.md")
    assert len(lines) == 8


def test_what_is_passed_on_by_a_real_model() -> None:
    """The table of docs/compressors.md, from the answers."""
    records = [r for r in read_records(RESULTS / "real_qwen2.5-coder-0.5b.jsonl.gz") if r.length == 16384]
    records = [r for r in records if "ask_after" not in r.asked and r.heads is None]
    usual = {"strategy": "apb", "blocks": 16, "compressor": "query-edge"}
    default = [r for r in records if r.asked == usual]
    assert {r.passing_length for r in default} <= set(range(120, 129))
    told = table("docs/compressors.md", "| | mean score | to the default |")
    changes = [{}, *({"passing_length": n} for n in (0, 64, 256, 512)), *({"anchor_length": n} for n in (512, 1024))]
    changes += [{"compressor": name} for name in ("query", "recent", "random")]
    assert len(told) == len(changes)
    for line, change in zip(told, changes, strict=True):
        found = [r for r in records if r.asked == usual | change]
        beside = difference(found, default)
        assert beside is not None and beside.samples == 475
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[1] == f"{fmean(r.score for r in found):.1f}", line
        low, high = beside.interval
        assert cells[2] == ("" if not change else f"{beside.difference:+.1f} ({low:+.1f} to {high:+.1f})"), line


def test_prefill_predicted_and_measured() -> None:
    """The table of docs/benchmarks.md."""
    lines = (ROOT / "docs/benchmarks.md").read_text().splitlines()
    for length in (65_536, 131_072, 262_144):
        for strategy in ("full", "apb"):
            row = prefill(f"prefill_{length}_h200.json", strategy, length)
            told = next(line for line in lines if line.startswith(f"| {length:,} | `{strategy}` |"))
            cells = [cell.strip() for cell in told.split("|")[3:-1]]
            gib = [row["predicted_peak_bytes"] / 2**30, row["peak_bytes"] / 2**30]
            seconds = [row["predicted_seconds"], row["seconds"]]
            assert [float(cell) for cell in cells[:2]] == pytest.approx(gib, abs=0.051)
            assert [float(cell) for cell in cells[3:5]] == pytest.approx(seconds, rel=0.005)
            assert cells[6] == f"{row['of_floor']:.0%}".replace("%", " %")


def test_follow_ups() -> None:
    """The tables of docs/documents.md, on a GPU and on a CPU."""
    text = page("docs/documents.md")
    (row,) = result("follow_up_h200.json")["rows"]
    host, disk = row["host"], row["disk"]
    seconds = f"{row['anew']['first_token_s']:.2f} | {row['device']['first_token_s']:.3f} | {host['first_token_s']:.3f}"
    rate = f"({host['bytes_per_s'] / 1e9:.0f} GB/s, {host['of_copy_rate']:.0%} of".replace("%", " %")
    later = f"{disk['page_cache']['first_token_s']:.2f} | {disk['cold']['first_token_s']:.1f}"
    assert f"{seconds} {rate}" in text and f"| {later} |" in text
    for row in result("follow_up_cpu.json")["rows"]:
        said = rf"`{row['strategy']}`[^`]* {row['anew_s']:.1f} s (anew )?and {row['first_token_s']:.2f} s"
        assert re.search(said, text), said


def test_second_requests() -> None:
    """The table of docs/benchmarks.md."""
    now, before = (result(f"second_request_{name}h200.json")["rows"][1:4] for name in ("", "before_"))
    lines = (ROOT / "docs/benchmarks.md").read_text().splitlines()
    told = [line.split("|")[2:-1] for line in lines if re.match(r"\| (first|second|third), \d+K", line)]
    for cells, row, old in zip(told, now, before, strict=True):
        known = [row["first_token_s"] * 1e3, row["replay_s"] * 1e3, row["graphs_captured"], old["first_token_s"] * 1e3]
        assert [float(cell) for cell in cells] == pytest.approx(known, abs=0.051)


def test_two_gpus() -> None:
    """The table of docs/benchmarks.md, what README says of it, and decode on GPUs that share the weights."""
    text, readme = page("docs/benchmarks.md"), page("README.md")
    for length in (32_768, 65_536, 131_072):
        full, ring, star, apb = (
            prefill("prefill_bounded_two_h200.json", name, length) for name in ("full", "ring", "star", "apb")
        )
        told = [f"{row['seconds']:.2f}" for row in (full, ring, star, apb)]
        told += [f"{row['seconds'] / apb['seconds']:.2f}x" for row in (full, ring, star)]
        assert f"| {length:,} | {' | '.join(told)} | {apb['predicted_seconds']:.2f} |" in text
    for length in (32_768, 65_536, 131_072):
        full, ring, apb = (prefill("prefill_two_merged_h200.json", name, length) for name in ("full", "ring", "apb"))
        told = [f"{row['seconds']:.2f}" for row in (full, ring, apb)]
        told += [f"{row['seconds'] / apb['seconds']:.2f}x" for row in (full, ring)]
        assert f"| {length:,} | {' | '.join(told)} | {apb['predicted_seconds']:.2f} |" in text
    ulysses, earlier, star = (
        prefill("prefill_two_h200.json", name, 131_072)["seconds"] for name in ("ulysses", "ring", "star")
    )
    assert f"{ulysses:.2f} and {earlier:.2f} s for 131,072" in text
    half, some_of_half, every, some = (row for row in result("prefill_long_two_h200.json")["rows"][2:])
    said = f"in {apb['seconds']:.1f} seconds, ring attention in {ring['seconds']:.1f}, Star in {star:.1f}"
    assert f"{said}; a million in {every['seconds']:.0f}" in readme
    said = f"`apb` {half['seconds']:.2f} s (the plan: {half['predicted_seconds']:.2f}) and {every['seconds']:.1f} s "
    assert f"{said}({every['predicted_seconds']:.1f})" in text
    said = f"{some_of_half['seconds']:.2f} s ({some_of_half['predicted_seconds']:.2f}) and {some['seconds']:.1f} s "
    assert f"{said}({some['predicted_seconds']:.1f})" in text
    assert f"{half['peak_bytes'] / 2**30:.0f} and {every['peak_bytes'] / 2**30:.0f} GiB a GPU" in text
    wider = result("prefill_million_two_h200.json")["rows"][0]
    assert f"took {wider['seconds']:.1f} s, the plan {wider['predicted_seconds']:.1f}" in text
    layer = prefill("full_layer_h200.json", "full", 524_288)["seconds"]
    assert f"takes one GPU {layer:.2f} s" in text
    assert f"so 32 of them {32 * layer:.0f} s, {32 * layer / half['seconds']:.0f} times as long" in text
    assert f"480 s, {480 / every['seconds']:.0f} times as long" in text
    plain, graph = result("decode_tensor_parallel_h200.json")["rows"]
    share = f"{graph['of_limit']:.0%}".replace("%", " %")
    said = f"{graph['seconds'] * 1e3:.2f} ms a token by CUDA graphs, {share} of what their memory allows, and"
    assert f"{said} {plain['seconds'] * 1e3:.1f} ms without graphs" in text
    plain, graph = result("decode_single_rows_h200.json")["rows"]
    assert f"One H200 takes {graph['seconds'] * 1e3:.2f} " in text
    assert f" {graph['of_limit']:.0%}".replace("%", f" %, and {plain['seconds'] * 1e3:.1f} without.") in text


def test_pages_on_a_gpu() -> None:
    """What docs/decoding.md says of a step at 128K."""
    row, text = result("decode_pages_h200.json")["rows"][1], page("docs/decoding.md")
    assert row["graph"] and row["same_tokens"] and row["length"] == 131_072
    exact = result("decode_whole_h200.json")["rows"][1]["seconds"]
    assert (
        f"{row['seconds'] * 1e3:.2f} ms a token by `pages`" in text and f"and {exact * 1e3:.2f} by exact decode" in text
    )
    share = f"{row['index_seconds'] / row['read_seconds']:.1%}".replace("%", " %")
    said = f"took {row['index_seconds']:.2f} s, {share} of reading, and {row['index_bytes'] / 1e9:.2f} GB"
    assert said in text
    pages, squeezed = (result(f"decode_{name}_512k_h200.json")["rows"][1] for name in ("pages", "squeezed"))
    assert all(row["graph"] and row["same_tokens"] and row["length"] == 524_288 for row in (pages, squeezed))
    assert f"524,288 tokens: {pages['seconds'] * 1e3:.2f} ms by `pages`" in text
    assert f"{squeezed['seconds'] * 1e3:.2f} by `squeezed`" in text
    whole = result("decode_exact_512k_h200.json")["rows"][1]["seconds"]
    times = [f"{whole / row['seconds']:.2f}x" for row in (pages, squeezed)]
    assert f"{whole * 1e3:.2f} by exact decode in an earlier run" in text and f": {times[0]} and {times[1]}." in text
    streamed = result("decode_streamed_h200.json")["rows"][0]["seconds"] * 1e3
    tenth, few = (result(f"decode_{name}_h200.json")["rows"][1] for name in ("retrieval", "retrieval_03"))
    assert all(row["graph"] and row["same_tokens"] for row in (tenth, few)) and few["share"] < 0.031
    fast = [row["seconds"] * 1e3 for row in (tenth, few)]
    assert f"{streamed:.0f} ms a token by `streamed`" in text and f"{fast[0]:.1f} by `retrieval`" in text
    assert (
        f"and {fast[1]:.1f} with 3 %" in text and f"{streamed / fast[0]:.1f}x and {streamed / fast[1]:.0f}x as" in text
    )
    assert f"pinned host memory took {few['index_seconds']:.1f} s" in text
    built = f"{squeezed['index_seconds']:.2f} s of {squeezed['read_seconds']:.0f} s"
    assert (
        f"the clusters {built}, {squeezed['index_seconds'] / squeezed['read_seconds']:.0%}".replace("%", " %") in text
    )
    rows = result("chosen_keys_h200.json")["rows"]
    told = [f"{row['seconds'] * 1e6:.0f}" for row in rows]
    told = [
        each + (f" ({row['times_exact']:.1f}x)" if "times_exact" in row else "")
        for each, row in zip(told, rows, strict=True)
    ]
    for short, long in zip(told[:4], told[4:], strict=True):
        assert f"| {short} | {long} |" in text


def test_one_gpu() -> None:
    """The table of docs/benchmarks.md, and the plan without a budget."""
    text = page("docs/benchmarks.md")
    for length in (32_768, 65_536, 131_072):
        full, apb = (prefill("prefill_bounded_h200.json", name, length) for name in ("full", "apb"))
        told = f"{full['seconds']:.2f} | {apb['seconds']:.2f} | {full['seconds'] / apb['seconds']:.2f}x"
        assert f"| {length:,} | {told} | {apb['predicted_seconds']:.2f} |" in text
    free = prefill("prefill_unbounded_h200.json", "apb", 131_072)["seconds"]
    assert f"`apb` took {free:.2f} s for 131,072 tokens" in text and f": {full['seconds'] / free:.2f}x." in text


def test_a_hybrid() -> None:
    """The table of docs/benchmarks.md, what the plan says now, and decode."""
    text, said, planned = page("docs/benchmarks.md"), [], []
    model = model_shape(shape_config("qwen3.5-9b"))
    runs = {"one GPU": "prefill_hybrid", "two": "prefill_hybrid_two"}
    runs["two, states handed on"] = "prefill_hybrid_handed_on_two"
    for number, name in runs.items():
        found = result(f"{name}_h200.json")
        rates = Ceilings(**{each: found["ceilings"][each] for each in ("linear", "attention", "link", "memory")})
        for row in found["rows"]:
            parts = [row["parts"][each] for each in ("attention", "recurrent", "communication", "mlp")]
            told = " | ".join(f"{each:.2f}" for each in (row["seconds"], *parts))
            assert f"| `{row['strategy']}`, {number} | {told} | {row['peak_bytes'] / 2**30:.1f} |" in text
            said.append(f"{row['predicted_seconds']:.2f}")
            plan = row["plan"]
            blocks = {"blocks": plan["blocks"]} if row["strategy"] == "apb" else {}
            plan = Plan.build(
                1,
                plan["document_tokens"],
                plan["query_tokens"],
                ranks=plan["ranks"],
                strategy=row["strategy"],
                **blocks,
            )
            cost = predict(plan, model, **({"most_composed": 0} if "handed on" in number else {}))
            planned.append(cost.seconds(rates, hidden=True))
            assert planned[-1] == pytest.approx(row["seconds"], rel=0.1)
    assert f"({said[0]}, {said[1]}, and handed on {said[4]} and {said[5]} s)" in text
    told = [f"{each:.2f}" for each in planned]
    assert f"It now says {', '.join(told[:3])} and {told[3]} s, and {told[4]} and {told[5]} handed on." in text
    plain, graph = result("decode_hybrid_h200.json")["rows"]
    takes = f"takes {graph['seconds'] * 1e3:.2f} ms by CUDA graphs on one H200, {graph['of_limit']:.0%}"
    assert takes.replace("%", f" % of what its memory allows, and {plain['seconds'] * 1e3:.1f} ms without") in text


def test_what_propagation_saves() -> None:
    """The table of docs/propagation.md, and the runs without a budget."""
    text = page("docs/propagation.md")
    cells: dict[int, str] = {}
    for name, lengths in (
        ("propagation_bounded", (32_768, 65_536, 131_072)),
        ("propagation_bounded_two", (32_768, 65_536, 131_072)),
        ("prefill_long_two", (524_288, 1_048_576)),
    ):
        for length in lengths:
            every, some = (row for row in result(f"{name}_h200.json")["rows"] if row["length"] == length)
            told = f"{every['seconds']:.2f} | {some['seconds']:.2f} | {some['seconds'] / every['seconds']:.2f}"
            cells[length] = f"{cells.get(length, '')} {told} | {some['predicted_seconds']:.2f} |"
    assert all(f"{told}" in text and f"| {length:,} |" in text for length, told in cells.items())
    for name in ("", "two_"):
        every, some = (row for row in result(f"propagation_dealt_{name}h200.json")["rows"] if row["length"] == 131_072)
        said = f"{every['seconds']:.2f} s with all rows and" if not name else f"{every['seconds']:.2f} s and"
        shares = f"({some['seconds'] / every['seconds']:.2f} of it; the plan: {some['predicted_seconds']:.2f};"
        assert said in text and f"{some['seconds']:.2f} s" in text and shares in text
    whole, less = (result(f"decode_{name}_h200.json")["rows"][1]["seconds"] * 1e3 for name in ("whole", "propagated"))
    assert f"{less:.2f} ms over the smaller cache instead of {whole:.2f}" in text and f"({whole / less:.2f}x;" in text


def paired(rows: list[dict[str, Any]], setting: str, otherwise: Any) -> dict[tuple[str, ...], dict[Any, float]]:
    """Scores by sample, and by what a setting was; ``otherwise`` where none was asked for."""
    scores: dict[tuple[str, ...], dict[Any, float]] = {}
    for each in rows:
        name = (each["model"], str(each["length"]), each["task"], each["sample"])
        scores.setdefault(name, {})[each["asked"].get(setting, otherwise)] = each["score"]
    return scores


def spread(values: list[float]) -> str:
    """A mean difference with its interval, over all samples."""
    low, high = bootstrap(values)
    return f"{fmean(values):+.1f} ({low:+.1f} to {high:+.1f})"


def records(name: str) -> list[dict[str, Any]]:
    """The records of a file of `apb eval`."""
    with gzip.open(RESULTS / name, "rt") as file:
        return [json.loads(line) for line in file]


def test_what_plans_cost() -> None:
    """The tables of docs/propagation.md and docs/compressors.md, and README's sentence: of each model and length as in
    the report, and of all."""
    report, readme = (RESULTS / "plans_qwen.md").read_text(), page("README.md")
    found = records("plans_qwen.jsonl.gz")
    bounded = paired([each for each in found if "propagate" not in each["asked"]], "passing_budget", None)
    lost = spread([score - by[None] for by in bounded.values() for asked, score in by.items() if asked])
    some = paired([each for each in found if "passing_budget" not in each["asked"]], "propagate", None)
    depths = {"1.5b": ("0.2@14", "0.2@16"), "0.5b": ("0.2@12", "0.2@14")}
    middle, later = (
        spread([by[depths[key[0][14:18]][which]] - by[None] for key, by in some.items()]) for which in (0, 1)
    )
    assert len(bounded) == len(some) == 456
    text = page("docs/propagation.md").split("## What it is worth")[1].split("## Whether")[0]
    all_rows = fmean(by[None] for by in some.values())
    assert f"| all 456 | {all_rows:.1f} | {middle} | {later} |" in text
    assert f"{middle.replace(' (', ' points (')[:-1]}; 456 samples)" in readme
    table = page("docs/compressors.md").split("| one for 32 tokens |")[1]
    assert f"| all 456 | {all_rows:.1f} | {lost} |" in table and f"block sees {lost[:-1]}; 456)" in readme
    for part in (text.split("| all 456")[0], table.split("| all 456")[0]):
        told = re.findall(r"[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)", part)
        assert len(told) in (4, 8) and all(each[:-1] + "," in report for each in told)


def test_which_rows_can_stay_behind() -> None:
    """The table of docs/propagation.md of depths and shares, and what it says of each model."""
    depths = {
        "1.5b": {9: "1/3 of the depth", 14: "1/2 (the default)", 16: "7/12", 21: "3/4"},
        "0.5b": {8: "1/3 of the depth", 12: "1/2 (the default)", 14: "7/12", 18: "3/4"},
    }
    text, every = page("docs/propagation.md"), records("propagation_depths.jsonl.gz")
    cells: dict[tuple[str, str], list[float]] = {}
    smaller: dict[tuple[str, str], list[float]] = {}
    few: dict[str, list[float]] = {}
    scores = paired([each for each in every if each["strategy"] == "apb"], "propagate", None)
    for (model, *_), by in scores.items():
        for asked in filter(None, by):
            share, layer = asked.split("@")
            if model.startswith("needle"):
                few.setdefault(asked, []).append(by[asked] - by[None])
                continue
            at = depths[model[14:18]][int(layer)], share
            cells.setdefault(at, []).append(by[asked] - by[None])
            if "0.5b" in model:
                smaller.setdefault(at, []).append(by[asked] - by[None])
    for depth in depths["1.5b"].values():
        told = " | ".join(spread(cells[depth, share]) for share in ("0.05", "0.1", "0.2", "0.4"))
        assert f"| {depth} | {told} |" in text
    of_two = [by[None] for (model, *_), by in scores.items() if not model.startswith("needle")]
    assert f"{len(of_two)} in all, {fmean(of_two):.1f} points with all rows" in text
    near, later = (spread(smaller[depth, "0.2"]) for depth in ("1/2 (the default)", "7/12"))
    assert f"({near} with 20 %; from 7/12 on {later})" in text
    assert f"differs by {spread(few['0.2@3'])} with 20 % from layer 3 on ({len(few['0.2@3'])} samples)" in text
    assert not any(few["0.05@4"])
    full = [each for each in every if each["strategy"] == "full" and "needle" not in each["model"]]
    of_full = paired(full, "propagate", None)
    tenth, fifth = (
        spread([score - by[None] for by in of_full.values() for asked, score in by.items() if asked and share in asked])
        for share in ("0.1@", "0.2@")
    )
    assert f"{fmean(by[None] for by in of_full.values()):.1f} points, loses nothing from the middle on: {tenth}" in text
    assert f"{fifth} with 20 %." in text


def test_what_attending_to_less_costs() -> None:
    """The table of docs/decoding.md, and README's sentence."""
    text, lines = page("docs/decoding.md"), (ROOT / "docs/decoding.md").read_text().splitlines()
    for number, name in enumerate(("qwen", "needle")):
        found = records(f"decode_shares_{name}.jsonl.gz")
        for each in found:
            asked = each["asked"]
            asked["method"] = (asked["decode"], asked.get("share", 0.1)) if "decode" in asked else None
        scores = paired(found, "method", None)
        assert len(scores) == 228
        for method in ("pages", "squeezed"):
            for share in (0.05, 0.1, 0.25):
                begin = f"| `{method}`, {share:.0%} |".replace("%", " %")
                line = next(line for line in lines if line.startswith(begin))
                told = [float(cell.split("(")[0]) for cell in line.split("|")[2:6]][2 * number :][:2]
                means = [
                    fmean(by[method, share] - by[None] for key, by in scores.items() if key[1] == length)
                    for length in ("16384", "32768")
                ]
                assert told == pytest.approx(means, abs=0.051)
        if name == "qwen":
            pages, squeezed = (
                spread([by[method, 0.25] - by[None] for by in scores.values()]) for method in ("pages", "squeezed")
            )
            assert f"(over both lengths `pages` {pages}, `squeezed` {squeezed})" in text
            assert f"while the answer is written: {pages[:-1]}; 228)." in page("README.md")


def test_follow_ups_of_the_shipped_model() -> None:
    """What docs/documents.md says of it."""
    text = page("docs/documents.md")
    scores: dict[tuple[int, str, str], dict[str, float]] = {}
    for each in records("follow_ups_needle.jsonl.gz"):
        asked = str(sorted(each["asked"].items()))
        scores.setdefault((each["length"], each["task"], each["sample"]), {})[asked] = each["score"]
    (full,) = {asked for by in scores.values() for asked in by if "'full'" in asked}
    lost: dict[int, dict[str, list[float]]] = {4096: {}, 8192: {}}
    for (length, *_), by in scores.items():
        for asked, score in by.items():
            if full in by:
                lost[length].setdefault(asked, []).append(score - by[full])
    assert not any(value for values in lost[4096].values() for value in values)
    assert all(abs(fmean(values)) < 2.3 for values in lost[8192].values())
    seen = [sum(length == each for each, *_ in scores) for length in lost]
    assert f"(up to {seen[0]} samples)" in text and f"(up to {seen[1]}; [answers]" in text


def test_what_fp8_costs() -> None:
    """The sentences of docs/plan.md and README."""
    of_bf16 = [
        each for each in records("plans_qwen.jsonl.gz") if "1.5b" in each["model"] and "propagate" not in each["asked"]
    ]
    score = {
        (each["length"], each["task"], each["sample"]): each["score"]
        for each in of_bf16
        if "passing_budget" not in each["asked"]
    }
    found = [each for each in records("float8_qwen.jsonl.gz") if "passing_budget" not in each["asked"]]
    gained = [each["score"] - score[each["length"], each["task"], each["sample"]] for each in found]
    assert len(gained) == 228
    told = spread(gained)[:-1]
    text = page("docs/plan.md")
    assert f"difference {told}; 228 samples" in text
    needle: dict[str, list[float]] = {}
    for each in records("float8_needle.jsonl.gz"):
        if "passing_budget" not in each["asked"]:
            needle.setdefault(f"{each['task']} {each['sample']}", []).append(each["score"])
    told_needle = spread([rounded - exact for exact, rounded in needle.values()])[:-1]
    assert f"{told_needle}; {len(needle)} samples at 16K" in text
    far = result("float8_logits_h200.json")
    assert f"After {far['prompts']} prompts" in text and f"{far['same_token']:.0%}".replace("%", " %") in text
    assert f"by {far['mean_difference']:.2f} in the mean and by {far['largest_difference']:.1f} at most" in text
    assert f"spread by {far['spread']:.1f};" in text and f"distribution by {far['nats']:.3f} nats" in text
    assert f"{far['nats_most']:.3f} at most" in text
    assert f"fp8 {told}; 228, the 1.5B alone)" in page("README.md")


def test_what_narrow_pooling_lost() -> None:
    """What docs/propagation.md says of codes."""
    text = page("docs/propagation.md")
    codes: dict[bool, list[float]] = {True: [], False: []}
    for (_, _, task, _), by in paired(records("propagation_qwen.jsonl.gz"), "propagate", None).items():
        (lost,) = (by[None] - score for asked, score in by.items() if asked in ("0.2@12", "0.2@14"))
        codes[task in ("single_code", "multikey_codes", "kv_retrieval")].append(lost)
    of_codes, of_others = codes[True], codes[False]
    assert f"{len(of_codes)} samples) lost {fmean(of_codes):.1f} points" in text
    assert f"({len(of_others)} samples) {fmean(of_others):.1f} (" in text


def test_stored_texts_in_vllm() -> None:
    """The second table of docs/vllm.md."""
    parts, text = result("vllm_hand_over_h200.json")["parts"], page("docs/vllm.md")
    runs = [(32_768, 1), (32_768, 2), (131_072, 1), (131_072, 2)]
    found = {(row["length"], row["tensor_parallel"], row["store"]): row for row in parts if row["part"] == "answer"}
    stored = [found[(*run, True)] for run in runs]
    alone = [found.get((*run, False)) for run in runs]
    first = [f"{median(row['first_token_s']):.2f} s" for row in stored]
    assert f"| first token, from the store | {' | '.join(first)} |" in text
    first = [f"{median(row['first_token_s']):.2f} s" if row else "" for row in alone]
    assert f"| first token, vLLM alone | {' | '.join(first)} |".replace("|  |", "| |") in text
    for row in stored:
        both = f"{row['requests_per_s_cold']:.3g}; {row['requests_per_s_warm']:.3g}"
        assert both in text or f"{row['requests_per_s_cold']:.2f}; {row['requests_per_s_warm']:.1f}" in text


def test_starts() -> None:
    """The table of docs/benchmarks.md, and what captures the graphs."""
    found, text = result("start_h200.json"), page("docs/benchmarks.md")
    for name in ("cold", "warm"):
        start = found[name]
        first, other, again = start["requests"]
        told = [f"{start['imports_s']:.1f}", f"{start['weights_s']:.1f}", f"{first['first_token_s']:.1f}"]
        told += [str(first["compiled"]), f"{other['first_token_s']:.2f}", str(other["compiled"])]
        told += [f"{again['first_token_s']:.2f}", str(again["compiled"])]
        assert f"| {name} | {' | '.join(told)} |" in text
        assert f"{first['second_token_s']:.1f} s {name}" in text


def test_a_server_under_load() -> None:
    """The table of docs/serving.md: nothing lost, nothing wrong, and its seconds and shares."""
    found, text = result("server_load_cpu.json"), page("docs/serving.md")
    load, leaving, short, again = (found[part] for part in ("load", "leaving", "overtaking", "again"))
    assert all(found[part]["wrong"] == 0 for part in ("load", "leaving", "killed", "stopped"))
    assert load["answered"] == load["requests"] == 200
    assert f"{load['tokens_per_s']:,.0f} tokens/s" in text
    beside = [(each["resident"] - each["documents"]) / 2**30 for each in load["memory"].values()]
    assert f"{beside[0]:.1f} GiB before, {', '.join(f'{each:.1f}' for each in beside[1:])} GiB at" in text
    assert f"to their bound, {load['memory']['after 200']['documents'] / 2**30:.1f} GiB" in text
    assert f"{leaving['left']} left, the other {leaving['answered']} were answered right" in text
    for part in ("killed", "stopped"):
        lost = found[part]
        assert lost["answered"] + lost["failed_requests"] == lost["requests"]
        assert lost["answered_right"] and not lost["orphans"] and lost["failed_requests"] <= lost["clients"]
        again_s = lost["answered_s"] - lost["noticed_s"]
        said = f"noticed after {lost['noticed_s']:.1f} s; {lost['failed_requests']} requests that were here failed"
        assert said in text and f"{again_s:.1f} s later, where a start takes {lost['start_s']:.1f} s" in text
    said = f"{short['medians']['short_s']:.1f} s ({short['medians']['short_alone_s']:.1f} s alone), "
    assert f"{said}{short['medians']['share']:.2f} of what the long one still took" in text
    for name in ("second", "third", "after_restart"):
        assert f"{again['of_first'][name]:.1%}".replace("%", " %") in text


def test_sessions_decoded_at_once() -> None:
    """The table of docs/serving.md: one session, and several by either way, which chose the same tokens."""
    text = page("docs/serving.md")
    for model in ("needle", "qwen"):
        rows = result(f"decode_sessions_{model}_cpu.json")["rows"]
        assert [(row["sessions"], row["together"]) for row in rows] == [
            (1, False), (4, False), (4, True), (16, False), (16, True)
        ]  # fmt: skip
        assert all(row["same_tokens"] for row in rows if row["together"])
        told = " | ".join(f"{row['tokens_per_s']:.1f}" for row in rows)
        assert f"{rows[0]['length']:,} tokens each | {told} |" in text
    rows = result("decode_sessions_h200.json")["rows"]
    assert {row["length"] for row in rows} == {32_768}
    for name, graph in (("CUDA graphs", True), ("kernel by kernel", False)):
        told = " | ".join(f"{row['tokens_per_s']:.1f}" for row in rows if row["graph"] == graph)
        assert f"| {name} | {told} |" in text
    one = next(row for row in rows if row["graph"] and row["sessions"] == 1)
    many = next(row for row in rows if row["graph"] and row["together"] and row["sessions"] == 16)
    times = many["tokens_per_s"] / one["tokens_per_s"]
    share = f"{many['of_limit']:.0%}".replace("%", " %")
    assert f"get {times:.1f} times the tokens of one, at {share} of what the memory allows" in text


def test_decode_methods() -> None:
    """The tables of docs/decoding.md: what methods recall, with intervals, and how fast they are."""
    text = page("docs/decoding.md")
    for name in ("smollm2-135m", "qwen2.5-coder-0.5b"):
        for row in result(f"decode_fidelity_{name}_cpu.json")["results"]:
            mass, kl = (
                f"{row[key]:.3f} ({row['intervals'][key][0]:.3f} to {row['intervals'][key][1]:.3f})"
                for key in ("mass_mean", "kl")
            )
            said = f"| {mass} | {min(row['mass']):.3f} | {row['mass_min']:.3f} | {kl} | {row['agreement']:.0%}"
            assert f"| {row['share']:.1%} {said} |".replace("%", " %") in text
            assert f"{row['samples']} texts and {row['tokens']} tokens" in text
    answers = [json.loads(line) for line in (RESULTS / "decode_methods_needle.jsonl").read_text().splitlines()]
    assert len(answers) == 7 * 20 and all(each["score"] == 100 for each in answers)
    assert "20 samples of `single` and `multikey`: every answer is right" in text
    found = result("decode_methods_cpu.json")
    assert f"Reading took {found['prefill_s']:.1f} s" in text
    for row in found["rows"]:
        assert row["answer"].strip() == ", ".join(found["answers"])
        said = f"`{row['decode']}` | {row['share']:.0%} | {row['tokens_per_s']:.1f} | {row['processor_s'] * 1e3:.0f} |"
        made = f" {row['index_bytes'] / 1e6:.1f} MB | {row['build_s']:.1f} s |" if row["index_bytes"] else ""
        assert f"| {said}{made}".replace("%", " %") in text


def test_an_index_from_a_library() -> None:
    """The table of docs/decoding.md: mass, time of a token, time to build."""
    rows, text = result("index_library_cpu.json")["rows"], page("docs/decoding.md")
    for number in range(4):
        kind = rows[number::4]
        told = " | ".join(f"{row['mass']:.3f}, {row['step_s'] * 1e3:.0f} ms" for row in kind)
        assert f"| {told} | {kind[2]['build_s']:.1f} s |" in text
    clusters, lists = rows[1::4], rows[3::4]
    assert all(clusters[2]["mass"] > row["mass"] and clusters[2]["step_s"] < row["step_s"] for row in lists[:2])


def test_how_many_families_are_read() -> None:
    """The README's count is that of docs/models.md, of the families of the transformers that the page was made with."""
    told = re.search(r"(\d+) of transformers' (\d+) causal decoders", page("README.md"))
    assert told is not None
    if len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) != int(told[2]):
        # The page is of the newest transformers; the suite also runs with the oldest, which lacks families that it has.
        pytest.skip("another transformers than the one that docs/models.md was made with")
    table = (ROOT / "docs/models.md").read_text()
    results = dict(re.findall(r"^\| `(.+?)` \| (.+?) \|", table, re.MULTILINE))
    read = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if results[name].startswith(("works", "as "))]
    assert len(read) == int(told[1])


def test_what_explain_foretells() -> None:
    """The tables of docs/propagation.md: what each layer held and what was lost above it, and how the ranks agree."""
    found, text = result("propagation_foresight_cpu.json"), page("docs/propagation.md")
    rows = found["rows"]
    prompts, right = ({(row["task"], row["sample"]) for row in rows if row["all_rows"] >= least} for least in (0, 1))
    assert f"{len(prompts)} prompts of {found['length']:,} tokens" in text
    assert f"the {len(right)} prompts that all rows answer" in text
    assert {row["share"] for row in rows} == {0.1}
    for layer in (8, 12, 16):
        here = [row for row in rows if row["layer"] == layer]
        assert len(here) == len(prompts)
        held, nats = (fmean(row[name] for row in here) for name in ("held", "nats"))
        points = fmean(row["points"] for row in here if row["all_rows"])
        assert f"| {layer} | {held:.0%} | {points:.1f} | {nats:.2f} |".replace("%", " %") in text
    told = {(each["ranked"], each["lost"]): each for each in found["correlations"]}
    for words, ranked in (
        ("the layers, for each prompt", "layers and shares of one prompt"),
        ("the prompts, for each layer", "prompts of one layer and share"),
        ("all together", "everything"),
    ):
        cells = [
            "{:+.2f} ({:+.2f} to {:+.2f})".format(each["correlation"], *each["interval"])
            for each in (told[ranked, "points"], told[ranked, "nats"])
        ]
        assert f"| {words} | {cells[0]} | {cells[1]} |" in text


def test_all_results_are_described() -> None:
    """Each file has a line in the folder's README, and each link of a page to one leads there."""
    listed = (RESULTS / "README.md").read_text()
    for path in RESULTS.iterdir():
        assert path.name in listed or path.name in ("README.md", "needle_compressors_study.json"), path.name
    for each in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", each.read_text(encoding="utf-8")):
            assert (each.parent / link).exists(), (each.name, link)
