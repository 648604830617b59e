"""Response bodies as the OpenAPI description has them. :mod:`.replies` and :mod:`.shelf` make them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorObject(BaseModel):
    """What went wrong, in one sentence."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of an error response."""

    error: ErrorObject


class Usage(_Body):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Question(_Body):
    """Which part of the request was taken for the question."""

    found: str
    first: str
    last: str
    tokens: int


class HowRead(_Body):
    """How the prompt was read and the answer written; fields that say nothing are left out."""

    strategy: str
    exact: bool
    plan: dict[str, Any]
    timing: dict[str, float]
    decode: dict[str, Any]
    question: Question
    choice: str = ""
    read_for: str = ""
    notes: list[str] = []


Finish = Literal["stop", "length"]


class Token(_Body):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(Token):
    """A token of an answer, with the likeliest in its place."""

    top_logprobs: list[Token]


class ChatScores(_Body):
    """The log-probabilities of a chat's answer."""

    content: list[ScoredToken]


class AssistantMessage(_Body):
    """An answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(_Body):
    """One of the answers."""

    index: int
    message: AssistantMessage
    finish_reason: Finish
    logprobs: ChatScores | None


class _Head(_Body):
    id: str
    created: int
    model: str


class ChatCompletion(_Head):
    """The answers to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    apb: HowRead


class Delta(_Body):
    """A piece of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(_Body):
    """Which answer a piece belongs to."""

    index: int
    delta: Delta
    finish_reason: Finish | None
    logprobs: ChatScores | None


class ChatChunk(_Head):
    """An event of a streamed chat; the last of an answer has a ``finish_reason`` and ``apb``."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | None = None
    apb: HowRead | None = None


class TextScores(_Body):
    """The log-probabilities of a text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class TextChoice(_Body):
    """One of the texts, or in a stream a piece of it."""

    index: int
    text: str
    finish_reason: Finish | None
    logprobs: TextScores | None


class TextCompletion(_Head):
    """How a text goes on; in a stream an event, without ``usage`` and ``apb`` but at the end."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None
    apb: HowRead | None = None


class DocumentBody(_Body):
    """A document, and how far it has been read."""

    object: Literal["document"]
    id: str
    name: str | None
    question: str | None
    characters: int
    created: int
    status: Literal["unread", "reading", "read", "failed"]
    tokens: int
    read: int
    error: str | None


class Passages(_Body):
    """Which characters of a document its blocks passed on, and for which question."""

    object: Literal["list"]
    question: str | None


class DocumentList(_Body):
    """All documents."""

    object: Literal["list"]
    data: list[DocumentBody]


class Deleted(_Body):
    """A document that is forgotten."""

    object: Literal["document"]
    id: str
    deleted: Literal[True]


class ModelBody(_Body):
    """The model."""

    object: Literal["model"]
    id: str
    created: int
    owned_by: str


class ModelList(_Body):
    """The models: there is one."""

    object: Literal["list"]
    data: list[ModelBody]


class Health(_Body):
    """The kind and time of the last failure that was not a client's."""

    status: Literal["ok"]
    last_error: str | None


class Ready(_Body):
    """Whether requests are taken."""

    ready: bool
