"""Documents that stay read: every question as if it were the first, and conversations that go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import apb
import ropes
from apb.hf.cache_names import with_cache
from apb.state import SEAM
from byte_checkpoint import TEMPLATE, byte_tokenizer
from cases import VOCABULARY, Case
from extension.nearest import Nearest
from families import PECULIAR, WINDOW, make
from models import tiny_model, transformers_says, without_eos

PROMPT = Case(1).prompt
QUESTIONS = [tuple((7 * i + 31 * j + 2) % VOCABULARY for j in range(2 + i)) for i in range(10)]


def llama() -> PreTrainedModel:
    return without_eos(tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY))


def engine_of(model: PreTrainedModel, strategy: str, **options: Any) -> apb.Engine:
    blocks = {"blocks": 4, "passing_length": 3} if strategy == "apb" else {}
    return apb.Engine.from_model(model, strategy=strategy, **blocks, **options)


def with_query(query: Sequence[int]) -> apb.Prompt:
    return apb.Prompt.from_tokens(PROMPT.prefix, PROMPT.document, query)


def read(engine: apb.Engine, **options: Any) -> apb.Document:
    return engine.read(tokens=PROMPT.document, prefix=PROMPT.prefix, **options)


@pytest.mark.parametrize("strategy", ["full", "ring"])
@pytest.mark.parametrize("question", [None, QUESTIONS[3]])
def test_exact_documents_answer_as_if_read_anew(strategy: str, question: Sequence[int] | None) -> None:
    """Ten questions in two orders: token for token, logits to 1e-4; nothing that is asked changes the document."""
    engine = engine_of(llama(), strategy)
    anew = [engine.generate(with_query(query), max_new_tokens=12) for query in QUESTIONS]
    logits = [engine.prefill(with_query(query)).logits for query in QUESTIONS]
    document = read(engine, question=question)
    assert document.exact
    for order in (range(10), reversed(range(10))):
        for number in order:
            answer = document.ask(QUESTIONS[number], max_new_tokens=12)
            assert answer.token_ids == anew[number].token_ids
            assert (answer.exact, answer.plan) == (True, anew[number].plan)
            torch.testing.assert_close(document.prefill(QUESTIONS[number]).logits, logits[number], rtol=1e-4, atol=1e-4)


def test_apb_answers_its_own_question_bit_for_bit() -> None:
    """Before and after others; the others are answered as well, and say for which question it was read."""
    engine = engine_of(llama(), "apb")
    whole = engine.prefill(PROMPT)
    anew = engine.generate(PROMPT, max_new_tokens=12)
    document = read(engine, question=PROMPT.query)
    for _ in range(2):
        answer = document.ask(PROMPT.query, max_new_tokens=12)
        assert (answer.token_ids, answer.read_for, answer.exact) == (anew.token_ids, "this question", False)
        assert torch.equal(document.prefill(PROMPT.query).logits, whole.logits)
        assert document.ask(QUESTIONS[0], max_new_tokens=2).read_for == "another question"
    assert "read_for" not in anew.to_dict()
    assert answer.to_dict()["read_for"] == "this question"
    assert read(engine).ask(PROMPT.query, max_new_tokens=1).read_for == "no question"


def test_without_a_question_more_is_passed_on() -> None:
    """Half of a block instead of an eighth, unless the user says how much; the same with the plan's own rounds."""
    tokens = list(range(3, 96)) * 40
    for given, asked, unasked in (({}, len(tokens) // 4 // 8, len(tokens) // 4 // 2), ({"passing_length": 7}, 7, 7)):
        engine = apb.Engine.from_model(llama(), strategy="apb", blocks=4, **given)
        found = [engine.read(tokens=tokens, question=question).plan.passing_length for question in ([5, 6], None)]
        assert found == [asked, unasked]
        engine.close()


@pytest.mark.parametrize("strategy", ["apb", "star", "minference"])
def test_another_question_is_read_exactly_over_what_is_kept(strategy: str) -> None:
    """Transformers' own model, given the document's keys and values, says the same."""
    model = llama()
    engine = engine_of(model, strategy)
    document = read(engine, question=PROMPT.query)
    stop = len(PROMPT.prefix) + len(PROMPT.document)
    session = engine.prefill(PROMPT)
    layers = [session.gather_kv(layer) for layer in range(3)]
    said = [(document.prefill(query).logits, query) for query in QUESTIONS[:3]]
    engine.close()
    for logits, query in said:
        torch.testing.assert_close(logits, over(model, layers, stop, query), rtol=1e-4, atol=1e-4)


def over(model: PreTrainedModel, layers: Sequence[Any], stop: int, query: Sequence[int]) -> Tensor:
    """The logits after a query over the first ``stop`` keys and values of every layer."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys[None, :, :stop], values[None, :, :stop], number)
    places = torch.arange(stop, stop + len(query))[None]
    with torch.no_grad():
        return model(torch.tensor([query]), **with_cache(model, cache), position_ids=places).logits[0, -1]


@pytest.mark.parametrize("family", ["gemma3_text", "deepseek_v3"])
def test_other_layers(family: str) -> None:
    """What a question has pushed out of a window's reach is there again for the next one; latents are kept as well."""
    engine = engine_of(make(*PECULIAR[family]), "full")
    document = read(engine)
    for query in (QUESTIONS[9], QUESTIONS[0], QUESTIONS[9]):
        expected = engine.prefill(with_query(query)).logits
        torch.testing.assert_close(document.prefill(query).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["full", "apb"])
def test_windows_keep_what_they_see(strategy: str, tmp_path: Path) -> None:
    """After reading, on disk, in host memory, and as the text goes on: the last tokens alone, and the same answers."""
    engine = engine_of(make(*PECULIAR["gemma3_text"]), strategy)
    document = read(engine)
    count = len(document.token_ids)
    short = WINDOW - 1 + SEAM
    assert document.state.cache.held == [short, count, short]
    storage = [layer.keys.shape[2] for layer in document.state.cache.layers]
    assert storage[0] == storage[1] - (count - short)
    said = {query: document.prefill(query).logits for query in (QUESTIONS[9], QUESTIONS[0])}
    session = document.prefill(QUESTIONS[0])
    assert session.positions(0)[0] == count - short
    assert session.gather_kv(0)[0].shape[1] == short + len(QUESTIONS[0])
    with pytest.raises(apb.InputError, match="hold different tokens"):
        session.to_dynamic_cache()
    document.save(tmp_path)
    loaded = engine.load(tmp_path)
    assert loaded.state.cache.held == [short, count, short]
    loaded.come_back(loaded.leave(None))
    for query, logits in said.items():
        torch.testing.assert_close(loaded.prefill(query).logits, logits, rtol=1e-4, atol=1e-4)
    longer = (*PROMPT.document[:-SEAM], *range(3, 60))
    for each in (document, loaded):
        each.ask(QUESTIONS[9], keep=True, max_new_tokens=9)
        engine.read(tokens=longer, prefix=PROMPT.prefix, after=each)
        assert each.state.cache.held == [short, len(PROMPT.prefix) + len(longer), short]
    torch.testing.assert_close(
        loaded.prefill(QUESTIONS[3]).logits, document.prefill(QUESTIONS[3]).logits, rtol=0, atol=0
    )
    if strategy == "full":
        anew = engine.prefill(apb.Prompt.from_tokens(PROMPT.prefix, longer, QUESTIONS[3])).logits
        torch.testing.assert_close(document.prefill(QUESTIONS[3]).logits, anew, rtol=1e-4, atol=1e-4)
    with pytest.raises(apb.InputError, match="is not there any more"):
        document.state.cache.forget(count - SEAM)


@pytest.mark.parametrize("query", [QUESTIONS[4], QUESTIONS[0][:1]])
def test_questions_are_read_exactly_whatever_decodes(query: Sequence[int]) -> None:
    """A decode method that sees a few keys is for the answer's tokens, not for the question's."""
    engine = engine_of(llama(), "full", decoding=Nearest(8))
    expected, anew = engine.prefill(with_query(query)).logits, engine.generate(with_query(query), max_new_tokens=6)
    document = read(engine)
    torch.testing.assert_close(document.prefill(query).logits, expected, rtol=1e-4, atol=1e-4)
    assert document.ask(query, max_new_tokens=6).token_ids == anew.token_ids


def test_a_question_beyond_a_length_where_rope_changes() -> None:
    """longrope rotates a longer text otherwise: the document is read anew for that question, and stays for others."""
    model, prompt = ropes.scaled("longrope"), ropes.prompt_of(60)
    engine = engine_of(model, "full")
    document = engine.read(tokens=prompt.document, prefix=prompt.prefix)
    for length in (2, 30, 3):
        query = [(11 * i + 3) % VOCABULARY for i in range(length)]
        expected = engine.prefill(apb.Prompt.from_tokens(prompt.prefix, prompt.document, query))
        torch.testing.assert_close(document.prefill(query).logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_questions_take_no_memory() -> None:
    """The storage of the first one serves a hundred."""
    document = read(engine_of(llama(), "apb"))
    document.ask(QUESTIONS[9], max_new_tokens=9)
    places = document.prefill(QUESTIONS[0]).cache.addresses()
    for number in range(100):
        document.ask(QUESTIONS[number % 10], max_new_tokens=1 + number % 9)
    assert document.prefill(QUESTIONS[0]).cache.addresses() == places


def test_a_conversation_goes_on() -> None:
    """Kept turns are read once; a question that is not kept in between leaves no trace. Transformers says the same."""
    model = llama()
    engine = engine_of(model, "full")
    document = read(engine)
    before = document.token_ids
    first = document.ask(QUESTIONS[0], keep=True, max_new_tokens=7)
    assert document.token_ids == (*before, *QUESTIONS[0], *first.token_ids[:-1])
    aside = document.ask(QUESTIONS[5], max_new_tokens=5)
    second = document.ask(QUESTIONS[1], keep=True, max_new_tokens=6)
    third = document.ask(QUESTIONS[2], max_new_tokens=5)
    engine.close()
    text = [*before, *QUESTIONS[0]]
    assert first.token_ids == transformers_says(model, text, 7)
    text += first.token_ids
    assert aside.token_ids == transformers_says(model, [*text, *QUESTIONS[5]], 5)
    text += QUESTIONS[1]
    assert second.token_ids == transformers_says(model, text, 6)
    assert third.token_ids == transformers_says(model, [*text, *second.token_ids, *QUESTIONS[2]], 5)


CLOSED = TEMPLATE.replace("{% endfor %}", "</s>{% endfor %}")


@pytest.mark.parametrize("template", [None, TEMPLATE, CLOSED])
@pytest.mark.parametrize("ended", [True, False])
def test_texts_and_turns_are_the_templates(template: str | None, ended: bool) -> None:
    """Tokens of questions and of further turns are those of the whole text, as the chat template writes it; the end of
    a turn that the model wrote itself is not read twice."""
    tokenizer = byte_tokenizer(template)
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258)
    model.generation_config.eos_token_id = model.config.eos_token_id = 257 if ended else None
    if ended:  # whatever is read, the model ends its answer
        with torch.no_grad():
            model.lm_head.weight[257] = 50 * model.lm_head.weight[257].abs() + 0 * model.lm_head.weight[257]
    text = "The keeper of Orrin was called Maud. " * 80
    engine = apb.Engine.from_model(model, tokenizer, strategy="full")
    document = engine.read(text, system="Be brief." if template else None)
    said = document.prefill("Who <s>?").token_ids
    system = "Be brief." if template else None
    assert said == list(apb.Prompt.for_model(tokenizer, text, "Who <s>?", system).token_ids)
    first = document.ask("Who <s>?", keep=True, max_new_tokens=4)
    tokens = list(document.prefill("Where?").token_ids)
    if template is None:
        expected = [*said, *first.token_ids, *b"\n\nWhere?"]
    else:
        closing = [257] if template == CLOSED else []
        answer = first.token_ids[:-1] if first.token_ids[-1:] == closing else first.token_ids
        expected = [*said, *answer, *closing, *b"[user]Where?", *closing, *b"[assistant]"]
    assert tokens == expected


@pytest.mark.parametrize("strategy", ["full", "apb"])
def test_a_text_that_goes_on(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beginning stays as it was read, the rest is read exactly over it, in passes of any number of rows."""
    monkeypatch.setattr("apb.document._ROWS", 7)
    model = llama()
    engine = engine_of(model, strategy)
    document = read(engine, question=PROMPT.query)
    document.ask(QUESTIONS[3], keep=True, max_new_tokens=3)
    longer = (*PROMPT.document[:-2], *((5 * i + 1) % VOCABULARY for i in range(40)))
    start = len(PROMPT.prefix) + len(PROMPT.document) - 2
    session = engine.prefill(PROMPT)
    layers = [session.gather_kv(layer) for layer in range(3)]
    assert engine.read(tokens=longer, prefix=PROMPT.prefix, after=document) is document
    assert document.token_ids == PROMPT.prefix + longer
    said = document.prefill(PROMPT.query).logits
    assert document.ask(PROMPT.query, max_new_tokens=1).read_for == "another question"
    assert document.plan.document == len(longer)
    engine.close()
    expected = over(model, layers, start, [*longer[len(PROMPT.document) - 2 :], *PROMPT.query])
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)


def test_a_text_that_does_not_go_on() -> None:
    """Another text, or one that ends earlier, is refused, and the document stays."""
    engine = engine_of(llama(), "full")
    document = read(engine)
    logits = document.prefill(QUESTIONS[0]).logits
    for tokens in ((9, *PROMPT.document), PROMPT.document[:20], (*PROMPT.document, *[1] * 5000)):
        with pytest.raises(apb.InputError):
            engine.read(tokens=tokens, prefix=PROMPT.prefix, after=document)
    assert torch.equal(document.prefill(QUESTIONS[0]).logits, logits)


def test_a_session_lasts_until_the_next_question() -> None:
    document = read(engine_of(llama(), "full"))
    session = document.prefill(QUESTIONS[0])
    session.extend([3])
    document.prefill(QUESTIONS[1])
    for use in (lambda: session.extend([3]), lambda: session.gather_kv(0), lambda: session.score([3])):
        with pytest.raises(RuntimeError, match="another question"):
            use()


def test_what_cannot_be_read_or_asked() -> None:
    """One sentence each, and the document goes on."""
    model, tokenizer = llama(), byte_tokenizer()
    engine = engine_of(model, "full")
    for wrong in ({}, {"text": "a", "tokens": [1]}, {"tokens": [1], "question": [2], "questions": ["a"]}):
        with pytest.raises(apb.InputError):
            engine.read(**wrong)  # type: ignore[arg-type]
    with pytest.raises(apb.InputError, match="needs a tokenizer"):
        engine.read("a text")
    document = read(engine)
    logits = document.prefill(QUESTIONS[0]).logits
    for query in ("Who?", [], [VOCABULARY], [1.5], [1] * 5000):
        with pytest.raises(apb.InputError):
            document.prefill(query)  # type: ignore[arg-type]
    assert torch.equal(document.prefill(QUESTIONS[0]).logits, logits)
    texts = apb.Engine.from_model(tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258), tokenizer)
    for query in ([5], " ", ""):
        with pytest.raises(apb.InputError):
            texts.read("A text.").prefill(query)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        document.prefill(QUESTIONS[0])


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("question_first", [False, True])
def test_a_text_is_read_anew_where_that_is_asked_for(as_text: bool, question_first: bool, tmp_path: Path) -> None:
    """Read for another question and not exactly, it is answered as by an engine that reads it for this one, and stays
    as it was. Otherwise nothing is read anew."""
    options: dict[str, Any] = {"blocks": 4, "passing_length": 3, "question_first": question_first}
    if as_text:
        model = without_eos(tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258))
        tokenizer = byte_tokenizer(TEMPLATE)
        engine = apb.Engine.from_model(model, tokenizer, strategy="apb", **options)
        text = "The keeper of Orrin was called Maud. " * 80  # longer than what is kept of it
        first, other = "Who?", "Where was it, and when?"
        document, wanted = engine.read(text, question=first), apb.Prompt.from_chat(tokenizer, text, other)
    else:
        engine = engine_of(llama(), "apb", question_first=question_first)
        first, other = PROMPT.query, QUESTIONS[3]
        document, wanted = read(engine, question=first), with_query(other)
    before = document.ask(other, max_new_tokens=9)
    assert before.read_for == "another question"
    anew = engine.generate(wanted, max_new_tokens=9)
    document.save(tmp_path / "a")
    for each in (document, document, engine.load(tmp_path / "a")):
        answer = each.ask(other, reread="auto", max_new_tokens=9)
        assert (answer.token_ids, answer.plan, answer.read_for) == (anew.token_ids, anew.plan, "this question")
    assert document.ask(other, max_new_tokens=9).token_ids == before.token_ids
    assert document.ask(first, reread="auto", max_new_tokens=9).read_for == "this question"
    none = engine.read(text) if as_text else read(engine)
    assert none.ask(other, reread="auto", max_new_tokens=1).read_for == "no question"
    with pytest.raises(apb.InputError, match="never or auto"):
        document.ask(other, reread="always")
    with pytest.raises(apb.InputError, match="A turn is kept"):
        document.ask(other, reread="auto", keep=True)


def test_several_typical_questions_and_streams() -> None:
    """Read for several, a document is read for each of them, joined; streamed pieces are the answer's text."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258)
    engine = apb.Engine.from_model(model, byte_tokenizer(), strategy="apb", blocks=4)
    document = engine.read("The keeper was called Maud. " * 20, questions=["Who?", "Where?"])
    assert document.read_for == ("Who?", "Where?")
    assert document.plan.query == len("\n\nWho?\nWhere?")
    pieces, stream = "", document.stream("Who?", max_new_tokens=9)
    while True:
        try:
            pieces += next(stream)
        except StopIteration as stop:
            answer = stop.value
            break
    assert pieces == answer.text == document.ask("Who?", max_new_tokens=9).text
    assert answer.read_for == "another question"
