"""Processes of tests, forked from one that has imported torch and transformers, which would take each of them seconds.

What they print goes to wherever the first of them was started, so tests that look at it start theirs otherwise; and so
do commands in a process of their own, as their users do.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest.mock import patch

from torch.distributed.launcher import api

from apb.distributed import launch as launching

_LaunchConfig = api.LaunchConfig


def context() -> ForkServerContext:
    """Where such processes come from."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["torch.distributed.elastic.multiprocessing.errors", "transformers.modeling_utils"])
    return made


def launch(function: Callable[..., None], ranks: int, *args: Any) -> None:
    """:func:`apb.distributed.launch.launch`, of such processes."""
    context()
    with patch.object(api, "LaunchConfig", lambda **given: _LaunchConfig(**given | {"start_method": "forkserver"})):
        launching.launch(function, ranks, *args)
