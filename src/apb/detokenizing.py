"""From tokens to text, piece by piece, and where an answer's text ends."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The name of a token that is a byte.
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if decoding removes spaces before punctuation; many tokenizers have that setting and ignore it."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    return " ." not in str(tokenizer.decode(tokenizer("a . b", add_special_tokens=False)["input_ids"]))


class Detokenizer:
    """Incremental decoding: the text of a growing run of tokens in pieces, which joined are the text of the whole run.

    Whatever a tokenizer does to the whole (it may strip a leading space, or join punctuation to words) applies to the
    pieces too: text is held back as long as later tokens may change it.
    """

    # Each token decodes a window of tokens again, of at most this many where possible.
    _WINDOW = 16

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # of the window
        self._told = 0  # characters of the window's text returned so far
        self._length = 0  # characters returned in all
        self._text_so_far = ""  # the window's
        self._in_bytes = False  # True if it ends in bytes that stand for characters not in the vocabulary
        # The last few characters of a text that is cleaned up may still change: "do n" becomes "don't".
        self._hold = 8 if _cleans_up(tokenizer) else 0

    def add(self, token: int, last: bool = False) -> str:
        """The new text that a token brings; held back while it ends in the middle of a character."""
        self._ids.append(token)
        if last:
            return self._given(self._text(0)[self._length :])
        text, before = self._text(self._start), self._text_so_far
        self._text_so_far = text
        name = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(name, str) and _BYTE.fullmatch(name):
            self._in_bytes = True
        elif text != before:  # special tokens between bytes do not count
            self._in_bytes = False
        # Such bytes are characters only if the whole run of them is valid.
        if self._in_bytes or text.endswith("\ufffd"):
            return ""
        piece = text[self._told : max(self._told, len(text) - self._hold)]
        self._told += len(piece)
        if len(self._ids) - self._start > self._WINDOW:
            self._move(text)
        return self._given(piece)

    def _move(self, text: str) -> None:
        """Advance the window's start, where text not yet returned depends on nothing before it."""
        start = len(self._ids) - self._WINDOW // 2
        rest = self._text(start)
        told = self._told - (len(text) - len(rest))
        if told > self._hold and text.endswith(rest):
            self._start, self._told, self._text_so_far = start, told, rest

    def _given(self, piece: str) -> str:
        self._length += len(piece)
        return piece

    def _text(self, start: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:], skip_special_tokens=True))


class Stops:
    """The text of an answer up to the first of some texts, in pieces; what may be the beginning of one is held back.

    Attributes:
        text: all that was returned.
        found: True once one of the texts was there.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.text = ""
        self.found = False

    def add(self, piece: str, last: bool) -> str:
        """The part of the text up to a new piece that can be told now."""
        held = self._held + piece
        ends = [place for place in map(held.find, self._stop) if place >= 0]
        self.found = bool(ends)
        told = min(ends) if ends else len(held) if last else len(held) - self._begun(held)
        self._held = held[told:]
        self.text += held[:told]
        return held[:told]

    def _begun(self, text: str) -> int:
        """Characters at the end of a text that may be the beginning of a stop."""
        longest = max(map(len, self._stop), default=1) - 1
        starts = range(max(0, len(text) - longest), len(text))
        return next((len(text) - n for n in starts if any(stop.startswith(text[n:]) for stop in self._stop)), 0)
