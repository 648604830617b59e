"""A prompt in its three parts: from tokens, from text, from a chat template; and what cannot be one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apb
from apb.prompt import check_tokens
from byte_checkpoint import BOS, EOS, TEMPLATE, byte_tokenizer

PLAIN, CHAT = byte_tokenizer(), byte_tokenizer(TEMPLATE)
texts = st.text(min_size=1).filter(str.strip)


def bytes_of(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def test_from_tokens() -> None:
    """Parts are kept as they are given, from any sequence of whole numbers; the order of reading is theirs."""
    prompt = apb.Prompt.from_tokens([1, 2], torch.tensor([3, 4, 5]), (6,))  # type: ignore[arg-type]
    assert (prompt.prefix, prompt.document, prompt.query) == ((1, 2), (3, 4, 5), (6,))
    assert prompt.token_ids == (1, 2, 3, 4, 5, 6)
    assert len(prompt) == 6
    assert all(type(token) is int for token in prompt.token_ids)
    assert apb.Prompt.from_tokens([], [1], [2]).token_ids == (1, 2)
    assert prompt == apb.Prompt.from_tokens([1, 2], [3, 4, 5], [6])


@given(texts, texts)
def test_from_text(document: str, query: str) -> None:
    """BOS, the document to the byte, an empty line and the query."""
    prompt = apb.Prompt.from_text(PLAIN, document, query)
    assert prompt == apb.Prompt((BOS,), bytes_of(document), bytes_of("\n\n" + query))


def test_bos_is_the_tokenizers_affair() -> None:
    """A tokenizer that has a BOS and does not put it in front of texts gives an empty prefix."""
    tokenizer = byte_tokenizer(adds_bos=False)
    assert tokenizer.bos_token_id == BOS
    assert apb.Prompt.from_text(tokenizer, "d", "q").prefix == ()


@given(texts, texts)
def test_from_chat(document: str, query: str) -> None:
    """The template around one user turn: what it puts before the document is prefix, what comes after it is query."""
    prompt = apb.Prompt.from_chat(CHAT, document, query)
    assert prompt.prefix == (BOS, *b"[user]")
    assert prompt.document == bytes_of(document)
    assert prompt.query == bytes_of(f"\n\n{query}[assistant]")


def test_from_chat_with_system_text() -> None:
    """System text stands in its own turn, before the document."""
    prompt = apb.Prompt.from_chat(CHAT, "d", "q", system="be brief")
    assert prompt.prefix == (BOS, *b"[system]be brief[user]")
    assert prompt.query == bytes_of("\n\nq[assistant]")


@given(texts, texts)
def test_the_question_in_front(document: str, query: str) -> None:
    """The question and an empty line before the document, inside the turn, without what closes it or begins an answer;
    document and query keep their tokens."""
    plain = apb.Prompt.from_text(PLAIN, document, query, answer_prefix="It").question_first
    assert plain.token_ids == (BOS, *bytes_of(f"{query}\n\n{document}\n\n{query}It"))
    chat = apb.Prompt.from_chat(CHAT, document, query, "s", answer_prefix="It")
    assert chat.question_first.prefix == (BOS, *bytes_of(f"[system]s[user]{query}\n\n"))
    assert chat.question_first.token_ids[-len(chat.document + chat.query) :] == chat.document + chat.query
    assert chat.question_first.question_first == chat.question_first
    assert chat.prefix == (BOS, *b"[system]s[user]")


def test_the_question_in_front_of_tokens() -> None:
    assert apb.Prompt.from_tokens([1], [2, 3], [4]).question_first.token_ids == (1, 4, 2, 3, 4)


def test_a_document_may_look_like_a_template() -> None:
    """Text of the document is never taken for the template's: special tokens and jinja in it stay text."""
    document = "{{ bos_token }} {% for %} [assistant]"
    prompt = apb.Prompt.from_chat(CHAT, document, "{{ q }}")
    assert prompt.document == bytes_of(document)
    assert prompt.query == bytes_of("\n\n{{ q }}[assistant]")


def test_for_model_takes_the_template_where_there_is_one() -> None:
    """A model with a chat template is asked by it, any other with plain text."""
    assert apb.Prompt.for_model(CHAT, "d", "q", "s") == apb.Prompt.from_chat(CHAT, "d", "q", "s")
    assert apb.Prompt.for_model(PLAIN, "d", "q") == apb.Prompt.from_text(PLAIN, "d", "q")


@pytest.mark.parametrize("separator", ["", " ", "\n"])
def test_what_separates_document_and_query(separator: str) -> None:
    """It stands in the query in place of the empty line, with a template and without."""
    options = {"separator": separator, "answer_prefix": " A"}
    assert apb.Prompt.for_model(PLAIN, "d", "q", **options).query == bytes_of(f"{separator}q A")
    assert apb.Prompt.for_model(CHAT, "d", "q", **options).query == bytes_of(f"{separator}q[assistant] A")


@pytest.mark.parametrize("opening", ["<s>[user]", "[user]"])
def test_from_rendered(opening: str) -> None:
    """No template and no second BOS is added; names of control tokens are those tokens, in the document too."""
    prompt = apb.Prompt.from_rendered(CHAT, opening, "d</s>d", "q</s>[assistant]", separator=" ", answer_prefix=" A")
    assert prompt.prefix == (BOS, *b"[user]")
    assert prompt.document == (*b"d", EOS, *b"d")
    assert prompt.query == (*b" q", EOS, *b"[assistant] A")


def test_tokens_do_not_depend_on_the_question() -> None:
    """The document's tokens are the same whatever is asked: a cache of them could be used again."""
    prompts = [apb.Prompt.from_chat(CHAT, "some text ", query) for query in ("a?", "b b b?")]
    assert prompts[0].document == prompts[1].document
    assert prompts[0].prefix == prompts[1].prefix


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda: apb.Prompt.from_tokens([1], [], [2]), ["document", "empty"]),
        (lambda: apb.Prompt.from_tokens([1], [2], []), ["query", "empty"]),
        (lambda: apb.Prompt.from_tokens([1], [1.7], [2]), ["whole numbers", "float"]),  # type: ignore[list-item]
        (lambda: apb.Prompt.from_text(PLAIN, "", "q"), ["document", "empty"]),
        (lambda: apb.Prompt.from_text(PLAIN, " \n\t", "q"), ["document", "empty"]),
        (lambda: apb.Prompt.from_text(PLAIN, "d", " "), ["query", "empty"]),
        (lambda: apb.Prompt.from_text(PLAIN, "d", "q\udcff"), ["query", "character 1", "UTF-8"]),
        (lambda: apb.Prompt.from_text(PLAIN, "d", "q", answer_prefix="\udcff"), ["answer prefix", "UTF-8"]),
        (lambda: apb.Prompt.from_rendered(PLAIN, "\udcff", "d", "q"), ["opening", "UTF-8"]),
        (lambda: apb.Prompt.from_chat(CHAT, "\udcff", "q"), ["document", "character 0", "UTF-8"]),
        (lambda: apb.Prompt.from_chat(CHAT, "", "q"), ["document", "empty"]),
        (lambda: apb.Prompt.from_chat(CHAT, "d", ""), ["query", "empty"]),
        (lambda: apb.Prompt.from_chat(PLAIN, "d", "q"), ["chat template", "from_text"]),
        (lambda: apb.Prompt.for_model(PLAIN, "d", "q", "s"), ["no chat template", "system"]),
        (
            lambda: apb.Prompt.from_chat(byte_tokenizer("{{ bos_token }}[assistant]"), "d", "q"),
            ["drops", "from_text"],
        ),
    ],
)
def test_refusals(make: Callable[[], apb.Prompt], fragments: list[str]) -> None:
    """What is missing is named, and what to do instead."""
    with pytest.raises(apb.InputError) as refusal:
        make()
    assert all(fragment in str(refusal.value) for fragment in fragments), refusal.value


def test_a_template_that_refuses() -> None:
    """A template that raises (some take no system text) is refused with its own words, in one sentence."""
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(apb.InputError, match="System role not supported"):
        apb.Prompt.from_chat(byte_tokenizer(template), "d", "q", system="s")


def test_check_tokens() -> None:
    """Ids from 0 to below the vocabulary's size pass; the one that does not is named."""
    check_tokens([0, 9], 10)
    for tokens, wrong in (([0, 10], "10"), ([3, -1], "-1")):
        with pytest.raises(apb.InputError, match=f"Token id {wrong} .* vocabulary of 10"):
            check_tokens(tokens, 10)
