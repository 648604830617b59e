"""``apb check``: correctness of a model's output, on a small random copy of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import options

if TYPE_CHECKING:
    from ..check import Card


def check(
    model: options.ModelName = None,
    ranks: options.RankCount = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Check that a model's output is right, on a small copy with random weights, read by every strategy.

    No weights are loaded. On several ranks their communication is checked as well. Exit status 0 if all is right, 2 if
    the model is refused, 1 if something differs.
    """
    import torch

    from .quiet import quiet_libraries

    quiet_libraries()

    from ..distributed import launch
    from ..hf import loading

    name = str(model or loading.shipped_model())
    loading.load_config(name, trust_remote_code)
    launch.run(examine, launch.ranks_to_use(ranks, torch.device("cpu")), name, trust_remote_code, as_json)


def examine(model: str, trust_remote_code: bool, as_json: bool) -> None:
    """One rank's part of a check; rank 0 prints."""
    import torch

    from .quiet import quiet_libraries

    quiet_libraries()

    from ..check import check as check_config
    from ..distributed import launch
    from ..hf import loading

    config = loading.load_config(model, trust_remote_code)
    group = launch.join(torch.device("cpu"))
    card = check_config(config, group)
    launch.leave()
    if group.rank == 0:
        if as_json:
            print(json.dumps(card.to_dict() | {"model": model, "ranks": group.size}), flush=True)
        else:
            _print(card, model, group.size)
    if card.refused:
        raise InputError(card.refused)
    if not card.supported:
        raise RuntimeError(f"{model} does not come out right: {sum(not r.passed for r in card.results)} checks failed.")


def _print(card: Card, model: str, ranks: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, title=f"{model} on {ranks} rank{'s' * (ranks > 1)}")
    facts: dict[str, Any] = {
        "model type": card.model_type,
        "layers": card.layers,
        "parameters": None if card.parameters is None else f"{card.parameters:,}",
        "cache": None if card.cache_bytes_per_token is None else f"{card.cache_bytes_per_token:,} bytes a token (bf16)",
        "positions": None if card.max_positions is None else f"{card.max_positions:,}",
        "refused": card.refused,
    }
    for name, fact in facts.items():
        if fact:
            table.add_row(name, fact)
    console.print(table)
    if card.results:
        table = Table("", "largest difference", "", title="A small copy with random weights, fp32, logits")
        for result in card.results:
            error = "" if result.error is None else f"{result.error:.1e}"
            table.add_row(result.name, error, "ok" if result.passed else f"FAILED {result.note}")
        console.print(table)
    console.print("Supported." if card.supported else "Not supported.")
