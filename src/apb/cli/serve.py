"""``apb serve``: answers over HTTP, for clients of the OpenAI API."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, RankError, Stopped, at_least
from . import options
from .groups import expanded, values

if TYPE_CHECKING:
    from ..serving.worker import Worker


@dataclass(frozen=True)
class Server:
    """Everything a rank needs to serve; plain values, so that it travels."""

    loading: dict[str, Any]
    reading: dict[str, Any]
    chat_template: str | None
    host: str
    port: int
    max_new_tokens: int
    keys: tuple[str, ...]
    served: str


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
) -> None:
    """Serve a model: POST /v1/chat/completions, /v1/completions, /v1/documents, GET /v1/models, /health, /metrics."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"A server needs {error.name}, which is not installed; install apb[serve].") from error
    at_least("max_new_tokens", max_new_tokens, 1)
    with _listen(host, port) as free:
        port = free.getsockname()[1]  # the same one when ranks are started again
    keys = () if api_keys is None else _keys(api_keys)

    from .checks import check_reading

    place, _ = check_reading(model, ranks, reading)

    from ..hf.chat import template_of
    from ..hf.loading import load_tokenizer
    from ..prompt import Prompt

    tokenizer = load_tokenizer(place.model.name, place.loading["trust_remote_code"])
    template = template_of(tokenizer, chat_template)
    if chat_template is not None:  # one that cannot be applied is refused here, not with every request
        Prompt.from_chat(tokenizer, "A document.", "A question?", chat_template=chat_template)
        chat_template = template  # its text: the file is read once, and may change or go
    with tempfile.TemporaryDirectory() as folder:
        served = str(Path(folder, "served"))
        server = Server(place.loading, values(reading), chat_template, host, port, max_new_tokens, keys, served)
        _supervised(place.processes, server)


def _supervised(processes: int, server: Server) -> None:
    """Start the ranks, and start them again whenever one of them is lost after they have served."""
    from ..distributed import launch

    while True:
        try:
            launch.run(work, processes, server)
            return
        except Stopped:
            raise
        except RankError as error:
            if not Path(server.served).exists():  # they never came so far, and would not the next time
                raise
            Path(server.served).unlink()
            print(f"apb: {error} They are started again.", file=sys.stderr, flush=True)


def work(server: Server) -> None:
    """One rank's part: the engine on this thread; on rank 0 the server on another."""
    from ..engine import Engine
    from ..serving.alive import SignsOfLife
    from ..serving.worker import Worker
    from .quiet import quiet_libraries

    quiet_libraries()
    engine = Engine.from_pretrained(**server.loading, **server.reading)
    worker = Worker(engine)
    signs = SignsOfLife() if engine.mesh.everyone.size > 1 else None
    if engine.device.type == "cuda":
        worker.warm_up()
    if engine.mesh.everyone.rank == 0:
        import uvicorn

        from ..serving.app import make_app

        model = server.loading["model"]
        name = Path(model).resolve().name if Path(model).exists() else model
        listening = _listen(server.host, server.port)
        app = make_app(worker, name, server.max_new_tokens, server.chat_template, server.keys)
        http = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        if signs is None:  # ranks are ended by those who started them
            _drain_on_sigterm(worker)
        threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True).start()
        at = f"http://{server.host}:{listening.getsockname()[1]}/v1"
        ranks = "1 rank" if engine.group.size == 1 else f"{engine.group.size} ranks"
        print(f"apb: serving {name!r} at {at}, {ranks}", file=sys.stderr, flush=True)
        Path(server.served).touch()
    if signs is not None:
        signs.start()
    worker.run()
    if signs is not None:
        signs.stop()


def _drain_on_sigterm(worker: Worker) -> None:
    """SIGTERM: requests that are here are answered, no others are taken. A second one ends the server."""

    def drain(*_: Any) -> None:
        worker.draining = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, drain)


def _keys(file: Path) -> tuple[str, ...]:
    """The keys in a file; InputError if there are none."""
    try:
        keys = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The file of API keys {str(file)!r} cannot be read; give one with a key on each line."
        ) from error
    if not keys:
        raise InputError(f"The file of API keys {str(file)!r} has none; write one on each line.")
    return keys


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
