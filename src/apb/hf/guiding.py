"""Answers that follow a JSON schema: every token that would leave it is ruled out, by the library llguidance."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Blanks between the parts of a JSON text: a space, or a new line and its indentation; a model may like blanks for ever.
_JSON = {"whitespace_pattern": r" |\n {0,24}"}
# What the library has made of each tokenizer, by logits and ends: a second's work for a large vocabulary.
_known: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def check_schema(schema: str) -> None:
    """InputError unless answers can follow this JSON schema, given as a text."""
    if wrong := _wrong(schema):
        raise InputError(f"Answers cannot follow this JSON schema: {wrong}.")


@lru_cache(maxsize=64)
def _wrong(schema: str) -> str:
    matcher = _library().LLMatcher
    try:
        json.loads(schema)
        found = matcher.validate_grammar(_grammar(schema))
    except (ValueError, RecursionError) as error:
        found = str(error)
    return " ".join(found.split()).rstrip(".")


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InputError("Answers that follow a JSON schema need llguidance: pip install 'apb-llm[guided]'.") from error
    return llguidance


def _grammar(schema: str) -> str:
    return str(_library().LLMatcher.grammar_from_json_schema(schema, overrides=_JSON))


class Guide(LogitsProcessor):
    """Leaves the tokens with which an answer still follows a schema.

    Once it is complete only a token that ends it is left. The work of a token is the library's, 0.1 ms for a vocabulary
    of 150,000; it is done on the CPU, and only where a token is chosen.

    Args:
        schema: the JSON schema, as a text.
        tokenizer: the model's, a fast one.
        ends: tokens that end an answer.
        prompt: tokens before the answer.
    """

    def __init__(self, schema: str, tokenizer: PreTrainedTokenizerBase | None, ends: list[int], prompt: int) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or not ends:
            raise InputError(
                "Answers of this model cannot follow a JSON schema: it needs a tokenizer.json and a token that ends "
                "an answer; ask without one."
            )
        self._schema, self._tokenizer, self._ends = schema, tokenizer, ends
        self._followed = prompt
        self._matcher: Any = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (1, vocab) with minus infinity for the tokens that are ruled out."""
        if self._matcher is None:
            vocabulary = _vocabulary(self._tokenizer, scores.shape[-1], self._ends)
            self._matcher = _library().LLMatcher(vocabulary, _grammar(self._schema), log_level=0)
        self._matcher.consume_tokens(input_ids[0, self._followed :].tolist())
        self._followed = input_ids.shape[1]
        if self._matcher.is_error():
            raise RuntimeError(f"The answer could not be kept to its schema: {self._matcher.get_error()}")
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        ruled_out: Tensor = (allowed == 0).to(scores.device)
        return scores.masked_fill(ruled_out, -torch.inf)  # type: ignore[return-value]


def _vocabulary(tokenizer: PreTrainedTokenizerFast, logits: int, ends: list[int]) -> Any:
    """The library's form of a tokenizer for so many logits."""
    from llguidance.hf import from_tokenizer

    made = _known.setdefault(tokenizer, {})
    key = (logits, *ends)
    if key not in made:
        made[key] = from_tokenizer(tokenizer, n_vocab=logits, eos_token=ends)
    return made[key]
