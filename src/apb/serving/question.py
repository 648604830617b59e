"""Which part of a user's message is the question: one rule for what the templates of clients make of it.

The rule looks at borders and punctuation, never at what a text means, in this order:

1. a message of at most ``LONGEST`` tokens is the question whole;
2. what follows the last line that closes a context (``</context>``, ``[END CONTEXT 0]``, ``-----``), else the last line
   that begins with a label such as ``Question:``;
3. a question in front: the message up to a line among its first that begins with such a label;
4. the last paragraph, else the last line, else the last sentence; but if none of them holds a question mark and the
   first paragraph ends with a colon or a question mark, that paragraph, in front;
5. else the last ``UNMARKED`` tokens.

What is taken at the end has at most ``LONGEST`` tokens, and so has what is taken in front. Code between fences is never
cut, and a last line that announces the answer (``Answer:``) belongs to the question but is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LONGEST = 256
UNMARKED = 32

# Ends of paragraphs, lines and sentences.
_PARAGRAPH = re.compile(r"\r?\n[ \t]*(?:\r?\n[ \t]*)+")
_LINE = re.compile(r"\r?\n")
_SENTENCE = re.compile(r"(?<=[.!?])[ \t\r\n]+|(?<=[\u3002\uff01\uff1f])")
# Lines that close a context.
_CLOSING = re.compile(r"^[ \t]*(?:</[\w:.-]+>|\[/?END\b[^\]\n]*\]|-{5,}|={5,}|\*{5,})[ \t]*(?:\r?\n|\Z)", re.MULTILINE)
_LABEL = re.compile(r"^[ \t#*]*(?:user )?(?:question|query)[ \t]?\d*[*]*[ \t]*[:\uff1a]", re.MULTILINE | re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})", re.MULTILINE)
_ASKS = ("?", "\uff1f")
_OPENS = (":", "\uff1a", *_ASKS)
# Characters of a last line that announces the answer; a longer one asks as well.
_ANNOUNCEMENT = 40
# Lines of a message among which a label may stand in front.
_FRONT_LINES = 8
# Ends of this many characters are searched; no text of LONGEST tokens is longer, or it is one strange line.
SEARCHED = 32 * LONGEST


@dataclass(frozen=True)
class Cut:
    """Where a message is cut: characters [0, head) stand in front, [start, len) are the query.

    Attributes:
        head: end of a question in front of the text; 0 if there is none.
        stop: end of the document; blanks between it and ``start`` belong to neither.
        start: beginning of the query.
        tail: True if no question was found at the end: the query is then the last few tokens, and ``start`` the end.
    """

    head: int
    stop: int
    start: int
    tail: bool = False


def cut(text: str, tokens: Callable[[str], int]) -> Cut:
    """Find the question in a message; ``tokens``: number of tokens of a text."""

    def fits(part: str) -> bool:
        return len(part) <= SEARCHED and tokens(part) <= LONGEST

    if fits(text):
        return Cut(0, 0, 0)
    searched = max(0, len(text) - SEARCHED)
    asked = _before_announcement(text)
    code = _fenced(text)

    def fit(places: Iterator[re.Match[str]], at_end: bool = True) -> tuple[int, int] | None:
        """The last border before a question that fits: (end of the document, beginning of the question)."""
        found = [match.span() for match in places if not any(start < match.start() < stop for start, stop in code)]
        for before, after in reversed(found):
            stop, start = (before, after) if at_end else (before, before)
            if text[start:asked].strip() and text[:stop].strip():
                return (len(text[:stop].rstrip()), start) if fits(text[start:]) else None
        return None

    closed = fit(_CLOSING.finditer(text, searched))
    if closed is not None:
        # The closing line belongs to what it closes.
        return Cut(0, len(text[: closed[1]].rstrip()), closed[1])
    labelled = fit(_LABEL.finditer(text, searched), at_end=False)
    if labelled is not None:
        return Cut(0, *labelled)
    head = _labelled_head(text)
    if head and fits(text[:head]):
        return Cut(head, len(text), len(text), tail=True)
    ends = (fit(border.finditer(text, searched)) for border in (_PARAGRAPH, _LINE, _SENTENCE))
    end = next((found for found in ends if found is not None), None)
    if end is None or not any(mark in text[end[1] : asked] for mark in _ASKS):
        first = _PARAGRAPH.search(text) or _LINE.search(text)
        if first and text[: first.start()].rstrip().endswith(_OPENS) and fits(text[: first.start()]):
            return Cut(first.start(), len(text), len(text), tail=True)
    return Cut(0, *end) if end is not None else Cut(0, len(text), len(text), tail=True)


def _before_announcement(text: str) -> int:
    """Where a message ends, without a last line that only announces the answer."""
    stop = len(text.rstrip())
    before, _, line = text[:stop].rpartition("\n")
    if line.rstrip().endswith((":", "\uff1a")) and len(line) <= _ANNOUNCEMENT and before.strip():
        return len(before.rstrip())
    return stop


def _labelled_head(text: str) -> int:
    """The end of a line near the beginning that is labelled as the question; 0 if there is none."""
    stop = 0
    for _ in range(_FRONT_LINES):
        end = text.find("\n", stop)
        if end < 0:
            return 0
        if _LABEL.match(text, stop) and text[stop:end].strip().rstrip("*")[-1:] not in (":", "\uff1a"):
            return end
        stop = end + 1
    return 0


def _fenced(text: str) -> list[tuple[int, int]]:
    """Where fenced code that ends a message is, from before its first line: it belongs to the paragraph before it."""
    if not text.rstrip().endswith(("```", "~~~")):
        return []
    marks = list(_FENCE.finditer(text))
    if len(marks) < 2 or len(marks) % 2:
        return []
    opening = marks[-2].start()
    return [(len(text[:opening].rstrip()) - 1, len(text))]
