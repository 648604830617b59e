"""What predicted seconds rest on: ceilings measured in one run, carried over to machines that were not there."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from .cost import KNOWN_CEILINGS, Ceilings

# The usual layout of hosts of eight GPUs: a network adapter for each of them, 400 Gbit/s.
RANKS_PER_HOST = 8
NETWORK_GBIT = 400.0


@dataclass(frozen=True)
class Basis:
    """Ceilings, and where each is from.

    Attributes:
        ceilings: the rates; ``link`` is 0 where none is known.
        sources: for every rate by name, where it is from.
        ranks: how many ranks the run had that they were measured in.
        run: that run's results, as ``apb bench prefill`` wrote them; None where the rates are those known of a device.
    """

    ceilings: Ceilings
    sources: dict[str, str]
    ranks: int
    run: dict[str, Any] | None = None

    @classmethod
    def of_device(cls, device: str, network_gbit: float) -> Basis | None:
        """What is known of a device by its name; None where nothing is."""
        known = KNOWN_CEILINGS.get(device)
        if known is None:
            return None
        sources = dict.fromkeys(("linear", "attention", "link", "memory"), f"known of {device}")
        return cls(known, sources, 2).with_network(network_gbit)

    @classmethod
    def of_run(cls, path: Path, network_gbit: float) -> Basis:
        """What ``apb bench prefill --out`` measured; a run on one rank has no link, and takes what is known of one."""
        run = _read(path)
        device, ranks = run["fingerprint"]["device"], run["ranks"] * run.get("tensor_parallel", 1)
        place = f"measured in {path.name} ({ranks} x {device}, {run['fingerprint']['dtype']})"
        ceilings = Ceilings(**{name: run["ceilings"][name] for name in ("linear", "attention", "link", "memory")})
        sources = dict.fromkeys(("linear", "attention", "link", "memory"), place)
        if not ceilings.link:
            known = KNOWN_CEILINGS.get(device)
            ceilings = replace(ceilings, link=known.link if known else 0.0)
            found = f"known of two {device} in another run" if known else "unknown"
            sources["link"] = f"{found}: {path.name} is of one rank"
        return cls(ceilings, sources, ranks, run).with_network(network_gbit)

    def with_network(self, gbit: float) -> Basis:
        """With a network of so many Gbit/s a device between hosts, which nobody measured."""
        sources = self.sources | {"network": f"assumed: {gbit:g} Gbit/s, an adapter for each device"}
        return replace(self, ceilings=replace(self.ceilings, network=gbit * 1e9 / 8), sources=sources)

    def projects(self, ranks: int) -> bool:
        """Whether so many ranks are more than there were: then what is predicted of them is a projection."""
        return ranks > self.ranks

    def check_link(self, ranks: int) -> None:
        """InputError where there are several ranks, and nobody knows how fast they reach each other."""
        if ranks > 1 and not self.ceilings.link:
            raise InputError(
                f"How fast ranks reach each other is {self.sources['link']}; give the results of a run on two or more."
            )

    def to_dict(self) -> dict[str, Any]:
        """Rates by name in FLOP/s and bytes/s, and their sources."""
        return {**asdict(self.ceilings), "sources": self.sources}


def _read(path: Path) -> dict[str, Any]:
    """A result file of ``apb bench prefill``; InputError for anything else."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        rates = [run["ceilings"][name] for name in ("linear", "attention", "link", "memory")]
        known = [*(rate > 0 for rate in (*rates[:2], rates[3])), rates[2] >= 0, all(map(math.isfinite, rates))]
        known += [run["ranks"] > 0, run.get("tensor_parallel", 1) > 0]
        if not all(isinstance(run["fingerprint"][name], str) for name in ("device", "dtype")):
            raise ValueError("a device and a dtype have names")
    except OSError as error:
        raise InputError(f"The ceilings in {str(path)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} holds no ceilings; give a file that apb bench prefill --out wrote.") from error
    if not all(known):
        raise InputError(f"The ceilings in {str(path)!r} are not all finite and above 0; measure them again.")
    return dict(run)
