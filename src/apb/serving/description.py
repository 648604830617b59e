"""The OpenAPI description: for every endpoint the bodies and the statuses that can really come."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .bodies import ChatChunk, ErrorBody

_ERRORS = {
    400: "The request is invalid, or does not fit.",
    401: "An API key is missing.",
    404: "There is no such model or document.",
    408: "The body took too long.",
    413: "The body is too large, or there are too many documents.",
    429: "Too many requests wait; Retry-After says when to come again.",
    500: "Answering failed.",
    502: "The vLLM server that answers failed.",
    503: "The server is ending, its ranks are being started, or the vLLM server that answers is gone.",
}
# What a request that is read may be answered with, and any other under /v1.
WORK = tuple(_ERRORS)
LOOK = (401, 404)


def errors(statuses: Collection[int]) -> dict[int | str, dict[str, Any]]:
    """The error responses of an endpoint."""
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


def streamed(event: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The responses of an endpoint that answers whole or, with ``stream``, in events."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{event.__name__}"},
        "description": "An ErrorBody if answering fails; of the last event [DONE].",
    }
    content = {"text/event-stream": {"schema": {"type": "object", "required": ["data"], "properties": {"data": data}}}}
    return {**errors(WORK), 200: {"description": "The answers.", "content": content}}


def describe(app: FastAPI, keys: bool) -> None:
    """Let an application describe itself; with ``keys`` every request under /v1 needs one."""

    def description() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app, keys)
        return app.openapi_schema

    app.openapi = description  # type: ignore[method-assign]


def _described(app: FastAPI, keys: bool) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    parts = found["components"]["schemas"]
    # FastAPI's own answer to what is invalid; here that is a 400.
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    _, chunk = models_json_schema([(ChatChunk, "serialization")], ref_template="#/components/schemas/{model}")
    for name, part in chunk["$defs"].items():
        parts.setdefault(name, part)
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            for status, response in operation["responses"].items():
                if int(status) >= 400:  # errors are JSON wherever the answer is plain text
                    response["content"] = {"application/json": next(iter(response["content"].values()))}
            if keys and path.startswith("/v1/"):
                operation["security"] = [{"key": []}]
    return found
