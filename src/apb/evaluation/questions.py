"""Where the question begins in a prompt that is one text, as other harnesses make them.

What is looked at is the user's own text, in a chat that of the last user turn. What follows it (the chat template's
closing, the beginning of an answer) and a last line that only announces the answer ("Answer:") are left out of the
search, and are part of the query. In what is left, the question is

1. what follows the sample's context, where that is known and stands there word for word;
2. else the last paragraph, else the last line, else the last sentence: the first of them that is no longer than
   ``LONGEST`` tokens and not all that the user says; in a chat, else all that the user says, if it is no longer;
3. else the last ``UNMARKED`` tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..hf.texts import Piece, encode
from ..prompt import BLANK_LINE, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 256
UNMARKED = 32

# A sample's fields for the text that the question is about, and for the beginning of the answer.
_CONTEXTS = ("article", "context", "document", "input", "passage", "story", "text")
_BEGINNINGS = ("gen_prefix", "answer_prefix")
# Ends of paragraphs, lines and sentences; a border belongs to what follows it.
_BORDERS = tuple(map(re.compile, (r"\r?\n[ \t]*\r?\n", r"\r?\n", r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")))
# Characters of a last line that announces the answer; a longer one asks as well.
_ANNOUNCEMENT = 40

Message = Mapping[str, str]
# From and up to which character a part of a text goes.
Span = tuple[int, int]


def last_user_turn(render: Callable[[Sequence[Message]], str], chat: Sequence[Message], text: str) -> Span | None:
    """Where a rendered chat has the content of its last user turn; None if it has none, or not as it was given.

    It is found by rendering the chat again with a number in its place; where the template looks at its input and says
    something else then, by a search for the content.
    """
    turn = next((turn for turn in reversed(range(len(chat))) if chat[turn]["role"] == "user"), None)
    if turn is None:
        return None
    before, after = around(render, chat, turn)
    if text.startswith(before) and text[len(before) :].endswith(after):
        return len(before), len(text) - len(after)
    content = chat[turn]["content"].strip()
    start = text.rfind(content)
    return (start, start + len(content)) if content and start >= 0 else None


def around(render: Callable[[Sequence[Message]], str], chat: Sequence[Message], turn: int) -> tuple[str, str]:
    """What a template writes before the content of a turn and after it."""
    mark = str(secrets.randbelow(10**20) + 10**20)
    before, _, after = render([*chat[:turn], {**chat[turn], "content": mark}, *chat[turn + 1 :]]).partition(mark)
    return before, after


def split(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    special: bool,
    turn: Span | None = None,
    sample: Mapping[str, Any] | None = None,
) -> Prompt:
    """Split a text into a prompt's document and query; the tokens are those of the whole text, however it is split.

    Names of control tokens in the text are control tokens: a chat template has been applied to it, if any.

    Args:
        text: all that the model is to read.
        tokenizer: the model's.
        special: let the tokenizer add its special tokens, such as BOS.
        turn: where the user's own text is; the whole text by default.
        sample: fields that the text was made of.
    """
    start, stop = (0, len(text)) if turn is None else (turn[0], min(turn[1], len(text)))
    stop = _end_of_search(text, start, stop, sample or {})

    def fits(part: str) -> bool:
        return len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) <= LONGEST

    cut = _after_context(text, start, stop, sample or {})
    if cut is None:
        cut = next((cut for cut in _borders(text, start, stop) if fits(text[cut:stop])), None)
    # What a template writes before the turn is prefix, unless there are long turns before it, or no document after it.
    opening = start if cut != start and fits(text[:start]) else 0

    def parts(cut: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        pieces = [Piece(text[:opening]), Piece(text[opening:cut]), Piece(text[cut:])]
        return encode(tokenizer, pieces, special=special).around(1)

    if cut is not None:
        prefix, document, query = parts(cut)
        ahead = [Piece(f"{text[:opening]}{text[cut:stop].strip()}{BLANK_LINE}"), Piece(text[opening:cut])]
        front = encode(tokenizer, ahead, special=special).around(1)[0]
    else:
        prefix, document, query = parts(stop)
        ids, closing = document + query, len(query) if stop < len(text) else 0
        count = closing + min(UNMARKED, max(1, (len(ids) - closing) // 2))
        document, query = ids[:-count], ids[-count:]
        front = prefix + query[: count - closing]
    return Prompt(prefix, document, query, front) if document and query else of_tokens(prefix + document + query)


def of_tokens(ids: Sequence[int]) -> Prompt:
    """A prompt of these tokens, of which nothing is known: the last one is the query."""
    if len(ids) < 2:
        raise InputError(f"The prompt has {len(ids)} tokens, and at least 2 are needed: give a longer one.")
    return Prompt((), tuple(ids[:-1]), tuple(ids[-1:]))


def _end_of_search(text: str, start: int, stop: int, sample: Mapping[str, Any]) -> int:
    """Where the question ends: before white space, the beginning of an answer, and a line that announces it."""

    def stripped(stop: int) -> int:
        return start + len(text[start:stop].rstrip())

    stop = stripped(stop)
    for value in map(sample.get, _BEGINNINGS):
        if isinstance(value, str) and value.strip() and text[start:stop].endswith(value.strip()):
            stop = stripped(stop - len(value.strip()))
    before, _, line = text[start:stop].rpartition("\n")
    if line.endswith((":", "\uff1a")) and len(line) <= _ANNOUNCEMENT and before.strip():
        stop = stripped(start + len(before))
    return stop


def _after_context(text: str, start: int, stop: int, sample: Mapping[str, Any]) -> int | None:
    """Where the sample's context ends, if a question follows that is shorter than the context."""
    values = (value.strip() for value in map(sample.get, _CONTEXTS) if isinstance(value, str))
    for value in sorted(filter(None, values), key=len, reverse=True):
        end = text.rfind(value, start, stop) + len(value)
        if end >= len(value) and 0 < len(text[end:stop].strip()) < len(value):
            return end
    return None


def _borders(text: str, start: int, stop: int) -> list[int]:
    """The last border of each kind that has the user's text on both sides, and its beginning if text precedes it."""
    found = []
    for border in _BORDERS:
        places = (match.start() for match in border.finditer(text, start, stop) if match.end() < stop)
        last = max(places, default=start)
        if text[start:last].strip():
            found.append(last)
    return [*found, start] if text[:start].strip() else found
