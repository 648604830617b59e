"""The small model's tokenizer: lossless, numbers in groups of three, words as single tokens, BOS in front."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from apb.evaluation.tasks.lexicon import NAMES, TITLES, WORDS

MODEL = Path(__file__).parents[2] / "models" / "needle"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def encode(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def test_any_text_comes_back(tokenizer, encode):
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
    @settings(max_examples=100, deadline=None)
    def comes_back(text: str) -> None:
        if "<s>" not in text and "</s>" not in text:
            assert tokenizer.decode(encode(text)) == text

    comes_back()


def test_size_and_special_tokens(tokenizer):
    assert len(tokenizer) == 4096
    assert tokenizer.encode("hello") == [tokenizer.bos_token_id, *tokenizer.encode("hello", add_special_tokens=False)]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.chat_template is None


def test_every_group_of_digits_is_one_token(encode):
    groups = [f"{n:0{width}}" for width in (1, 2, 3) for n in range(10**width)]
    assert all(len(encode(group)) == 1 for group in groups)


def test_numbers_are_cut_from_the_left(tokenizer, encode):
    assert [tokenizer.decode([token]) for token in encode("is 1234567.")] == ["is", " ", "123", "456", "7", "."]


def test_every_word_of_the_lists_is_one_token(encode):
    assert all(len(encode(" " + word)) == 1 for word in (*WORDS, *NAMES, *TITLES))


def test_parts_of_a_document_are_tokenized_alike_alone_and_together(encode):
    parts = ["The old bell", " of the", " harbor", ".", "\n\nChapter", " willow", ".", " VAR", " elm", " =", " 123456"]
    assert encode("".join(parts)) == [token for part in parts for token in encode(part)]
