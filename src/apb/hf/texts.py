"""Tokenization of prompts: the tokens that transformers makes of the whole, with control tokens only from the template.

The whole is encoded at once and its tokens are split afterwards. Encoding the parts separately would give other tokens:
many tokenizers put a space in front of their input, and others merge characters across a border.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Any

from ..errors import first_line
from .control import any_of, cannot, control_tokens, twin_of

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """A part of a prompt; ``source`` names the user's text that it is from; None: it is the template's."""

    text: str
    source: str | None = None


def encode(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece], *, special: bool, template: str | None = None
) -> Tokens:
    """Encode pieces as the one text that they make up.

    Args:
        tokenizer: fast or slow.
        pieces: the text.
        special: let the tokenizer add its special tokens, such as BOS.
        template: source of the chat template that wrote the pieces without a ``source``.

    Returns:
        The ids of ``tokenizer(text, add_special_tokens=special)``; but names of control tokens in the user's texts are
        encoded as text.

    Raises:
        InputError: the tokenizer cannot be kept from turning such names into control tokens.
    """

    def call(text: str) -> Any:
        # verbose=False: documents longer than the tokenizer's own limit are checked by this package.
        return tokenizer(text, add_special_tokens=special, verbose=False)

    unknown = tokenizer.unk_token_id
    if all(piece.source is None for piece in pieces):
        return _read(call, pieces, {}, unknown)
    control = control_tokens(tokenizer, template)
    tokens = _read(call, pieces, control, unknown)
    if tokens.strays():
        twin = twin_of(tokenizer, control)
        names = {number: twin.names[name] for number, name in control.items()}
        renamed = [Piece(twin.renamed(piece.text)) if piece.source is None else piece for piece in pieces]
        try:
            tokens = _read(lambda text: twin.encode(text, special), renamed, names, unknown)
            done = tokens.complete() and not tokens.strays()
        except Exception as error:  # of a class with its own implementation
            raise cannot(tokenizer, first_line(error)) from error
        if not done:
            raise cannot(tokenizer, "it makes control tokens of pieces of text")
    return tokens


class Tokens(ABC):
    """The tokens of all pieces.

    Attributes:
        ids: their ids.
    """

    def __init__(
        self, ids: Sequence[int], pieces: Sequence[Piece], control: Mapping[int, str], unknown: int | None
    ) -> None:
        self.ids = tuple(ids)
        self._pieces = pieces
        self._starts = [0, *accumulate(len(piece.text) for piece in pieces)]
        self._control = control
        self._unknown = unknown

    def around(self, piece: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The tokens before a piece, its own, and those after it.

        A token that straddles a border of the piece is the piece's own; if the tokenizer gives no offsets, it belongs
        to what follows. If that leaves nothing after the piece, the piece gives up its last token.
        """
        first, last = self._cut(self._starts[piece], self._starts[piece + 1])
        if last == len(self.ids) and last - first > 1:
            last -= 1
        return self.ids[:first], self.ids[first:last], self.ids[last:]

    def characters(self, first: int, last: int) -> tuple[int, int] | None:
        """The characters of all pieces that tokens [first, last) stand for; None if the tokenizer does not say."""
        return None

    @abstractmethod
    def _cut(self, start: int, stop: int) -> tuple[int, int]:
        """From characters to tokens: the first one, and the last one + 1."""

    @abstractmethod
    def strays(self) -> bool:
        """True if a user's text has become a control token."""

    @abstractmethod
    def complete(self) -> bool:
        """True if all names of control tokens that the template wrote have become those tokens."""

    def _markers(self) -> list[tuple[int, int]]:
        """The template's control tokens: the characters they start at, and their ids."""
        pattern = any_of(self._control.values())
        ids = {name: number for number, name in self._control.items()}
        return [
            (start + match.start(), ids[match[0]])
            for start, piece in zip(self._starts, self._pieces, strict=False)
            if piece.source is None
            for match in pattern.finditer(piece.text)
        ]


class _Fast(Tokens):
    """Tokens of a tokenizer that gives the characters of each token."""

    def __init__(
        self, encoding: Encoding, pieces: Sequence[Piece], control: Mapping[int, str], unknown: int | None
    ) -> None:
        super().__init__(encoding.ids, pieces, control, unknown)
        self._encoding = encoding
        self._text = "".join(piece.text for piece in pieces)
        # Tokens that the tokenizer has added around the text have no characters in it.
        added = encoding.special_tokens_mask
        front = sum(takewhile(bool, added))
        self._own = range(front, max(front, len(added) - sum(takewhile(bool, reversed(added)))))

    def characters(self, first: int, last: int) -> tuple[int, int] | None:
        """See :meth:`Tokens.characters`."""
        first, last = max(first, self._own.start), min(last, self._own.stop)
        return (self._span(first)[0], self._span(last - 1)[1]) if first < last else None

    def _span(self, token: int) -> tuple[int, int]:
        """The characters of a token; of a control token those of its name, as some include white space."""
        span = self._encoding.token_to_chars(token)
        assert span is not None, "all but tokens from outside the text have one"
        start, stop = span
        if self.ids[token] in self._control:
            found = self._text[start:stop]
            start, stop = stop - len(found.lstrip()), start + len(found.rstrip())
        return start, stop

    def _cut(self, start: int, stop: int) -> tuple[int, int]:
        own = self._own
        # A token without characters at the very beginning (an added space) is the text's, not that of what precedes it.
        first = bisect_right(own, start, key=lambda token: self._span(token)[1]) if start else 0
        last = bisect_left(own, stop, lo=first, key=lambda token: self._span(token)[0])
        return own.start + first, own.start + last

    def strays(self) -> bool:
        for token in self._own:
            number = self.ids[token]
            if number not in self._control:
                continue
            start, stop = self._span(token)
            # Characters without a token become the unknown token, whatever the text.
            if number == self._unknown and self._text[start:stop].casefold() != self._control[number].casefold():
                continue
            if self._is_users(start, stop):
                return True
        return False

    def _is_users(self, start: int, stop: int) -> bool:
        """True if any of these characters comes from a user's text."""
        for piece in range(bisect_right(self._starts, start) - 1, len(self._pieces)):
            if self._starts[piece] >= max(stop, start + 1):
                return False
            if self._pieces[piece].source is not None and self._pieces[piece].text:
                return True
        return False

    def complete(self) -> bool:
        places = ((self._encoding.char_to_token(place), number) for place, number in self._markers())
        return all(token is not None and self.ids[token] == number for token, number in places)


class _Slow(Tokens):
    """Tokens of a tokenizer that gives ids only: borders are found by encoding prefixes of the text."""

    def __init__(
        self,
        call: Callable[[str], Any],
        ids: Sequence[int],
        pieces: Sequence[Piece],
        control: Mapping[int, str],
        unknown: int | None,
    ) -> None:
        super().__init__(ids, pieces, control, unknown)
        self._call = call

    def _cut(self, start: int, stop: int) -> tuple[int, int]:
        text = "".join(piece.text for piece in self._pieces)
        first, last = (self._common(text[:place]) for place in (start, stop))
        return first, max(first, last)

    def _common(self, beginning: str) -> int:
        """Number of leading tokens that the text and a prefix of it have in common."""
        ids = self._call(beginning)["input_ids"]
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids, strict=False)))

    def strays(self) -> bool:
        name = None if self._unknown is None else self._control.get(self._unknown)
        named = name is not None and any(name in piece.text for piece in self._pieces if piece.source is not None)
        return named or bool(self._found() - self._wanted())

    def complete(self) -> bool:
        return not self._wanted() - self._found()

    def _found(self) -> Counter[int]:
        """Count of each control token in the whole, except for unknown characters."""
        return Counter(number for number in self.ids if number in self._control and number != self._unknown)

    def _wanted(self) -> Counter[int]:
        """Expected count of each, from the template and from the tokenizer's own special tokens."""
        around = Counter(number for number in self._call("")["input_ids"] if number in self._control)
        return around + Counter(number for _, number in self._markers())


def _read(
    call: Callable[[str], Any], pieces: Sequence[Piece], control: Mapping[int, str], unknown: int | None
) -> Tokens:
    result = call("".join(piece.text for piece in pieces))
    if result.encodings:
        return _Fast(result.encodings[0], pieces, control, unknown)
    return _Slow(call, result["input_ids"], pieces, control, unknown)
