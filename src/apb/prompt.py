"""A prompt in the three parts that strategies treat differently: prefix, document, query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Separates the document from the question, unless the caller says what does.
BLANK_LINE = "\n\n"
# Characters of a document's beginning with which the text before it is encoded as it is before all of it.
_ENOUGH = 64


@dataclass(frozen=True)
class Prompt:
    """Token ids of ``prefix`` (BOS, system text), ``document`` and ``query`` (the question and what closes the turn).

    The model reads ``prefix + document + query`` at positions 0, 1, 2, ... These are the tokens that transformers makes
    of the whole text; a token that straddles a border of the document belongs to it. Documents, questions and system
    texts are plain text: names of control tokens in them, such as ``</s>``, do not become those tokens.

    ``front`` replaces the prefix where the question is asked before the document too: the prefix, the question (without
    what closes the turn) and an empty line. A prompt of tokens has the prefix and the whole query there.

    ``asked`` is False where the query stands for questions that are not known yet.
    """

    prefix: tuple[int, ...]
    document: tuple[int, ...]
    query: tuple[int, ...]
    front: tuple[int, ...] = field(default=(), compare=False, repr=False)
    asked: bool = field(default=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.document:
            raise InputError("The document is empty; give a text with at least one token.")
        if not self.query:
            raise InputError("The query is empty; give the question to ask of the document.")
        if not self.front:
            object.__setattr__(self, "front", self.prefix + self.query)

    def __len__(self) -> int:
        return len(self.prefix) + len(self.document) + len(self.query)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids in the order in which an ordinary forward pass would read them."""
        return self.prefix + self.document + self.query

    @property
    def question_first(self) -> Prompt:
        """This prompt with the question in front of the document as well; document and query keep their tokens."""
        return replace(self, prefix=self.front)

    @classmethod
    def from_tokens(cls, prefix: Sequence[int], document: Sequence[int], query: Sequence[int]) -> Prompt:
        """A prompt of token ids; ``prefix`` may be empty."""
        return cls(whole_numbers(prefix), whole_numbers(document), whole_numbers(query))

    @classmethod
    def from_text(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        document: str,
        query: str,
        *,
        separator: str = BLANK_LINE,
        answer_prefix: str = "",
    ) -> Prompt:
        """A plain-text prompt: the document, the separator, the query; BOS in front if the tokenizer adds one.

        The ids are those of ``tokenizer(document + separator + query)``. ``answer_prefix`` is the forced beginning of
        the answer: it follows the query directly.
        """
        from .hf.texts import Piece, encode

        _check_texts(document, query, separator=separator, answer_prefix=answer_prefix)
        pieces = [Piece(document, "document"), Piece(separator), Piece(query + answer_prefix, "query")]
        ahead = [Piece(query, "query"), Piece(BLANK_LINE), Piece(document[:_ENOUGH], "document")]
        front = encode(tokenizer, ahead, special=True).around(2)[0]
        return cls(*encode(tokenizer, pieces, special=True).around(0), front)

    @classmethod
    def from_rendered(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        opening: str,
        document: str,
        query: str,
        *,
        separator: str = BLANK_LINE,
        answer_prefix: str = "",
    ) -> Prompt:
        """A prompt whose text a chat template has been applied to already; no template is added.

        Names of control tokens are those tokens wherever they stand. The ids are those of ``tokenizer(text)`` of the
        whole text, in the order of the arguments, but a text that begins with BOS gets no second one.

        Args:
            tokenizer: the model's tokenizer.
            opening: what the template wrote before the document; it becomes the prefix.
            document: the document.
            query: the question and what the template wrote after it, from the first control token on.
            separator: the text between document and query.
            answer_prefix: forced beginning of the answer; it follows the query directly.
        """
        from .hf.control import any_of, control_tokens
        from .hf.texts import Piece, encode

        _check_texts(document, query, opening=opening, separator=separator, answer_prefix=answer_prefix)
        begun = bool(tokenizer.bos_token) and opening.startswith(str(tokenizer.bos_token))
        pieces = [Piece(opening), Piece(document), Piece(separator + query + answer_prefix)]
        question = any_of(control_tokens(tokenizer, None).values()).split(query)[0].rstrip()
        ahead = [Piece(f"{opening}{question}{BLANK_LINE}"), Piece(document[:_ENOUGH])]
        front = encode(tokenizer, ahead, special=not begun).around(1)[0]
        return cls(*encode(tokenizer, pieces, special=not begun).around(1), front)

    @classmethod
    def from_chat(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        document: str,
        query: str,
        system: str | None = None,
        *,
        chat_template: str | Path | None = None,
        separator: str = BLANK_LINE,
        answer_prefix: str = "",
    ) -> Prompt:
        """The tokenizer's chat template around one user turn: the document, the separator and the query.

        ``prefix`` is the template's text before the document; ``query`` is the question and the template's text after
        it, up to the beginning of the assistant's turn. The ids are those of ``apply_chat_template``.

        Args:
            tokenizer: the model's tokenizer.
            document, query, system: texts; the system text has a turn of its own, before the user's.
            chat_template: the name of one of the tokenizer's templates, a file, or a template's text, instead of the
                tokenizer's own.
            separator: the text between document and query.
            answer_prefix: forced beginning of the answer; it follows the template's text directly.
        """
        from .hf.chat import Turn, rendered, template_of
        from .hf.texts import Piece, encode

        template = template_of(tokenizer, chat_template)
        if template is None:
            raise InputError("This tokenizer has no chat template; use Prompt.from_text instead of Prompt.from_chat.")
        _check_texts(document, query, system_text=system, separator=separator, answer_prefix=answer_prefix)
        turns = [Turn("user", [Piece(document, "document"), Piece(separator), Piece(query, "query")])]
        if system is not None:
            turns.insert(0, Turn("system", [Piece(system, "system text")]))
        pieces = [*rendered(tokenizer, template, turns), Piece(answer_prefix, "answer prefix")]
        place, text = next((number, piece.text) for number, piece in enumerate(pieces) if piece.source == "document")
        question = next(piece for piece in pieces if piece.source == "query")
        ahead = [*pieces[:place], question, Piece(BLANK_LINE), Piece(text[:_ENOUGH], "document")]
        front = encode(tokenizer, ahead, special=False, template=template).around(place + 2)[0]
        return cls(*encode(tokenizer, pieces, special=False, template=template).around(place), front)

    @classmethod
    def for_model(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        document: str,
        query: str,
        system: str | None = None,
        *,
        chat_template: str | Path | None = None,
        separator: str = BLANK_LINE,
        answer_prefix: str = "",
    ) -> Prompt:
        """``from_chat`` where the tokenizer has a chat template or one is given, else ``from_text``."""
        if tokenizer.chat_template is not None or chat_template is not None:
            return cls.from_chat(
                tokenizer,
                document,
                query,
                system,
                chat_template=chat_template,
                separator=separator,
                answer_prefix=answer_prefix,
            )
        if system is not None:
            raise InputError("This model has no chat template, so it takes no system text; leave the system text out.")
        return cls.from_text(tokenizer, document, query, separator=separator, answer_prefix=answer_prefix)


def whole_numbers(token_ids: Sequence[int]) -> tuple[int, ...]:
    """Token ids from any sequence of whole numbers, a tensor among them, as Python's own; InputError for others."""
    try:
        return tuple(map(index, token_ids))
    except TypeError as error:
        raise InputError(f"Token ids must be whole numbers: {first_line(error)}.") from error


def check_tokens(token_ids: Sequence[int], vocabulary: int) -> None:
    """InputError if a token id is not below ``vocabulary``."""
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0 or highest >= vocabulary:
        raise InputError(
            f"Token id {lowest if lowest < 0 else highest} is outside the model's vocabulary of {vocabulary}; "
            "make the prompt with this model's tokenizer."
        )


def _check_texts(document: str, query: str, **others: str | None) -> None:
    texts = {"document": document, "query": query, **others}
    for name, text in texts.items():
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:  # lone surrogates: bytes of the command line that were not UTF-8
            what = name.replace("_", " ")
            raise InputError(f"The {what} is not valid text at character {error.start}; give it as UTF-8.") from error
    if not document.strip():
        raise InputError("The document is empty; give a text with at least one word.")
    if not query.strip():
        raise InputError("The query is empty; give the question to ask of the document.")
