"""``apb serve``: answer over HTTP, as clients of the OpenAI API ask."""

from __future__ import annotations

import socket
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, at_least
from . import options


@dataclass(frozen=True)
class Server:
    """Everything a rank needs to serve; plain values, so that it travels."""

    model: str
    chat_template: str | None
    loading: dict[str, Any]
    reading: dict[str, Any]
    host: str
    port: int
    max_new_tokens: int


def serve(
    model: options.Model = None,
    chat_template: options.ChatTemplate = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for every one that this machine has.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    strategy: options.Strategy = "apb",
    blocks: options.Blocks = None,
    rounds: options.Rounds = None,
    ranks: options.Ranks = None,
    tensor_parallel: options.TensorParallel = 1,
    gpus_per_rank: options.GpusPerRank = 1,
    anchor_length: options.AnchorLength = None,
    passing_length: options.PassingLength = None,
    compressor: options.Compressor = None,
    heads: options.Heads = None,
    vertical_size: options.VerticalSize = None,
    slash_size: options.SlashSize = None,
    approximate: options.Approximate = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens, where a request names none.")] = 512,
    dtype: options.Dtype = None,
    device: options.Device = None,
    allow_extrapolation: options.AllowExtrapolation = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve a model: POST /v1/chat/completions, GET /v1/models, /health, /metrics. One prompt is read at a time."""
    given = dict(locals())
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"A server needs {error.name}, which is not installed; install apb[serve].") from error
    _listen(host, port).close()

    from ..distributed import launch
    from ..hf import loading
    from .quiet import quiet_libraries

    quiet_libraries()
    place = loading.pick_device(device)
    at_least("tensor-parallel", tensor_parallel, 1)
    at_least("max_new_tokens", max_new_tokens, 1)
    size = launch.ranks_to_use(ranks, place, tensor_parallel, gpus_per_rank)
    server = Server(
        model=str(model or loading.shipped_model()),
        chat_template=chat_template,
        **options.of_engine(given, place.type),
        host=host,
        port=port,
        max_new_tokens=max_new_tokens,
    )
    _check(server, size)
    launch.run(work, size * tensor_parallel, server)


def _check(server: Server, ranks: int) -> None:
    """What would be wrong with every request, before a process is started or a weight is read."""
    from ..hf import loading
    from ..hf.chat import template_of
    from ..hf.heads import HeadShape, load_heads
    from ..hf.tensor_parallel import check_shards
    from ..methods import check_heads
    from ..reading import Reading

    reading = Reading(**server.reading)
    for name, value in (("blocks", reading.blocks), ("rounds", reading.rounds)):
        if value is not None:
            at_least(name, value, 1)
    config = loading.load_config(server.model, server.loading["trust_remote_code"])
    loading.check_supported(config)
    template_of(loading.load_tokenizer(server.model, server.loading["trust_remote_code"]), server.chat_template)
    tensor = server.loading["tensor_parallel"]
    check_shards(config, tensor)
    check_heads(reading.strategy, config.get_text_config().num_attention_heads // tensor, ranks)
    if reading.heads:
        load_heads(reading.heads, **asdict(HeadShape.of(config)))


def work(server: Server) -> None:
    """One rank's part: the engine on this thread; on rank 0 the server on another."""
    from ..engine import Engine
    from ..serving.worker import Worker
    from .quiet import quiet_libraries

    quiet_libraries()
    engine = Engine.from_pretrained(server.model, **server.loading, **server.reading)
    worker = Worker(engine)
    if engine.device.type == "cuda":
        worker.warm_up()
    if engine.mesh.everyone.rank == 0:
        import uvicorn

        from ..serving.app import make_app

        path = Path(server.model)
        name = path.resolve().name if path.is_dir() else server.model
        listening = _listen(server.host, server.port)
        app = make_app(worker, name, server.max_new_tokens, server.chat_template)
        http = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True).start()
        at = f"http://{server.host}:{listening.getsockname()[1]}/v1"
        ranks = "1 rank" if engine.group.size == 1 else f"{engine.group.size} ranks"
        print(f"apb: serving {name!r} at {at}, {ranks}", file=sys.stderr, flush=True)
    worker.run()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; InputError where none can."""
    if not 0 <= port < 1 << 16:
        raise InputError(f"A port is a number from 0 to 65535, not {port}.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"Nothing can listen at {host}, port {port}: {error.strerror}; choose others with --host and --port."
        ) from error
