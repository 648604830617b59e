"""A prompt in the three parts that the method treats differently: prefix, document, query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING

from .errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for the document while a chat template is rendered; long enough not to occur in one.
_SENTINEL = "\u2063apb-document-goes-here\u2063"


@dataclass(frozen=True)
class Prompt:
    """Token ids of ``prefix`` (BOS, system text), ``document`` and ``query`` (the question and what closes the turn).

    The model reads ``prefix + document + query`` at positions 0, 1, 2, ...
    """

    prefix: tuple[int, ...]
    document: tuple[int, ...]
    query: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.document:
            raise InputError("The document is empty; give a text with at least one token.")
        if not self.query:
            raise InputError("The query is empty; give the question to ask of the document.")

    def __len__(self) -> int:
        return len(self.prefix) + len(self.document) + len(self.query)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids in the order in which an ordinary forward pass would read them."""
        return self.prefix + self.document + self.query

    @classmethod
    def from_tokens(cls, prefix: Sequence[int], document: Sequence[int], query: Sequence[int]) -> Prompt:
        """A prompt of token ids; ``prefix`` may be empty."""
        try:
            return cls(*(tuple(map(index, part)) for part in (prefix, document, query)))
        except TypeError as error:
            raise InputError(f"Token ids must be whole numbers: {first_line(error)}.") from error

    @classmethod
    def from_text(cls, tokenizer: PreTrainedTokenizerBase, document: str, query: str) -> Prompt:
        """A plain-text prompt: BOS where the tokenizer has one, the document, an empty line, the query.

        The parts are tokenized apart, so that a document's tokens do not depend on the question.
        """
        _check_texts(document, query)
        bos = tokenizer.bos_token_id
        return cls(
            () if bos is None else (bos,),
            _encode(tokenizer, document),
            _encode(tokenizer, "\n\n" + query),
        )

    @classmethod
    def from_chat(
        cls, tokenizer: PreTrainedTokenizerBase, document: str, query: str, system: str | None = None
    ) -> Prompt:
        """The tokenizer's chat template around one user turn that holds the document, an empty line and the query.

        ``prefix`` is what the template puts before the document, ``query`` is the question with what the template puts
        after it, up to where the assistant begins to speak.
        """
        if tokenizer.chat_template is None:
            raise InputError("This tokenizer has no chat template; use Prompt.from_text instead of Prompt.from_chat.")
        _check_texts(document, query)
        messages = [{"role": "user", "content": f"{_SENTINEL}\n\n{query}"}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        from jinja2 import TemplateError

        try:
            rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise InputError(f"The tokenizer's chat template refuses this prompt: {first_line(error)}.") from error
        before, found, after = rendered.partition(_SENTINEL)
        if not found:
            raise InputError("The tokenizer's chat template drops the user's text; use Prompt.from_text instead.")
        return cls(_encode(tokenizer, before), _encode(tokenizer, document), _encode(tokenizer, after))

    @classmethod
    def for_model(
        cls, tokenizer: PreTrainedTokenizerBase, document: str, query: str, system: str | None = None
    ) -> Prompt:
        """``from_chat`` where the tokenizer has a chat template, else ``from_text``."""
        if tokenizer.chat_template is not None:
            return cls.from_chat(tokenizer, document, query, system)
        if system is not None:
            raise InputError("This model has no chat template, so it takes no system text; leave the system text out.")
        return cls.from_text(tokenizer, document, query)


def check_tokens(token_ids: Sequence[int], vocabulary: int) -> None:
    """InputError where a token id is not below ``vocabulary``."""
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0 or highest >= vocabulary:
        raise InputError(
            f"Token id {lowest if lowest < 0 else highest} is outside the model's vocabulary of {vocabulary}; "
            "make the prompt with this model's tokenizer."
        )


def _check_texts(document: str, query: str) -> None:
    for name, text in (("document", document), ("query", query)):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8 come as such characters
            raise InputError(f"The {name} is not valid text at character {error.start}; give it as UTF-8.") from error
    if not document.strip():
        raise InputError("The document is empty; give a text with at least one word.")
    if not query.strip():
        raise InputError("The query is empty; give the question to ask of the document.")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    # verbose=False: a document longer than the tokenizer's own limit is this package's business, not a warning.
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else ()
