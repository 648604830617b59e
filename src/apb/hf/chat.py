"""Chat templates: their choice, and the location of the user's texts in their output."""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_line
from .control import IN_BRACKETS, any_of, control_tokens
from .texts import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates for other purposes than answering a user.
_OTHERS = {"tool_use", "rag"}
# What templates write before a turn: names in brackets, or the speaker's.
_MARKS = re.compile(rf"{IN_BRACKETS.pattern}|\b(?:USER|User|ASSISTANT|Assistant):")


@dataclass(frozen=True)
class Turn:
    """A message of a chat: its role, and its text in pieces."""

    role: str
    pieces: Sequence[Piece]


def template_of(tokenizer: PreTrainedTokenizerBase, asked: str | Path | None = None) -> str | None:
    """The source of a chat template; None if the tokenizer has none and none is asked for.

    Args:
        tokenizer: may have one template, or several by name.
        asked: the name of one of the tokenizer's, a file, or a template's source. By default the tokenizer's only one,
            the one named "default", or the only one that is not for tools or retrieval.
    """
    own = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {} if own is None else {"default": own}
    if asked is None:
        if not named:
            return None
        fit = [name for name in named if name == "default"] or [name for name in named if name not in _OTHERS]
        if len(fit) != 1:
            raise InputError(
                f"The tokenizer has several chat templates and none is its default: {', '.join(sorted(named))}; "
                "name one (--chat-template of apb, chat_template= in Python)."
            )
        return named[fit[0]]
    if str(asked) in named:
        return named[str(asked)]
    if isinstance(asked, str) and ("{{" in asked or "{%" in asked):
        return asked
    try:
        return Path(asked).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        there = f"its templates are {', '.join(sorted(named))}" if named else "it has none"
        raise InputError(
            f"The chat template {str(asked)!r} is neither a text file nor the name of one of the tokenizer's: {there}."
        ) from error


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The control token with which the tokenizer's chat template closes the assistant's turn; None if there is none.

    A checkpoint's generation configuration may lack it; an answer ends there nevertheless.
    """
    template = template_of(tokenizer)
    if template is None:
        return None
    mark = f"{secrets.randbelow(10**20) + 10**20}"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        text = str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False))
    except Exception:  # a template is code and may fail in any way: then its end of turn is unknown
        return None
    control = {name: number for number, name in control_tokens(tokenizer, template).items()}
    found = any_of(control).match(text.rpartition(mark)[2].lstrip())
    return control[found[0]] if found else None


def marks_in(text: str) -> list[str]:
    """The names in a text that look like a chat template's, this tokenizer's or another's."""
    return _MARKS.findall(text)


def unknown_marks(tokenizer: PreTrainedTokenizerBase, marks: Sequence[str]) -> list[str]:
    """Those that are neither control tokens of the tokenizer nor what its own template writes around a user's text."""
    template = template_of(tokenizer)
    names = set(control_tokens(tokenizer, template).values())
    others = [mark for mark in marks if mark not in names]
    if template is None or not others:
        return others
    pieces = rendered(tokenizer, template, [Turn("user", [Piece("A text.", "text")])])
    frame = "".join(piece.text for piece in pieces if piece.source is None)
    return [mark for mark in others if mark not in frame]


def rendered(tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[Turn]) -> list[Piece]:
    """A template's output for a chat, up to the beginning of the assistant's turn, in pieces.

    Joined, the pieces equal ``apply_chat_template(..., tokenize=False, add_generation_prompt=True)``. Those with a
    ``source`` are the turns' own texts as the template wrote them: it may strip them, or write them in capitals.
    Templates that take the content of a message as a list of parts get a list.

    The texts are located by rendering the chat again with numbers in their place; if that fails (a template may inspect
    its input), they are searched for verbatim.

    Raises:
        InputError: the template refuses the chat, cannot be applied, drops a text, or changes it beyond recognition.
    """
    texts = {piece.source: piece.text for turn in turns for piece in turn.pieces if piece.source is not None}
    # Digits have no case, are never stripped or escaped, and a number this long occurs in no text by chance.
    nonce = secrets.randbelow(10**20) + 10**20
    marks = {source: f"{nonce}{number:04}" for number, source in enumerate(texts)}
    wrong: list[InputError] = []
    for as_parts in (False, True):
        chat = _Chat(tokenizer, template, turns, texts, marks, as_parts)
        try:
            return chat.pieces()
        except InputError as error:
            wrong.append(error)
    # A lost text is the more useful error: a template may not support the other kind of content at all.
    raise next((error for error in wrong if isinstance(error, _Lost)), wrong[0])


class _Lost(InputError):
    """A text given to a template is missing from its output."""


@dataclass(frozen=True)
class _Chat:
    """A chat whose texts are given to a template verbatim, or with marks in their place."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    turns: Sequence[Turn]
    texts: dict[str, str]
    marks: dict[str, str]
    as_parts: bool

    def pieces(self) -> list[Piece]:
        frame, whole = self.render(()), self.render(self.texts)
        # If the output contains the list as Python or JSON prints it, the template expects a string.
        listed = self.as_parts and re.search(r"""\{["']type["']: ?["']text["']""", frame)
        found = None if listed else self._by_marks(frame, whole) or self._as_they_are(whole)
        if found is not None and self._is_clear(found, frame):
            return found
        dropped = [source for source, mark in self.marks.items() if mark not in frame]
        what = f"drops the {' and the '.join(dropped)}" if dropped else "changes the text beyond recognition"
        raise _Lost(
            f"The chat template {what}; give another one (--chat-template of apb, chat_template= in Python), or use "
            "Prompt.from_text instead."
        )

    def render(self, real: Collection[str]) -> str:
        """The template's output, with these texts in it and marks for the others."""
        given = {source: text if source in real else self.marks[source] for source, text in self.texts.items()}
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            content = "".join(piece.text if piece.source is None else given[piece.source] for piece in turn.pieces)
            parts = [{"type": "text", "text": content}]
            messages.append({"role": turn.role, "content": parts if self.as_parts else content})
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:
            raise InputError(f"The tokenizer's chat template refuses this prompt: {first_line(error)}.") from error
        except Exception as error:  # a template is code and may fail in any way, as by adding a number to a text
            raise InputError(
                f"The tokenizer's chat template cannot be applied: {first_line(error)}; give another one "
                "(--chat-template of apb, chat_template= in Python)."
            ) from error

    def _by_marks(self, frame: str, whole: str) -> list[Piece] | None:
        if any(mark not in frame for mark in self.marks.values()):
            return None
        source_of = {mark: source for source, mark in self.marks.items()}
        parts = re.split(f"({'|'.join(source_of)})", frame) if source_of else [frame]

        def filled(became: Callable[[str], list[Piece]]) -> list[Piece] | None:
            pieces: list[Piece] = []
            for part in parts:
                pieces += became(source_of[part]) if part in source_of else [Piece(part)]
            return pieces if "".join(piece.text for piece in pieces) == whole else None

        return filled(lambda source: [Piece(self.texts[source], source)]) or filled(partial(self._changed, frame))

    def _changed(self, frame: str, source: str) -> list[Piece]:
        """A text as the template writes it, located with marks for the others."""
        before, _, rest = frame.partition(self.marks[source])
        after = rest.rpartition(self.marks[source])[2]
        alone = self.render((source,))
        became, text = alone[len(before) : len(alone) - len(after)], self.texts[source]
        for same in (text, text.lstrip(), text.rstrip(), text.strip()):
            if same and same in became:  # text that the template adds around it is the template's
                front, _, back = became.partition(same)
                return [Piece(front), Piece(same, source), Piece(back)]
        return [Piece(became, source)]

    def _is_clear(self, pieces: list[Piece], frame: str) -> bool:
        """True if every control token outside the texts is the template's own.

        Output beyond that with marks may come from a text, in which names of control tokens are plain text.
        """
        marked = re.compile("|".join(self.marks.values()) or "(?!)")
        if (said := "".join(piece.text for piece in pieces if piece.source is None)) == marked.sub("", frame):
            return True
        names = any_of(control_tokens(self.tokenizer, self.template).values())
        more = Counter(names.findall(said)) - Counter(names.findall(frame))
        return not any(name in text for name in more for text in self.texts.values())

    def _as_they_are(self, whole: str) -> list[Piece] | None:
        pieces: list[Piece] = []
        end = 0
        for source, text in self.texts.items():
            start = whole.find(text.strip(), end)
            if start < 0:
                return None
            pieces += [Piece(whole[end:start]), Piece(text.strip(), source)]
            end = start + len(text.strip())
        return [*pieces, Piece(whole[end:])]
