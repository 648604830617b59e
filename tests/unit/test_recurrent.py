"""Recurrent layers are exact: a state runs through the rows of a text, whatever its attention layers see of it, and
whichever ranks and rounds the rows are in."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

import apb
from apb.distributed.collectives import Group
from apb.distributed.mesh import Mesh
from apb.hf import verifying
from apb.hf.cache_names import with_cache
from apb.hf.counting import model_shape
from apb.planning.cost import MOVED_IN_RECURRENCE, Ceilings, predict
from apb.planning.memory import ALIVE_IN_RECURRENCE
from apb.planning.plan import Plan
from families import ANSWER, PROMPT
from hybrids import FAMILIES, make, says
from oracle import masked_prefill
from together import together

# Fewer tokens than a convolution looks at, on every rank; blocks without any.
SHORT = apb.Prompt.from_tokens([], PROMPT.document[:11], PROMPT.query[:2])
SHORTER = apb.Prompt.from_tokens([7], PROMPT.document[:2], PROMPT.query[:1])
APB = {"strategy": "apb", "blocks": 5, "anchor_length": 29, "passing_length": 4}


def engine_of(family: str, group: Group | None = None, **options: Any) -> apb.Engine:
    """An engine on a model of its own."""
    return apb.Engine.from_model(make(family), verify=False, mesh=None if group is None else Mesh.of(group), **options)


def same(left: Any, right: Any) -> None:
    """Equal within 1e-4."""
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def check_cache(
    family: str, prompt: apb.Prompt, layers: dict[int, list[Tensor]], states: dict[int, list[Tensor]]
) -> None:
    """Keys and values, and states, are those in transformers' own cache."""
    _, known = says(family, prompt.token_ids)
    own = {}
    for index, layer in enumerate(known.layers):
        parts = [part for name in ("conv_states", "recurrent_states") for part in getattr(layer, name, {}).values()]
        own[index] = [part for part in parts if part is not None]
        if index in layers:
            kept = layer.keys.shape[2]  # transformers keeps of a layer with a window what later rows see
            same([part[None, :, -kept:] for part in layers[index]], [layer.keys, layer.values])
    for index, state in enumerate(getattr(known, "linear_cache", [])):  # MiniMax
        own[index] = [] if isinstance(state, list) else [state]
    assert states.keys() == {index for index, parts in own.items() if parts}
    for index, state in states.items():
        same(state, own[index])


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_on_ranks(family: str) -> None:
    """Logits, keys, values and states are transformers' own, on every rank; so are 24 tokens, chosen greedily."""

    def read(group: Group, prompt: apb.Prompt, strategy: str, tokens: int) -> Any:
        engine = engine_of(family, group, strategy=strategy)
        session = engine.prefill(prompt)
        layers = {layer: list(session.gather_kv(layer)) for layer in session.cache.indices}
        states = {
            layer: [part.clone() for part in state.tensors().values()] for layer, state in session.cache.states.items()
        }
        logits = [session.logits]
        for _ in range(tokens):
            logits.append(session.extend([int(logits[-1].argmax())]))
        engine.close()
        return torch.stack(logits), layers, states

    for size, prompt, strategy, tokens in (
        (1, PROMPT, "full", 0),
        (2, PROMPT, "ulysses", 24),
        (3, PROMPT, "ring", 0),
        (4, SHORT, "ring", 1),
        (4, SHORTER, "ring", 1),
    ):
        ranks = together(lambda group: read(group, prompt, strategy, tokens), size)  # noqa: B023
        chosen = tuple(ranks[0][0].argmax(-1)[:tokens].tolist())
        expected, _ = says(family, prompt.token_ids, chosen)
        assert torch.equal(ranks[0][0].argmax(-1), expected.argmax(-1))
        for logits, _, states in ranks:
            same(logits, expected)
            assert torch.equal(logits, ranks[0][0])
            check_cache(family, prompt, {}, states)
        check_cache(family, prompt, *ranks[0][1:])
        size_of_states = sum(part.nbytes for state in states.values() for part in state)
        assert size_of_states == model_shape(make(family).config).recurrent.state_bytes(4)


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "lfm2"])
def test_against_the_oracle(family: str) -> None:
    """Attention as the strategy has it, and states that run through all of the text: alike on any ranks and rounds."""
    for size, options in (
        (2, APB),
        (1, {**APB, "rounds": 3}),
        (3, {**APB, "rounds": 2}),
        (2, {"strategy": "star", "blocks": 5, "rounds": 2}),
    ):
        sizes = {"anchor_length": None, "passing_length": 0, **options}
        parts = PROMPT.prefix, PROMPT.document, PROMPT.query
        expected = masked_prefill(make(family), *parts, ANSWER, **sizes)

        def read(group: Group) -> Tensor:
            session = engine_of(family, group, **options).prefill(PROMPT)  # noqa: B023
            return torch.stack([session.logits, *(session.extend([token]) for token in ANSWER)])

        for logits in together(read, size):
            same(logits, expected)


@pytest.mark.parametrize("family", ["qwen3_5_text", "jamba", "lfm2"])
def test_documents(family: str) -> None:
    """Several tokens read in one pass, and those of a document asked twice."""
    more = [7, 19, 4]
    expected, _ = says(family, PROMPT.token_ids, tuple(more))
    engine = engine_of(family, strategy="full")
    same(engine.prefill(PROMPT).extend(more), expected[-1])
    document = engine.read(tokens=PROMPT.document, prefix=PROMPT.prefix)
    for _ in range(2):
        same(document.prefill(PROMPT.query).logits, expected[0])
        document.prefill((5, 6))
    engine.close()


@pytest.mark.parametrize("family", ["falcon_h1", "minimax"])
def test_stores_of_other_ranks(family: str, tmp_path: Path) -> None:
    """A document that two ranks have written, on three: its states with it, wherever it is asked from."""
    expected, _ = says(family, PROMPT.token_ids, ANSWER)
    plenty = 1 << 40

    def write(group: Group) -> None:
        engine = engine_of(family, group, strategy="ring")
        engine.read(tokens=PROMPT.document, prefix=PROMPT.prefix, question=PROMPT.query).save(tmp_path / "it")

    def ask(group: Group) -> list[Tensor]:
        engine = engine_of(family, group, strategy="ring")
        documents = apb.Documents(engine, plenty, plenty)
        documents.add("it", engine.load(tmp_path / "it"))
        said = []
        for query in (PROMPT.query, (5, 6), PROMPT.query, (*PROMPT.query, ANSWER[0])):
            documents.make_room(plenty)
            assert documents.place("it") == "host"
            said.append(documents.document("it").prefill(query).logits)
        return said

    together(write, 2)
    for first, _, again, longer in together(ask, 3):
        same(torch.stack([first, again, longer]), expected[[0, 0, 1]])


def test_transformers_goes_on() -> None:
    """From the whole cache of two ranks, states included; a cache that only a model's own code knows is refused."""
    ids = torch.tensor([[*PROMPT.token_ids, ANSWER[0]]])

    def read(group: Group, family: str) -> Any:
        engine = engine_of(family, group, strategy="ring")
        session = engine.prefill(PROMPT)
        try:
            return session.to_dynamic_cache()
        finally:
            engine.close()

    for family in ("qwen3_next", "falcon_h1"):
        cache, other = together(lambda group: read(group, family), 2)  # noqa: B023
        assert other is None
        expected, _ = says(family, PROMPT.token_ids, ANSWER[:1])
        with torch.no_grad():
            model = make(family)
            same(model(ids[:, -1:], **with_cache(model, cache)).logits[0, -1], expected[1])
    with pytest.raises(apb.InputError, match="cache of its own"):
        read(Group(), "minimax")


@pytest.mark.parametrize("family", FAMILIES)
def test_in_pieces(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run is read some rows at a time, by the state between them, wherever a piece ends."""
    monkeypatch.setattr("apb.hf.recurrent.CPU_ROWS", 7)
    engine = engine_of(family, strategy="full")
    session = engine.prefill(PROMPT)
    same(session.logits, says(family, PROMPT.token_ids)[0][0])
    states = {layer: list(state.tensors().values()) for layer, state in session.cache.states.items()}
    check_cache(family, PROMPT, {}, states)
    engine.close()


def test_kernels_of_other_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that transformers calls once they are installed read with the state before them, and never without numbers.

    Sizes are counted and a small copy is compared by transformers' own functions: such kernels run on GPUs alone.
    """
    own = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    calls: list[tuple[int, bool]] = []

    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        assert not q.is_meta, "no kernel without numbers"
        calls.append((q.shape[1], initial_state is not None))
        rest = initial_state, output_final_state, use_qk_l2norm_in_kernel
        return own(q, k, v, g, beta, 64, *rest)  # type: ignore[no-any-return]

    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    installed = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")(own)
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", installed)
    monkeypatch.setattr("apb.hf.counting._SHAPES", {})
    monkeypatch.setattr("apb.hf.verifying._verified", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = make("qwen3_5_text")
    assert model_shape(model.config).recurrent is not None
    verifying.verify(model.config)
    assert verifying._verified
    assert not calls
    monkeypatch.setattr("apb.hf.recurrent.CPU_ROWS", 64)
    engine = apb.Engine.from_model(model, strategy="full")
    same(engine.prefill(PROMPT).logits, says("qwen3_5_text", PROMPT.token_ids)[0][0])
    engine.close()
    assert [carries for _, carries in calls[: len(calls) // 2]] == [False, *[True] * (len(calls) // 2 - 1)]
    assert sum(rows for rows, _ in calls) == 2 * len(PROMPT)


def test_waiting_and_states_are_predicted() -> None:
    """A rank waits for the others' rows in recurrent layers; what these hold and two states lie in its memory."""
    plan, shape = Plan.build(3, 100, 6, ranks=2, strategy="ring"), model_shape(make("qwen3_5_text").config)
    assert shape.attention_layers == 1
    cost = predict(plan, shape, element_bytes=4)
    layers = make("qwen3_5_text").model.layers
    weights = sum(
        each.weight.numel()
        for layer in layers
        for each in getattr(layer, "linear_attn", torch.nn.Identity()).modules()
        if isinstance(each, torch.nn.Linear)
    )
    written = sum(
        each.out_features
        for layer in layers
        for each in getattr(layer, "linear_attn", torch.nn.Identity()).modules()
        if isinstance(each, torch.nn.Linear)
    )
    rows, moved = plan.rows_by_rank(), 4 * MOVED_IN_RECURRENCE * written
    attention_alone = predict(plan, replace(shape, recurrent=None), element_bytes=4)
    for rank, other, mine, alone in zip(cost.ranks, reversed(rows), rows, attention_alone.ranks, strict=True):
        assert rank.waiting_flops == 2 * weights * other
        assert rank.waiting_bytes == moved * other
        assert rank.moved_bytes == alone.moved_bytes + moved * (mine + plan.query)
        assert rank.activation_bytes >= mine * ALIVE_IN_RECURRENCE * written // 2 * 4
        assert (alone.waiting_bytes, alone.waiting_flops) == (0, 0)
        assert rank.state_bytes == 2 * shape.recurrent.state_bytes(4)
        assert rank.peak_bytes == rank.weight_bytes + rank.cache_bytes + rank.activation_bytes + rank.state_bytes
    slow, none = Ceilings(1e9, 1e9, 1e9), Plan.build(3, 100, 6)
    copying = Ceilings(1e9, 1e9, 1e9, memory=1e9)
    of_bytes = cost.ranks[0].seconds(copying) - cost.ranks[0].seconds(slow)
    assert of_bytes == pytest.approx((cost.ranks[0].moved_bytes + cost.ranks[0].waiting_bytes) / 1e9)
    assert cost.ranks[0].seconds(slow) > cost.ranks[0].linear_flops / 1e9 + cost.ranks[0].waiting_flops / 1e9
    assert predict(none, shape).ranks[0].waiting_flops == 0


def test_only_what_cannot_be_is_refused() -> None:
    """Propagation, by name, before anything is read."""
    engine = engine_of("lfm2", **APB, propagation="0.5")
    with pytest.raises(apb.InputError, match=r"'lfm2' models have recurrent layers.*without propagation"):
        engine.prefill(PROMPT)
    engine.close()
