"""The server's end of the pipe to its ranks: what happens to requests when ranks are lost or fall silent."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

import apb
from apb.serving.answers import Failed, Lost, Progress, Task, travelling
from apb.serving.messages import Cancel, Drain, Facts, Happened, State, Submit, Taken
from apb.serving.ranks import Ranks
from apb.serving.replies import Refusal, failure

TASK = Task(apb.Prompt((), (1, 2), (3,)))


def group(ranks: Ranks, pid: int = 0) -> Connection:
    """Rank 0's end of a new group that is ready."""
    ready = threading.Event()
    pipe = ranks.connect(lambda facts: ready.set())
    pipe.send(Facts(pid, 2, {"temperature": 1.0}))
    assert ready.wait(5)
    return pipe


def submitted(ranks: Ranks, tell: Callable[[Any], None], pipe: Connection, answer: bool | Exception | None) -> Any:
    """What :meth:`Ranks.submit` gives if rank 0 answers this, or is lost before it does."""

    def rank() -> None:
        asked = pipe.recv()
        assert isinstance(asked, Submit) and asked.task == TASK
        if answer is None:
            ranks.disconnect()
        else:
            pipe.send(Taken(asked.number, answer, State(waiting=5)))

    thread = threading.Thread(target=rank)
    thread.start()
    try:
        return asyncio.run(ranks.submit(TASK, tell))
    finally:
        thread.join()


def soon(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + 20
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


def test_refusals_come_before_an_answer_begins() -> None:
    """A full queue, and what rank 0 alone can know; events of others are not mixed up."""
    ranks, told = Ranks(), []
    pipe = group(ranks)
    assert ranks.own_sampling == {"temperature": 1.0}
    assert submitted(ranks, told.append, pipe, False) is None and ranks.waiting == 5
    with pytest.raises(Refusal, match=r"never fits\.") as refused:
        submitted(ranks, told.append, pipe, apb.InputError("It never fits."))
    assert refused.value.status == 400
    job = submitted(ranks, told.append, pipe, True)
    pipe.send(Happened(2, Progress(1, 2)))
    pipe.send(Happened(3, Progress(2, 2)))
    pipe.send(Happened(3, None))
    pipe.send(Happened(3, Progress(3, 3)))
    assert soon(lambda: len(told) == 2) and told == [Progress(2, 2), None]
    job.cancel()
    ranks.drain()
    assert isinstance(pipe.recv(), Drain)  # nothing was sent for a request that is over
    ranks.disconnect()
    assert len(told) == 2


def test_only_requests_in_flight_fail() -> None:
    """With 503, those that were being handed over as well; until the next group is ready, others are told to return."""
    ranks, told = Ranks(), []
    with pytest.raises(Refusal) as refused:
        asyncio.run(ranks.submit(TASK, told.append))
    assert refused.value.status == 503 and refused.value.headers == {"Retry-After": "15"} and not ranks.ready
    pipe = group(ranks)
    assert ranks.ready
    submitted(ranks, told.append, pipe, True)
    with pytest.raises(Refusal, match="A rank was lost") as refused:
        submitted(ranks, told.append, pipe, None)
    assert refused.value.status == 503
    assert [type(event) for event in told] == [Lost] and failure(told[0]).status == 503
    assert not ranks.ready and ranks.running == 0
    told.clear()
    pipe = group(ranks)
    job = submitted(ranks, told.append, pipe, True)
    job.cancel()
    assert isinstance(pipe.recv(), Cancel)
    pipe.send(Happened(3, None))
    ranks.disconnect()
    assert told == [None]  # what had been sent before is heard


def test_a_silent_rank_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the group is started again; loading may take as long as it does. Whether the patience is over is told
    here: on a loaded machine the time between two messages would be anything."""
    ranks, over, asked, poll = Ranks(patience_s=7.0), threading.Event(), list[float | None](), Connection.poll

    def patient(pipe: Connection, seconds: float | None = 0.0) -> bool:
        asked.append(seconds)
        while seconds == 7.0 and not over.is_set():
            if poll(pipe, 0.01):
                return True
        return poll(pipe, None if seconds is None else 0.0)

    monkeypatch.setattr(Connection, "poll", patient)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as rank:
        pipe = ranks.connect(lambda facts: None)
        over.set()
        pipe.send(State(waiting=1))
        assert soon(lambda: ranks.waiting == 1)
        assert asked == [] and rank.poll() is None
        over.clear()
        pipe.send(Facts(rank.pid, 1, {}))
        for number in (2, 3, 4):
            pipe.send(State(waiting=number))
            assert soon(lambda: ranks.waiting == number)  # noqa: B023
        assert rank.poll() is None
        over.set()
        assert rank.wait(20) == -signal.SIGKILL
    ranks.disconnect()


def test_errors_travel_as_what_can_be_told() -> None:
    """Ours as themselves, others by name: their classes may not be there, or not be rebuilt from a message."""
    import pickle

    class Odd(RuntimeError):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    for error, kind, status, message in (
        (apb.InputError("No."), apb.InputError, 400, "No."),
        (apb.NotFinite("No numbers."), apb.NotFinite, 500, "No numbers."),
        (Odd(1, 2), Failed, 500, "Odd: 1 and 2"),
    ):
        there = pickle.loads(pickle.dumps(travelling(error)))
        assert type(there) is kind
        refusal = failure(there)
        assert (refusal.status, str(refusal)) == (status, message)
