"""What clients may ask, in the words of the OpenAI chat API, and the parts of a prompt that it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import InputError

# Fields that clients send although they change nothing so.
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
    # What is not known cannot be heeded, and leaving it out would be another answer than the one asked for.
    model_config = ConfigDict(extra="forbid")


class Text(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message; the text in pieces or whole."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Text], Field(min_length=1)]
    name: str | None = None


class StreamOptions(_Strict):
    """Of a streamed answer."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions.

    Attributes:
        document: this package's addition: the text to read; the user's message is then the question alone.
        user, metadata, store: taken, and not looked at.
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
        """Without what says nothing: null is as good as left out."""
        if not isinstance(body, dict):
            return body
        return {
            name: value
            for name, value in body.items()
            if value is not None and value not in _CHANGES_NOTHING.get(name, ())
        }

    def parts(self) -> tuple[str, str, str | None]:
        """(document, query, system text or None); InputError where the messages do not name them.

        The document is ``document``, else all pieces of the user's message but the last, else what stands before the
        message's last blank line. The order of the text is the same each time: what differs is which of it counts as
        the question, whose rows decide what blocks pass on.
        """
        system = [message for message in self.messages if message.role in ("system", "developer")]
        others = [message for message in self.messages if message not in system]
        if len(others) != 1 or others[0].role != "user" or len(system) > 1:
            raise InputError(
                "A request is one question: a system message, if any, and one user message; "
                "put what was said before into the document."
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
                "There is no document: give it as 'document', as a piece of the message in front of the question, "
                "or end the message with a blank line and the question."
            )
        return document, query, told

    def sampling(self, longest: int) -> dict[str, Any]:
        """What :class:`apb.generation.Sampling` takes; ``longest`` is the answer's length where none is asked for."""
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
