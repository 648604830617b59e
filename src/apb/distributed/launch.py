"""Starting processes on this machine, or joining those that torchrun started."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError, RankError, at_least
from .collectives import Group

# How long a rank waits in a collective for one that is slow (not dead: those are noticed at once).
_PATIENCE = timedelta(minutes=30)
# Seconds that a rank which failed because another one did leaves the launcher to see that.
_GRACE = 5.0
# The status of a rank that found the request wrong, which only it could see.
_WRONG_INPUT = 2


def under_torchrun() -> bool:
    """Whether this process was started as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def world_size() -> int:
    """Number of ranks this process belongs to; 1 outside torchrun."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def local_device(device: torch.device, gpus: int = 1) -> torch.device:
    """This rank's own device, or the first of its ``gpus``: ranks take a machine's GPUs in their order."""
    if device.type != "cuda" or device.index is not None or not under_torchrun():
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) * gpus)


def join(device: torch.device, gpus: int = 1) -> Group:
    """The group of all ranks: initialises torch.distributed (NCCL on GPUs, else gloo) where torchrun asks for it.

    NCCL makes a communicator for each device that it sees tensors of, unless it is bound to one: with several ``gpus``
    a rank, of which ``device`` is the first, it is not.
    """
    if dist.is_available() and dist.is_initialized():
        group: Any = dist.group.WORLD
        if gpus > 1 and group.bound_device_id is not None:
            raise InputError(
                f"torch.distributed was initialised for {group.bound_device_id} alone, and the layers of this rank lie "
                f"on {gpus} GPUs; leave device_id out of init_process_group."
            )
        return Group.of_world()
    if device.type == "cuda" and (world_size() > 1 or gpus > 1):
        check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), gpus)
    if world_size() == 1:
        return Group()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=_PATIENCE, device_id=device if gpus == 1 else None)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    # A process that ends with its threads of communication still running is aborted, and torchrun calls that a failure.
    atexit.register(_leave_at_exit)
    return Group.of_world()


def leave() -> None:
    """Take torch.distributed down, where it is up."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _leave_at_exit() -> None:
    if not (_waits_for_others() and hasattr(sys, "last_value")):  # an error that nobody caught
        leave()


def end(status: int) -> None:
    """End this process, which failed, at once where leaving in good order would wait for ranks that are still at work.

    They are ended by torchrun once it sees that this one has.
    """
    if _waits_for_others():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _waits_for_others() -> bool:
    """NCCL is taken down by all ranks together."""
    return dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"


def check_split(device: torch.device, gpus: int, tensor_parallel: int = 1) -> None:
    """InputError where the layers of a rank cannot be split over so many GPUs, wherever that runs."""
    at_least("GPUs per rank", gpus, 1)
    if gpus > 1 and device.type != "cuda":
        raise InputError(f"--gpus-per-rank {gpus} splits layers over GPUs, and this runs on the CPU; leave it out.")
    if gpus > 1 and tensor_parallel > 1:
        raise InputError(
            f"--gpus-per-rank {gpus} and --tensor-parallel {tensor_parallel} are two ways to spread weights; use one."
        )


def check_gpus(processes: int, gpus: int = 1) -> None:
    """InputError where this machine has fewer GPUs than so many processes take, each of them ``gpus``."""
    needed, there = processes * gpus, torch.cuda.device_count()
    if needed > there:
        ranks = f"{processes} rank{'s' * (processes > 1)}"
        if gpus > 1:
            raise InputError(f"--gpus-per-rank {gpus} on {ranks} takes {needed} GPUs, and this machine has {there}.")
        raise InputError(f"{ranks} need {needed} GPUs and this machine has {there}; use fewer ranks or --device cpu.")


def check_ranks(ranks: int, device: torch.device, tensor_parallel: int = 1, gpus: int = 1) -> None:
    """InputError where this machine cannot start that many processes."""
    if ranks < 1:
        raise InputError(f"Ranks must be at least 1, not {ranks}.")
    ranks *= tensor_parallel
    if device.type == "cuda":
        check_gpus(ranks, gpus)
    cores = os.cpu_count() or 1
    if device.type == "cpu" and ranks > max(8 * cores, 16):
        raise InputError(f"{ranks} ranks on {cores} CPU cores would not run; use at most {max(8 * cores, 16)}.")


def ranks_to_use(asked: int | None, device: torch.device, tensor_parallel: int = 1, gpus: int = 1) -> int:
    """Under torchrun the ranks that are there, else those asked for, by default 1; InputError if they cannot be had.

    A rank is ``tensor_parallel`` processes, or one whose layers lie on ``gpus`` GPUs.
    """
    check_split(device, gpus, tensor_parallel)
    if under_torchrun():
        ranks, rest = divmod(world_size(), tensor_parallel)
        if rest:
            raise InputError(
                f"torchrun started {world_size()} processes, which make no whole ranks of {tensor_parallel} "
                "(--tensor-parallel); start a multiple of that."
            )
        if asked not in (None, ranks):
            raise InputError(f"--ranks {asked} was given, but torchrun started {ranks}; leave --ranks out.")
        return ranks
    ranks = 1 if asked is None else asked
    check_ranks(ranks, device, tensor_parallel, gpus)
    return ranks


def run(function: Callable[..., None], ranks: int, *args: Any) -> None:
    """Run ``function(*args)`` on so many ranks: in this process where it is one of them, else in started ones."""
    if under_torchrun() or ranks == 1:
        function(*args)
    else:
        launch(function, ranks, *args)


def launch(function: Callable[..., None], ranks: int, *args: Any) -> None:
    """Run ``function(*args)`` in ``ranks`` processes on this machine, with torch's elastic launcher.

    When one of them dies or fails the others are ended within seconds; raises RankError that says which and why, or
    the InputError that a rank raised.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    with _threads_shared(ranks):
        try:
            elastic_launch(config, _run_rank)(function, *args)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == _WRONG_INPUT:
                raise InputError(_message(failure).split(": ", 1)[-1]) from None  # behind the error's name
            raise RankError(f"Rank {rank} of {ranks} {_reason(failure)}; the other ranks were ended.") from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise RankError(f"{error.sigval.name} was received; all ranks were ended.") from None


def _run_rank(function: Callable[..., None], *args: Any) -> None:
    """What a started process does: the function, with failures told to the launcher instead of to the terminal."""
    from torch.distributed.elastic.multiprocessing.errors import record

    # Python's own handler waits for the main thread to return from a collective, which it may never do.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        record(function)(*args)
    except Exception as error:
        if os.environ.get("APB_TRACEBACK"):
            raise
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            # It lost another rank, which is the one to name: the launcher, which names the first one that it finds
            # dead, has time to find that one, and then ends this one.
            time.sleep(_GRACE)
        os._exit(_WRONG_INPUT if isinstance(error, InputError) else 1)


def _reason(failure: Any) -> str:
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    message = _message(failure)
    return f"failed: {message.rstrip('.')}" if message else f"ended with status {failure.exitcode}"


def _message(failure: Any) -> str:
    """The name of a failed rank's error and what it says; of several lines, as torch's often have, the first."""
    message = failure.message
    recorded = isinstance(message, dict)
    text = message.get("message", "") if recorded else message  # a traceback, which ends with that
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0 if recorded else -1] if lines else ""


@contextmanager
def _threads_shared(ranks: int) -> Iterator[None]:
    """Share the cores out between the processes, unless the user said how many threads each gets."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
