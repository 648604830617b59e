"""The page at ``/``: a client of the API in a browser, files that load nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The browser itself keeps the page from loading or sending anything elsewhere, whatever a text or an answer contains.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Serve the page."""
    for file in sorted(Path(__file__).parent.iterdir()):
        if kind := _KINDS.get(file.suffix):
            path = "/" if file.suffix == ".html" else f"/{file.name}"
            app.add_api_route(path, _route(file.read_bytes(), kind), include_in_schema=False)


def _route(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return file
