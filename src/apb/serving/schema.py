"""Requests in the format of the OpenAI chat API, and the parts of the prompt that they contain."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import InputError

# Values of fields that clients send although they have no effect.
_CHANGES_NOTHING = {
    "stop": ([],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}


class _Strict(BaseModel):
    # Ignoring an unknown field would give another answer than the one requested.
    model_config = ConfigDict(extra="forbid")


class Text(_Strict):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message, its text whole or in parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Text], Field(min_length=1)]
    name: str | None = None


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions.

    Attributes:
        document: extension of this package: the text to read; the user's message is then the question alone.
        user, metadata, store: accepted and ignored.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    document: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, body: Any) -> Any:
        """Drop nulls and fields without effect."""
        if not isinstance(body, dict):
            return body
        return {
            name: value
            for name, value in body.items()
            if value is not None and value not in _CHANGES_NOTHING.get(name, ())
        }

    def parts(self) -> tuple[str, str, str | None]:
        """(document, query, system text or None).

        The document is the field ``document``, else all parts of the user's message but the last, else the text before
        the message's last blank line. The prompt is the same text in each case; they differ in which part of it counts
        as the query, whose rows decide what blocks pass on.

        Raises:
            InputError: the messages hold more than one question, or no document.
        """
        system = [message for message in self.messages if message.role in ("system", "developer")]
        others = [message for message in self.messages if message not in system]
        if len(others) != 1 or others[0].role != "user" or len(system) > 1:
            raise InputError(
                "A request is one question: a system message, if any, and one user message; "
                "put earlier messages into the document."
            )
        told = _whole(system[0].content) if system else None
        content = others[0].content
        if self.document is not None:
            return self.document, _whole(content), told
        if not isinstance(content, str) and len(content) > 1:
            return _whole(content[:-1]), content[-1].text, told
        document, blank, query = _whole(content).rstrip().rpartition("\n\n")
        if not blank:
            raise InputError(
                "There is no document: give it as 'document', as a text part of the message before the question, "
                "or end the message with a blank line and the question."
            )
        return document, query, told

    def sampling(self, longest: int) -> dict[str, Any]:
        """Arguments of :class:`apb.generation.Sampling`; ``longest`` is the token limit if the request sets none."""
        asked = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return {
            "max_new_tokens": longest if asked is None else asked,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
        }


def _whole(content: str | list[Text]) -> str:
    return content if isinstance(content, str) else "\n\n".join(piece.text for piece in content)
