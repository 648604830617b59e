"""Bytes sent, and which of them leave a host: by hand, and against rings that are walked step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.planning.cost import Ceilings, ModelShape, predict
from apb.planning.methods import METHODS
from apb.planning.plan import Plan
from apb.planning.traffic import Hosts, Sent
from shapes import SMALL

QUERY = 3 * 2 * 4 * 17 * 4  # to three others, two rows


def traffic(strategy: str, ranks_per_host: int | None, shape: ModelShape = SMALL) -> list[tuple[int, int]]:
    """(sent, leaving) of every rank and of one layer: 80 tokens of document, two of query, four ranks, one round."""
    sizes = {"blocks": 4, "anchor_length": 8, "passing_length": 3} if strategy == "apb" else {}
    plan = Plan.build(0, 80, 2, ranks=4, strategy=strategy, **sizes)
    ranks = predict(plan, shape, ranks_per_host=ranks_per_host).ranks
    assert all(rank.sent_bytes % shape.layers == rank.network_bytes % shape.layers == 0 for rank in ranks)
    return [(rank.sent_bytes // shape.layers, rank.network_bytes // shape.layers) for rank in ranks]


def test_ring_by_hand() -> None:
    """Twenty rows a rank go round three times; of each host of two the second rank's go to the other host."""
    document = 3 * 20 * 64 * 2
    total = document + QUERY
    assert traffic("ring", 2) == [
        (total, QUERY // 2),
        (total, document + QUERY // 2),
        (total, QUERY // 2),
        (total, document + QUERY // 2),
    ]
    assert traffic("ring", 1) == [(total, total)] * 4


def test_ulysses_by_hand() -> None:
    """To each other rank: q, k, v of 20 rows for its one head, and the outputs of its 20 rows; two are elsewhere."""
    each = (20 * 3 + 20) * 16 * 2
    assert traffic("ulysses", 2) == [(3 * each + QUERY, 2 * each + QUERY // 2)] * 4


def test_apb_by_hand() -> None:
    """A rank gives two rows of the anchor and three passed pairs to the all-gather; two adapters share what leaves."""
    document = 3 * (2 + 3) * 64 * 2
    assert traffic("apb", 2) == [(document + QUERY, (document + QUERY) // 2)] * 4


def test_halos_by_hand() -> None:
    """Sliding layers of ring: chunks 0..7 of ten rows on ranks 0 1 2 3 3 2 1 0; a window of 4 needs three keys of the
    chunk before. Of the boundaries only 1|2 and 5|6, between ranks 1 and 2, lie between hosts."""
    sliding = traffic("ring", 2, ModelShape(**{**vars(SMALL), "reach": (4, 4, 4)}))
    piece = 3 * 64 * 2
    # Rank 0 gives chunk 0's end; 1 those of 1 and 6; 2 of 2 and 5; 3 of 4 alone, to rank 2, and of 3 to itself.
    assert sliding == [
        (1 * piece + QUERY, QUERY // 2),
        (2 * piece + QUERY, 1 * piece + QUERY // 2),
        (2 * piece + QUERY, 1 * piece + QUERY // 2),
        (1 * piece + QUERY, QUERY // 2),
    ]


@pytest.mark.parametrize("strategy", METHODS)
def test_on_one_host_nothing_leaves(strategy: str) -> None:
    """However many ranks a host could have; and how they are spread changes nothing in what is sent in all."""
    together = traffic(strategy, None)
    assert [leaving for _, leaving in together] == [0] * 4
    assert traffic(strategy, 4) == traffic(strategy, 9) == together
    for ranks_per_host in (1, 2, 3):
        apart = traffic(strategy, ranks_per_host)
        assert [sent for sent, _ in apart] == [sent for sent, _ in together]
        assert all(0 < leaving <= sent for sent, leaving in apart)


@given(hosts=st.integers(2, 5), size=st.integers(1, 8), piece=st.integers(1, 9))
def test_gather_as_rings(hosts: int, size: int, piece: int) -> None:
    """As many rings as a host has devices, each leaving a host from another one: walked hop by hop, every device
    sends what is predicted, in all and through its adapter."""
    ranks = hosts * size
    total, leaving = [0] * ranks, [0] * ranks
    for ring in range(size):
        order = [host * size + (ring + 1 + step) % size for host in range(hosts) for step in range(size)]
        for place, rank in enumerate(order):
            following = order[(place + 1) % ranks]
            total[rank] += (ranks - 1) * piece  # a size-th of every rank's bytes but one
            leaving[rank] += (ranks - 1) * piece * (following // size != rank // size)
    expected = Hosts(ranks, size).gather(piece * size)
    assert total == [expected.total] * ranks
    assert leaving == [expected.leaving] * ranks


def test_a_last_host_with_fewer_devices() -> None:
    """Ten ranks on hosts of eight: the rings are as many as the second host's two devices."""
    assert Hosts(10, 8).gather(100) == Sent(900, 450)


def test_the_slower_link_counts() -> None:
    """Sixty-four ranks of ring attention: the boundary's adapter, at a quarter of the link, sets the pace; of apb's
    all-gather an adapter carries an eighth, and seven eighths on the link take longer."""
    ceilings = Ceilings(linear=1e12, attention=1e12, link=200.0, network=50.0)
    ring = predict(Plan.build(0, 6400, 2, ranks=64, strategy="ring"), SMALL, ranks_per_host=8)
    query = 3 * 63 * QUERY // 3
    document = 3 * 63 * 100 * 64 * 2
    assert ring.ranks[7].sending_seconds(ceilings) == pytest.approx((document + query / 8) / 50)
    assert ring.ranks[0].sending_seconds(ceilings) == pytest.approx((document + query * 7 / 8) / 200)
    apb = predict(Plan.build(0, 6400, 2, ranks=64, blocks=64, strategy="apb"), SMALL, ranks_per_host=8).ranks[0]
    assert apb.network_bytes * 8 == apb.sent_bytes
    assert apb.sending_seconds(ceilings) == pytest.approx(apb.sent_bytes * 7 / 8 / 200)
    slow = Ceilings(linear=1e12, attention=1e12, link=200.0, network=20.0)
    assert apb.sending_seconds(slow) == pytest.approx(apb.sent_bytes / 8 / 20)
