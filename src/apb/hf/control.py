"""Control tokens, and a twin of a tokenizer that treats their names in a text as plain text."""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An added token in brackets is a control token, except for the HTML tags that Gemma has single tokens for.
IN_BRACKETS = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_TAG = re.compile(
    r"</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|sub|sup|code|p|pre|a|ul|ol|li)>"
)


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str | None) -> dict[int, str]:
    """Ids and names of the tokens that text must not turn into.

    They are the tokens added to the vocabulary that are special; that occur in ``template`` (a chat template's source)
    and are not plain words; or that are in brackets and are not HTML tags. Other added tokens, such as letters that a
    vocabulary lacked, and white space of any kind are plain text.
    """
    named = set(getattr(tokenizer, "chat_control_tokens", None) or ())

    def controls(token: Any) -> bool:
        name = token.content
        if name.isspace():
            return False
        if token.special or name in named:
            return True
        if name.isalnum():
            return False
        written = template is not None and name in template
        return written or (IN_BRACKETS.fullmatch(name) is not None and _TAG.fullmatch(name) is None)

    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if controls(token)}


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the names, the longest if several begin at one place."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


@dataclass(frozen=True)
class Twin:
    """A tokenizer whose control tokens have other, unguessable names; all ids are the same.

    Attributes:
        encode: from (text, add special tokens) to the result of a tokenizer of transformers.
        names: the new names by the old ones.
    """

    encode: Callable[[str, bool], Any]
    names: Mapping[str, str]

    def renamed(self, text: str) -> str:
        """A template's text with the new names in it."""
        return any_of(self.names).sub(lambda match: self.names[match[0]], text)


_twins: WeakKeyDictionary[Any, tuple[dict[int, str], Twin]] = WeakKeyDictionary()


def twin_of(tokenizer: PreTrainedTokenizerBase, control: dict[int, str]) -> Twin:
    """The tokenizer's twin, cached for the tokenizer's lifetime; InputError if none can be made."""
    known = _twins.get(tokenizer)
    if known is not None and known[0] == control:
        return known[1]
    nonce = secrets.token_hex(8)  # lower-case letters and digits, which no normalizer changes
    names = {name: f"q{nonce}x{number}q" for number, name in control.items()}
    try:
        encode, number_of = (_fast if tokenizer.is_fast else _slow)(tokenizer, names)
        wrong = [name for number, name in control.items() if number_of(names[name]) != number]
    except Exception as error:  # of parts that cannot be serialized, or a class with its own implementation
        raise cannot(tokenizer, first_line(error)) from error
    if wrong:
        raise cannot(tokenizer, f"{wrong[0]!r} cannot be renamed")
    twin = Twin(encode, names)
    _twins[tokenizer] = control, twin
    return twin


def cannot(tokenizer: PreTrainedTokenizerBase, why: str) -> InputError:
    """The error for a tokenizer that cannot be kept from turning text into control tokens."""
    return InputError(
        f"The text has names of control tokens in it, and {type(tokenizer).__name__} cannot be made to read them as "
        f"text ({why}); take them out of the text."
    )


# A twin's encoding function, and the function from a token's name to its id.
_Made = tuple[Callable[[str, bool], Any], Callable[[str], int | None]]


def _fast(tokenizer: Any, names: Mapping[str, str]) -> _Made:
    from tokenizers import Tokenizer
    from transformers import BatchEncoding

    written = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in written["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    _rename(written["model"], names)
    written["truncation"] = written["padding"] = None
    twin = Tokenizer.from_str(json.dumps(written))

    def encode(text: str, special: bool) -> BatchEncoding:
        encoding = twin.encode(text, add_special_tokens=special)
        return BatchEncoding({"input_ids": encoding.ids}, encoding)

    return encode, twin.token_to_id


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename control tokens in a vocabulary too, as BPE merges and Unigram pieces could produce them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]


def _slow(tokenizer: Any, names: Mapping[str, str]) -> _Made:
    twin = copy.deepcopy(tokenizer)
    for number, token in tokenizer.added_tokens_decoder.items():
        renamed = copy.deepcopy(token)
        renamed.content = names.get(token.content, token.content)
        twin._added_tokens_decoder[number] = renamed
    for role, name in tokenizer.special_tokens_map.items():
        setattr(twin, role, names.get(name, name))
    ids = twin._added_tokens_encoder = {token.content: n for n, token in twin._added_tokens_decoder.items()}
    twin.tokens_trie = type(twin.tokens_trie)()
    twin._update_trie()

    def encode(text: str, special: bool) -> Any:
        return twin(text, add_special_tokens=special, verbose=False)

    return encode, ids.get
