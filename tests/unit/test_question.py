"""Which part of a request is taken for the question: messages as clients' templates make them, in our own words."""

from __future__ import annotations

import pytest

from apb.serving.prompts import LONGEST_GIVEN, Said, asked, plain
from apb.serving.question import LONGEST, UNMARKED, cut
from byte_checkpoint import TEMPLATE, byte_tokenizer

SENTENCE = "The lighthouse keeper of Orrin was called Maud. "
TEXT = "\n\n".join([SENTENCE * 12] * 5)
LINES = "\n".join([SENTENCE * 2] * 40)
ASKED = "Who kept the lighthouse of Orrin?"


def question_of(text: str) -> str:
    found = cut(text, len)
    assert text[: found.stop].strip() or not found.stop
    return text[: found.head] if found.head else text[found.start :]


ENDS = {
    "a blank line": (f"{TEXT}\n\n{ASKED}", ASKED),
    "carriage returns": (f"{TEXT}\n\n{ASKED}".replace("\n", "\r\n"), ASKED),
    "a blank line with a space": (f"{LINES}\n \t\n{ASKED}", ASKED),
    "one line break": (f"{LINES}\n{ASKED}", ASKED),
    "a sentence": (SENTENCE * 30 + ASKED, ASKED),
    "no question mark": (f"{TEXT}\n\nName the keeper of the lighthouse.", "Name the keeper of the lighthouse."),
    "an announcement": (f"{LINES}\n{ASKED}\nAnswer:", f"{ASKED}\nAnswer:"),
    "a label": (f"{LINES}\nQuestion: {ASKED}\nIn one word.\nHelpful Answer:", None),
    "code": (f"{TEXT}\n\n{ASKED}\n\n```python\nif x:\n\n    y()\n```", f"{ASKED}\n\n```python\nif x:\n\n    y()\n```"),
    "a rule": (f"Context:\n-----------\n{LINES}\n-----------\nUse it, nothing else.\nQuery: {ASKED}\nAnswer: ", None),
    "a tag": (f"### Task:\nAnswer.\n\n<context>\n<source>{LINES}</source>\n</context>\n{ASKED}\nBriefly.", None),
    "tags around both": (f"<context>\n{LINES}\n</context>\n\n<user_query>\n{ASKED}\n</user_query>", None),
    "closing marks": (f"[CONTEXT 0]:\n{LINES}\n[END CONTEXT 0]\n\n{ASKED}", ASKED),
    "an introduction": (f"Here is a report:\n\n{TEXT}\n\n{ASKED}", ASKED),
}
WHOLE = {
    "a label": f"Question: {ASKED}\nIn one word.\nHelpful Answer:",
    "a rule": f"Use it, nothing else.\nQuery: {ASKED}\nAnswer: ",
    "a tag": f"{ASKED}\nBriefly.",
    "tags around both": f"<user_query>\n{ASKED}\n</user_query>",
}


@pytest.mark.parametrize("name", ENDS)
def test_questions_at_the_end(name: str) -> None:
    """Found whole, and nothing of the text with it."""
    text, expected = ENDS[name]
    assert question_of(text).strip() == (expected or WHOLE[name]).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Summarise this:\n\n{TEXT}", "Summarise this:"),
        (f"What does this say?\r\n\r\n{TEXT}", "What does this say?"),
        (f"Answer from what was found.\nQuestion: {ASKED} \nContext: {LINES} \nAnswer:", f"Question: {ASKED} "),
    ],
    ids=["an instruction", "a question", "labelled"],
)
def test_questions_in_front(text: str, expected: str) -> None:
    """The text's own last paragraph is not the question."""
    assert question_of(text).endswith(expected)


def test_wrong_guesses_are_cheap() -> None:
    """Whatever stands in a message, what is taken for the question has few tokens."""
    for text in ("word " * 4000, SENTENCE.replace(".", "") * 99, f"{TEXT}\n\n{'word ' * 400}", "x" * 99999):
        assert len(question_of(text)) <= LONGEST
    assert question_of("Hello there.") == "Hello there."


def chat(*messages: tuple[str, str], document: str | None = None) -> tuple[str, str, str, dict[str, object]]:
    """Prefix, document and query as texts, and what is told about the question."""
    tokenizer = byte_tokenizer(TEMPLATE)
    found = asked(tokenizer, [Said(role, [text]) for role, text in messages], document)
    parts = (found.prompt.prefix, found.prompt.document, found.prompt.query)
    prefix, text, query = (tokenizer.decode(part) for part in parts)
    rendered = tokenizer.apply_chat_template(
        [*({"role": r, "content": t} for r, t in messages[:-1]), {"role": "user", "content": messages[-1][1]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    if document is None:
        assert prefix + text + query == rendered  # whatever is taken, the model reads what was sent
    return prefix, text, query, found.question


def test_context_in_the_system_message() -> None:
    """As LangChain, LibreChat and AnythingLLM send it: the system message is the document, the user's the question."""
    system = f"Use what follows to answer.\n\nContext:\n[CONTEXT 0]:\n{TEXT}\n[END CONTEXT 0]\n\n"
    prefix, document, query, told = chat(("system", system), ("user", ASKED))
    assert (prefix, document) == ("<s>[system]", system)
    assert query == f"[user]{ASKED}[assistant]"
    assert told == {"found": "message", "first": ASKED, "last": ASKED, "tokens": len(ASKED)}


def test_turns() -> None:
    """The last turn is the question; what was said before it stands as the template writes it."""
    prefix, document, query, _ = chat(("system", "Be brief."), ("user", TEXT), ("assistant", "Yes."), ("user", ASKED))
    assert prefix == "<s>[system]Be brief.[user]"
    assert document == f"{TEXT}[assistant]Yes."
    assert query == f"[user]{ASKED}[assistant]"


def test_a_document_of_its_own() -> None:
    """The field: all of the user's message is the question, up to a limit beyond which only a part of it is."""
    prefix, document, query, told = chat(("system", "Be brief."), ("user", ASKED), document=TEXT)
    assert (prefix, document, query) == ("<s>[system]Be brief.[user]", TEXT, f"\n\n{ASKED}[assistant]")
    assert told["found"] == "end"
    long = SENTENCE * (LONGEST_GIVEN // len(SENTENCE) + 1)
    _, document, query, told = chat(("user", f"{long}\n\n{ASKED}"), document=TEXT)
    assert document == f"{TEXT}\n\n{long}".rstrip() and query.strip() == f"{ASKED}[assistant]"


def test_a_document_of_a_conversation() -> None:
    """It stays in front of the first message, where it was read; a longer last message is cut as any other is."""
    turns = (("system", "Be brief."), ("user", "Where?"), ("assistant", "In Orrin."))
    _, document, query, told = chat(*turns, ("user", ASKED), document=TEXT)
    assert document == f"{TEXT}\n\nWhere?[assistant]In Orrin."
    assert query == f"[user]{ASKED}[assistant]" and told["found"] == "message"
    long = SENTENCE * (LONGEST_GIVEN // len(SENTENCE) + 1)
    _, document, query, told = chat(*turns, ("user", f"{long}\n\n{ASKED}"), document=TEXT)
    assert document.startswith(f"{TEXT}\n\nWhere?[assistant]In Orrin.[user]{long}".rstrip())
    assert query.strip() == f"{ASKED}[assistant]" and told["found"] == "end"


@pytest.mark.parametrize("turns", [(), (("user", "Where?"), ("assistant", "There."))], ids=["first", "follow-up"])
@pytest.mark.parametrize("template", [None, TEMPLATE, TEMPLATE.replace("'content'] }}", "'content'] | trim }}")])
def test_characters_of_a_document(template: str | None, turns: tuple[tuple[str, str], ...]) -> None:
    """Tokens of the prompt's document stand for characters of the text as it was given; what follows is none of it."""
    if template is None and turns:
        template = TEMPLATE
    tokenizer, text = byte_tokenizer(template), f"\n  \u00d6de an Orrin. {TEXT}"
    found = asked(tokenizer, [Said(role, [said]) for role, said in (*turns, ("user", ASKED))], text)
    lead = len(text) - len(text.lstrip()) if "trim" in str(template) else 0
    raw = text[lead:].encode()  # one token each
    for first, last in ((0, 9), (500, 540)):
        before, after = (lead + len(raw[:place].decode()) for place in (first, last))
        assert found.characters(first, last) == (before, after)
    assert found.characters(0, len(raw) + 9) == (lead, len(text))
    assert found.characters(len(raw) + 2, len(raw) + 9) is None


def test_an_instruction_in_front_is_read_by_all() -> None:
    """It stands in the prefix, which every block sees, and the last few tokens of the text are the query."""
    prefix, document, query, told = chat(("user", f"Summarise this:\n\n{TEXT}"))
    assert prefix == "<s>[user]Summarise this:"
    assert query == (prefix + document + query)[-UNMARKED - len("[assistant]") :]
    assert told["found"] == "front" and told["first"] == "Summarise this:"


def test_ordinary_requests_have_no_document() -> None:
    """A short chat is one, with turns or without, and so is a short plain prompt; a long text is not."""
    tokenizer = byte_tokenizer(TEMPLATE)
    assert asked(tokenizer, [Said("user", ["Hi"])]).ordinary
    assert asked(tokenizer, [Said("system", ["Be brief."]), Said("user", ["Hi"])]).ordinary
    assert not asked(tokenizer, [Said("user", ["Hi"])], document="A text.").ordinary
    assert not asked(tokenizer, [Said("user", [TEXT, "Hi"])]).ordinary
    assert not plain(tokenizer, TEXT).ordinary
    found = plain(tokenizer, "Once upon")
    assert found.ordinary and tokenizer.decode(found.prompt.token_ids) == "<s>Once upon"
