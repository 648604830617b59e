"""Ranks on hosts, and which of the bytes a rank sends leave its host.

Inside a host devices reach each other over one kind of link, between hosts over another, where every device has a
network adapter of its own. Three patterns occur, and each crosses hosts in its own way:

- all-gather (apb's anchor and passed pairs, the query's partial results): NCCL runs it as rings. A host has as many as
  it has devices, each leaving through another one's adapter, so that an adapter carries that share of what a device
  sends in all.
- shift (ring attention): a rank sends to the next one. Of each host one rank has its neighbour on another, and all
  that it sends leaves through its adapter; in every step the others wait for it.
- all-to-all (ulysses, halos of sliding windows): what is meant for ranks on other hosts leaves, through the sender's
  adapter.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends, and those of them that leave its host through its adapter."""

    total: int = 0
    leaving: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.total + other.total, self.leaving + other.leaving)

    def __mul__(self, times: int) -> Sent:
        return Sent(self.total * times, self.leaving * times)


@dataclass(frozen=True)
class Hosts:
    """Consecutive ranks share a host, ``size`` of them or all; the last host may have fewer."""

    ranks: int
    size: int | None = None

    def apart(self, rank: int, other: int) -> bool:
        """Whether two ranks are on different hosts."""
        return self.size is not None and rank // self.size != other // self.size

    def gather(self, bytes_each: int) -> Sent:
        """What a rank sends in an all-gather to which every rank gives so many bytes."""
        total = (self.ranks - 1) * bytes_each
        if self.size is None or self.ranks <= self.size:
            return Sent(total)
        return Sent(total, -(-total // (self.ranks % self.size or self.size)))  # as many rings as the smallest host has

    def scatter(self, rank: int, bytes_to: list[int]) -> Sent:
        """What a rank sends in an all-to-all with so many bytes for every rank."""
        others = [other for other in range(self.ranks) if other != rank]
        leaving = sum(bytes_to[other] for other in others if self.apart(rank, other))
        return Sent(sum(bytes_to[other] for other in others), leaving)
