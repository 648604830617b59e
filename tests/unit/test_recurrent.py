"""Recurrent layers are exact: a state runs through the rows of a text, whatever its attention layers see of it, and
whichever ranks and rounds the rows are in."""

from __future__ import annotations

import inspect
import math
import runpy
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
from apb.hf.recurrent import LayerState, recurrent_modules, take_over
from apb.layers.composing import Composition
from apb.layers.recurrent import RecurrentInput
from apb.planning.cost import MOVED_IN_COMPOSITION, MOVED_IN_RECURRENCE, Ceilings, predict
from apb.planning.memory import ALIVE_IN_COMPOSITION, ALIVE_IN_RECURRENCE
from apb.planning.plan import Plan
from apb.planning.runs import Run, composed, document_runs, rows_of_others
from families import ANSWER, PROMPT
from hybrids import FAMILIES, make, says
from oracle import masked_prefill
from together import together

# Families whose runs can be composed.
COMPOSED = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "lara_mini"}
# Fewer tokens than a convolution looks at, on every rank; blocks without any.
SHORT = apb.Prompt.from_tokens([], PROMPT.document[:11], PROMPT.query[:2])
SHORTER = apb.Prompt.from_tokens([7], PROMPT.document[:2], PROMPT.query[:1])
# What asks for fp32 is given fp64.
InFloat64: Any = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/recurrent_errors.py"))["InFloat64"]
APB = {"strategy": "apb", "blocks": 5, "anchor_length": 29, "passing_length": 4}


def engine_of(family: str, group: Group | None = None, **options: Any) -> apb.Engine:
    """An engine on a model of its own."""
    return apb.Engine.from_model(make(family), verify=False, mesh=None if group is None else Mesh.of(group), **options)


def same(left: Any, right: Any) -> None:
    """Equal within 1e-4."""
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks of all layers' runs that are composed from now on."""
    ranks: list[int] = []
    read = Composition.read

    def counted(self: Composition, *args: Any) -> None:
        ranks.append(self._group.rank)
        read(self, *args)

    monkeypatch.setattr(Composition, "read", counted)
    return ranks


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
def test_exact_on_ranks(family: str, compositions: list[int]) -> None:
    """Logits, keys, values and states are transformers' own, on every rank; so are 24 tokens, chosen greedily.

    Runs of enough rows are composed where they can be, several of a rank and of different lengths among them.
    """

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

    for size, prompt, strategy, tokens, composes in (
        (1, PROMPT, "full", 0, False),
        (2, PROMPT, "ulysses", 24, True),
        (3, PROMPT, "ring", 0, True),
        (4, PROMPT, "ulysses", 0, True),
        (4, SHORT, "ring", 1, False),
        (4, SHORTER, "ring", 1, False),
    ):
        compositions.clear()
        ranks = together(lambda group: read(group, prompt, strategy, tokens), size)  # noqa: B023
        chosen = tuple(ranks[0][0].argmax(-1)[:tokens].tolist())
        expected, _ = says(family, prompt.token_ids, chosen)
        assert torch.equal(ranks[0][0].argmax(-1), expected.argmax(-1))
        for logits, _, states in ranks:
            same(logits, expected)
            assert torch.equal(logits, ranks[0][0])
            check_cache(family, prompt, {}, states)
        check_cache(family, prompt, *ranks[0][1:])
        layers = len(ranks[0][2]) if composes and family in COMPOSED else 0
        assert sorted(compositions) == sorted([*range(size)] * layers)
        size_of_states = sum(part.nbytes for state in states.values() for part in state)
        assert size_of_states == model_shape(make(family).config).recurrent.state_bytes(4)


@pytest.mark.parametrize("family", ["qwen3_5_text", "olmo_hybrid", "falcon_h1", "lfm2"])
def test_against_the_oracle(family: str, compositions: list[int]) -> None:
    """Attention as the strategy has it, and states that run through all of the text: alike on any ranks and rounds.

    Rounds are composed from the state before them, by ranks that have no run of one as well; or handed on, where one
    rank has all rows.
    """
    for size, options, rounds in (
        (2, APB, 1),
        (1, {**APB, "rounds": 3}, 0),
        (3, {**APB, "rounds": 2}, 2),
        (2, {"strategy": "star", "blocks": 5, "rounds": 2}, 1),
    ):
        compositions.clear()
        sizes = {"anchor_length": None, "passing_length": 0, **options}
        parts = PROMPT.prefix, PROMPT.document, PROMPT.query
        expected = masked_prefill(make(family), *parts, ANSWER, **sizes)

        def read(group: Group) -> Tensor:
            session = engine_of(family, group, **options).prefill(PROMPT)  # noqa: B023
            return torch.stack([session.logits, *(session.extend([token]) for token in ANSWER)])

        for logits in together(read, size):
            same(logits, expected)
        assert sorted(compositions) == sorted([*range(size)] * 2 * rounds * (family in COMPOSED))


@pytest.mark.parametrize("family", ["qwen3_5_text", "olmo_hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_composed_runs_do_not_grow(family: str, dtype: torch.dtype) -> None:
    """Eight runs of 512 rows, and 256 of 16, are as near to fp64 as rows that are read at once."""
    model, hidden = make(family).to(dtype), torch.randn(1, 4096, 64, generator=torch.manual_seed(0)).to(dtype)
    module = recurrent_modules(model)[0]
    states: list[LayerState] = []

    def read(length: int | None) -> tuple[Tensor, Tensor]:
        def recur(layer: RecurrentInput) -> Tensor:
            states.append(layer.fresh())
            if length is None:
                return layer.read(layer.hidden, states[-1])
            runs = [Run(0, start, start + length, start) for start in range(0, layer.hidden.shape[1], length)]
            out = torch.full_like(layer.hidden, math.nan)
            assert layer.composable is not None
            Composition(runs, Group()).read(layer.composable, layer.hidden, states[-1], out)
            return out

        undo = take_over(model, lambda: recur)
        with torch.no_grad():
            out = module(hidden)
        undo()
        return out, states[-1].layer.recurrent_states[0]

    def errors(results: tuple[Tensor, Tensor]) -> list[float]:
        return [float((got - exact).norm() / exact.norm()) for got, exact in zip(results, expected, strict=True)]

    at_once, *composed = [read(length) for length in (None, 512, 16)]
    model.double()
    hidden = hidden.double()
    with InFloat64():
        expected = read(None)
    assert expected[0].dtype == expected[1].dtype == torch.float64
    for results in composed:
        assert results[0].dtype == dtype
        for mine, theirs in zip(errors(results), errors(at_once), strict=True):
            assert mine < 1.2 * theirs


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
    calls.clear()

    def read(group: Group) -> Tensor:
        engine = engine_of("qwen3_5_text", group, strategy="ulysses")
        logits = engine.prefill(PROMPT).logits
        engine.close()
        return logits

    for logits in together(read, 2):  # each of the two layers: a run of each rank, then the query on both
        same(logits, says("qwen3_5_text", PROMPT.token_ids)[0][0])
    assert sorted(calls) == sorted([*[(len(PROMPT.query), True)] * 4, *[(54, True), (50, True)] * 2])
    assert modeling_qwen3_5.torch_chunk_gated_delta_rule is installed


def test_waiting_and_states_are_predicted() -> None:
    """A rank waits for the others' rows in recurrent layers, but where their runs are composed; what these hold and two
    states lie in its memory."""
    plan, shape = Plan.build(3, 100, 6, ranks=2, strategy="ring"), model_shape(make("qwen3_5_text").config)
    assert shape.attention_layers == 1
    cost = predict(plan, shape, element_bytes=4, most_composed=50)  # of 51 and 52 rows
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
    composed = predict(plan, shape, element_bytes=4)
    heads = 2 * 4  # of two layers, their keys and values 16 wide
    assert (shape.recurrent.effect, shape.recurrent.lookback) == (heads * 16 * (16 + 16), 3)
    # Ring's first rank has two runs, so that from both there are two; the first hands its state on no more.
    effects, lookback, state = shape.recurrent.effect * 4, 2 * 3 * 64 * 4, shape.recurrent.state_bytes(4)
    for rank, walked, mine, sent in zip(composed.ranks, cost.ranks, rows, (state, state), strict=True):
        assert (rank.waiting_flops, rank.waiting_bytes) == (0, 0)
        assert rank.moved_bytes == walked.moved_bytes + 4 * MOVED_IN_COMPOSITION * written * mine
        assert rank.sent_bytes == walked.sent_bytes - sent + 2 * (effects + lookback)
        assert rank.activation_bytes >= mine * ALIVE_IN_COMPOSITION * written // 2 * 4
        assert rank.activation_bytes > walked.activation_bytes
    slow, none = Ceilings(1e9, 1e9, 1e9), Plan.build(3, 100, 6)
    copying = Ceilings(1e9, 1e9, 1e9, memory=1e9)
    of_bytes = cost.ranks[0].seconds(copying) - cost.ranks[0].seconds(slow)
    assert of_bytes == pytest.approx((cost.ranks[0].moved_bytes + cost.ranks[0].waiting_bytes) / 1e9)
    assert cost.ranks[0].seconds(slow) > cost.ranks[0].linear_flops / 1e9 + cost.ranks[0].waiting_flops / 1e9
    assert predict(none, shape).ranks[0].waiting_flops == 0


def test_when_runs_are_composed() -> None:
    """As soon as a rank would wait, if every run has enough rows and no rank more than it reads at once."""
    two = Plan.build(0, 100, 6, ranks=2, strategy="ulysses")
    assert [len(run) for run in document_runs(two, 0)] == [50, 50]
    assert [composed(two, 0, most) for most in (0, 49, 50)] == [False, False, True]
    assert [rows_of_others(two, 1, most) for most in (49, 50)] == [50, 0]
    assert not composed(Plan.build(0, 100, 6), 0, 1000)
    short = [Plan.build(0, length, 6, ranks=2, strategy="ulysses") for length in (31, 32)]
    assert [composed(plan, 0, 1000) for plan in short] == [False, True]
    # The ranks share an anchor, whose runs are handed on.
    anchored = Plan.build(0, 200, 6, ranks=2, **APB)
    assert composed(anchored, 0, 1000)
    assert sum(rows_of_others(anchored, rank, 1000) for rank in range(2)) == 29


def test_only_what_cannot_be_is_refused() -> None:
    """Propagation, by name, before anything is read."""
    engine = engine_of("lfm2", **APB, propagation="0.5")
    with pytest.raises(apb.InputError, match=r"'lfm2' models have recurrent layers.*without propagation"):
        engine.prefill(PROMPT)
    engine.close()
