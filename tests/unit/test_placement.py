"""Layers split over the GPUs of a rank: the map, what is predicted of it, what is refused, and hooks in between."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import apb
from apb.compressors import Query
from apb.decoding import Dense
from apb.distributed import launch
from apb.distributed.collectives import Group
from apb.errors import DoesNotFit, InputError
from apb.hardware import Hardware
from apb.hf import counting, loading, placement
from apb.hf.cache import Layout
from apb.hf.heads import load_heads
from apb.hf.modules import attention_modules
from apb.hf.random_weights import shape_config, shapes
from apb.passes.step import Stepper
from apb.planning.cost import ModelShape, predict
from apb.planning.fitting import check_memory
from apb.planning.plan import Plan
from apb.reading import Reading
from command_line import Cli
from families import PECULIAR, make
from models import tiny_heads, tiny_model

CUDA = torch.device("cuda")
READINGS: dict[str, dict[str, Any]] = {
    "full": {"strategy": "full"},
    "apb": {"strategy": "apb", "blocks": 5, "anchor_length": 30, "passing_length": 8},
    "apb in rounds": {"strategy": "apb", "blocks": 5, "anchor_length": 30, "passing_length": 8, "rounds": 3},
}


def on_meta(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def small_llama(layers: int, vocabulary: int = 500, tied: bool = False) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model(
        "llama", **sizes, num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=tied
    )


def check_places(model: PreTrainedModel, places: dict[str, int], gpus: int) -> None:
    """Every layer is whole, layers stand in order, the ranks' first GPUs are used, the counts are complete."""
    of_layers = []
    for name, module in model.named_modules():
        if type(module).__name__ in model._no_split_modules:
            inside = {placement._place(f"{name}.{part}", places) for part, _ in module.named_parameters()}
            assert len(inside) == 1, name
            of_layers.append(inside.pop())
    assert of_layers == sorted(of_layers)
    assert set(places.values()) == set(range(max(places.values()) + 1)) <= set(range(gpus))
    parts = placement.split(model, attention_modules(model), places)
    assert len(of_layers) == model.config.get_text_config().num_hidden_layers
    assert sum(layers for layers, _ in parts) == len(attention_modules(model))
    assert sum(weights for _, weights in parts) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("gpus", [2, 3])
@pytest.mark.parametrize("family", PECULIAR)
def test_maps_of_families(family: str, gpus: int) -> None:
    """Whatever a family calls its modules, no layer is cut in two and nothing is left out."""
    model = make(*PECULIAR[family])
    check_places(model, placement.balanced(model, gpus, torch.bfloat16), gpus)


@given(
    layers=st.integers(1, 9), gpus=st.integers(2, 5), vocabulary=st.sampled_from([8, 500, 20000]), tied=st.booleans()
)
def test_maps_of_any_size(layers: int, gpus: int, vocabulary: int, tied: bool) -> None:
    """Also with more GPUs than layers, with embeddings larger than all layers, and with shared ones."""
    config = small_llama(layers, vocabulary, tied)
    check_places(on_meta(config), placement.device_map(config, gpus, torch.bfloat16), gpus)


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("name", shapes())
def test_large_models_are_spread_evenly(name: str, gpus: int) -> None:
    """No GPU holds more than its share and, since those are not cut, the embeddings."""
    shape = counting.model_shape(shape_config(name), gpus)
    assert len(shape.split) == gpus
    room = shape.parameters / gpus + shape.vocabulary * shape.hidden
    assert max(weights for _, weights in shape.split) <= room


def test_yi_on_two_gpus() -> None:
    """The model that the paper split: 60 layers, half of the 34.4 billion weights on each GPU."""
    (first, low), (second, high) = counting.model_shape(shape_config("yi-34b"), 2).split
    assert first + second == 60
    assert abs(first - second) <= 2
    assert low == pytest.approx(17.2e9, rel=0.01)
    assert high == pytest.approx(17.2e9, rel=0.01)


def test_nothing_is_left_to_the_host() -> None:
    """Weights that do not fit the GPUs are refused with the numbers, where accelerate would offload them."""
    config = small_llama(6)
    size = 2 * sum(parameter.numel() for parameter in on_meta(config).parameters())
    assert placement.device_map(config, 2, torch.bfloat16, memory=size)
    with pytest.raises(DoesNotFit, match=r"do not fit 2 GPUs .*--gpus-per-rank"):
        placement.device_map(config, 2, torch.bfloat16, memory=size // 3)


def test_models_that_do_not_say_what_is_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that was cut in two would add numbers of two devices."""
    model = on_meta(small_llama(2))
    monkeypatch.setattr(model, "_no_split_modules", None)
    with pytest.raises(InputError, match="does not declare which of its modules"):
        placement.balanced(model, 2, torch.bfloat16)


def test_split_as_weights_lie() -> None:
    """Of a model that somebody else has placed, counted where its weights are."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    model.model.layers[2].to("meta")
    inside = sum(parameter.numel() for parameter in model.model.layers[2].parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert placement.devices(model) == [torch.device("cpu"), torch.device("meta")]
    assert placement.split(model, attention_modules(model)) == ((2, whole - inside), (1, inside))


# Ten numbers of cache a token and layer.
SHAPE = ModelShape(
    layers=5,
    heads=2,
    kv_heads=1,
    head_dim=5,
    hidden=10,
    intermediate=10,
    vocabulary=10,
    layer_parameters=500,
    parameters=1000,
    split=((2, 550), (3, 450)),
)


@pytest.mark.parametrize(("tokens", "layers", "weights"), [(9, 2, 550), (110, 3, 450)])
def test_memory_of_the_fullest_gpu(tokens: int, layers: int, weights: int) -> None:
    """Short prompts: the GPU with most weights; long ones: that with most layers, for their cache. FLOPs stay."""
    plan = Plan.build(0, tokens - 1, 1, strategy="full")
    split, whole = predict(plan, SHAPE), predict(plan, replace(SHAPE, split=()))
    assert (split.ranks[0].weight_bytes, split.ranks[0].cache_bytes) == (2 * weights, 2 * 10 * tokens * layers)
    assert (whole.ranks[0].weight_bytes, whole.ranks[0].cache_bytes) == (2 * 1000, 2 * 10 * tokens * 5)
    assert split.ranks[0].activation_bytes == whole.ranks[0].activation_bytes
    assert split.flops == whole.flops
    assert split.to_dict()["peak_bytes_per_gpu"] == split.ranks[0].peak_bytes
    assert "peak_bytes_per_rank" not in split.to_dict()


def test_what_later_rounds_see_is_split_too() -> None:
    """Pairs kept between rounds lie where their layers do."""
    plan = Plan.build(0, 400, 2, blocks=4, anchor_length=20, passing_length=10, rounds=2)
    ranks = [predict(plan, shape).ranks[0] for shape in (replace(SHAPE, split=((3, 0), (2, 0))), SHAPE)]
    assert ranks[0].activation_bytes == ranks[1].activation_bytes  # three layers each
    whole = predict(plan, replace(SHAPE, split=())).ranks[0].activation_bytes
    assert whole - ranks[0].activation_bytes == 2 * 2 * 10 * plan.contexts()[-1]


def test_refusals_speak_of_the_gpu() -> None:
    """What is compared is a GPU's memory with what its layers need."""
    plan = Plan.build(0, 109, 1, strategy="full")
    need = predict(plan, SHAPE).ranks[0].peak_bytes + 2 * 7 * 10 * 3
    check_memory(plan, SHAPE, Hardware(need, 2, None), 7, Query())
    with pytest.raises(DoesNotFit, match=r"on a rank's fullest GPU .*, and a GPU has 0\.0 GiB"):
        check_memory(plan, SHAPE, Hardware(need - 1, 2, None), 7, Query())


def prompt() -> apb.Prompt:
    draw = random.Random(0)
    return apb.Prompt.from_tokens([1, 2], [draw.randrange(97) for _ in range(203)], [5, 6, 7, 8])


def dispatched() -> PreTrainedModel:
    """A model that accelerate has put hooks around, as it does with several devices; here all of them are the CPU."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    places = placement.balanced(model, 3, torch.float32)
    assert len(places) > 3
    return dispatch_model(
        model, dict.fromkeys(places, "cpu"), force_hooks=True, skip_keys=model._skip_keys_device_placement
    )


@pytest.mark.parametrize("name", READINGS)
def test_hooks_change_nothing(name: str) -> None:
    """A dispatched model gives the same logits, cache and answer, and can be given back."""
    found = []
    for model in (tiny_model("llama", heads=4, kv_heads=2, head_dim=16), dispatched()):
        before = model(torch.tensor([prompt().token_ids])).logits
        engine = apb.Engine.from_model(model, **READINGS[name])
        session = engine.prefill(prompt())
        cache = [part for layer in range(3) for part in session.gather_kv(layer)]
        longer = session.extend([11, 12]).clone()
        answer = engine.generate(prompt(), max_new_tokens=6).token_ids
        found.append([session.logits, longer, *cache, torch.tensor(answer)])
        engine.close()
        torch.testing.assert_close(model(torch.tensor([prompt().token_ids])).logits, before, rtol=0, atol=0)
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_hooks_and_retaining_heads(tmp_path: Path) -> None:
    """What is caught before RoPE, and scored by heads that lie with their layers, is the same."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    torch.save(tiny_heads(model), tmp_path / "heads.bin")
    places = [torch.device("cpu"), torch.device("meta"), torch.device("cpu")]
    heads = load_heads(tmp_path / "heads.bin", layers=3, heads=4, kv_heads=2, head_dim=16, devices=places)
    assert [head.fc1.device for head in heads] == [head.fc2.device for head in heads] == places
    found = []
    for each in (model, dispatched()):
        engine = apb.Engine.from_model(each, **READINGS["apb"], heads=tmp_path / "heads.bin")
        found.append(engine.prefill(prompt()).logits)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_weights_on_a_disk_are_refused(tmp_path: Path) -> None:
    """accelerate's offloading is refused by the module's name."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    places: dict[str, Any] = dict.fromkeys(placement.balanced(model, 3, torch.float32), "cpu")
    places["model.layers.1"] = places["model.layers.2"] = "disk"
    with pytest.raises(InputError, match=r"'model\.layers\.1' and others on the disk"):
        apb.Engine.from_model(dispatch_model(model, places, offload_dir=tmp_path), strategy="full")


def test_weights_in_the_host_beside_gpus_are_refused() -> None:
    """The CPU in a map is where a model runs only if there is no GPU in it."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    model.hf_device_map = {"model.layers.0": 0, "lm_head": "cpu"}
    with pytest.raises(InputError, match="'lm_head' on the cpu"):
        placement.check_map(model)
    model.hf_device_map = {"": torch.device("cpu")}
    placement.check_map(model)


def test_steps_are_no_graphs() -> None:
    """A graph is captured on one device: with several, decode runs ordinary passes."""
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    attachment: Any = SimpleNamespace(recurrent=0, attending={0}, expands=False, devices=devices)
    layout = Layout(keeps_new=True, device=CUDA, dtype=torch.bfloat16, heads=((8, 128),))
    cache: Any = SimpleNamespace(layout=layout, states={})
    assert Stepper(attachment, Dense(), Group(), graphs=True).why_not(cache) == "layers lie on 2 devices"


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1 << 24))


@pytest.mark.usefixtures("four_gpus")
def test_ranks_take_gpus_one_after_the_other(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local rank 1 of ranks with two GPUs each loads onto GPUs 2 and 3, as accelerate maps them."""
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    first = launch.local_device(CUDA, 2)
    assert first == torch.device("cuda", 2)
    given: dict[str, Any] = {}

    def load(model: str, **options: Any) -> Any:
        given.update(options)
        return tiny_model("llama", heads=4, kv_heads=2, head_dim=16), {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    loading.load_model(checkpoint, torch.bfloat16, first, gpus=2)
    expected = placement.device_map(loading.load_config(checkpoint), 2, torch.bfloat16)
    assert given["device_map"] == {name: torch.device("cuda", 2 + place) for name, place in expected.items()}
    assert set(given["device_map"].values()) == {torch.device("cuda", 2), torch.device("cuda", 3)}


@pytest.mark.usefixtures("four_gpus")
def test_more_gpus_than_there_are() -> None:
    """One sentence, before anything is started or loaded."""
    assert launch.ranks_to_use(2, CUDA, gpus=2) == 2
    with pytest.raises(
        InputError, match=r"--gpus-per-rank 2 on 3 ranks takes 6 GPUs, and this machine has 4; use fewer\."
    ):
        launch.ranks_to_use(3, CUDA, gpus=2)
    with pytest.raises(InputError, match="on 1 rank takes 5 GPUs"):
        launch.join(CUDA, gpus=5)
    with pytest.raises(InputError, match="5 ranks need 5 GPUs and this machine has 4"):
        launch.ranks_to_use(5, CUDA)


@pytest.mark.usefixtures("four_gpus")
def test_groups_bound_to_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL serves one device alone where init_process_group was told so: said before a layer finds out."""
    world = SimpleNamespace(bound_device_id=torch.device("cuda", 0))
    there = {"is_available": lambda: True, "is_initialized": lambda: True, "group": SimpleNamespace(WORLD=world)}
    monkeypatch.setattr(launch, "dist", SimpleNamespace(**there))
    with pytest.raises(InputError, match="leave device_id out of init_process_group"):
        launch.join(CUDA, gpus=2)


def test_the_command_line_refuses(cli: Cli, tmp_path: Path) -> None:
    """On the CPU there is nothing to split over."""
    document = tmp_path / "document.txt"
    document.write_text("A text.")
    asked = ("generate", "--document", document, "--query", "What?", "--device")
    cli(*asked, "cpu", "--gpus-per-rank", 2).refused("--gpus-per-rank 2", "CPU")
    cli(*asked, "cpu", "--gpus-per-rank", 0).refused("at least 1, not 0")


@pytest.mark.usefixtures("four_gpus")
def test_the_command_line_refuses_with_gpus(cli: Cli, tmp_path: Path) -> None:
    """More GPUs than there are; together with tensor parallel; a document that the fullest GPU has no room for."""
    document = tmp_path / "document.txt"
    document.write_text("A text. " * 20000)
    asked = ("generate", "--document", document, "--query", "What?", "--device", "cuda")
    cli(*asked, "--gpus-per-rank", 3, "--ranks", 2).refused("takes 6 GPUs", "has 4")
    cli(*asked, "--gpus-per-rank", 2, "--tensor-parallel", 2).refused("--tensor-parallel 2", "use one")
    longest = (*asked, "--allow-extrapolation", "--rounds", 1, "--gpus-per-rank", 2)
    cli(*longest).refused("on a rank's fullest GPU", "a GPU has 0.0 GiB")


def test_plans_for_several_gpus(cli: Cli) -> None:
    """`apb plan` speaks of GPUs where a rank has several, and of hosts with as many fewer ranks."""
    asked = ("plan", "--length", 131072, "--random-weights", "yi-34b", "--ranks", 4, "--json")
    one, two = (cli(*asked, "--gpus-per-rank", gpus).json for gpus in (1, 2))
    assert (one["gpus_per_rank"], two["gpus_per_rank"]) == (1, 2)
    assert (one["ranks_per_host"], two["ranks_per_host"]) == (8, 4)
    for whole, split in zip(one["strategies"], two["strategies"], strict=True):
        assert whole["cache_bytes_per_rank"] / 2 <= split["cache_bytes_per_gpu"] < 0.6 * whole["cache_bytes_per_rank"]
        assert split["peak_bytes_per_gpu"] < 0.6 * whole["peak_bytes_per_rank"]
        assert split["flops"] == whole["flops"]
    table = cli(*asked[:-1], "--gpus-per-rank", 2).out
    assert "peak per GPU" in table
    assert "peak per rank" not in table


def test_reading_plans_by_the_split() -> None:
    """Rounds are as few as the fullest GPU has room for: with the layers on two, fewer."""
    config = small_llama(6)
    sizes = apb.Prompt.from_tokens([], [3] * 1900, [4])
    reading = Reading.of(blocks=16, anchor_length=20, passing_length=8)
    split = counting.model_shape(config, 2).split
    whole = Plan.build(0, 1900, 1, blocks=16, anchor_length=20, passing_length=8)
    need = predict(whole, replace(counting.model_shape(config), split=split)).ranks[0].peak_bytes
    hardware = Hardware(need + 100 * counting.model_shape(config).cache_row, 2, None)
    assert reading.plan(reading.lengths(sizes), 1, config, hardware, 1, 1, split).rounds == 1
    with pytest.raises(DoesNotFit):
        replace(reading, rounds=1).plan(reading.lengths(sizes), 1, config, hardware, 1)
