"""Strategies, compressors and decode methods may come from outside the package, as instances: nothing in it knows them.

Compared with transformers' own eager attention under masks that are written out here, on one rank and on two.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import apb
from apb.distributed.collectives import Group
from apb.evaluation.fidelity import measure
from apb.evaluation.settings import Setting
from apb.hf.counting import model_shape
from apb.planning.cost import predict
from apb.reading import Reading
from byte_checkpoint import byte_tokenizer
from extension import work
from extension.neighbours import Neighbours
from extension.stride import Stride
from extension.work import ANSWER, DECODING, METHOD, PASSING, PROMPT, STRIDE
from forked import launch

pytestmark = pytest.mark.timeout(300)
START, STOP = len(PROMPT.prefix), len(PROMPT.prefix) + len(PROMPT.document)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """{ranks: what each of them saw}."""
    folder = tmp_path_factory.mktemp("extension")
    launch(work.everything, 2, str(folder))
    two = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return {1: [work.use(Group())], 2: two}


def masked(seen: Tensor) -> Tensor:
    """transformers' logits (1 + len(ANSWER), vocabulary) where a row sees a key as ``seen`` (rows, keys) says."""
    model = work.model()
    model.set_attn_implementation("eager")
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT.token_ids + ANSWER]), attention_mask=mask[None, None]).logits[0]
    return logits[len(PROMPT) - 1 :]


def causal() -> Tensor:
    total = len(PROMPT) + len(ANSWER)
    return torch.ones(total, total, dtype=torch.bool).tril()


@cache
def neighbours() -> Tensor:
    """Blocks of 17, 17, 17, 16, 16 document tokens, each with the last six of the one before it."""
    seen = causal()
    for first, stop in ((19, 36), (36, 53), (53, 69), (69, 85)):
        seen[first:stop, : first - METHOD.reach] = False
    return masked(seen)


@cache
def nearest(ranks: int) -> Tensor:
    """New tokens see the first key and the last twelve of every rank's shard: with two, document and tail are apart."""
    seen = causal()
    for row in range(len(PROMPT), len(seen)):
        shards = [range(STOP), range(STOP, row + 1)] if ranks == 2 else [range(row + 1)]
        for shard in shards:
            seen[row, shard.start + 1 : max(shard.stop - DECODING.last, shard.start + 1)] = False
    return masked(seen)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_strategy(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    """Logits through decode are those of the mask; the answer names the strategy, its option, and that it is not
    exact."""
    for each in found[ranks]:
        torch.testing.assert_close(each["logits"], neighbours(), rtol=1e-4, atol=1e-4)
        answer = each["answer"]
        assert (answer["strategy"], answer["exact"], answer["plan"]["reach"]) == ("neighbours", False, 6)
        assert answer["decode"] == {"method": "exact", "exact": True, "share": 1.0}


@pytest.mark.parametrize("ranks", [1, 2])
def test_its_cost(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    """Plans count what it attends to, sends and holds."""
    cost = found[ranks][0]["cost"]
    blocks = [17, 17, 17, 16, 16]
    blocks[0] += START
    pairs = sum(n * (n + 1) // 2 for n in blocks) + 6 * sum(blocks[1:])
    pairs += sum(len(PROMPT.query) * n for n in blocks) + 6  # the query's rows over the cache, and over themselves
    assert cost["attention_flops"] == 4 * 4 * 16 * 3 * pairs
    query = 3 * 4 * 17 * 4 if ranks == 2 else 0
    assert cost["sent_bytes_per_rank"] == 3 * ((3 * 6 * 64 * 4 if ranks == 2 else 0) + query)
    assert cost["peak_bytes_per_rank"] > cost["cache_bytes_per_rank"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compressor(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    """Its choice is passed on, by every rank of its own blocks, and its cost is counted."""
    plan = apb.Plan.of_method(PASSING, START, STOP - START, len(PROMPT.query))
    picked = [pick for each in found[ranks] for pick in each["picked"]]
    assert {(layer, block) for layer, block, _ in picked} == {
        (layer, block) for layer in range(3) for block in range(3)
    }
    for _, block, positions in picked:
        place = plan.block(block)
        free = range(max(place.start, plan.anchored), place.stop)
        best = sorted(free, key=lambda at: ((at - place.start) % STRIDE.step != 0, at))[:3]
        assert positions.tolist() == [sorted(best)] * 2
    shape = model_shape(work.model().config)
    cost = predict(plan, shape, compressor=STRIDE)
    assert cost.ranks[0].scoring_flops == 2 * 3 * (START + 83 - 20)  # but for the last block's tokens


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_decode_method(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    """New tokens see the keys that it attends to, of every rank's shard; the answer says that it left some out."""
    for each in found[ranks]:
        torch.testing.assert_close(each["nearest"], nearest(ranks), rtol=1e-4, atol=1e-4)
        assert (each["decode"]["method"], each["decode"]["exact"]) == ("nearest", False)
        assert 0 < each["decode"]["share"] < 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    """Records name both, with their options; only rank 0 keeps them."""
    first, *others = found[ranks]
    assert [record.strategy for record in first["records"]] == ["neighbours", "apb", "full"]
    assert first["records"][0].asked == {"strategy": "neighbours", "blocks": 5, "reach": 6}
    assert first["records"][1].compressor == "stride"
    assert first["records"][1].asked["step"] == 5
    assert first["records"][2].asked == {"strategy": "full", "decode": "nearest", "last": 12}
    assert not first["records"][2].exact
    assert all(other["records"] == [] for other in others)


def test_fidelity() -> None:
    """The share of attention that its rows still see is that of the mask; one that does not say what its rows see is
    refused, not guessed."""
    engine = apb.Engine.from_model(work.model(), byte_tokenizer(), strategy="full")
    few, all_seen = measure(engine, PROMPT, [Setting(METHOD), Setting(Neighbours(blocks=5, reach=83))], rows=30)
    assert 0 < few.mass[0][0] < all_seen.mass[0][0] <= 1
    assert few.strategy == "neighbours"
    with pytest.raises(apb.InputError, match=r"'silent' does not say which keys its rows see"):
        measure(engine, PROMPT, [Setting(Silent(blocks=5))], rows=5)
    engine.close()


class Silent(Neighbours):
    """A method whose strategy keeps to itself what its rows see."""

    name = "silent"
    implementation = "extension.neighbours:SilentAttention"


def test_options_are_checked() -> None:
    """A value below an option's least is refused with the option's name, when the object is made."""
    for make in (lambda: Neighbours(reach=-1), lambda: Stride(step=0), lambda: type(DECODING)(last=0)):
        with pytest.raises(apb.InputError, match="must be at least"):
            make()


def test_a_compressor_whose_scores_do_not_compare() -> None:
    """It passes pairs on, but cannot choose between those of several blocks: refused before anything runs."""
    with pytest.raises(apb.InputError, match=r"budget of 9 pairs .* 'stride' has none; leave the budget out"):
        apb.Engine.from_model(work.model(), strategy=apb.methods.APB(passing_budget=9), compressor=STRIDE)
    with pytest.raises(apb.InputError, match="'stride' has none"):
        Reading.of("auto", approximate=True, passing_budget=9, compressor=STRIDE)
