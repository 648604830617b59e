"""The basis of predicted seconds: ceilings measured in one run, applied to other machines."""

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
    """Ceilings and their sources.

    Attributes:
        ceilings: the rates; ``link`` is 0 if it is not known.
        sources: the source of every rate, by name.
        ranks: number of ranks of the run that measured them.
        run: that run's results, as ``apb bench prefill`` wrote them; None if the rates are a device's known ones.
    """

    ceilings: Ceilings
    sources: dict[str, str]
    ranks: int
    run: dict[str, Any] | None = None

    @classmethod
    def of_device(cls, device: str, network_gbit: float) -> Basis | None:
        """The known rates of a device, by its name; None for an unknown device."""
        known = KNOWN_CEILINGS.get(device)
        if known is None:
            return None
        sources = dict.fromkeys(("linear", "attention", "link", "memory"), f"known of {device}")
        return cls(known, sources, 2).with_network(network_gbit)

    @classmethod
    def of_run(cls, path: Path, network_gbit: float) -> Basis:
        """The rates in a file of ``apb bench prefill --out``; a run on one rank takes the device's known link."""
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
        """The same with an assumed network of ``gbit`` Gbit/s per device between hosts."""
        sources = self.sources | {"network": f"assumed: {gbit:g} Gbit/s, an adapter for each device"}
        return replace(self, ceilings=replace(self.ceilings, network=gbit * 1e9 / 8), sources=sources)

    def projects(self, ranks: int) -> bool:
        """True if there are more ranks than were measured: their predictions are projections."""
        return ranks > self.ranks

    def check_link(self, ranks: int) -> None:
        """InputError if there are several ranks and the rate of their link is not known."""
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
