"""Where the question begins in a prompt that is one text: paragraphs, known contexts, chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

import apb
from apb.evaluation.questions import LONGEST, Message, last_user_turn, of_tokens, split
from byte_checkpoint import BOS, byte_tokenizer

LINE = "The keeper of the tower was called Maud and lived there alone. "
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Looks at its input: the number that stands for a turn's content is not treated as the content is.
PECULIAR = (
    "{% for m in messages %}<{{ m.role }}{% if 'Maud' in m.content %}, Maud{% endif %}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("One.\n\nTwo.\n\nThree?\n\n", "\n\nThree?\n\n"),
        ("One.\r\n \r\nTwo?", "\r\n \r\nTwo?"),
        ("One.\nTwo.", "\nTwo."),
        ("One. Two? Three?", " Three?"),
        ("一。二。三", "三"),
        ("x" * 100, "x" * 32),
        ("ab", "b"),
        ("\n\nx", "x"),
        (f"Read.\n\n{LINE * 9}\nWho?", "\nWho?"),
        (f"Read.\n\n{LINE * 9}Who?", " Who?"),
        (f"Read.\n\n{'x' * (LONGEST - 2)}", f"\n\n{'x' * (LONGEST - 2)}"),
        (f"Read.\n\n{'x' * LONGEST}", "x" * 32),
        ("One.\n\nTwo?\n\nAnswer:", "\n\nTwo?\n\nAnswer:"),
        ("One.\n\nTwo?\nAnswer:\n", "\n\nTwo?\nAnswer:\n"),
        ("一。\n二？\n答案是：", "\n二？\n答案是："),  # noqa: RUF001
        (f"One.\n\nTwo?\nWho was it that {'x' * 40}:", f"\n\nTwo?\nWho was it that {'x' * 40}:"),
        ("Answer:", "er:"),
    ],
)
def test_the_question_is_the_last_paragraph(text: str, query: str) -> None:
    """Else the last line, sentence, or tokens, if it is too long or all there is; a last line that only announces the
    answer is no question. Document and query together are the text."""
    prompt = split(text, byte_tokenizer(), special=True)
    assert bytes(prompt.document + prompt.query) == text.encode()
    assert bytes(prompt.query).decode() == query
    assert prompt.prefix == (BOS,)


@pytest.mark.parametrize(
    ("text", "sample", "query"),
    [
        ("Read.\n\nStory: {}\n\nNow answer.\n\nQuestion: Who?\n\nAnswer:", {"context": "{}"}, 0),
        ("{}\n\nQuestion: Who?\nAnswer:", {"question": "Who?", "text": "{}", "input": "Who?\n\n{}"}, 0),
        ("{} Who?", {"input": " {}\n"}, 0),
        ("{}\n\nWho?\n\n" + "(A) Maud. " * 50, {"passage": "{}"}, 0),
        ("{}\n\nOf whom?\nNext line:", {"context": "{}\n\nOf whom?"}, "\n\nOf whom?\nNext line:"),  # nothing is asked
        ("Title\n\n{}\n\nWho?", {"text": "Title"}, "\n\nWho?"),  # what follows is no question
        ("{}\n\nWho?", {"context": "Another text." * 99}, "\n\nWho?"),
        ("{}\n\nWho? It was", {"gen_prefix": "It was"}, "\n\nWho? It was"),
        ("{}\n\nOrrin.\nWho?\n\nIt was", {"answer_prefix": "It was "}, "\n\nOrrin.\nWho?\n\nIt was"),
        ("{}\nWho?\n\nIt was", {"context": 7, "gen_prefix": None}, "\n\nIt was"),
    ],
)
def test_fields_of_the_sample_are_used(text: str, sample: dict[str, object], query: str | int) -> None:
    """What follows the context is the question, of any length below the context's; the beginning of an answer is no
    part of the question, but of the query."""
    document = "\n\n".join(LINE.strip() for _ in range(20))
    fields = {name: value.format(document) if isinstance(value, str) else value for name, value in sample.items()}
    whole = text.format(document)
    prompt = split(whole, byte_tokenizer(), special=False, sample=fields)
    assert prompt.token_ids == tuple(whole.encode())
    assert bytes(prompt.query).decode() == (query or whole.partition(document)[2])


@pytest.mark.parametrize("template", [CHATML, LLAMA, MISTRAL, PECULIAR])
@pytest.mark.parametrize("beginning", [None, "It was"])
@pytest.mark.parametrize(
    "before", [[], [("system", "Be brief.\n\nBe kind.")], [("user", "a\n\nb"), ("assistant", "c")]]
)
def test_the_last_user_turn_is_looked_at(template: str, beginning: str | None, before: list[tuple[str, str]]) -> None:
    """The template's closing and the beginning of the answer belong to the query and are not searched; turns and
    headers before the user's text are not the question either."""
    tokenizer = byte_tokenizer(template)

    def render(chat: Sequence[Message]) -> str:
        going_on = chat[-1]["role"] == "assistant"
        return str(
            tokenizer.apply_chat_template(
                [dict(turn) for turn in chat],
                tokenize=False,
                add_generation_prompt=not going_on,
                continue_final_message=going_on,
            )
        )

    for content, query in (
        (f"{LINE * 9}\n\nWho?", "\n\nWho?"),
        (f"{LINE * 9}Who?", " Who?"),
        ("Who", "Who"),
        ("a", "a"),
        ("x" * 400, "x" * 32),
    ):
        chat = [*before, ("user", content), *([] if beginning is None else [("assistant", beginning)])]
        turns: list[Mapping[str, str]] = [{"role": role, "content": text} for role, text in chat]
        text = render(turns)
        turn = last_user_turn(render, turns, text)
        assert turn is not None
        assert text[slice(*turn)] == content
        prompt = split(text, tokenizer, special=False, turn=turn)
        assert list(prompt.token_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(prompt.query) == query + text[turn[1] :]
        if query != content:  # there is a document: the question is asked in front of it within the turn
            own = text[: turn[0]] if len(text[: turn[0]]) <= LONGEST else ""
            assert tokenizer.decode(prompt.question_first.prefix) == own + query.strip() + (
                "\n\n" if query[0] != "x" else ""
            )


def test_no_user_turn() -> None:
    """A chat without one has no place to look at."""
    assert last_user_turn(str, [{"role": "system", "content": "Hello."}], "Hello.") is None


def test_too_short_to_be_split() -> None:
    """Two tokens are enough, wherever they come from; fewer are refused."""
    tokenizer = byte_tokenizer()
    assert split("a", tokenizer, special=True) == of_tokens([BOS, 97]) == apb.Prompt((), (BOS,), (97,))
    for text in ("", "a"):
        with pytest.raises(apb.InputError, match=f"{len(text)} tokens, and at least 2"):
            split(text, tokenizer, special=False)
