"""From the messages of a request to a prompt in its parts, whatever template the client has put them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..errors import InputError
from ..hf.chat import Turn, rendered, template_of
from ..hf.texts import Piece, Tokens, encode
from ..prompt import BLANK_LINE, Prompt
from .question import LONGEST, SEARCHED, UNMARKED, Cut, cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts of up to this many tokens without an explicit document are an ordinary chat, and are read exactly.
ORDINARY = 1024
# Tokens of a question that the client has told from the document; of a longer one only a part counts as the question.
LONGEST_GIVEN = 4 * LONGEST
# Characters of a text before the document that every block reads; with a longer one the document begins.
_OPENING = 1000
# Characters of a document's beginning with which the text before it is encoded as it is before all of it.
_ENOUGH = 64
# The piece that is the document, if the client has told it from the question.
_GIVEN = "document"
# Words of the question that the response shows from its beginning, and as many from its end.
_SHOWN = 8


@dataclass(frozen=True)
class Said:
    """A message: who said it and what.

    ``parts`` are its texts; they are joined by blank lines.
    """

    role: str
    parts: Sequence[str]

    @property
    def text(self) -> str:
        """All parts, as they are read."""
        return BLANK_LINE.join(self.parts)


def _nowhere(first: int, last: int) -> None:
    """Of no characters. A function with a name, like the other one: both travel between processes."""


@dataclass(frozen=True)
class Asked:
    """A request as it is read.

    Attributes:
        prompt: its tokens, in the parts that strategies treat differently.
        question: what the response says of the question: its first and last words, tokens, and where it was found.
        ordinary: True if there is no document, so that the prompt is to be read exactly.
        characters: of the text given as document, those that tokens [first, last) of the prompt's document stand for;
            None if they are of no characters of it, or the tokenizer does not say.
    """

    prompt: Prompt
    question: dict[str, str | int]
    ordinary: bool
    characters: Callable[[int, int], tuple[int, int] | None] = _nowhere


def asked(
    tokenizer: PreTrainedTokenizerBase,
    said: Sequence[Said],
    document: str | None = None,
    chat_template: str | None = None,
) -> Asked:
    """The prompt of a chat, of which the last message is the user's.

    Args:
        tokenizer: the model's.
        said: all messages, in order.
        document: stands before the user's first message, if given; all of the last one is then the question.
        chat_template: as in :meth:`apb.Prompt.from_chat`.

    Raises:
        InputError: an empty message, or a template that refuses the chat.
    """
    last = said[-1]
    for each in said:
        _check(each.text, f"message from {each.role}")
    if document is not None:
        _check(document, "document")
    opened = next((number for number, each in enumerate(said) if each.role == last.role), len(said) - 1)
    goes_on = document is not None and opened < len(said) - 1
    # Where it stood when the conversation began: there it is found read.
    given = [Piece(document, _GIVEN), Piece(BLANK_LINE)] if document is not None and goes_on else []
    turns = [
        Turn(each.role, [*(given if number == opened else []), Piece(each.text, f"message {number}")])
        for number, each in enumerate(said[:-1])
    ]
    text, start = last.text, 0 if document is not None else len(last.text) - len(last.parts[-1])
    if document is not None and not goes_on:
        text, start = document + BLANK_LINE + text, len(document + BLANK_LINE)
    found = _found(tokenizer, text, start, told=document is not None or start > 0)
    template = template_of(tokenizer, chat_template)
    pieces = _pieces(text, found, "rest" if goes_on else _GIVEN)
    if template is not None:
        pieces = rendered(tokenizer, template, [*turns, Turn(last.role, pieces)])
    elif turns:
        raise InputError(
            "This model has no chat template, so it takes one user message, and no system text or earlier turns; "
            "send that message alone, or start the server with --chat-template."
        )

    def encoded(pieces: Sequence[Piece]) -> Tokens:
        return encode(tokenizer, pieces, special=template is None, template=template)

    prompt, count, tokens = _prompt(pieces, encoded)
    ordinary = document is None and start == 0 and len(prompt) <= ORDINARY
    places = {} if document is None else {"characters": _places(document, pieces, prompt, tokens)}
    return Asked(prompt, _told(text, found, count), ordinary, **places)


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> Asked:
    """The prompt of a text as POST /v1/completions gives it: no template, names of control tokens are those tokens."""
    _check(text, "prompt")
    found = _found(tokenizer, text, 0, told=False)
    begun = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))

    def as_it_is(pieces: Sequence[Piece]) -> Tokens:
        return encode(tokenizer, [Piece(piece.text) for piece in pieces], special=not begun)

    prompt, count, _ = _prompt(_pieces(text, found), as_it_is)
    return Asked(prompt, _told(text, found, count), len(prompt) <= ORDINARY)


def _check(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # lone surrogates, which JSON can write
        raise InputError(f"The {what} is not valid text at character {error.start}; send it as UTF-8.") from error
    if not text.strip():
        raise InputError(f"The {what} is empty; give a text with at least one word.")


def _found(tokenizer: PreTrainedTokenizerBase, text: str, start: int, told: bool) -> Cut:
    """The cut of a message whose question begins at ``start`` if the client has ``told`` it from a document."""

    def tokens(part: str) -> int:
        return len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    given = text[start:]
    if told and len(given) <= SEARCHED and tokens(given) <= LONGEST_GIVEN:
        return Cut(0, max(start - len(BLANK_LINE), 0), start)
    found = cut(given, tokens)
    # Behind a document nothing stands in front.
    return Cut(0, start + found.stop, start + found.start, found.tail) if told else found


def _pieces(text: str, found: Cut, document: str = _GIVEN) -> list[Piece]:
    """The message in pieces: what stands in front, the document, blanks, the question."""
    borders = (0, found.head, found.stop, found.start, len(text))
    named = zip(("front", document, None, "question"), borders, borders[1:], strict=False)
    return [Piece(text[start:stop], name) for name, start, stop in named if start < stop]


def _places(
    document: str, pieces: Sequence[Piece], prompt: Prompt, tokens: Tokens
) -> Callable[[int, int], tuple[int, int] | None]:
    """Where in a text its tokens stand, which begin the prompt's document or follow in it."""
    number = next(number for number, piece in enumerate(pieces) if piece.source == _GIVEN)
    # A template may have stripped it.
    begins = sum(len(piece.text) for piece in pieces[:number]) - max(document.find(pieces[number].text[:_ENOUGH]), 0)
    return partial(_characters, tokens, len(prompt.prefix), begins, len(document))


def _characters(tokens: Tokens, before: int, begins: int, length: int, first: int, last: int) -> tuple[int, int] | None:
    found = tokens.characters(before + first, before + last)
    if found is None:
        return None
    start, stop = max(found[0] - begins, 0), min(found[1] - begins, length)
    return (start, stop) if start < stop else None


def _told(text: str, found: Cut, tokens: int) -> dict[str, str | int]:
    """What the response says about the question."""
    question = text[: found.head] if found.head else text[found.start :]
    where = "front" if found.head else "last tokens" if found.tail else "end" if found.stop else "message"
    words = (question or text[-_SHOWN * 16 :]).split()
    return {"found": where, "first": " ".join(words[:_SHOWN]), "last": " ".join(words[-_SHOWN:]), "tokens": tokens}


def _prompt(pieces: Sequence[Piece], encoded: Callable[[Sequence[Piece]], Tokens]) -> tuple[Prompt, int, Tokens]:
    """The prompt of a chat in pieces, the number of the question's tokens, and all tokens.

    The document begins with the first long text, and ends before the question.
    """
    tokens = encoded(pieces)
    ids = tokens.ids
    place = {piece.source: number for number, piece in enumerate(pieces) if piece.source is not None}
    question, front = place.pop("question", None), place.pop("front", None)
    count = 0
    if (marked := question if front is None else front) is not None:
        _, own, rest = tokens.around(marked)
        # A piece that nothing follows has given up its last token.
        count = len(own) + (len(rest) if marked == len(pieces) - 1 else 0)
    if place:
        texts = sorted(place.values())
        long = (number for number in texts if len(pieces[number].text) > _OPENING)
        first = next(long, place.get(_GIVEN, texts[0]))
        opening, closing = tokens.around(first)[0], tokens.around(texts[-1])[2]
        document, query = ids[len(opening) : len(ids) - len(closing)], closing
        if question is None:
            tail = min(UNMARKED, len(document) // 2)
            document, query = document[: len(document) - tail], document[len(document) - tail :] + closing
            count = count or tail
        if document and query:
            ahead = [*pieces[:first], *([] if question is None else [pieces[question], Piece(BLANK_LINE)])]
            begun = Piece(pieces[first].text[:_ENOUGH], pieces[first].source)
            return Prompt(opening, document, query, encoded([*ahead, begun]).around(len(ahead))[0]), count, tokens
    if len(ids) < 2:
        raise InputError("The prompt has a single token, and at least 2 are needed; give a longer one.")
    return Prompt((), ids[:-1], ids[-1:]), count, tokens
