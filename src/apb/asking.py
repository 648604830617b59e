"""Prompts of a document that is asked several times: the first one, later questions, further turns of a chat."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .prompt import BLANK_LINE, Prompt, whole_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Question = str | Sequence[int]

NEUTRAL = "Read the text above carefully; questions about it follow."
"""Stands for the question while a text is read for none."""
TYPICAL = (
    "Who and what does the text mention, which names, numbers, words and values does it give, and to what does each "
    "belong? What is said where, and what is said most often?"
)
"""Questions that stand for those to come."""
THIS, ANOTHER, NONE = "this question", "another question", "no question"
"""For which question the document was read, seen from the question that is asked."""
NO_QUESTION = (
    "With propagation a document is read for a question, which chooses the rows that go on; give the question, or read "
    "it without propagation."
)
"""Why a text cannot be read."""
# Characters of a document's end after which a question is encoded as it is after all of it.
_ENOUGH = 2000


class Asking(ABC):
    """Makes the prompts of one document."""

    @abstractmethod
    def first(self, question: Question | None, questions: Sequence[str]) -> tuple[Prompt, tuple[Question, ...]]:
        """The prompt by which the document is read, and the questions it is read for, if any."""

    @abstractmethod
    def query(self, question: Question) -> tuple[int, ...]:
        """The tokens of a question about the document, and of what closes the turn."""

    @abstractmethod
    def anew(self, prefix: tuple[int, ...], document: tuple[int, ...], question: Question) -> Prompt:
        """The prompt by which a document of these tokens is read for a question.

        ``prefix`` is what stands before a document that was given as tokens; a text's is its template's.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """What a loaded document needs of it to be asked again, as JSON's own values."""

    @abstractmethod
    def turn(self, unread: Sequence[int], question: Question) -> tuple[int, ...]:
        """The tokens of a further turn after an answer, of which the tokens ``unread`` have not been read yet."""


@dataclass(frozen=True)
class OfTokens(Asking):
    """A document given as token ids; its questions are too."""

    prefix: tuple[int, ...]
    document: tuple[int, ...]

    def first(self, question: Question | None, questions: Sequence[str]) -> tuple[Prompt, tuple[Question, ...]]:
        """See :meth:`Asking.first`: without a question the document's last token stands for it."""
        if questions:
            raise InputError("Several questions are texts; give the document as text too, or one question as tokens.")
        if question is None:
            return replace(Prompt.from_tokens(self.prefix, self.document, self.document[-1:] or (0,)), asked=False), ()
        query = self.query(question)
        return Prompt.from_tokens(self.prefix, self.document, query), (query,)

    def query(self, question: Question) -> tuple[int, ...]:
        """See :meth:`Asking.query`."""
        if isinstance(question, str):
            raise InputError("The document was given as tokens, so its questions must be; or give the text.")
        query = whole_numbers(question)
        if not query:
            raise InputError("The query is empty; give the question to ask of the document.")
        return query

    def anew(self, prefix: tuple[int, ...], document: tuple[int, ...], question: Question) -> Prompt:
        """See :meth:`Asking.anew`."""
        return Prompt.from_tokens(prefix, document, self.query(question))

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Asking.to_dict`."""
        return {}

    def turn(self, unread: Sequence[int], question: Question) -> tuple[int, ...]:
        """See :meth:`Asking.turn`: what closes a turn is up to the caller."""
        return (*unread, *self.query(question))


@dataclass(frozen=True)
class OfText(Asking):
    """A document given as text, with the model's chat template around it if there is one."""

    tokenizer: PreTrainedTokenizerBase
    text: str
    system: str | None = None
    chat_template: str | Path | None = None

    def first(self, question: Question | None, questions: Sequence[str]) -> tuple[Prompt, tuple[Question, ...]]:
        """See :meth:`Asking.first`."""
        asked = tuple(questions) or (() if question is None else (question,))
        if not all(_text(each).strip() for each in asked):
            raise InputError("A question that the document is read for is empty; give one, or none.")
        prompt = self._prompt(self.text, "\n".join(map(_text, asked)) or NEUTRAL)
        return replace(prompt, asked=bool(asked)), asked

    def query(self, question: Question) -> tuple[int, ...]:
        """See :meth:`Asking.query`: the tokens that stand behind the document in its prompt with this question."""
        return self._prompt(self._end, _text(question)).query

    def anew(self, prefix: tuple[int, ...], document: tuple[int, ...], question: Question) -> Prompt:
        """See :meth:`Asking.anew`: what stands around the document is the same around its end."""
        return replace(self._prompt(self._end, _text(question)), document=document)

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Asking.to_dict`: the text's end, and the source of the chat template that was asked for."""
        from .hf.chat import template_of

        asked = None if self.chat_template is None else template_of(self.tokenizer, self.chat_template)
        return {"text": self._end, "system": self.system, "chat_template": asked}

    @classmethod
    def from_dict(cls, tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> OfText:
        """The inverse of :meth:`to_dict`."""
        return cls(tokenizer, fields["text"], fields["system"], fields["chat_template"])

    @property
    def _end(self) -> str:
        end = self.text[-_ENOUGH:]
        return end if end.strip() else self.text

    def turn(self, unread: Sequence[int], question: Question) -> tuple[int, ...]:
        """See :meth:`Asking.turn`: what the chat template writes after an answer up to the next one."""
        from .hf.chat import Turn, rendered, template_of
        from .hf.texts import Piece, encode

        asked = Piece(_text(question), "query")
        if not asked.text.strip():
            raise InputError("The query is empty; give the question to ask of the document.")
        template = template_of(self.tokenizer, self.chat_template)
        if template is None:
            return (*unread, *encode(self.tokenizer, [Piece(BLANK_LINE), asked], special=False).ids)
        chat = [Turn("user", [Piece("?")]), Turn("assistant", [Piece("!", "answer")]), Turn("user", [asked])]
        pieces = rendered(self.tokenizer, template, chat)
        place = next(number for number, piece in enumerate(pieces) if piece.source == "answer")
        ids = encode(self.tokenizer, pieces[place + 1 :], special=False, template=template).ids
        # The template writes the end of the answer's turn, which the model may have written as well.
        return ids if tuple(unread) == ids[: len(unread)] else (*unread, *ids)

    def _prompt(self, document: str, query: str) -> Prompt:
        return Prompt.for_model(self.tokenizer, document, query, self.system, chat_template=self.chat_template)


def check_reread(reread: str) -> None:
    """InputError for another value than "never" or "auto" of what says when a text is read anew."""
    if reread not in ("never", "auto"):
        raise InputError(f"reread is never or auto, not {reread!r}.")


def _text(question: Question) -> str:
    if not isinstance(question, str):
        raise InputError("The document was given as text, so its questions must be; or give its tokens.")
    return question
