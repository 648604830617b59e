"""The strategy "auto": what it chooses, and why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from apb import Engine, InputError, Prompt
from apb.compressors import Query
from apb.hardware import Hardware
from apb.hf.cache_names import with_cache
from apb.planning.cost import Ceilings, predict
from apb.planning.fitting import check_memory, peak
from apb.planning.plan import Plan
from apb.reading import Reading
from models import tiny_model
from shapes import LLAMA_8B

GPU = Hardware(memory=141 * 10**9, element_bytes=2, ceilings=Ceilings(linear=7e14, attention=6e14, link=2e11))


def choose(document, ranks=1, hardware=GPU, **options):
    return Reading.of("auto", **options).choose((1, document, 30), ranks, LLAMA_8B, hardware)


def test_short_documents_are_read_in_full():
    """Below 8K tokens nothing is gained by cutting, whatever is allowed."""
    plan = choose(5000, approximate=True)
    assert plan.strategy == "full"
    assert choose(5000, ranks=2).strategy != "full"  # several ranks are there to share the work
    assert "8192" in plan.reason


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_only_exact_strategies_unless_allowed(ranks):
    """Without leave to approximate the choice is exact; several ranks take a parallel strategy."""
    plan = choose(131072, ranks)
    assert plan.exact
    assert plan.strategy in (("full", "ring") if ranks == 1 else ("ring", "ulysses"))
    assert "predicted fastest" in plan.reason


def test_approximate_wins_on_long_documents():
    """With leave, the cheapest by FLOPs is taken: at 512K that is not an exact one."""
    assert not choose(524288, ranks=2, approximate=True).exact


def test_a_class_is_no_strategy():
    """A method without its parentheses is refused with an example of an object."""
    with pytest.raises(InputError, match=r"apb\.methods\.APB\(blocks=8\), not <class"):
        Reading.of(type(choose(131072).method))


def test_ulysses_only_where_heads_divide():
    """Three ranks do not divide 32 heads."""
    assert "ulysses" not in choose(131072, 3).reason


def test_rounds_are_as_few_as_fit():
    """What does not fit at once is read in rounds, no more than needed; asked-for rounds stay, exact ones have one."""

    def rounds(gigabytes, strategy="apb", **options):
        reading = Reading.of(strategy, blocks=16, compressor="query", **options)
        return reading.choose((1, 1 << 19, 30), 1, LLAMA_8B, Hardware(gigabytes * 10**9, 2, None)).rounds

    fits = [rounds(gigabytes) for gigabytes in (300, 141, 105, 100)]
    assert fits[0] == 1
    assert fits == sorted(fits)
    assert 1 < fits[2] < 16
    assert rounds(300, rounds=4) == 4
    assert rounds(10) == rounds(10, "ring") == 1  # no number of rounds makes it fit


def test_what_does_not_fit_is_refused_with_the_numbers():
    """No strategy fits 20 GB: the sentence says what is needed and what there is."""
    small = Hardware(memory=20 * 10**9, element_bytes=2, ceilings=None)
    with pytest.raises(InputError, match=r"needs least, \d+\.\d GiB a rank, and a rank has 18\.6 GiB"):
        choose(131072, hardware=small)


def test_the_result_says_what_was_chosen():
    """The generation names the strategy and the reason; a strategy that the user named has none."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    prompt = Prompt.from_tokens([1], [5, 6, 7, 8, 9], [2, 3])
    result = Engine.from_model(model, strategy="auto").generate(prompt, max_new_tokens=2)
    assert result.strategy == "full"
    assert result.choice == "the document has fewer than 8192 tokens"
    assert Engine.from_model(model, strategy="full").generate(prompt, max_new_tokens=2).choice is None


def test_a_session_continues_in_transformers():
    """The cache handed over as transformers' own lets model.generate go on to the same tokens."""
    import torch

    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16)
    prompt = Prompt.from_tokens([1], [(37 * i + 11) % 97 for i in range(90)], [2, 3])
    for strategy, options in (("full", {}), ("apb", {"blocks": 4, "anchor_length": 9, "passing_length": 5})):
        engine = Engine.from_model(model, strategy=strategy, **options)
        expected = engine.generate(prompt, max_new_tokens=12).token_ids
        session = engine.prefill(prompt)
        first = int(session.logits.argmax())
        cache = session.to_dynamic_cache()
        engine.close()
        ids = torch.tensor([[*prompt.token_ids, first]])
        generated = model.generate(
            ids, **with_cache(model, cache), max_new_tokens=11, do_sample=False, eos_token_id=None
        )
        assert generated[0, len(prompt) :].tolist() == expected


def refusal(gigabytes, **sizes):
    """The sentence that refuses a plan for the 8B shape on a device of so many gigabytes."""
    plan = Plan.build(1, sizes.pop("document"), 30, **sizes)
    with pytest.raises(InputError) as refused:
        check_memory(plan, LLAMA_8B, Hardware(gigabytes * 10**9, 2, None), 64, Query())
    return str(refused.value)


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers():
    """What a rank needs, part by part, what it has, and the nearest plan that fits."""
    numbers = r"needs 1\d\d\.\d GiB a rank \(weights 15\.0 GiB, cache 64\.0 GiB, activations \d\d\.\d GiB\)"
    assert re.search(numbers + r", and a rank has 83\.8 GiB", refusal(90, document=1 << 19, strategy="full"))
    assert "'ring' with 4 blocks on 2 ranks" in refusal(90, document=1 << 19, strategy="full")
    assert re.search(r"'apb' with 16 blocks in \d+ rounds\.", refusal(100, document=1 << 19, blocks=16))
    plan = Plan.build(1, 1 << 19, 30, 16)
    least = peak(predict(replace(plan, rounds=16), LLAMA_8B, 2, Query()))
    with pytest.raises(InputError, match=r"'apb' with 16 blocks in 16 rounds\."):  # the most that there can be
        check_memory(plan, LLAMA_8B, Hardware(least, 2, None), 0, Query())
    shorter = refusal(20, document=1 << 24, strategy="star", blocks=8)
    document = int(re.search(r"at most ([\d,]+) tokens", shorter)[1].replace(",", ""))
    check_memory(Plan.build(1, document, 30, 8, strategy="star"), LLAMA_8B, Hardware(20 * 10**9, 2, None), 64, Query())
    assert "weights alone" in refusal(10, document=4096, strategy="full")


def test_what_fits_is_not_refused():
    """The same plan on a device with room for it."""
    plan = Plan.build(1, 1 << 17, 30, strategy="full")
    check_memory(plan, LLAMA_8B, GPU, 64, Query())


def test_an_engine_refuses_before_anything_runs(monkeypatch):
    """prefill raises the sentence; no row was computed."""
    monkeypatch.setattr(Hardware, "of", lambda *_: Hardware(10**5, 4, None))
    engine = Engine.from_model(tiny_model("llama", heads=4, kv_heads=2, head_dim=16), strategy="full")
    with pytest.raises(InputError, match=r"and a rank has 0\.0 GiB"):
        engine.prefill(Prompt.from_tokens([1], [2] * 500, [3]))
