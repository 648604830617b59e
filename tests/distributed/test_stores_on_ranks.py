"""Stores on two ranks: what is wrong with one file or one disk all ranks say, in one sentence, and nobody waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import store_work
from apb.distributed.collectives import Group
from apb.errors import RankError
from command_line import Cli
from forked import launch
from store_work import ASKED, DAMAGE

# All ranks' work is done before the first test, which is charged for it.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where the stores are, and what the ranks were told before one of them was killed while it saved."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.raises(RankError, match="was killed by SIGKILL"):
        launch(store_work.everything, 2, str(folder))
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_on_every_rank(ran: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    """Also by ranks that have not seen it themselves."""
    folder, told = ran
    assert told[0][name] == told[1][name]
    assert DAMAGE[name][1] in told[0][name]
    assert str(folder / name) in told[0][name] and "\n" not in told[0][name]


def test_a_full_disk(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    """Of one rank or the other: both say so, and what was there before is there, whole and alone."""
    _, told = ran
    for rank in range(2):
        assert told[0][f"rank {rank}'s disk"] == told[1][f"rank {rank}'s disk"]
        assert "cannot be written" in told[0][f"rank {rank}'s disk"]
        assert "No space left on device" in told[0][f"rank {rank}'s disk"]
    assert told[0]["files"] == 3
    torch.testing.assert_close(told[0]["logits"], told[1]["logits"], rtol=0, atol=0)


def test_a_rank_killed_while_saving(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    """The document before is there, for any number of ranks; its successor leaves no trace of the attempt."""
    folder, told = ran
    engine = store_work.engine_of(Group())
    document = engine.load(folder / "whole")
    torch.testing.assert_close(document.prefill(ASKED).logits, told[0]["logits"], rtol=1e-4, atol=1e-4)
    document.save(folder / "whole")
    assert len(list((folder / "whole").iterdir())) == 2


def test_the_command_says_it_once(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """With status 2, though only one of two ranks has read the damaged file."""
    (tmp_path / "text.txt").write_text("The keeper of Orrin was called Maud. ")
    given = ("--model", checkpoint, "--device", "cpu")
    assert cli("read", "--document", tmp_path / "text.txt", "--out", tmp_path / "a", *given).status == 0
    store_work.flip(0)(tmp_path / "a")
    cli("ask", tmp_path / "a", "--query", "Who?", *given, "--ranks", 2).refused(
        "-0.safetensors is not what was written"
    )
