"""``apb serve``: answers over HTTP, for clients of the OpenAI API."""

from __future__ import annotations

import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, at_least
from . import options
from .groups import expanded, values


@dataclass(frozen=True)
class Server:
    """Everything a rank needs to serve; plain values, so that it travels."""

    loading: dict[str, Any]
    reading: dict[str, Any]
    chat_template: str | None
    host: str
    port: int
    max_new_tokens: int
    answer_with: str | None
    store: str | None


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
    answer_with: Annotated[
        str | None, typer.Option(help="Address of a vLLM server that answers from the documents read here; see docs.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="With --answer-with: folder of documents that the vLLM server sees as well.")
    ] = None,
) -> None:
    """Serve a model: POST /v1/chat/completions, GET /v1/models, /health, /metrics. One prompt is read at a time."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"A server needs {error.name}, which is not installed; install apb[serve].") from error
    at_least("max_new_tokens", max_new_tokens, 1)
    if (answer_with is None) != (store is None):
        raise InputError("--answer-with and --store go together: an address, and a folder that both servers see.")
    if store is not None and not store.is_dir():
        raise InputError(f"The store {str(store)!r} is no folder; make it, and name it to the vLLM server too.")
    _listen(host, port).close()

    from .checks import check_reading

    place, _ = check_reading(model, ranks, reading)

    from ..distributed import launch
    from ..hf.chat import template_of
    from ..hf.loading import load_tokenizer
    from ..prompt import Prompt

    tokenizer = load_tokenizer(place.model.name, place.loading["trust_remote_code"])
    template = template_of(tokenizer, chat_template)
    if chat_template is not None:  # one that cannot be applied is refused here, not with every request
        Prompt.from_chat(tokenizer, "A document.", "A question?", chat_template=chat_template)
        chat_template = template  # its text: the file is read once, and may change or go
    given = None if store is None else str(store)
    server = Server(place.loading, values(reading), chat_template, host, port, max_new_tokens, answer_with, given)
    launch.run(work, place.processes, server)


def work(server: Server) -> None:
    """One rank's part: the engine on this thread; on rank 0 the server on another."""
    from ..engine import Engine
    from ..serving.worker import Worker
    from .quiet import quiet_libraries

    quiet_libraries()
    engine = Engine.from_pretrained(**server.loading, **server.reading)
    worker = Worker(engine)
    if server.answer_with is not None and server.store is not None:
        from ..serving.answer_with import Handing

        worker = Handing(engine, server.answer_with, Path(server.store))
    if engine.device.type == "cuda":
        worker.warm_up()
    if engine.mesh.everyone.rank == 0:
        import uvicorn

        from ..serving.app import make_app

        model = server.loading["model"]
        name = Path(model).resolve().name if Path(model).exists() else model
        listening = _listen(server.host, server.port)
        app = make_app(worker, name, server.max_new_tokens, server.chat_template)
        http = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True).start()
        at = f"http://{server.host}:{listening.getsockname()[1]}/v1"
        ranks = "1 rank" if engine.group.size == 1 else f"{engine.group.size} ranks"
        print(f"apb: serving {name!r} at {at}, {ranks}", file=sys.stderr, flush=True)
    worker.run()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; InputError if the address cannot be used."""
    if not 0 <= port < 1 << 16:
        raise InputError(f"A port is a number from 0 to 65535, not {port}.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"Nothing can listen at {host}, port {port}: {error.strerror}; choose others with --host and --port."
        ) from error
