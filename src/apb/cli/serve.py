"""``apb serve``: answers over HTTP, for clients of the OpenAI API."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, RankError, Stopped, at_least
from . import options
from .groups import expanded, values
from .serve_checks import certificate_of, keys_of, listen, places_of

if TYPE_CHECKING:
    from .. import reading as readings
    from ..serving.forwarding import Forwarding, Submit
    from ..serving.front import Front
    from ..serving.kept import Places
    from ..serving.messages import Facts
    from ..serving.ranks import Ranks
    from .checks import Place


# SIGTERM is none of these: the ranks end by themselves once they have answered.
_ENDED_BY = "SIGINT,SIGHUP,SIGQUIT"
# Seconds that ranks have to end when one of them is lost; one that is stopped would take forever.
_PATIENCE_S = 3
# Seconds between looks at whether the other server has answered, at the end.
_PAUSE_S = 0.1


@dataclass(frozen=True)
class Served:
    """What a rank serves; plain values, so that it travels."""

    loading: dict[str, Any]
    reading: dict[str, Any]
    places: Places


@expanded
def serve(
    model: options.RemoteModel,
    reading: options.Reading,
    ranks: options.Ranks,
    chat_template: options.ChatTemplate = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for every one that this machine has.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens, where a request names none.")] = 512,
    api_keys: Annotated[Path | None, typer.Option(help="File of API keys, one a line, for all requests.")] = None,
    documents: Annotated[
        Path | None, typer.Option(help="Folder in which documents stay read, also when the server ends.")
    ] = None,
    host_gib: Annotated[
        float | None, typer.Option(help="Host memory for documents; by default 30 % of what is free beside GPUs.")
    ] = None,
    disk_gib: Annotated[
        float | None, typer.Option(help="Disk space for documents; by default half of what is free.")
    ] = None,
    answer_with: Annotated[
        str | None, typer.Option(help="Address of a vLLM server that answers from what is read here; see docs/vllm.md.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="With --answer-with: the folder of documents that both servers see.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Web pages of this origin may ask; * for all; repeatable.")
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate, for HTTPS.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its private key, if that is in a file of its own.")] = None,
    allow_exact: Annotated[
        bool, typer.Option("--allow-exact", help="Requests may ask to be read exactly: {'apb': {'exact': true}}.")
    ] = False,
) -> None:
    """Serve a model: POST /v1/chat/completions, /v1/completions, /v1/documents, GET /v1/models, /health, /metrics."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"A server needs {error.name}, which is not installed; install apb-llm[serve].") from error
    at_least("--max-new-tokens", max_new_tokens, 1)
    if (answer_with is None) != (store is None):
        raise InputError("--answer-with and --store go together: an address, and a folder that both servers see.")
    if store is not None and not store.is_dir():
        raise InputError(f"The store {str(store)!r} is no folder; make it, and name it to the vLLM server too.")
    leads = os.environ.get("RANK", "0") == "0"  # of those that torchrun started, if it did
    with listen(host, port) if leads else nullcontext() as listening:
        keys = () if api_keys is None else keys_of(api_keys)
        certificate = certificate_of(ssl_certfile, ssl_keyfile)

        from .checks import check_reading

        place, read = check_reading(model, ranks, reading)
        elsewhere = None if answer_with is None or store is None else _elsewhere(answer_with, store, place, read)

        from ..hf.chat import template_of
        from ..hf.loading import load_tokenizer, position_limit
        from ..prompt import Prompt
        from ..serving.app import make_app
        from ..serving.front import Front
        from ..serving.shelf import Shelf

        tokenizer = load_tokenizer(place.model.name, place.loading["trust_remote_code"])
        template = template_of(tokenizer, chat_template)
        if chat_template is not None:  # one that cannot be applied is refused here, not with every request
            Prompt.from_chat(tokenizer, "A document.", "A question?", chat_template=chat_template)
            chat_template = template  # its text: the file is read once, and may change or go
        name = place.model.name
        served = Path(name).resolve().name if Path(name).exists() else name
        positions = None if read.allow_extrapolation else position_limit(place.config)
        job = Served(place.loading, values(reading), places_of(place, documents, host_gib, disk_gib))
        if listening is None:  # a rank of torchrun's, but the first
            work(job, None)
            return
        door, shelf = listening, Shelf(documents)

        def front_of(ranks: Ranks, forwarding: Forwarding | None) -> Front:
            app = make_app(
                ranks,
                served,
                tokenizer,
                positions,
                max_new_tokens,
                chat_template=chat_template,
                keys=keys,
                shelf=shelf,
                forwarding=forwarding,
                origins=cors_origin or (),
                may_ask_exact=allow_exact,
            )
            return Front(app, door, **certificate)

        where = f"{served!r} at http{'s' * bool(certificate)}://{host}:{door.getsockname()[1]}/v1"
        _run(place.processes, job, elsewhere, front_of, where)


def _elsewhere(url: str, store: Path, place: Place, reading: readings.Reading) -> Callable[[Submit], Forwarding]:
    """What hands requests to the vLLM server that answers; InputError if that cannot take what is read here."""
    from ..serving.forwarding import Forwarding, Ours
    from ..serving.vllm_server import VllmServer

    if reading.propagation is not None:
        raise InputError("With --answer-with documents are stored whole; leave propagation out.")
    if place.tensor_parallel > 1:
        raise InputError("Ranks that share weights cannot store documents yet; leave --tensor-parallel out here.")
    server = VllmServer.at(url, place.model.name)
    dtype = str(place.dtype).removeprefix("torch.")
    ours = Ours(place.model.name, dtype, all(method.exact for method in reading.methods))
    return partial(Forwarding, server=server, folder=store.resolve(), ours=ours, reading=reading)


def _run(
    processes: int,
    served: Served,
    elsewhere: Callable[[Submit], Forwarding] | None,
    front_of: Callable[[Ranks, Forwarding | None], Front],
    where: str,
) -> None:
    """Serve: HTTP on a thread of this process, the ranks in others."""
    from ..distributed import launch
    from ..serving.answers import noted
    from ..serving.ranks import Ranks

    def ready(facts: Facts) -> None:
        count = "1 rank" if facts.ranks == 1 else f"{facts.ranks} ranks"
        print(f"apb: serving {where}, {count}", file=sys.stderr, flush=True)

    ranks = Ranks()
    forwarding = None if elsewhere is None else elsewhere(ranks.submit)
    if launch.under_torchrun():
        with front_of(ranks, forwarding):
            work(served, ranks.connect(ready))
        return
    with front_of(ranks, forwarding), _draining(ranks):
        while not ranks.draining:
            try:
                launch.launch(work, processes, served, ranks.connect(ready), ended_by=_ENDED_BY, patience_s=_PATIENCE_S)
            except Stopped:
                raise
            except RankError as error:
                if ranks.draining or not ranks.served:  # they never came so far, and would not the next time
                    raise
                ranks.last_error = noted(error)
                print(f"apb: {error} They are started again.", file=sys.stderr, flush=True)
            finally:
                ranks.disconnect()
        while forwarding is not None and forwarding.answering:
            time.sleep(_PAUSE_S)


def work(served: Served, pipe: Connection | None) -> None:
    """One rank's part; ``pipe`` is rank 0's to the HTTP server."""
    from .quiet import quiet_libraries

    quiet_libraries()

    from ..engine import Engine
    from ..serving.alive import SignsOfLife
    from ..serving.desk import Desk
    from ..serving.worker import Worker

    engine = Engine.from_pretrained(**served.loading, **served.reading)
    worker = Worker(engine, served.places)
    signs = SignsOfLife() if engine.mesh.everyone.size > 1 else None
    if engine.device.type == "cuda":
        worker.warm_up()
    if pipe is not None and engine.mesh.everyone.rank == 0:
        Desk(worker, pipe).open()
    elif pipe is not None:  # every process is given it
        pipe.close()
    if signs is not None:
        signs.start()
    worker.run()
    if signs is not None:
        signs.stop()


@contextmanager
def _draining(ranks: Ranks) -> Iterator[None]:
    """SIGTERM: requests that are here are answered, no others are taken. A second one ends the server."""
    from torch.distributed.elastic.multiprocessing import SignalException

    def drain(number: int, frame: FrameType | None) -> None:
        if ranks.draining or not ranks.ready:
            raise SignalException("A signal was received.", signal.Signals(number))
        ranks.drain()

    before = signal.signal(signal.SIGTERM, drain)
    try:
        yield
    except SignalException as error:  # between two groups of ranks
        raise Stopped(f"{error.sigval.name} was received.") from None
    finally:
        signal.signal(signal.SIGTERM, before)
