"""Benchmarks report what they ran: baseline, ratio, floor; and shapes with random weights are the known models'."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import families
import hybrids
from apb import InputError, attention
from apb.benchmarks import ceilings, decode, prefill
from apb.benchmarks.attention import Shape, _in_turns, bench_attention
from apb.benchmarks.attention_kernels import KERNELS
from apb.benchmarks.decode import bench_decode
from apb.benchmarks.prefill import bench_prefill
from apb.cli import bench_ranks
from apb.decoding import Pages, Squeezed
from apb.distributed.collectives import Group
from apb.hardware import Hardware
from apb.hf import random_weights
from apb.hf.counting import model_shape
from apb.hf.random_weights import random_model, shape_config
from apb.planning.cost import Ceilings
from apb.timing import clocked, timed
from models import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rates():
    """What this machine reaches: measured once, which takes seconds."""
    return ceilings.measure_ceilings(CPU, torch.float32, Group())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.1-8b", 8_030_261_248), ("qwen2.5-14b", 14_770_033_664), ("qwen3.5-9b", 8_953_803_264)],
)
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    """The configurations in the package are those models', weight for weight."""
    assert model_shape(shape_config(name)).parameters == parameters


def test_random_weights_depend_on_the_seed_alone():
    """Every rank makes the same model, torch's global generator is left alone, and logits are finite."""
    config = shape_config("llama-3.1-8b", layers=1)
    for name, value in {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 97}.items():
        setattr(config, name, value)
    state = torch.random.get_rng_state()
    first, again, other = (random_model(config, torch.float32, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        logits = [model(ids).logits for model in (first, again, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert logits[0].isfinite().all()


def test_unknown_shape_is_refused():
    """The sentence lists the shapes there are."""
    with pytest.raises(InputError, match=r"Unknown model shape 'gpt-9'.*llama-3\.1-8b"):
        shape_config("gpt-9")


def test_rows_hold_baseline_ratio_and_floor(rates):
    """The first strategy is the baseline of each length; ratios and shares follow from the seconds of the same run."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    assert rates.linear > 0
    assert rates.attention > 0
    assert rates.link == 0
    shape = model_shape(model.config)
    rows = list(bench_prefill(model, shape, rates, ["full", "apb"], [100, 300], 3, blocks=3))
    assert [(row.length, row.strategy) for row in rows] == [(100, "full"), (100, "apb"), (300, "full"), (300, "apb")]
    for full, apb in (rows[:2], rows[2:]):
        assert full.speedup is None
        assert apb.speedup == pytest.approx(full.seconds / apb.seconds)
        for row in (full, apb):
            assert len(row.all_seconds) == 3
            assert min(row.all_seconds) <= row.seconds <= max(row.all_seconds)
            assert row.of_floor == pytest.approx(row.floor_seconds / row.seconds)
            assert row.tokens_per_s == pytest.approx(row.length / row.seconds)
            assert all(seconds >= 0 for seconds in row.parts.values())
            assert min(row.parts[name] for name in ("qkv", "attention", "output", "mlp")) > 0
            assert row.parts["communication"] < row.parts["attention"]
        assert full.parts["scoring"] == full.parts["selection"] == 0 < min(apb.parts["scoring"], apb.parts["selection"])
    assert model.config._attn_implementation == "eager"  # given back


def test_a_part_within_another_is_its_own(monkeypatch):
    """Of ten seconds the outer part has those outside the two that are inside."""
    moments = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0])
    monkeypatch.setattr("apb.timing.time", SimpleNamespace(perf_counter=lambda: next(moments)))
    with clocked(torch.device("cpu")) as clock, timed("recurrent"):
        for _ in range(2):
            with timed("communication"):
                pass
    assert clock.seconds() == {"recurrent": 3.0, "communication": 7.0}


@pytest.mark.parametrize("family", ["qwen3_5_text", "minimax"])
def test_recurrent_layers_are_a_part(family, rates):
    """Whole, whatever their modules are called: parts sum to the prefill's time."""
    model = hybrids.make(family)
    for row in bench_prefill(model, model_shape(model.config), rates, ["full", "apb"], [200], 1, blocks=3):
        assert row.parts["recurrent"] > row.parts["qkv"] > 0
        assert min(row.parts.values()) >= 0


def test_predictions_are_of_the_kernel_that_runs(monkeypatch):
    """The baseline's own attention is measured, once; floors stay those of the best kernel, predictions do not."""
    asked = []
    monkeypatch.setattr(prefill, "attention_rate", lambda device, dtype, backend: asked.append(backend) or 1e6)
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    rates = Ceilings(1e9, 1e9, 0.0, 1e9)
    run = partial(bench_prefill, model, model_shape(model.config), rates, ["full", "apb"], [300, 400], 1, blocks=3)
    rows = list(run(baseline_backend="reference"))
    assert asked == ["reference"]
    assert [row.attention_rate for row in rows] == [1e6, 1e9, 1e6, 1e9]
    for row, auto in zip(rows, run(), strict=True):
        assert row.floor_seconds == auto.floor_seconds
        slower = row.predicted_seconds - auto.predicted_seconds
        flops = 4 * 4 * 16 * sum(range(1, row.length + 1)) * model.config.num_hidden_layers
        assert slower == pytest.approx(flops * (1e-6 - 1e-9) if row.strategy == "full" else 0.0)
    assert asked == ["reference"]


def test_what_takes_too_long_or_too_much_is_left_out(rates, monkeypatch):
    """A row says why there are no figures; short of time, fewer repeats are counted and no parts."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    run = partial(bench_prefill, model, model_shape(model.config), rates, ["full"], [300], 50)
    (row,) = run(max_seconds=1e-12)
    assert (row.seconds, row.all_seconds, row.parts, row.speedup) == (None, [], None, None)
    assert row.note.startswith("left out: two prefills take at least")
    monkeypatch.setattr(prefill, "slowest", lambda group, device, figure: 10.0)  # every prefill takes so long
    (row,) = run(max_seconds=35.0)
    assert (row.note, row.all_seconds, row.parts) == (None, [10.0, 10.0], None)
    (row,) = run(max_seconds=1000.0)
    assert len(row.all_seconds) == 50
    assert row.parts
    small = Hardware(memory=1 << 20, element_bytes=4, ceilings=None)
    monkeypatch.setattr(Hardware, "of", lambda *_: small)
    (row,) = run()
    assert (row.seconds, row.plan) == (None, {})
    assert row.note.startswith("left out: Reading 300 tokens with 'full' on 1 rank needs")


def test_decode_reads_weights_and_cache():
    """The limit is the bytes of the weights without the embedding table and of the cache, over the bandwidth."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    shape = model_shape(model.config)
    (row,) = bench_decode(model, shape, [200], 3, 1e9, strategy="apb", blocks=2)
    assert not row.graph
    assert row.same_tokens is None
    embedding = model.get_input_embeddings().weight.numel()
    assert row.weight_bytes == 4 * (sum(weight.numel() for weight in model.parameters()) - embedding)
    assert row.cache_bytes == 4 * (200 + 4 + 3) * 2 * 3 * 2 * 16
    assert row.limit_seconds == pytest.approx((row.weight_bytes + row.cache_bytes) / 1e9)
    assert row.of_limit == pytest.approx(row.limit_seconds * row.tokens_per_s)


def test_decode_by_an_index():
    """The row says what was made of the keys, and how many of them were read."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    shape = model_shape(model.config)
    rows = [
        next(bench_decode(model, shape, [400], 3, 1e9, strategy="full", decoding=decoding))
        for decoding in ("exact", Pages(0.3, page_size=8), Squeezed(0.3, cluster_size=8))
    ]
    exact, pages, squeezed = rows
    assert [row.decode for row in rows] == ["exact", "pages", "squeezed"]
    assert (exact.share, exact.index_bytes) == (1.0, 0)
    assert 0.2 < pages.share < 0.3 and 0.2 < squeezed.share < 0.3
    units = (400 - 64) // 8
    assert pages.index_bytes == 4 * 3 * 2 * units * 2 * 16
    assert squeezed.index_bytes == 4 * 3 * 2 * (400 - 64 + units * 16)
    assert all(row.index_seconds > 0 and row.read_seconds > 0 for row in rows)


def test_decode_of_several_sessions():
    """The same tokens in turns and in one pass, whose limit has the weights once; a model may need turns."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    shape = model_shape(model.config)
    one, turns, together = bench_decode(model, shape, [200], 3, 1e9, (1, 3), strategy="apb", blocks=2)
    assert [(row.sessions, row.together) for row in (one, turns, together)] == [(1, False), (3, False), (3, True)]
    assert together.same_tokens and turns.same_tokens is None
    assert turns.weight_bytes == 3 * one.weight_bytes and together.weight_bytes == one.weight_bytes
    assert turns.cache_bytes == together.cache_bytes == 3 * one.cache_bytes
    assert together.tokens_per_s == pytest.approx(3 / together.seconds)
    model = families.make(*families.PECULIAR["deepseek_v3"])
    (row,) = bench_decode(model, model_shape(model.config), [100], 1, 1e9, (2,), strategy="full")
    assert not row.together


def test_decode_frees_sessions_before_it_makes_others(monkeypatch):
    """Of the engine before none is left when the next one reads: memory is for one set of caches."""
    model, caches = tiny_model("llama", heads=4, kv_heads=2, head_dim=16), []
    make = decode._sessions

    def noted(*asked):
        assert [cache() for cache in caches] == [None] * len(caches)
        for session in make(*asked):
            caches.append(weakref.ref(session.cache))
            yield session

    monkeypatch.setattr(decode, "_sessions", noted)
    gc.collect()
    gc.disable()
    try:
        rows = list(bench_decode(model, model_shape(model.config), [60, 90, 70], 1, 1e9, (1, 2), strategy="full"))
    finally:
        gc.enable()
    assert [row.length for row in rows] == [60] * 3 + [90] * 3 + [70] * 3
    assert len(caches) == 6


def test_a_prompt_without_document_is_refused(rates):
    """The length counts the query too."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    with pytest.raises(InputError, match="leaves no document"):
        list(bench_prefill(model, model_shape(model.config), rates, ["full"], [33], 1))


def test_attention_rows_hold_time_and_error(monkeypatch):
    """Every kernel gets a row: figures that follow from each other, or why there are none; errors are against fp64."""
    monkeypatch.setattr("apb.benchmarks.attention._TURN_S", 0.02)
    shapes = [Shape(4, 2, 64, 96, 20, 33), Shape(4, 2, 64, 1, 0, 70)]
    rows = list(bench_attention(shapes, CPU, torch.float32, 2))
    assert [(row.shape, row.kernel) for row in rows] == [(str(shape), name) for shape in shapes for name in KERNELS]
    measured = [row for row in rows if row.note is None]
    assert {"torch, two calls", "reference"} <= {row.kernel for row in measured}
    for row in measured:
        shape = Shape.parse(row.shape)
        assert row.tflops == pytest.approx(shape.flops / row.seconds / 1e12)
        assert row.kv_bytes_per_s == pytest.approx(shape.kv_bytes(4) / row.seconds)
        assert max(row.error, row.lse_error) < 1e-5
        assert len(row.all_seconds) == 2
        rivals = [other for other in measured if other.shape == row.shape]
        best = min(rivals, key=lambda other: other.seconds)
        ratios = [a / b for a, b in zip(best.all_seconds, row.all_seconds, strict=True)]
        assert row.of_fastest == pytest.approx(statistics.median(ratios))
    assert all(row.note for row in rows if "Flash" in row.kernel)


def test_attention_kernels_take_turns(monkeypatch):
    """Each round times every kernel, so that a slow minute of the machine slows all of them."""
    log = []

    def logged(name):
        return lambda q, segments: lambda: log.append(name) or attention(q, segments)

    monkeypatch.setattr("apb.benchmarks.attention._TURN_S", 0)
    for name in "ab":
        monkeypatch.setitem(KERNELS, name, logged(name))
    list(bench_attention([Shape(4, 2, 64, 8, 2, 3)], CPU, torch.float32, 3, ["a", "b"]))
    checked, warm, rounds = log[:2], log[2:6], log[6:]
    assert (checked, warm, rounds) == (["a", "b"], ["a", "a", "b", "b"], ["a", "a", "b", "b"] * 3)


def test_attention_turns_settle_first(monkeypatch):
    """A quarter of a turn's calls come before the clock starts, three quarters after; a slow kernel has one of each."""
    log = []
    taken = {"quick": 0.01, "slow": 5.0}
    monkeypatch.setattr("apb.benchmarks.attention._TURN_S", 0.2)
    monkeypatch.setattr(
        "apb.benchmarks.attention._turn", lambda call, device, *counts: log.append((call, *counts)) or taken[call]
    )
    assert _in_turns({name: name for name in taken}, CPU, 1) == {name: [seconds] for name, seconds in taken.items()}
    assert log[2:] == [("quick", 5, 15), ("slow", 1, 1)]


def test_attention_that_is_wrong_shows(monkeypatch):
    """A kernel that leaves the anchor out has an error, and one that writes nothing has a note."""
    short = lambda q, segments: lambda: attention(q, segments[1:])  # noqa: E731
    silent = lambda q, segments: lambda: (torch.full_like(q, float("nan")), torch.zeros(q.shape[1], len(q)))  # noqa: E731
    monkeypatch.setitem(KERNELS, "short", short)
    monkeypatch.setitem(KERNELS, "silent", silent)
    shape = Shape(4, 2, 64, 96, 20, 33)
    assert (shape.flops, shape.kv_bytes(2)) == (4 * 4 * 64 * (96 * 53 + 96 * 97 // 2), 2 * 149 * 2 * 64 * 2)
    rows = bench_attention([shape], CPU, torch.float32, 1, ["short", "silent"])
    assert next(rows).error > 0.05
    assert "not all of the output is finite" in next(rows).note


@pytest.mark.parametrize("text", ["", "32/8", "32,128,1,1,1", "32/8,128,a,1,1", "32/7,128,1,1,1", "32/8,128,0,1,1"])
def test_shapes_that_make_no_sense_are_refused(text):
    """One sentence, with what was given."""
    with pytest.raises(InputError, match=f"not {text!r}"):
        Shape.parse(text)


def test_unknown_kernel_is_refused():
    """The sentence lists those there are."""
    with pytest.raises(InputError, match=r"Unknown kernel 'magic'.*FlashAttention 3"):
        list(bench_attention([], CPU, torch.float32, 1, ["magic"]))


def test_a_bench_draws_what_it_measured(cli, checkpoint, tmp_path, monkeypatch, capfd):
    """`apb bench prefill --out`: the file, and plots beside it; without matplotlib the file and a sentence."""
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *_: Ceilings(1e11, 1e11, 0.0, 1e10))
    out = tmp_path / "figures.json"
    command = ("bench", "prefill", "--model", checkpoint, "--length", 200, "--blocks", 2, "--repeat", 1)
    done = cli(*command, "--device", "cpu", "--out", out)
    assert done.status == 0
    assert sorted(path.name for path in tmp_path.glob("figures*")) == [
        "figures.json",
        "figures_parts.svg",
        "figures_seconds.svg",
    ]
    for path in tmp_path.glob("*.svg"):
        path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench_ranks.draw(json.loads(out.read_text()), out)
    assert "no plots" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.svg"))
    cli(*command, "--out", tmp_path / "no" / "figures.json").refused("figures.json", "no folder")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["prefill", "--length", "200", "--layers", "1"], ["--layers", "--random-weights"]),
        (["prefill", "--length", "200", "--layers", "0", "--random-weights", "llama-3.1-8b"], ["Layers", "at least 1"]),
        (["prefill", "--length", "200", "--max-seconds", "-1"], ["--max-seconds", "above 0"]),
        (["prefill", "--length", "200", "--max-seconds", "nan"], ["--max-seconds", "above 0"]),
        (["prefill", "--length", "200", "--baseline-backend", "magic"], ["'magic'", "torch"]),
        (["prefill", "--length", "200", "--compressor", "magic"], ["'magic'", "query"]),
        (["prefill", "--length", "32"], ["Length", "at least 33"]),
        (["decode", "--length", "999999999"], ["999,999,999 tokens", "GiB", "what fits is"]),
        (["decode", "--length", "200", "--sessions", "100000000"], ["100,000,000 sessions", "what fits is"]),
        (["decode", "--length", "200", "--random-weights", "llama-3.1-8b", "--layers", "33"], ["32 layers", "no more"]),
        (["prefill", "--length", "200", "--random-weights", "llama-3.1-70b"], ["random weights take", "--layers"]),
        (["decode", "--length", "200", "--out", "."], ["folder", "name a file"]),
        (["attention", "--shape", "4/2,64,40,9,7", "--out", "no/figures.json"], ["figures.json", "no folder"]),
    ],
    ids=lambda value: " ".join(value) if "--" in str(value) else None,
)
def test_benches_that_cannot_be_run(cli, monkeypatch, tmp_path, arguments, fragments):
    """Refused before anything is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ceilings, "measure_ceilings", None)
    monkeypatch.setattr(ceilings, "copy_bandwidth", None)
    monkeypatch.setattr(random_weights, "free_memory", lambda device, ranks: 2**30)
    cli("bench", *arguments, "--device", "cpu").refused(*fragments)
