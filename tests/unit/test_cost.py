"""The cost model against counts: of the oracle's mask, of what a run really multiplies, and of published figures."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

import apb
from apb.compressors import make_compressor
from apb.hf.counting import model_shape
from apb.planning.cost import KNOWN_CEILINGS, Ceilings, _window_pairs, predict
from apb.planning.itinerary import Kind
from apb.planning.memory import activations
from apb.planning.methods import METHODS
from apb.planning.plan import Plan
from cases import CASES, Case
from families import PECULIAR, PROMPT, make
from models import FAMILIES, tiny_model
from oracle import lay_out, visibility, within
from shapes import LLAMA_8B as LLAMA_8B_SHAPE
from shapes import SMALL

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def plan_of(case: Case, ranks: int = 1) -> Plan:
    return Plan.build(
        case.prefix,
        case.document,
        case.query,
        blocks=case.blocks,
        ranks=ranks,
        anchor_length=case.anchor_length,
        passing_length=case.passing_length,
        passing_budget=case.passing_budget,
        strategy=case.strategy,
        rounds=case.rounds,
    )


def visible_pairs(case: Case, plan: Plan) -> int:
    """Query-key pairs of one head, counted cell by cell in the oracle's mask."""
    prompt = case.prompt
    strategy = "star" if case.strategy == "star" else "apb"
    parts = (prompt.prefix, prompt.document, prompt.query)
    layout = lay_out(parts, case.blocks, case.anchor_length, strategy, case.rounds)
    passed = [
        torch.arange(block.stop - (plan.passed(index) if case.blocks > 1 else 0), block.stop)[None]
        for index, block in enumerate(layout.blocks)
    ]
    offered = [[token for block in passed[:index] for token in block[0].tolist()] for index in range(len(passed))]
    seen = [[tokens[: case.passing_budget]] for tokens in offered]  # which ones does not matter
    return int(visibility(layout, passed, seen).sum())


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("name", CASES)
def test_attention_counts_the_masks_cells(name: str, ranks: int) -> None:
    """4 x heads x head_dim FLOPs for every visible pair of every layer: over all ranks, those of the one big mask.
    Star alone computes its anchor anew on ranks without block 0."""
    case = CASES[name]
    plan = plan_of(case, ranks)
    expected = visible_pairs(case, plan)
    if case.strategy == "star":
        spans = [span for rank in range(ranks) for span in plan.spans(rank) if span.kind is Kind.ANCHOR]
        expected += sum(len(span) * (len(span) + 1) // 2 for span in spans)
    cost = predict(plan, SMALL)
    assert sum(rank.attention_flops for rank in cost.ranks) == 4 * 4 * 16 * 3 * expected


@pytest.mark.parametrize(
    "name",
    [
        *("five blocks", "anchor longer than a block", "star", "full", "ring", "ulysses", "a block a round"),
        *("budget", "budget, seven blocks in three rounds"),
    ],
)
def test_a_run_does_what_was_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in a real prefill: pairs attended, rows through every linear map, bytes of the cache."""
    case = CASES[name]
    model = case.model()
    shape = model_shape(model.config)
    cost = predict(plan_of(case), shape, element_bytes=4).ranks[0]
    engine = case.engine(model)  # what it compares when it is made is not counted

    pairs = linear = 0
    attention = apb.attention

    def counting(q: Tensor, segments: list[apb.Segment], *args: object) -> tuple[Tensor, Tensor]:
        nonlocal pairs
        for segment in segments:
            for row in range(len(q)):
                keys = len(segment.k)
                pairs += max(min(keys, row + keys - len(q) + 1), 0) if segment.causal else keys
        return attention(q, segments, *args)

    def count_linear(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal linear
        linear += 2 * output[..., 0].numel() * module.weight.numel()  # type: ignore[operator,union-attr]

    for module in ("strategies.base", "layers.shards", "kernels.attention"):
        monkeypatch.setattr(f"apb.{module}.attention", counting)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count_linear)
    session = engine.prefill(case.prompt)
    assert cost.attention_flops == 4 * shape.heads * shape.head_dim * pairs
    assert cost.linear_flops == linear
    held = [session.gather_kv(layer) for layer in range(shape.layers)]
    assert cost.cache_bytes == sum(part.numel() * part.element_size() for pair in held for part in pair)  # type: ignore[union-attr]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_linear_maps_count_every_row(ranks: int) -> None:
    """Anchor rows once over all ranks, block rows once, the query's rows and one row of the output head on each."""
    case = CASES["five blocks"]
    cost = predict(plan_of(case, ranks), SMALL)
    rows = 17 + 3 + 101 + ranks * 6
    assert sum(rank.linear_flops for rank in cost.ranks) == 2 * rows * 1000 + ranks * 2 * 64 * 503


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_cache_holds_every_token_once(ranks: int) -> None:
    """Keys and values of prefix, document and query, 2 bytes a number, on one rank or another."""
    cost = predict(plan_of(CASES["five blocks"], ranks), SMALL)
    assert sum(rank.cache_bytes for rank in cost.ranks) == 110 * 2 * 3 * 2 * 16 * 2
    for rank in cost.ranks:
        assert rank.peak_bytes >= 5000 * 2 + rank.cache_bytes


def test_scoring_counts_tokens_of_blocks_that_pass() -> None:
    """Each token of a block that passes something on is scored once; the last block's are not."""
    plan = plan_of(Case(4))
    tokens = 3 + 101 - 25  # prefix and document without the last block
    features = (4 + 2 * 2) * 16
    expected = {
        "query": 2 * 6 * 4 * 16 * 3 * tokens,
        "retaining": 2 * 1024 * (features + 2) * 3 * tokens,
        "recent": 0,
        "random": 0,
    }
    for compressor, flops in expected.items():
        scorer = make_compressor(compressor, {"heads": "heads.pt"} if compressor == "retaining" else None)
        cost = predict(plan, SMALL, compressor=scorer)
        assert sum(rank.scoring_flops for rank in cost.ranks) == flops
    nothing = predict(plan_of(Case(4, passing_length=0)), SMALL, compressor=make_compressor())
    assert nothing.ranks[0].scoring_flops == 0
    for budget, times in ((11, 2), (12, 1)):  # scores that compare are computed only where pairs compete: of twelve
        scorer = make_compressor("query")
        (rank,) = predict(plan_of(Case(4, passing_budget=budget)), SMALL, compressor=scorer).ranks
        assert rank.scoring_flops == times * expected["query"]


def test_sparse_rows_see_columns_and_diagonals_alone() -> None:
    """Ten rows that see three keys at most: 1 + 2 + 8 * 3; one query row that sees all eleven."""
    plan = Plan.build(0, 10, 1, strategy="minference", vertical_size=1, slash_size=2)
    (rank,) = predict(plan, SMALL).ranks
    assert rank.attention_flops == 4 * 16 * 4 * 3 * (27 + 11)


def test_what_is_alive_at_the_widest_moment() -> None:
    """Full attention: in the MLP, where gate, up and product stand beside the embedded rows, what came into the layer,
    what came out of its attention and the normed copy of that. Apb on two ranks: in attention, whose pairs come from
    both of them and whose partial results are merged in fp32."""
    full = predict(Plan.build(0, 90, 10, strategy="full"), SMALL).ranks[0]
    assert full.activation_bytes == 2 * (100 * (64 + 2 * 16) + 3 * 100 * 64 + 100 * 3 * 128)
    plan = Plan.build(0, 80, 2, blocks=2, ranks=2, anchor_length=8, passing_length=30)
    rows, gathered = 4 + 40 + 2, 4 + 30
    alive = rows * (64 + 2 * 16)  # the embedded rows, sines and cosines
    alive += 2 * rows * 64 + rows * (64 + 64) + rows * 64  # stream and norm; q, k, v; the output
    alive += (1 + 2 * 2) * gathered * 64  # packed, gathered, put in order
    alive += rows * 64 + 40 * 64 * 6  # the other partial result; sum, part, and that part unweighted in fp32
    assert predict(plan, SMALL).ranks[0].activation_bytes == 2 * alive


def test_mlps_work_in_chunks() -> None:
    """Of 40,000 rows: the last chunk's gate, up and product beside what the others gave, or all put together."""
    rows = 40_000
    shared = rows * (64 + 2 * 16) + 3 * rows * 64
    for intermediate, widest in ((400, (rows - 16384) * 64 + 16384 * 3 * 400), (50, 2 * rows * 64)):
        shape = replace(SMALL, kv_heads=1, heads=1, intermediate=intermediate)
        full = predict(Plan.build(0, rows - 10, 10, strategy="full"), shape).ranks[0]
        assert full.activation_bytes == 2 * (shared + widest)


@pytest.mark.parametrize("length", [65536, 131072, 262144])
def test_memory_that_was_measured(length: int) -> None:
    """Llama-3.1-8B's shape on an H200, full attention and apb, as committed: within 3 %."""
    report = json.loads((RESULTS / f"prefill_{length}_h200.json").read_text())
    assert [row["strategy"] for row in report["rows"]] == ["full", "apb"]
    for row in report["rows"]:
        sizes = row["plan"]
        given = {name: sizes[name] for name in ("blocks", "anchor_length", "passing_length")}
        plan = Plan.build(
            length - sizes["document_tokens"] - sizes["query_tokens"],
            sizes["document_tokens"],
            sizes["query_tokens"],
            strategy=row["strategy"],
            **(given if row["strategy"] == "apb" else {}),
        )
        predicted = predict(plan, LLAMA_8B_SHAPE).ranks[0].peak_bytes
        assert predicted == pytest.approx(row["peak_bytes"], rel=0.03)


def test_rounds_carry_what_later_blocks_see() -> None:
    """In rounds the anchor and three blocks' pairs of every layer stay alive beside what is alive in one layer."""
    plan = Plan.build(0, 80, 2, blocks=4, anchor_length=8, passing_length=3, rounds=2)
    (rank,) = predict(plan, SMALL).ranks
    assert plan.method.gathered(plan) == (8 + 3 + 3, 3)  # pairs that join in each round
    alive = max(activations(plan, 0, round, SMALL, count) for round, count in enumerate(plan.method.gathered(plan)))
    assert rank.activation_bytes == 2 * (alive + (8 + 3 * 3) * 64 * 3)


def test_a_budget_bounds_what_is_carried_copied_and_sent() -> None:
    """Later rounds see the anchor and five pairs of the nine that were offered; a rank's blocks have copies of five,
    and a partial result of their own for them; every pair of a KV head is sent with its score."""
    sizes = {"blocks": 4, "anchor_length": 8, "passing_length": 3, "rounds": 2}
    plan, free = (Plan.build(0, 80, 2, passing_budget=budget, **sizes) for budget in (5, None))
    gathered = plan.method.gathered(plan)
    (rank,) = predict(plan, SMALL).ranks
    bounded, unbounded = (
        max(activations(each, 0, round, SMALL, count) for round, count in enumerate(gathered)) for each in (plan, free)
    )
    assert bounded == unbounded + 2 * 5 * 64 + 20 * 4 * 16
    assert rank.activation_bytes == 2 * (bounded + (8 + 5) * 64 * 3)
    plan, free = (replace(each, ranks=2, rounds=1) for each in (plan, free))
    more = predict(plan, SMALL).ranks[0].sent_bytes - predict(free, SMALL).ranks[0].sent_bytes
    assert more == 3 * sum(plan.method.gathered(plan)) * SMALL.kv_heads * 4


def test_with_a_budget_attention_grows_with_the_document_alone() -> None:
    """In blocks of 1K, 2K pairs at most: a document of four times the length costs four times the attention."""
    options = {"anchor_length": 256, "passing_length": 128}
    flops = [
        predict(Plan.build(0, blocks * 1024, 1, blocks=blocks, passing_budget=budget, **options), SMALL).flops
        for budget in (2048, None)
        for blocks in (256, 1024)
    ]
    assert 4.0 < flops[1] / flops[0] < 4.1
    assert flops[3] / flops[2] > 10


def test_one_rank_sends_nothing() -> None:
    """Bytes are sent between ranks alone; star sends none of its blocks' pairs, only the query's partial results."""
    assert predict(plan_of(Case(4)), SMALL).ranks[0].sent_bytes == 0
    star = predict(plan_of(CASES["star"], 2), SMALL).ranks[0].sent_bytes
    assert star == 6 * 4 * (16 + 1) * 4 * 3
    assert predict(plan_of(Case(4), 2), SMALL).ranks[0].sent_bytes > star


def test_snake_order_balances_the_ranks() -> None:
    """With two blocks a rank all have the same to do, but for the one whose first block has no anchor to look at."""
    first, *others = (rank.flops for rank in predict(Plan.build(4, 131072, 30, blocks=8, ranks=4), SMALL).ranks)
    assert max(others) < 1.01 * min(others)
    assert 0.8 * min(others) < first < max(others)


@pytest.mark.parametrize(
    ("document", "blocks", "strategy", "peta_flops"),
    [(131072, 8, "full", 6.3), (131072, 8, "apb", 3.2), (524288, 32, "full", 79.0), (524288, 32, "apb", 19.5)],
)
def test_published_figures(document: int, blocks: int, strategy: str, peta_flops: float) -> None:
    """Llama-3.1-8B, blocks of 16K, anchor 4K, passing 2K: the FLOPs that were worked out by hand."""
    plan = Plan.build(4, document, 30, blocks=blocks, anchor_length=4096, passing_length=2048, strategy=strategy)
    cost = predict(plan, model_shape(LLAMA_8B))
    assert cost.flops / 1e15 == pytest.approx(peta_flops, rel=0.05)


def test_seconds() -> None:
    """Seconds are FLOPs and bytes over the ceilings, of the slowest rank; unknown hardware gives none."""
    cost = predict(plan_of(Case(5), 2), SMALL)
    ceilings = Ceilings(linear=2.0, attention=4.0, link=8.0, memory=16.0)
    flops = [rank.linear_flops / 2 + (rank.attention_flops + rank.scoring_flops) / 4 for rank in cost.ranks]
    moved = [rank.sent_bytes / 8 + rank.moved_bytes / 16 for rank in cost.ranks]
    assert cost.floor(ceilings) == pytest.approx(max(flops))
    assert cost.seconds(ceilings) == pytest.approx(max(sum(both) for both in zip(flops, moved, strict=True)))
    rows = [sum(len(span) for span in plan_of(Case(5), 2).spans(rank)) for rank in range(2)]
    numbers = 12 * SMALL.hidden + 2 * (4 + 2) * 16 + 3 * SMALL.intermediate + 4 * 2 * 16
    assert [rank.moved_bytes for rank in cost.ranks] == [count * 3 * numbers * 2 for count in rows]
    assert cost.to_dict(ceilings)["seconds"] == cost.seconds(ceilings)
    late = [rank.linear_flops / 2 + rank.moved_bytes / 16 for rank in cost.ranks]
    attention = [(rank.attention_flops + rank.scoring_flops) / 4 for rank in cost.ranks]
    sent = [rank.sent_bytes / 8 for rank in cost.ranks]
    assert min(sent) > 0
    assert cost.to_dict(ceilings)["hidden_seconds"] == pytest.approx(
        max(other + max(both) for other, *both in zip(late, attention, sent, strict=True))
    )
    assert cost.to_dict()["seconds"] is None
    h200 = predict(Plan.build(4, 524288, 30, strategy="full"), model_shape(LLAMA_8B))
    assert h200.seconds(KNOWN_CEILINGS["NVIDIA H200"]) == pytest.approx(130, rel=0.1)


def test_ulysses_shares_the_heads() -> None:
    """Every rank has some heads of all rows: all attend to as many pairs, but for the query's own on the last."""
    cost = predict(Plan.build(4, 1000, 6, ranks=4, strategy="ulysses"), SMALL)
    document = 1004 * 1005 // 2  # one of four heads
    query = [4 * 6 * rows for rows in (254, 250, 250, 250)]
    query[3] += 4 * 6 * 7 // 2
    assert [rank.attention_flops for rank in cost.ranks] == [4 * 16 * 3 * (document + pairs) for pairs in query]


def test_the_report() -> None:
    """The dictionary is JSON; its totals are sums over the ranks, its bytes those of the largest."""
    cost = predict(plan_of(Case(5), 3), SMALL)
    report = json.loads(json.dumps(cost.to_dict()))
    assert report["flops"] == sum(rank["flops"] for rank in report["per_rank"])
    assert report["flops"] == report["linear_flops"] + report["attention_flops"]
    for name in ("sent_bytes", "cache_bytes", "peak_bytes"):
        assert report[f"{name}_per_rank"] == max(rank[name] for rank in report["per_rank"])


# --- the shape of a model ------------------------------------------------------------------------------------------


def linear_weights(model: PreTrainedModel) -> int:
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_model_shape_is_the_models(family: str) -> None:
    """Counted without weights, the numbers are those of the real model."""
    model = tiny_model(family, heads=4, kv_heads=2, head_dim=32, vocab=99)
    shape = model_shape(model.config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.layer_parameters == linear_weights(model)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (3, 4, 2, 32)
    assert (shape.hidden, shape.intermediate, shape.vocabulary) == (64, 128, 99)
    assert shape.cache_row == 2 * 3 * 2 * 32


# Numbers that experts hold of a token: two copies of 64 and three of an expert's width, for each that it is sent to.
EXPERT_ROWS = {
    "deepseek_v3": 2 * (2 * 64 + 3 * 32),
    "gpt_oss": 4 * (2 * 64 + 3 * 96),
    "llama4_text": 2 * (2 * 64 + 3 * 96),
    "mimo_v2_flash": 2 * (2 * 64 + 3 * 32),
    "phimoe": 2 * (2 * 64 + 3 * 96),
    "qwen2_moe": 2 * (2 * 64 + 3 * 32),
    "qwen3_moe": 2 * (2 * 64 + 3 * 32),
}


@pytest.mark.parametrize("family", PECULIAR)
def test_model_shape_is_what_a_run_meets(family: str) -> None:
    """Heads, windows, the cache and products of latent attention, sliding windows and experts, counted in runs."""
    model = make(*PECULIAR[family])
    shape = model_shape(model.config)
    layers = []
    with contextlib.closing(apb.Engine.from_model(model, strategy="full")) as engine:
        engine.inspect(PROMPT, [0], lambda _, layer: layers.append(layer))
        cache = engine.prefill(PROMPT).to_dynamic_cache()
    for seen, (kv_heads, width) in ((False, (shape.kv_heads, shape.head_dim)), (True, shape.near or (0, 0))):
        some = [layer for layer in layers if bool(layer.window) is seen or shape.near is None]
        assert {layer.q.shape[1:] for layer in some} == {(shape.heads, width)} or not width
        assert {layer.k.shape[1:] for layer in some} == {(kv_heads, width)} or not width
    assert (shape.near is not None) is (family in ("gemma4_text", "mimo_v2_flash"))
    assert [layer.window for layer in layers if layer.window] == list(shape.windows)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if hasattr(layer, "keys"))
    assert 0 <= len(PROMPT) * shape.cache_row - held < len(PROMPT) * len(layers)  # of a layer it is rounded up
    kinds = ("conv_states", "recurrent_states")
    states = [part for layer in cache.layers for kind in kinds for part in getattr(layer, kind, {}).values()]
    assert sum(part.nbytes for part in states) == (shape.recurrent.state_bytes(4) if shape.recurrent else 0)
    assert shape.expert_row == EXPERT_ROWS.get(family, 0)
    model.set_experts_implementation("eager")  # the counter does not know the others' products

    def flops(tokens: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.model(torch.arange(tokens)[None])
        return counter.get_total_flops()

    # Linear layers cost 2 FLOPs a weight and row, attention grows with the square. The choice of experts is left out.
    linear = (4 * flops(64) - flops(128)) / (2 * 64) / 2
    known = 0.97 if family == "gemma3n_text" else 0.99  # which mixes four streams of hidden states by products
    assert known * linear < shape.layer_parameters <= linear or shape.recurrent  # scans, left out too


def test_shapes_of_configurations_without_a_word() -> None:
    """What a configuration leaves out is what transformers takes it for; windows that are switched off are none."""
    few = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    gpt2 = model_shape(GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4))
    assert (gpt2.heads, gpt2.kv_heads, gpt2.head_dim, gpt2.intermediate) == (4, 4, 16, 256)
    qwen = {**few, "num_key_value_heads": 2, "intermediate_size": 96, "sliding_window": 32, "max_window_layers": 1}
    assert model_shape(Qwen2Config(**qwen, use_sliding_window=False)).windows == ()
    assert model_shape(Qwen2Config(**qwen, use_sliding_window=True)).windows == (32,)


def test_a_model_that_cannot_be_made() -> None:
    """Values that a model's own code trips over are the configuration's fault, and said in one sentence."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96, num_hidden_layers=2)
    config.hidden_act = "no such thing"
    with pytest.raises(apb.InputError, match=r"No 'llama' model can be built from this configuration: .*; correct it"):
        model_shape(config)


def test_tied_embeddings_count_once() -> None:
    """Where the output head is the embedding, its weights are one and no layer's."""
    config = Qwen3Config(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    tied = model_shape(config)
    config.tie_word_embeddings = False
    apart = model_shape(config)
    assert apart.parameters - tied.parameters == 99 * 64
    assert apart.layer_parameters == tied.layer_parameters


def test_a_large_model_takes_no_memory() -> None:
    """An 8B model is counted to the last weight, without making any."""
    shape = model_shape(LLAMA_8B)
    assert shape.parameters == 8_030_261_248
    assert shape.layer_parameters == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert shape.head_dim == 128


@pytest.mark.parametrize("strategy", METHODS)
def test_every_strategy_has_a_cost(strategy: str) -> None:
    """No strategy is left out of the comparison that `apb plan` prints."""
    cost = predict(Plan.build(4, 100_000, 30, blocks=8, strategy=strategy), SMALL)
    assert len(cost.ranks) == 1
    assert cost.flops > 0


@pytest.mark.parametrize("strategy", ["apb", "star", "ring", "full"])
@pytest.mark.parametrize("window", [1, 7, 40, 90])
def test_pairs_of_a_sliding_window(window: int, strategy: str) -> None:
    """On any number of ranks: the cells of the oracle's mask, those of an anchor counted where it is computed."""
    case = Case(4, strategy=strategy, anchor_length=17 if strategy == "apb" else None)
    prompt = case.prompt
    kind = strategy if strategy in ("apb", "star") else "apb"
    blocks = 4 if strategy in ("apb", "star") else 1
    layout = lay_out((prompt.prefix, prompt.document, prompt.query), blocks, case.anchor_length, kind, 1)
    cells = int(within(layout, window).sum())
    for ranks in (1, 3):
        plan = plan_of(case, ranks)
        counted = sum(_window_pairs(plan, rank, window) for rank in range(ranks))
        copies = 0
        if strategy == "star" and ranks > 1:
            length = plan.anchor_length
            copies = int((torch.ones(length, length).tril() - torch.ones(length, length).tril(-window)).sum())
        assert counted == cells + copies * sum(plan.anchor_share(rank)[1] > 0 for rank in range(ranks))
