"""Ranks on hosts, and the share of a rank's sent bytes that leaves its host.

Devices of a host are connected by one kind of link, hosts by another, where every device has its own network adapter.
Three patterns occur, and each crosses hosts in its own way:

- all-gather (apb's anchor and passed pairs, the query's partial results): NCCL runs it as rings, as many per host as
  the host has devices. Each leaves through a different device's adapter, so an adapter carries that share of the bytes
  that a device sends.
- shift (ring attention): a rank sends to the next one. One rank of each host has its neighbour on another host, so all
  its bytes leave through its adapter; the others wait for it in every step.
- all-to-all (ulysses, halos of sliding windows): the bytes for ranks on other hosts leave through the sender's adapter.
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
        """True if two ranks are on different hosts."""
        return self.size is not None and rank // self.size != other // self.size

    def gather(self, bytes_each: int) -> Sent:
        """Bytes that a rank sends in an all-gather of ``bytes_each`` from every rank."""
        total = (self.ranks - 1) * bytes_each
        if self.size is None or self.ranks <= self.size:
            return Sent(total)
        return Sent(total, -(-total // (self.ranks % self.size or self.size)))  # as many rings as the smallest host has

    def scatter(self, rank: int, bytes_to: list[int]) -> Sent:
        """Bytes that a rank sends in an all-to-all with ``bytes_to[r]`` for rank r."""
        others = [other for other in range(self.ranks) if other != rank]
        leaving = sum(bytes_to[other] for other in others if self.apart(rank, other))
        return Sent(sum(bytes_to[other] for other in others), leaving)
