"""Several ranks read what one does: the oracle's numbers, the same on all ranks, with the bytes that were predicted."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import families
import rank_work
import ropes
from apb.errors import DoesNotFit, InputError, RankError
from apb.hf.counting import model_shape
from apb.planning.cost import predict
from apb.planning.plan import Plan
from apb.planning.shape import ModelShape
from cases import CASES, check
from chosen import attended, chosen
from forked import launch
from rank_work import DECODED, EXACT_ANSWER, LONG, SIZES, Record, cases, peculiar

# All ranks' work is done before the first test, which is charged for it.
pytestmark = pytest.mark.timeout(900)
Records = dict[int, list[Record]]
GROUPS = [(size, name) for size in SIZES for name in cases(size)]
PECULIAR = [(size, *case) for size in SIZES for case in peculiar(size)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """{size: the records of the ranks of the group of that size}."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(rank_work.everything, max(SIZES), str(folder))
    loaded = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(max(SIZES))]
    return {size: [loaded[rank][size] for rank in range(size)] for size in SIZES}


def plan_of(name: str, size: int) -> Plan:
    case = CASES[name]
    return Plan.build(
        case.prefix,
        case.document,
        case.query,
        blocks=case.blocks,
        ranks=size,
        anchor_length=case.anchor_length,
        passing_length=case.passing_length,
        passing_budget=case.passing_budget,
        rounds=case.rounds,
        strategy=case.strategy,
    )


@cache
def shape_of(family: str) -> ModelShape:
    return model_shape(families.make(*families.PECULIAR[family]).config)


def ran(records: Records, size: int, name: str) -> list[Record]:
    """The records of a case; skips nothing: a case that was refused must be one that cannot be run so."""
    refused = {record.refused.get(name) for record in records[size]}
    assert refused == {None}, refused
    return records[size]


@pytest.mark.parametrize(("size", "name"), GROUPS)
def test_against_the_oracle(records: Records, size: int, name: str) -> None:
    """Fewer, as many and more blocks than ranks: rank 0 has the oracle's logits, cache in document order and decode."""
    check(ran(records, size, name)[0].outcomes[name], name)


@pytest.mark.parametrize(("size", "name"), GROUPS)
def test_all_ranks_agree(records: Records, size: int, name: str) -> None:
    """Logits are the same to the bit on all ranks, after prefill and in decode; only rank 0 gathers the cache."""
    first, *others = (record.outcomes[name] for record in ran(records, size, name))
    for outcome in others:
        assert torch.equal(outcome.logits, first.logits)
        assert torch.equal(outcome.decoded, first.decoded)
        assert outcome.keys == outcome.values == [None] * 3


@pytest.mark.parametrize(("size", "name"), GROUPS)
def test_bytes_are_those_predicted(records: Records, size: int, name: str) -> None:
    """Every rank sends and keeps what the plan's cost says: to the byte."""
    case = CASES[name]
    cost = predict(plan_of(name, size), model_shape(case.model().config), element_bytes=4)
    for rank, record in zip(cost.ranks, ran(records, size, name), strict=True):
        assert record.cached[name] == rank.cache_bytes
        assert record.sent[name] == rank.sent_bytes


@pytest.mark.parametrize("reading", rank_work.WIDE, ids=str)
@pytest.mark.parametrize("size", SIZES[1:])
def test_memory_is_that_predicted(records: Records, size: int, reading: tuple[str, int | None, int | None]) -> None:
    """What is alive at once at the widest moment of the rank that needs most, storage by storage: to a few percent."""
    strategy, blocks, budget = reading
    count = None if blocks is None else blocks * size
    plan = Plan.build(0, rank_work.WIDE_DOCUMENT, 2, blocks=count, ranks=size, strategy=strategy, passing_budget=budget)
    ranks = predict(plan, model_shape(rank_work.wide_model().config)).ranks
    predicted = max(rank.cache_bytes + rank.activation_bytes for rank in ranks)
    counted = max(record.alive[reading] for record in records[size])
    assert 0.97 < predicted / counted < 1.04


@pytest.mark.parametrize("size", SIZES)
def test_generated_text_is_the_same_everywhere(records: Records, size: int) -> None:
    """With a seed and without one, all ranks give the same answer; with one, any number of ranks does; the stream is
    the text; an EOS ends it on all ranks, as do scores that are no numbers, by the same sentence; timing and memory are
    told alike."""
    first, *others = (record.generated for record in records[size])
    for other in others:
        assert other == first
    assert first["streamed"] == first["drawn"]["text"]
    assert first["drawn"]["token_ids"] == records[1][0].generated["drawn"]["token_ids"]
    assert first["drawn"]["plan"]["ranks"] == size
    assert len(first["unseeded"]) == 24
    assert first["cold"] == first["greedy"]
    assert "the attention of layer 1 was the first" in first["broken"]
    assert first["stopped"]["finish_reason"] == "stop"
    assert first["stopped"]["token_ids"] == first["drawn"]["token_ids"][: len(first["stopped"]["token_ids"])]


@pytest.mark.parametrize("size", SIZES[1:])
def test_exact_strategies_are_full_attention(records: Records, size: int) -> None:
    """Ring and ulysses, groups of 1, 4 and 8, documents of 2 to 1,499 tokens: logits to 1e-4, the answer the same."""
    full = {key[:3]: result for key, result in records[1][0].exact.items()}
    assert len(records[size][0].exact) == 2 * len(full)
    for key, (logits, tokens) in records[size][0].exact.items():
        expected_logits, expected_tokens = full[key[:3]]
        assert (logits - expected_logits).abs().max().item() < 1e-4, key
        assert tokens == expected_tokens, key
        assert len(tokens) == EXACT_ANSWER


@pytest.mark.parametrize("size", SIZES)
def test_scores_are_those_of_one_rank(records: Records, size: int) -> None:
    """Tokens that may follow are scored alike on all ranks, and leave nothing behind on the one that keeps new ones."""
    for record in records[size]:
        assert len(record.scored) == 4
        for mine, first, alone in zip(record.scored, records[size][0].scored, records[1][0].scored, strict=True):
            assert torch.equal(mine, first)
            torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_documents_answer_as_on_one_rank(records: Records, size: int) -> None:
    """Questions in a row, one of them kept: the same on all ranks, under exact strategies as under full attention on
    one; a document's own question is answered as a prompt is."""
    wanted = records[1][0].asked
    for record in records[size]:
        assert record.asked.keys() >= {"ring", "apb"}
        for strategy, said in record.asked.items():
            expected = wanted[strategy if strategy == "apb" else "full"]
            for mine, first, alone in zip(said, records[size][0].asked[strategy], expected, strict=True):
                if isinstance(mine, list):
                    assert mine == first == alone
                else:
                    assert torch.equal(mine, first)
                    torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(said[-1], said[0], rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_documents_on_disk_serve_any_number_of_ranks(records: Records, size: int) -> None:
    """Written by 1 rank, read and written by 2, and so on: what one rank said when it had read the text."""
    wanted = records[1][0].stored
    for record in records[size]:
        assert record.stored.keys() == {"ring", "apb", rank_work.WINDOWS}
        for strategy, said in record.stored.items():
            for mine, alone in zip(said, wanted[strategy], strict=True):
                if isinstance(mine, list):
                    assert mine == alone
                else:
                    torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pages", "squeezed"])
@pytest.mark.parametrize("size", SIZES)
def test_each_rank_chooses_among_its_own(records: Records, size: int, name: str) -> None:
    """Every layer's merged output is the softmax over what a numpy reference chooses in each shard, alike on all."""
    found = [record.chosen[name] for record in records[size]]
    for layers in zip(*(each.layers for each in found), strict=True):
        shards = [(k, v) for _, k, v, _ in layers]
        q, scale = layers[0][0], layers[0][0].shape[-1] ** -0.5
        assert sum(len(k) for k, _ in shards) == len(LONG) + 1
        seen = [chosen(DECODED[name], q, k, scale, own=rank == size - 1) for rank, (k, _) in enumerate(shards)]
        assert all(not each.all() and each.any() for each in seen)
        k, v = (torch.cat(parts) for parts in zip(*shards, strict=True))
        expected = torch.from_numpy(attended(q, k, v, scale, np.concatenate(seen, 1)))
        for _, _, _, out in layers:
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(each.logits, found[0].logits) for each in found)
    assert all(each.share < 0.85 for each in found)


@pytest.mark.parametrize("name", ["all pages", "all clusters", "streamed", "all fetched"])
@pytest.mark.parametrize("size", SIZES)
def test_all_keys_of_all_ranks_are_exact(records: Records, size: int, name: str) -> None:
    """A budget of everything, and all of it from host memory, on any number of ranks: one rank's exact logits, and the
    share that is told is 1."""
    wanted = records[1][0].chosen["exact"].logits
    for record in records[size]:
        torch.testing.assert_close(record.chosen[name].logits, wanted, rtol=1e-4, atol=1e-4)
        assert record.chosen[name].share == 1


@pytest.mark.parametrize("size", SIZES)
def test_indexes_on_disk_are_those_of_the_shard(records: Records, size: int) -> None:
    """Written by other ranks they are made anew, of as many they come back."""
    for record in records[size]:
        assert len(record.indexed) == 12 and all(record.indexed)


def test_rope_that_changes_with_the_length(records: Records) -> None:
    """Prompt and answer on either side of where dynamic and longrope change: transformers' tokens, on both ranks."""
    first, second = (record.ropes for record in records[2])
    assert first == second
    assert first == {key: ropes.answer(key[0], key[2]) for key in first}
    assert len(first) == 2 * len(ropes.LENGTHS)


@pytest.mark.parametrize(("size", "family", "reading"), PECULIAR)
def test_peculiar_layers(records: Records, size: int, family: str, reading: str) -> None:
    """Windows whose halos travel, caps, sinks, latent attention, experts: what one rank gives, alike on all ranks."""
    first, *others = (record.peculiar[family, reading][0] for record in records[size])
    torch.testing.assert_close(first, families.expected(family, reading), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("size", "family", "reading"), PECULIAR)
def test_halos_are_those_predicted(records: Records, size: int, family: str, reading: str) -> None:
    """Every rank sends in prefill what the plan's cost says, sliding layers included: to the byte."""
    plan = Plan.build(3, 101, 6, ranks=size, **families.READINGS[reading])
    predicted = predict(plan, shape_of(family), element_bytes=4)
    sent = [record.peculiar[family, reading][1] for record in records[size]]
    assert sent == [rank.sent_bytes for rank in predicted.ranks]


@pytest.mark.parametrize("size", SIZES)
def test_captured_steps(records: Records, size: int) -> None:
    """What is replayed gives what running it gives, from every input, and sends as often."""
    for record in records[size]:
        assert [sent for _, _, sent in record.replayed] == [2 * (size > 1)] * 3
        for run, replayed, _ in record.replayed:
            assert torch.equal(run, replayed)


# These ranks run on the CPU, where kernels need the interpreter. With a GPU they are compiled for that, and tests/gpu
# runs such steps: ranks.py those of ranks, test_steps_on_gpu.py those with recurrent layers, on one.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


@pytest.mark.triton
@interpreted
@pytest.mark.parametrize("size", [2, 3])
def test_steps_by_graphs(records: Records, size: int) -> None:
    """Two sessions in turn, by graphs that some ranks capture later than others, and in one pass: what ordinary passes
    give, alike on all ranks, from messages of the same sizes."""
    for rank, record in enumerate(records[size]):
        (wanted, sent_wanted, never), (logits, sent, by_graphs) = record.stepped
        assert (logits - wanted).abs().max().item() < 1e-4
        assert torch.equal(logits, records[size][0].stepped[1][0])
        assert sent == sent_wanted
        assert never == [False] * 8
        assert by_graphs == [rank == 0, *[True] * 7]


@pytest.mark.triton
@interpreted
def test_states_by_graphs(records: Records) -> None:
    """As above, of a model with recurrent layers: the states of ordinary passes, to the bit alike on all ranks."""
    for rank, record in enumerate(records[2]):
        (wanted, sent_wanted, _), (found, sent, by_graphs) = record.carried
        for x, y, first in zip(found, wanted, records[2][0].carried[1][0], strict=True):
            assert (x - y).abs().max().item() < 1e-4
            assert torch.equal(x, first)
        assert sent == sent_wanted
        assert by_graphs == [rank == 1, *[True] * 5]


@pytest.mark.parametrize("size", SIZES)
def test_collectives(records: Records, size: int) -> None:
    """Each collective gives every rank what its description says, views and empty tensors included."""
    mine = [torch.tensor([[10.0 * rank, 10.0 * rank + 1]]) for rank in range(size)]
    for rank, record in enumerate(records[size]):
        got = record.collectives
        assert torch.equal(got["all_gather"], torch.stack(mine))
        assert torch.equal(got["all_gather, waited twice"], torch.stack(mine))
        assert got["all_gather of nothing"].shape == (size, 2, 0, 3)
        view = torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])
        assert torch.equal(got["all_gather of a view"], torch.stack([view + other for other in range(size)]))
        assert torch.equal(got["shift"], mine[rank - 1])
        assert torch.equal(got["broadcast"], mine[0])
        assert torch.equal(got["broadcast of the last"], mine[-1])
        assert torch.equal(got["handed on"], torch.stack(mine[: rank + 1]).sum(0))
        assert [part.tolist() for part in got["all_to_all"]] == [
            [[10.0 * source + rank] * (rank + 1)] * (source + 1) for source in range(size)
        ]
        if rank == 0:
            assert torch.equal(torch.stack(got["gather"]), torch.stack(mine))
        else:
            assert got["gather"] is None


def test_a_rank_that_fails_ends_the_others() -> None:
    """A rank that fails while another waits for it: both end, and one sentence says which and why."""
    with pytest.raises(RankError, match=r"^Rank 1 of 2 failed: ValueError: the reason; the other ranks were ended\.$"):
        launch(rank_work.fail_on_rank_1, 2, ValueError)


def test_a_rank_that_ends_without_a_word() -> None:
    """Its status is all that is known of it."""
    with pytest.raises(RankError, match=r"^Rank 1 of 2 ended with status 3; the other ranks were ended\.$"):
        launch(rank_work.exit_on_rank_1, 2)


def test_a_rank_that_is_stopped_is_killed() -> None:
    """By one that has waited for a sign of life: torch alone would wait half a minute for it to heed SIGTERM."""
    with pytest.raises(RankError, match=r"^Rank 1 of 2 was killed by SIGKILL"):
        launch(rank_work.stop_on_rank_1, 2)


@pytest.mark.parametrize("error", [InputError, DoesNotFit])
def test_what_only_a_rank_finds_wrong_is_still_wrong_input(error: type[InputError]) -> None:
    """An InputError of any kind that a rank raises comes out of the launcher as one, with its own sentence."""
    with pytest.raises(InputError, match=r"^the reason\.$"):
        launch(rank_work.fail_on_rank_1, 2, error)


def test_records_are_of_different_plans(records: Records) -> None:
    """A check of the checks: the groups did read in different ways."""
    sent = {size: records[size][0].sent["five blocks"] for size in SIZES}
    assert len(set(sent.values())) == len(SIZES)
