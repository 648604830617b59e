"""The HTTP server, on a thread of its own."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Any

import uvicorn
from fastapi import FastAPI

# Seconds that responses have to get out when the server ends.
_LAST_S = 3


class Front:
    """Serves an application from entering its context until leaving it.

    ``ssl`` are those of uvicorn's options that begin so: with a certificate it is a server of HTTPS.
    """

    def __init__(self, app: FastAPI, listening: socket.socket, **ssl: Any) -> None:
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_LAST_S, **ssl)
        self._http = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._http.run, kwargs={"sockets": [listening]}, daemon=True)

    def __enter__(self) -> Front:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.should_exit = True
        self._thread.join(2 * _LAST_S)
