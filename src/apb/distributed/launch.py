"""Starting ranks on this machine, or joining those that torchrun started."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..errors import InputError, NotFinite, RankError, Stopped, at_least
from .collectives import Group

# Time that a rank waits in a collective for a slow one; a dead one is noticed at once.
_PATIENCE = timedelta(minutes=30)
# Seconds that a rank waits before it exits because of another one's failure, so that the launcher sees that one first.
_GRACE = 5.0
# Signals that end all ranks.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
# Exit status of a rank that raised InputError.
_WRONG_INPUT = 2


class Holder(Protocol):
    """What NCCL waits for when a process group is destroyed: a CUDA graph that sends messages."""

    def give_up(self) -> None:
        """Let go of it; nothing is sent any more."""


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()


def before_leaving(holder: Holder) -> None:
    """Have something let go before :func:`leave` destroys the process group, if it is still alive then."""
    _holders.add(holder)


def under_torchrun() -> bool:
    """True if torchrun or :func:`launch` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def world_size() -> int:
    """Number of processes started together; 1 for a process started on its own."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def local_device(device: torch.device, gpus: int = 1) -> torch.device:
    """This rank's device, or the first of its ``gpus``: ranks take a machine's GPUs in order of local rank."""
    if device.type != "cuda" or device.index is not None or not under_torchrun():
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) * gpus)


def join(device: torch.device, gpus: int = 1) -> Group:
    """The group of all ranks; initialises torch.distributed (NCCL on GPUs, else gloo) under torchrun.

    With one GPU per rank, NCCL is bound to ``device``. With several ``gpus`` per rank, ``device`` being the first, it
    is not: an unbound group creates a communicator for each device whose tensors it is given.

    Raises:
        InputError: fewer GPUs than the ranks need, or an existing group bound to one of a rank's several GPUs.
    """
    if dist.is_available() and dist.is_initialized():
        group: Any = dist.group.WORLD
        if gpus > 1 and group.bound_device_id is not None:
            raise InputError(
                f"torch.distributed was initialised for {group.bound_device_id} alone, but the layers of this rank are "
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
    # A process that exits with its communication threads still running is aborted, which torchrun counts as a failure.
    atexit.register(_leave_at_exit)
    return Group.of_world()


def leave() -> None:
    """Destroy the process group of torch.distributed, if there is one."""
    if dist.is_available() and dist.is_initialized():
        for holder in list(_holders):
            holder.give_up()
        dist.destroy_process_group()


def _leave_at_exit() -> None:
    if not (_waits_for_others() and hasattr(sys, "last_value")):  # an uncaught error
        leave()


def end(status: int) -> None:
    """Exit this failed process at once if an orderly exit would wait for the other ranks; return otherwise.

    torchrun ends the other ranks once this one has exited.
    """
    if _waits_for_others():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _waits_for_others() -> bool:
    """True with NCCL, whose groups are destroyed by all ranks together."""
    return dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"


def check_split(device: torch.device, gpus: int, tensor_parallel: int = 1) -> None:
    """Raise InputError if ``gpus`` per rank conflict with the device or with tensor parallelism."""
    at_least("GPUs per rank", gpus, 1)
    if gpus > 1 and device.type != "cuda":
        raise InputError(f"--gpus-per-rank {gpus} splits layers over GPUs, but the device is the CPU; leave it out.")
    if gpus > 1 and tensor_parallel > 1:
        raise InputError(
            f"--gpus-per-rank {gpus} and --tensor-parallel {tensor_parallel} both spread the weights; use one of them."
        )


def check_gpus(processes: int, gpus: int = 1) -> None:
    """Raise InputError if this machine has fewer than ``processes * gpus`` GPUs."""
    needed, there = processes * gpus, torch.cuda.device_count()
    if needed > there:
        ranks = f"{processes} rank{'s' * (processes > 1)}"
        if gpus > 1:
            raise InputError(
                f"--gpus-per-rank {gpus} on {ranks} takes {needed} GPUs, and this machine has {there}; use fewer."
            )
        raise InputError(f"{ranks} need {needed} GPUs and this machine has {there}; use fewer ranks or --device cpu.")


def check_ranks(ranks: int, device: torch.device, tensor_parallel: int = 1, gpus: int = 1) -> None:
    """Raise InputError if this machine cannot run that many ranks, each of ``tensor_parallel`` processes."""
    if ranks < 1:
        raise InputError(f"Ranks must be at least 1, not {ranks}.")
    ranks *= tensor_parallel
    if device.type == "cuda":
        check_gpus(ranks, gpus)
    cores = os.cpu_count() or 1
    if device.type == "cpu" and ranks > max(8 * cores, 16):
        raise InputError(f"{ranks} ranks are too many for {cores} CPU cores; use at most {max(8 * cores, 16)}.")


def ranks_to_use(asked: int | None, device: torch.device, tensor_parallel: int = 1, gpus: int = 1) -> int:
    """Number of ranks: those that torchrun started, else ``asked``, else 1.

    A rank is ``tensor_parallel`` processes, or one process whose layers are on ``gpus`` GPUs.

    Raises:
        InputError: torchrun started another number of ranks, or this machine cannot run them.
    """
    check_split(device, gpus, tensor_parallel)
    if under_torchrun():
        ranks, rest = divmod(world_size(), tensor_parallel)
        if rest:
            raise InputError(
                f"torchrun started {world_size()} processes, which do not divide into ranks of {tensor_parallel} "
                "(--tensor-parallel); start a multiple of that."
            )
        if asked not in (None, ranks):
            raise InputError(f"--ranks {asked} was given, but torchrun started {ranks}; leave --ranks out.")
        return ranks
    ranks = 1 if asked is None else asked
    check_ranks(ranks, device, tensor_parallel, gpus)
    return ranks


def run(function: Callable[..., None], ranks: int, *args: Any) -> None:
    """Run ``function(*args)`` on every rank: in this process for a single rank or under torchrun, else in new ones."""
    if under_torchrun() or ranks == 1:
        function(*args)
    else:
        launch(function, ranks, *args)


def launch(
    function: Callable[..., None], ranks: int, *args: Any, ended_by: str = _SIGNALS, patience_s: int = 30
) -> None:
    """Run ``function(*args)`` in ``ranks`` processes on this machine, with torch's elastic launcher.

    If one of them dies or fails, the others are ended within seconds.

    Args:
        function, ranks, args: see above.
        ended_by: names of the signals to this process that end all ranks, with commas between them.
        patience_s: seconds after which a rank that does not end is killed.

    Raises:
        RankError: a rank died or failed; the message names it and the reason.
        InputError, NotFinite: a rank raised it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    shares = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    with _environment(shares | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(patience_s)}):
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
            signals_to_handle=ended_by,
        )
        try:
            elastic_launch(config, _run_rank)(function, *args)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            kind, _, sentence = _message(failure).partition(": ")
            if failure.exitcode == _WRONG_INPUT:
                raise InputError(sentence) from None
            if kind == NotFinite.__name__:  # of all ranks alike
                raise NotFinite(sentence) from None
            others = "; the other ranks were ended" if ranks > 1 else ""
            raise RankError(f"Rank {rank} of {ranks} {_reason(failure)}{others}.") from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise Stopped(f"{error.sigval.name} was received; all ranks were ended.") from None


def _run_rank(function: Callable[..., None], *args: Any) -> None:
    """Entry point of a started process: run the function, and report failures to the launcher, not the terminal."""
    from torch.distributed.elastic.multiprocessing.errors import record

    # Python's own handler waits for the main thread to return from a collective, which it may never do.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        record(function)(*args)
    except Exception as error:
        if os.environ.get("APB_TRACEBACK"):
            raise
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            # This rank lost another one, which is the one to report. The launcher reports the first dead rank that it
            # finds: leave it time to find that one.
            time.sleep(_GRACE)
        os._exit(_WRONG_INPUT if isinstance(error, InputError) else 1)


def _reason(failure: Any) -> str:
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    message = _message(failure)
    return f"failed: {message.rstrip('.')}" if message else f"ended with status {failure.exitcode}"


def _message(failure: Any) -> str:
    """Class name and first line of a failed rank's error; torch's messages often have several lines."""
    message: Any = "" if failure.error_file == "<N/A>" else failure.message  # without a file it is torch's advice
    recorded = isinstance(message, dict)
    text = message.get("message", "") if recorded else message  # a traceback, which ends with the message
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0 if recorded else -1] if lines else ""


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a while, unless the user has."""
    ours = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
