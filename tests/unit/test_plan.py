"""The plan: who computes which rows. Properties over many plans, the paper's defaults, and every refusal."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import apb
from apb.errors import InputError
from apb.planning.cost import predict
from apb.planning.itinerary import Kind
from apb.planning.methods import METHODS
from apb.planning.plan import Plan
from shapes import LLAMA_8B


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of every kind: fewer and more blocks than ranks, anchors shorter and longer than a block, any rounds."""
    prefix, document, query = draw(st.integers(0, 6)), draw(st.integers(1, 400)), draw(st.integers(1, 12))
    blocks = draw(st.integers(1, min(document, 24)))
    strategy = draw(st.sampled_from(["apb", "star"]))
    # star's anchor is the beginning of the first block
    shortest, longest = (
        (prefix + query, prefix + query + 450) if strategy == "apb" else (0, prefix + document // blocks)
    )
    return Plan.build(
        prefix,
        document,
        query,
        blocks=blocks,
        ranks=draw(st.integers(1, 9)),
        rounds=draw(st.integers(1, blocks)),
        anchor_length=draw(st.none() | st.integers(shortest, longest)),
        passing_length=draw(st.none() | st.integers(0, 60)),
        passing_budget=draw(st.none() | st.integers(1, 300)),
        strategy=strategy,
    )


def block_spans(plan: Plan) -> list[tuple[int, int, int, int]]:
    """(block, rank, start, stop) of every block span of every rank and round."""
    return [
        (span.block, rank, span.start, span.stop)
        for rank in range(plan.ranks)
        for round in range(plan.rounds)
        for span in plan.spans(rank, round)
        if span.kind is Kind.BLOCK
    ]


@given(plans())
def test_blocks_are_numpys_slices(plan: Plan) -> None:
    """Document slices are those of numpy.array_split, and block 0 also holds the prefix."""
    slices = np.array_split(np.arange(plan.prefix, plan.query_start), plan.blocks)
    for index, expected in enumerate(slices):
        block = plan.block(index)
        assert (block.start if index else plan.prefix, block.stop) == (expected[0], expected[-1] + 1)
        assert len(block) == len(expected) + (0 if index else plan.prefix)
    assert plan.block(0).start == 0


@given(plans())
def test_every_document_row_is_computed_once(plan: Plan) -> None:
    """Over all ranks and rounds the block spans tile prefix and document: every row has exactly one owner."""
    spans = sorted(block_spans(plan))
    assert [span[0] for span in spans] == list(range(plan.blocks))
    edges = [0, *(stop for _, _, _, stop in spans)]
    assert [start for _, _, start, _ in spans] == edges[:-1]
    assert edges[-1] == plan.query_start
    assert all(plan.block(index).rank == rank for index, rank, _, _ in spans)


@given(plans())
def test_owned_is_the_ranks_blocks_in_order(plan: Plan) -> None:
    """`owned` gives what `block().rank` says, ascending, whether or not there are more ranks than blocks."""
    for rank in range(plan.ranks):
        expected = [index for index in range(plan.blocks) if plan.block(index).rank == rank]
        assert [block.index for block in plan.owned(rank)] == expected


@given(plans())
def test_anchor_shares_tile_the_anchor(plan: Plan) -> None:
    """The ranks' shares of the anchor's rows follow each other from 0 to its end and differ by one row at most. Only
    star, which sends nothing, computes it anew on every rank that has blocks but not block 0."""
    shares = [plan.anchor_share(rank) for rank in range(plan.ranks)]
    if plan.strategy == "star":
        owned = [[block.index for block in plan.owned(rank)] for rank in range(plan.ranks)]
        assert shares == [(0, plan.anchor_length if blocks and 0 not in blocks else 0) for blocks in owned]
    else:
        edges = [0, *(stop for _, stop in shares)]
        assert [start for start, _ in shares] == edges[:-1]
        assert edges[-1] == plan.anchor_length
        lengths = [stop - start for start, stop in shares]
        assert max(lengths) - min(lengths) <= 1
    seen = [
        (span.start, span.stop)
        for rank in range(plan.ranks)
        for round in range(plan.rounds)
        for span in plan.spans(rank, round)
        if span.kind is Kind.ANCHOR
    ]
    assert seen == (shares if plan.anchor_length else [])


@given(plans())
def test_spans_tile_a_ranks_rows(plan: Plan) -> None:
    """A rank's spans follow each other in rows without gap, and end with the query's rows on every rank."""
    for rank in range(plan.ranks):
        for round in range(plan.rounds):
            spans = plan.spans(rank, round)
            row = 0
            for span in spans:
                assert span.rows == slice(row, row + len(span))
                assert len(span) == span.stop - span.start
                row += len(span)
            assert (spans[-1].kind, spans[-1].start, spans[-1].stop) == (Kind.QUERY, plan.query_start, plan.total)


@given(plans())
def test_rounds_hold_consecutive_blocks(plan: Plan) -> None:
    """Blocks of a later round come after those of an earlier one, and no round is empty."""
    rounds = [plan.block(index).round for index in range(plan.blocks)]
    assert rounds == sorted(rounds)
    assert set(rounds) == set(range(plan.rounds))


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 200))
def test_snake_order_pairs_early_with_late(ranks: int, turns: int, extra: int) -> None:
    """With H a multiple of 2R every rank's block indices have the same sum, so every rank sees as many passed pairs."""
    blocks = 2 * ranks * turns
    plan = Plan.build(0, blocks + extra, 1, blocks=blocks, ranks=ranks)
    sums = {sum(block.index for block in plan.owned(rank)) for rank in range(ranks)}
    assert sums == {turns * (blocks - 1)}


@given(st.integers(1, 12), st.integers(1, 60))
def test_blocks_per_rank_differ_by_one_at_most(ranks: int, blocks: int) -> None:
    """No rank gets two blocks more than another."""
    plan = Plan.build(0, 60, 1, blocks=blocks, ranks=ranks)
    counts = Counter(plan.block(index).rank for index in range(blocks))
    assert max(counts.values()) - min(counts[rank] for rank in range(ranks)) <= 1


@given(plans())
def test_anchored_tokens_are_never_passed(plan: Plan) -> None:
    """A block's selectable tokens are those whose true position stands in no anchor; it passes no more than these."""
    inserted = plan.query if plan.strategy == "apb" else 0  # the query's tokens in the anchor are no document tokens
    in_anchor = range(max(plan.anchor_length - inserted, 0))
    for index in range(plan.blocks):
        block = plan.block(index)
        free = [position for position in range(block.start, block.stop) if position not in in_anchor]
        assert plan.selectable(block) == len(free)
        assert not free or free[-1] == block.stop - 1  # so "the last selectable ones" are the free ones
        expected = 0 if index == plan.blocks - 1 else min(plan.passing_length, len(free))
        assert plan.passed(index) == expected


@given(plans())
def test_contexts_are_anchor_and_what_was_passed(plan: Plan) -> None:
    """Block 0 sees nothing but itself; block h the anchor and what blocks 0 .. h-1 pass on, within the budget. Pairs
    compete where that leaves some out."""
    offered = [sum(plan.passed(earlier) for earlier in range(index)) for index in range(plan.blocks)]
    budget = plan.method.passing_budget
    seen = [pairs if budget is None else min(pairs, budget) for pairs in offered]
    assert list(plan.contexts()) == [0] + [plan.anchor_length + pairs for pairs in seen[1:]]
    assert plan.competing == (budget if seen != offered else None)


@pytest.mark.parametrize("strategy", METHODS)
def test_one_block_is_exact(strategy: str) -> None:
    """With one block there is nothing to approximate: no anchor, nothing passed, exact."""
    plan = Plan.build(2, 5000, 10, blocks=1, anchor_length=500, passing_length=50, strategy=strategy)
    assert (plan.anchor_length, plan.passing_length, plan.exact, plan.anchored) == (0, 0, True, 0)
    assert Plan.build(2, 50_000, 10, blocks=3, strategy=strategy).exact is METHODS[strategy].exact


@pytest.mark.parametrize("wrong", [{"blocks": 0}, {"anchor_length": -1}, {"passing_length": -5}])
@pytest.mark.parametrize("strategy", METHODS)
def test_impossible_sizes_are_refused_whatever_the_strategy(strategy: str, wrong: dict[str, int]) -> None:
    """A size below its least is wrong also where the strategy, or a single block, makes no use of it."""
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        Plan.build(2, 100, 10, **{"blocks": 1, "strategy": strategy} | wrong)


def test_star_takes_the_whole_first_block_and_passes_nothing() -> None:
    """Star's anchor is block 1 (prefix and first slice) by default, any beginning of it on request; nothing passed."""
    plan = Plan.build(3, 101, 10, blocks=4, passing_length=9, strategy="star")
    assert (plan.anchor_length, plan.anchored, plan.passing_length) == (3 + 26, 3 + 26, 0)
    assert Plan.build(3, 101, 10, blocks=4, anchor_length=5, strategy="star").contexts() == (0, 5, 5, 5)


# --- defaults ------------------------------------------------------------------------------------------------------

K = 1024


@pytest.mark.parametrize(
    ("document", "blocks", "anchor_length", "passing_length"),
    [
        (32 * K, 8, 1 * K, K // 2),
        (64 * K, 8, 2 * K, 1 * K),
        (128 * K, 8, 4 * K, 2 * K),
        (256 * K, 8, 8 * K, 4 * K),
        (512 * K, 8, 8 * K, 8 * K),
        (1024 * K, 8, 8 * K, 8 * K),
        (32 * K, None, K // 2, K // 4),
    ],
)
def test_default_lengths_are_the_papers_table(
    document: int, blocks: int | None, anchor_length: int, passing_length: int
) -> None:
    """Anchor = block / 4 and passing = block / 8, both capped at 8K (paper, table 8, which has eight blocks)."""
    plan = Plan.build(prefix=4, document=document, query=30, blocks=blocks)
    assert (plan.anchor_length, plan.passing_length) == (anchor_length, passing_length)
    assert plan == Plan.build(
        4, document, 30, blocks=plan.blocks, anchor_length=anchor_length, passing_length=passing_length
    )


@pytest.mark.parametrize(
    ("document", "apb"), [(8 * K, 8), (16 * K, 8), (18 * K, 9), (32 * K - 200, 16), (128 * K, 64), (1024 * K, 64)]
)
def test_default_blocks(document: int, apb: int) -> None:
    """APB's have about 2K tokens, but there are at least 8 and at most 64 of them; star has 8."""
    assert Plan.build(4, document, 30).blocks == apb
    assert Plan.build(4, document, 30, ranks=3).blocks == -(-apb // 3) * 3
    assert Plan.build(4, document, 30, strategy="star").blocks == 8


def test_short_documents_are_read_exactly_by_default() -> None:
    """Below 8192 document tokens the automatic choice is one block; from there on, eight."""
    assert Plan.build(4, 8191, 30).exact
    assert Plan.build(4, 8192, 30).blocks == 8


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 12])
def test_default_blocks_fill_all_ranks(ranks: int) -> None:
    """By default every rank gets as many blocks as any other, and there are at least eight."""
    plan = Plan.build(4, 100_000, 30, ranks=ranks)
    assert plan.blocks >= 8
    assert {len(list(plan.owned(rank))) for rank in range(ranks)} == {plan.blocks // ranks}


def test_default_anchor_holds_a_long_query() -> None:
    """A question longer than a quarter of a block still fits into the default anchor."""
    plan = Plan.build(prefix=10, document=800, query=300, blocks=8)
    assert plan.anchor_length == 310


def test_an_anchor_is_cut_to_the_prompt() -> None:
    """The anchor holds no more tokens than there are."""
    assert Plan.build(2, 50, 3, blocks=2, anchor_length=999).anchor_length == 55


# --- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [10**7, 10**9])
def test_long_documents_cost_nothing_to_plan(document: int) -> None:
    """A plan of a billion tokens, and what it will cost, allocate no more than a plan of a thousand."""

    def work() -> Plan:
        plan = Plan.build(4, document, 30, blocks=1024, ranks=16)
        predict(plan, LLAMA_8B)
        return plan

    start = time.process_time()
    plan = work()
    seconds = time.process_time() - start
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.block(1023).stop == document + 4
    assert seconds < 2
    assert peak < 2e6


def test_planning_needs_no_torch() -> None:
    """`import apb` and a plan take under a second and import neither torch nor transformers nor numpy."""
    program = (
        "import sys, time; start = time.process_time(); import apb; "
        "apb.Plan.build(prefix=4, document=100_000, query=30, blocks=8, ranks=2); "
        "from apb.planning.cost import predict; "
        "seconds = time.process_time() - start; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); assert seconds < 1, seconds"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"blocks": 0}, ["Blocks", "at least 1", "0"]),
        ({"blocks": -3}, ["Blocks", "at least 1", "-3"]),
        ({"blocks": 2.5}, ["blocks", "whole number", "2.5"]),
        ({"blocks": True}, ["blocks", "whole number", "True"]),
        ({"blocks": "4"}, ["blocks", "whole number", "'4'"]),
        ({"blocks": 101}, ["101 blocks", "100 tokens", "at most 100"]),
        ({"document": 0}, ["Document", "at least 1", "0"]),
        ({"document": -1}, ["Document", "at least 1", "-1"]),
        ({"query": 0}, ["Query", "at least 1", "0"]),
        ({"prefix": -1}, ["Prefix", "at least 0", "-1"]),
        ({"ranks": 0}, ["Ranks", "at least 1", "0"]),
        ({"ranks": 1.0}, ["ranks", "whole number", "1.0"]),
        ({"rounds": 0}, ["Rounds", "at least 1", "0"]),
        ({"rounds": 5}, ["5 rounds", "4"]),
        ({"rounds": 2, "strategy": "ring"}, ["'ring'", "one round", "apb or star"]),
        ({"anchor_length": 11}, ["11 tokens", "prefix (2)", "query (10)", "at least 12"]),
        ({"anchor_length": -1}, ["Anchor length", "at least 0", "-1"]),
        ({"anchor_length": 20.5}, ["anchor", "whole number", "20.5"]),
        ({"anchor_length": 28, "strategy": "star"}, ["28 tokens", "first block", "27 tokens"]),
        ({"anchor_length": -1, "strategy": "star"}, ["Anchor length", "at least 0", "-1"]),
        ({"passing_length": -1}, ["Passing length", "at least 0", "-1"]),
        ({"passing_length": 3.5}, ["passing length", "whole number", "3.5"]),
        ({"strategy": "magic"}, ["'magic'", "apb", "full"]),
    ],
)
def test_refusals_name_the_value_and_a_way_out(changes: dict[str, object], fragments: list[str]) -> None:
    """A request that cannot be planned raises InputError: one sentence with the value and the limit or the choices."""
    request = {"prefix": 2, "document": 100, "query": 10, "blocks": 4, "anchor_length": 20, "passing_length": 5}
    Plan.build(**request)  # type: ignore[arg-type]
    with pytest.raises(apb.InputError) as refusal:
        Plan.build(**{**request, **changes})  # type: ignore[arg-type]
    message = str(refusal.value)
    assert all(fragment in message for fragment in fragments), message
    assert message.endswith(".")
    assert "\n" not in message


def test_a_plan_cannot_be_changed() -> None:
    """Plans are immutable, and equal requests give equal plans."""
    plan = Plan.build(2, 100, 10, blocks=4)
    with pytest.raises(AttributeError):
        plan.blocks = 5  # type: ignore[misc]
    assert plan == Plan.build(2, 100, 10, blocks=4)
    assert hash(plan) == hash(Plan.build(2, 100, 10, blocks=4))


@pytest.mark.parametrize("index", [-1, 4])
def test_there_is_no_block_outside(index: int) -> None:
    """Block numbers run from 0 to H - 1; no wrapping around."""
    with pytest.raises(IndexError):
        Plan.build(2, 100, 10, blocks=4).block(index)
