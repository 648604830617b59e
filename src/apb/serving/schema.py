"""Requests in the format of the OpenAI API: what they may hold, what is refused, and what is ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import InputError
from .prompts import Said

# Fields that would change the answer and are not supported, with the values under which they change nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}
# Fields that name the client or its bookkeeping, about which there is nothing to say.
_SILENT = {"user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key"}

MOST_ANSWERS = 8
MOST_MESSAGES = 256


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Text(_Open):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class Message(_Open):
    """One message, its text whole or in parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Text], Field(min_length=1, max_length=MOST_MESSAGES)]

    def said(self) -> Said:
        """The message as prompts are made of it; "developer" is what templates know as "system"."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return Said("system" if self.role == "developer" else self.role, parts)


class StreamOptions(_Open):
    """Options of a streamed answer."""

    include_usage: bool = False


class NamedSchema(_Open):
    """A JSON schema under a name."""

    json_schema: Annotated[dict[str, Any], Field(alias="schema")] = {}


class ResponseFormat(_Open):
    """The form that an answer has to have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: NamedSchema | None = None

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that the answer follows; None if there is none."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return '{"type": "object"}'
        if self.json_schema is None:
            raise InputError("A response_format of type 'json_schema' needs 'json_schema': {'schema': ...}.")
        return json.dumps(self.json_schema.json_schema)


class HowToRead(BaseModel):
    """How a request asks to be read, where the operator lets it.

    Attributes:
        exact: with full attention, whatever the server's strategy is; its decode method stays.
    """

    model_config = ConfigDict(extra="forbid")
    exact: bool = False


class _Request(_Open):
    """What chats and completions have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = None
    response_format: ResponseFormat | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    apb: HowToRead | None = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, body: Any) -> Any:
        """Drop nulls, and unsupported fields without effect; refuse the others of these."""
        if not isinstance(body, dict):
            return body
        kept = {name: value for name, value in body.items() if value is not None}
        for name, harmless in _REFUSED.items():
            if name in kept and kept.pop(name) not in harmless:
                raise InputError(f"{name!r} is not supported here; leave it out.")
        return kept

    @property
    def ignored(self) -> list[str]:
        """Names of the fields that have no effect here."""
        return sorted(set(self.model_extra or ()) - _SILENT)

    @property
    def exactly(self) -> bool:
        """True if the request asks to be read exactly."""
        return self.apb is not None and self.apb.exact

    @property
    def with_usage(self) -> bool:
        """True if a stream is to end with the token usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, longest: int, own: dict[str, Any]) -> dict[str, Any]:
        """Arguments of :class:`apb.generation.Sampling`.

        Args:
            longest: the token limit if the request sets none.
            own: how the checkpoint samples where the request does not say.
        """
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        asked = own | {name: value for name, value in given.items() if value is not None}
        if asked.get("top_k", 0) < 1:  # as clients write "all"
            asked.pop("top_k", None)
        return asked | {
            "max_new_tokens": longest if self.max_tokens is None else self.max_tokens,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "schema": self.response_format and self.response_format.schema_text,
            "seed": self.seed,
        }


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions.

    Attributes:
        document: extension of this package: the text to read; the user's last message is then the question alone.
        document_id: the same, of a document given to POST /v1/documents.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    document: str | None = None
    document_id: str | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def said(self) -> list[Said]:
        """The messages; InputError unless the last one is the user's."""
        if self.messages[-1].role != "user":
            raise InputError("The last message must be the user's: it is what gets answered.")
        if self.document is not None and self.document_id is not None:
            raise InputError("Both 'document' and 'document_id' are given; leave one out.")
        return [message.said() for message in self.messages]

    def sampling(self, longest: int, own: dict[str, Any]) -> dict[str, Any]:
        """As for all requests, with the limit's newer name and the log-probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("'top_logprobs' needs 'logprobs': true.")
        asked = super().sampling(longest, own)
        if self.max_completion_tokens is not None:
            asked["max_new_tokens"] = self.max_completion_tokens
        return asked | ({"top_logprobs": self.top_logprobs or 0} if self.logprobs else {})


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    def sampling(self, longest: int, own: dict[str, Any]) -> dict[str, Any]:
        """As for all requests, with the log-probabilities."""
        asked = super().sampling(longest, own)
        return asked | ({} if self.logprobs is None else {"top_logprobs": self.logprobs})


class DocumentRequest(_Open):
    """The body of POST /v1/documents.

    Attributes:
        text: the document.
        question: what it is read for, if that is known.
        name: shown in lists.
        read: False to keep the text alone; it is then read for the first question that is asked of it.
    """

    text: str
    question: str | None = None
    name: str | None = None
    read: bool = True
