"""What ranks on GPUs do, one group of them after the other; started by torchrun from test_ranks.py.

Every rank reads the prefills that ranks on the CPU read, over NCCL. Rank 0 prints one JSON object: what it was asked
to compare, and for each comparison that failed a line that says how.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

import families
from apb import Engine, InputError, Prompt
from apb.distributed import launch
from apb.distributed.collectives import Group
from apb.distributed.mesh import Mesh
from apb.distributed.one_shot import quick
from apb.hf import fusing
from cases import CASES, Outcome, check, read
from models import placed, tiny_model, without_eos

# Where numbers must be those of fp32: 8 query heads to a KV head and more rows than a tile of any kernel.
LONG = Prompt.from_tokens([1, 2], [(37 * i * i + 11 * i) % 97 for i in range(5003)], [5, 6, 7, 8])
LONG_READINGS: dict[str, dict[str, Any]] = {
    "ring": {"strategy": "ring"},
    "ulysses": {"strategy": "ulysses"},
    "star": {"strategy": "star", "blocks": 5, "anchor_length": 300},
    # Which tokens are passed must not hang on how sums were rounded.
    "apb": {"strategy": "apb", "blocks": 5, "anchor_length": 300, "passing_length": 130, "compressor": "recent"},
    "apb in rounds": {"strategy": "apb", "blocks": 9, "anchor_length": 300, "compressor": "recent", "rounds": 2},
}


class Comparisons:
    """How many there were, and which failed, on rank 0; the other ranks' results must be the first rank's."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.made = 0
        self.failed: dict[str, str] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Note a comparison; what is wrong in it ends it, and no other."""
        name = f"{name}, {self.group.size} ranks"
        self.made += 1
        try:
            yield
        except (AssertionError, InputError) as error:
            self.failed[name] = " ".join(str(error).split())

    def everywhere(self, mine: Any) -> None:
        """Assert that all ranks found the same, to the bit."""
        found: list[Any] = [None] * self.group.size
        dist.all_gather_object(found, mine, group=self.group.process_group)
        for rank, other in enumerate(found):
            alike = torch.equal(other, found[0]) if isinstance(mine, Tensor) else other == found[0]
            assert alike, f"rank {rank} has another result than rank 0"


def main(gpus: int, shared: bool) -> None:
    """Read everything by groups of two and more of the ranks there are."""
    rank, first = dist.get_rank(), 0 if shared else dist.get_rank() * gpus
    made = 0
    failed: dict[str, str] = {}
    for size in range(2, dist.get_world_size() + 1):
        group = Group(rank, size, dist.new_group(range(size)))
        if rank < size:
            comparisons = Comparisons(group)
            # Compiling norms for every little model takes minutes, and other tests do it.
            with patch.object(fusing, "why_not", lambda device: "left out here"):
                matrix(comparisons, gpus, first)
                if gpus == 1:
                    if size in (2, 4):  # divisors of the heads, for ulysses
                        peculiar(comparisons, first)
                    long(comparisons, first)
                    answers(comparisons, first)
            made += comparisons.made
            failed |= comparisons.failed
            group.barrier()
    if rank == 0:
        print(json.dumps({"made": made, "failed": failed}))
    dist.barrier()


def matrix(comparisons: Comparisons, gpus: int, first: int) -> None:
    """All strategies and special lengths, in fp32: the oracle's logits, its cache and what it decodes."""
    for name, case in CASES.items():
        with comparisons.of(name):
            engine = case.engine(placed(case.model(), gpus, first), comparisons.group)
            assert len(engine.devices) == gpus
            outcome = read(engine, case)
            engine.close()
            comparisons.everywhere(torch.cat([outcome.logits[None], outcome.decoded]).cpu())
            if comparisons.group.rank == 0:
                pairs = (outcome.keys, outcome.values)
                keys, values = ([part.cpu() for part in parts if part is not None] for parts in pairs)
                check(Outcome(outcome.logits.cpu(), keys, values, outcome.decoded.cpu()), name, tolerance=1e-3)


def peculiar(comparisons: Comparisons, first: int) -> None:
    """Windows whose halos travel, caps, sinks, latent attention, experts."""
    for family, reading in families.CASES:
        with comparisons.of(f"{family}, {reading}"):
            model = families.make(*families.PECULIAR[family]).to(f"cuda:{first}")
            logits = families.read(model, reading, comparisons.group).cpu()
            comparisons.everywhere(logits)
            if comparisons.group.rank == 0:
                torch.testing.assert_close(logits, families.expected(family, reading), rtol=1e-3, atol=1e-3)


def long(comparisons: Comparisons, first: int) -> None:
    """The kernels for bf16 on thousands of rows: as near to what one rank reads in fp32 as one rank is in bf16."""
    for head_dim, name in itertools.product((64, 128), LONG_READINGS):
        with comparisons.of(f"{name} of {len(LONG)} tokens, head dim {head_dim}"):
            model = tiny_model("llama", heads=24, kv_heads=3, head_dim=head_dim, hidden=96).to(f"cuda:{first}")
            exact = read_long(model, name, Group())
            alone, mine = (read_long(model.to(torch.bfloat16), name, group) for group in (Group(), comparisons.group))
            comparisons.everywhere(mine)
            near, off = ((logits - exact).norm() / exact.norm() for logits in (alone, mine))
            assert off < 1.5 * near + 0.01, f"{off:.4f} away from fp32, one rank is {near:.4f} away"


def read_long(model: PreTrainedModel, name: str, group: Group) -> Tensor:
    """Logits (1 + len(families.ANSWER), vocabulary): after LONG, and after each token of the answer."""
    engine = Engine.from_model(model, mesh=Mesh.of(group), allow_extrapolation=True, **LONG_READINGS[name])
    session = engine.prefill(LONG)
    logits = [session.logits, *(session.extend([token]) for token in families.ANSWER)]
    engine.close()
    return torch.stack(logits).cpu()


def answers(comparisons: Comparisons, first: int) -> None:
    """Tokens drawn with a seed are one rank's, and without one alike on all ranks; each engine captures once."""
    model = without_eos(tiny_model("llama", heads=4, kv_heads=2, head_dim=16)).to(f"cuda:{first}")
    prompt = Prompt.from_tokens([], [(37 * i + 11) % 97 for i in range(90)], [5, 6])
    graph = torch.cuda.CUDAGraph
    replaying = patch.object(graph, "replay", autospec=True, side_effect=graph.replay)
    capturing = patch.object(graph, "capture_begin", autospec=True, side_effect=graph.capture_begin)
    with comparisons.of("answers"), replaying as replayed, capturing as captured:
        found = []
        for group in (comparisons.group, Group()):
            engine = Engine.from_model(model, blocks=5, mesh=Mesh.of(group))
            found.append(engine.generate(prompt, max_new_tokens=24, temperature=1.0, seed=7).token_ids)
            unseeded = engine.generate(prompt, max_new_tokens=24, temperature=1.0).token_ids
            if group.size > 1:
                comparisons.everywhere(found[0] + unseeded)
            engine.close()
        assert replayed.call_count > 20 * len(found), "no graph was replayed"
        # Of several ranks one graph, or one for every stretch between the layers' messages if those are no kernels; of
        # one rank one.
        made = quick(comparisons.group, torch.device("cuda", first))[0]
        by_kernels = made.in_kernels(torch.zeros(1, 4, 17, device=f"cuda:{first}"))
        stretches = 1 if by_kernels else len(model.model.layers) + 1
        assert captured.call_count == stretches + 1, f"{captured.call_count} captures, not {stretches} and 1"
        assert found[0] == found[1], f"{found[0]} drawn, by one rank {found[1]}"


def fail() -> None:
    """The last rank fails while the others wait for it."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise RuntimeError("on purpose")
    Group.of_world().sum(torch.ones(1, device="cuda")).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=1, help="of every rank, each with other layers")
    parser.add_argument("--shared", action="store_true", help="all ranks on the first GPU")
    parser.add_argument("--fail", action="store_true", help="nothing but that")
    arguments = parser.parse_args()
    if arguments.shared:
        with patch.object(launch, "check_gpus"):
            launch.join(torch.device("cuda", 0))
    else:
        launch.join(launch.local_device(torch.device("cuda"), arguments.gpus), arguments.gpus)
    fail() if arguments.fail else main(arguments.gpus, arguments.shared)
