"""Chat templates as others write them: which one is meant, and where in it the document stands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import apb
from apb.hf.chat import Turn, end_of_turn, rendered, template_of
from apb.hf.texts import Piece
from byte_checkpoint import BOS, TEMPLATE, byte_tokenizer
from command_line import Cli

DOCUMENT, QUERY = " The keeper of Orrin\nwas called Maud.\n", "Who kept <it>?  "
# Each with what it makes of the document and of the query.
ODD = {
    "strips": ("[u]{{ messages[-1].content | trim }}[a]", DOCUMENT.lstrip(), QUERY.rstrip()),
    "capitals": ("[u]{{ messages[-1].content | upper }}[a]", DOCUMENT.upper(), QUERY.upper()),
    "capitals and strips": (
        "[u]{{ messages[-1].content.upper().strip() }}[a]",
        DOCUMENT.lstrip().upper(),
        QUERY.rstrip().upper(),
    ),
    "json": ("[u]{{ messages[-1].content | tojson }}[a]", DOCUMENT.replace("\n", "\\n"), QUERY),
    "escapes": ("[u]{{ messages[-1].content | e }}[a]", DOCUMENT, QUERY.replace("<it>", "&lt;it&gt;")),
    "looks at the text": (
        "{% if 'Orrin' in messages[-1].content %}[o]{% endif %}{{ messages[-1].content }}[a]",
        DOCUMENT,
        QUERY,
    ),
    "looks and puts elsewhere": (
        "[u]{% if 'Orrin' in messages[-1].content %}[o]{{ messages[-1].content }}{% endif %}[a]",
        DOCUMENT.strip(),
        QUERY.strip(),
    ),
    "parts": (
        "[u]{% for part in messages[-1].content if part.type == 'text' %}{{ part.text }}{% endfor %}[a]",
        DOCUMENT,
        QUERY,
    ),
    "parts or nothing": ("[u]{{ messages[-1]['content'][0]['text'] + '' }}[a]", DOCUMENT, QUERY),
    "parts or complaints": (
        "{% if messages[-1].content is string %}{{ raise_exception('no texts') }}{% endif %}"
        "[u]{{ messages[-1].content[0].text }}[a]",
        DOCUMENT,
        QUERY,
    ),
    "twice": ("[u]{{ messages[-1].content }}[again]{{ messages[-1].content }}[a]", DOCUMENT, QUERY),
}


CLOSED = "{% for m in messages %}[u]{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"


@pytest.mark.parametrize(
    ("template", "ends"),
    [(CLOSED, True), (CLOSED.replace("<end>", " ."), False), ("{{ raise_exception('no') }}", False), (None, False)],
)
def test_the_end_of_the_assistants_turn(template: str | None, ends: bool) -> None:
    """The control token with which the template closes a turn; none if it closes with text, or refuses the chat."""
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    assert end_of_turn(tokenizer) == (tokenizer.convert_tokens_to_ids("<end>") if ends else None)


def own(pieces: list[Piece], source: str) -> str:
    return next(piece.text for piece in pieces if piece.source == source)


def user_turn(document: str = DOCUMENT, query: str = QUERY) -> Turn:
    return Turn("user", [Piece(document, "document"), Piece("\n\n"), Piece(query, "query")])


@pytest.mark.parametrize("name", ODD)
def test_odd_templates(name: str) -> None:
    """The document is found in whatever a template makes of it; joined, the pieces are what transformers renders."""
    template, document, query = ODD[name]
    tokenizer = byte_tokenizer(template)
    pieces = rendered(tokenizer, template, [user_turn()])
    assert (own(pieces, "document"), own(pieces, "query")) == (document, query)
    text = f"{DOCUMENT}\n\n{QUERY}"
    content = [{"type": "text", "text": text}] if "parts" in name else text
    turn = [{"role": "user", "content": content}]
    assert "".join(piece.text for piece in pieces) == tokenizer.apply_chat_template(turn, tokenize=False)
    prompt = apb.Prompt.from_chat(tokenizer, DOCUMENT, QUERY)
    assert list(prompt.token_ids) == tokenizer.apply_chat_template(turn, tokenize=True)["input_ids"]
    assert bytes(prompt.document).decode() == document
    assert prompt.query[-3:] == tuple(b"[a]")


def test_turns_of_a_longer_chat() -> None:
    """Every message is found, whichever role it has and however often its text occurs in others or in the template."""
    roles = ["system", "user", "assistant", "user"]
    turns = [Turn(role, [Piece(role, f"message {number}")]) for number, role in enumerate(roles)]
    pieces = rendered(byte_tokenizer(TEMPLATE), TEMPLATE, turns)
    assert [piece.text for piece in pieces if piece.source] == roles
    assert [piece.text for piece in pieces if not piece.source][:3] == ["<s>[system]", "[user]", "[assistant]"]


BROKEN = {
    "drops all": ("{{ bos_token }}[a]", "drops the system text and the document and the query"),
    "drops the question": ("{{ messages[0].content }}{{ messages[-1].content.split('\n\n')[0] }}", "drops the query"),
    "drops the system text": ("{{ messages[-1].content }}[a]", "drops the system text"),
    "turns it round": ("{{ messages[-1].content | reverse }}[a]", "drops the .* document"),
    "cuts": ("{{ messages[0].content }}{{ messages[-1].content[:36] }}", "drops the query"),
    "cuts long ones": ("{{ messages[0].content }}{{ messages[-1].content[:53] }}", "changes the text"),
    "adds numbers": ("{{ 1 + messages[-1].content }}", "cannot be applied: .*int"),
    "is none": ("{% for %}", "refuses this prompt"),
    "refuses": ("{{ raise_exception('no such role') }}", "refuses this prompt: no such role"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_templates_that_are_of_no_use(name: str) -> None:
    """What is wrong is said in one sentence, as a wrong input."""
    template, said = BROKEN[name]
    with pytest.raises(apb.InputError, match=rf"^The (tokenizer's )?chat template ({said}).*\.$") as refusal:
        apb.Prompt.from_chat(byte_tokenizer(template), DOCUMENT, QUERY, "Be brief.")
    assert "\n" not in str(refusal.value)


def test_what_a_template_says_of_a_text_brings_no_control_tokens() -> None:
    """A template that repeats a line, where it sees fit to, may do so, but not to turn text into control tokens."""
    template = "{{ messages[0].content.split('\n')[0] if 'Orrin' in messages[0].content }}{{ messages[0].content }}[a]"
    prompt = apb.Prompt.from_chat(byte_tokenizer(template), DOCUMENT, QUERY)
    assert bytes(prompt.prefix + prompt.document).decode() == " The keeper of Orrin" + DOCUMENT
    with pytest.raises(apb.InputError, match="changes the text"):
        apb.Prompt.from_chat(byte_tokenizer(template), "</s>" + DOCUMENT, QUERY)


def test_which_template(tmp_path: Path) -> None:
    """The tokenizer's default or the only one for answers; else the one that is named, a file, or the text itself."""
    tokenizer = byte_tokenizer(TEMPLATE)
    assert template_of(tokenizer) == TEMPLATE
    tokenizer.chat_template = None
    assert template_of(tokenizer) is None
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "t"}
    assert (template_of(tokenizer), template_of(tokenizer, "tool_use")) == (TEMPLATE, "t")
    tokenizer.chat_template = {"tool_use": "t", "plain": TEMPLATE, "rag": "r"}
    assert template_of(tokenizer) == TEMPLATE
    assert template_of(tokenizer, "{{ x }}") == "{{ x }}"
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[-1].content }}!")
    prompt = apb.Prompt.from_chat(tokenizer, "d", "q", chat_template=file)
    assert prompt == apb.Prompt((), (100,), tuple(b"\n\nq!"))
    assert apb.Prompt.for_model(byte_tokenizer(), "d", "q", chat_template=str(file)) == prompt
    assert apb.Prompt.for_model(tokenizer, "d", "q").prefix == (BOS, *b"[user]")


def test_templates_that_cannot_be_told_apart() -> None:
    """Which there are is said, and how to name one."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"short": TEMPLATE, "long": TEMPLATE}
    with pytest.raises(apb.InputError, match=r"none is its default: long, short; name one \(--chat-template"):
        apb.Prompt.for_model(tokenizer, "d", "q")
    with pytest.raises(apb.InputError, match=r"'other' is neither a text file nor the name .*: its templates are long"):
        apb.Prompt.for_model(tokenizer, "d", "q", chat_template="other")
    with pytest.raises(apb.InputError, match=r"it has none\.$"):
        apb.Prompt.from_chat(byte_tokenizer(), "d", "q", chat_template="other")


def test_the_command_line_takes_one(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """By name or file, for an answer and for a server; without one, those that there are to choose from are named."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    settings = folder / "tokenizer_config.json"
    several = [{"name": name, "template": f"{{{{ messages[-1].content }}}}{name}"} for name in ("short", "shorter")]
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": several}))
    document, file = tmp_path / "document.txt", tmp_path / "mine.jinja"
    document.write_text(DOCUMENT)
    file.write_text("{{ messages[-1].content }} and in long?")
    asked = ["generate", "--model", folder, "--document", document, "--query", "Who?", "--max-new-tokens", 1]
    asked += ["--strategy", "full", "--device", "cpu", "--json"]
    for template, tail in (("shorter", "shorter"), (file, " and in long?")):
        plan = cli(*asked, "--chat-template", template).json["plan"]
        assert plan["document_tokens"] + plan["query_tokens"] == len(f"{DOCUMENT}\n\nWho?{tail}")
    cli(*asked).refused("several chat templates", "short, shorter", "--chat-template")
    cli(*asked, "--chat-template", "long").refused("'long'", "its templates are short, shorter")
    serve = ["serve", "--model", folder, "--device", "cpu", "--port", 0]
    cli(*serve).refused("several chat templates", "short, shorter", "--chat-template")
    cli(*serve, "--chat-template", "long").refused("'long'", "its templates are short, shorter")
