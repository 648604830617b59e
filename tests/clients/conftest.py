"""The server that all clients here ask."""

from real_server import server

__all__ = ["server"]
