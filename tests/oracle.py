"""Dense reference of approximate blockwise prefill: one softmax over one explicit mask, and nothing clever.

All rows [A | B_1 .. B_H | Q] (anchor, blocks, query) go through the decoder layers together. Per layer and KV head a
boolean matrix says which row sees which row's key; a token that a block passes on is simply that token's own column,
made visible to the rows of later blocks. Everything runs in the model's dtype: fp32, or fp64 after `model.double()`.
Shapes: rows = len(A) + p + n + m, for a prefix of p tokens, a document of n and a query of m; d = head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

POOL = 5  # width of the max-pool over a block's scores
RECURRENT = ("GatedDeltaNet", "Mixer", "MambaLayer", "ShortConv")  # ends of the names of recurrent layers
Tokens = Sequence[int] | Tensor
Score = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class OracleResult:
    """logits (vocab,): for the token after the query.
    keys, values: per layer (kv_heads, p + n + m, d), keys after RoPE, in document order.
    selected: per layer, per block (all H of them, though nothing follows the last): (kv_heads, count), the true
        positions of the tokens passed on, ascending. count is 0 with one block, star, or no compressor.
    margins: how far the closest decision was from a coin toss (see `select`), over all layers, heads and blocks;
        infinite where no score decided anything.
    seen: with a passing budget, per layer, block and KV head: true positions that the block sees of those selected."""

    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    selected: list[list[Tensor]]
    margins: float
    seen: list[list[list[list[int]]]]


@dataclass(frozen=True)
class Layout:
    """Which token stands in which row. Row `anchor + t` is the token at true position t, for every t."""

    tokens: list[int]  # (rows,)
    positions: list[int]  # (rows,) for RoPE
    anchor: int  # rows of the anchor: 0 with one block, and for star, whose anchor is a part of block 1
    shared: range  # rows that all rows of blocks 2.. see: the anchor
    blocks: list[range]  # true positions of each block; block 1 starts with the prefix
    query: range  # true positions
    copies: list[range]  # rows of the query as each round carries it, the last round's where the query stands
    first_eligible: int  # true positions before this one are prefix, or stand in the anchor


def lay_out(
    prompt: tuple[Tokens, Tokens, Tokens], blocks: int, anchor_length: int | None, strategy: str, rounds: int
) -> Layout:
    """The rows of a prefill; every round but the last has rows of its own for the query, at the end.

    Refuses what the definition leaves open: an empty query, an empty block."""
    x, doc, q = ([int(token) for token in part] for part in prompt)
    if strategy not in ("apb", "star"):
        raise ValueError(f"unknown strategy {strategy!r}")
    if not q or not 1 <= blocks <= max(len(doc), 1):
        raise ValueError("the query and every block need at least one token")
    if (strategy == "apb" and blocks > 1 and anchor_length is None) or (anchor_length or 0) < 0:
        raise ValueError("apb with several blocks needs an anchor_length, and no length is negative")

    sizes = [len(part) for part in np.array_split(np.arange(len(doc)), blocks)]
    ends = [len(x) + end for end in np.cumsum(sizes).tolist()]
    ranges = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    anchor = (x + q + doc)[:anchor_length] if strategy == "apb" and blocks > 1 else []
    at, start, stop = len(anchor), len(x) + len(doc), len(x) + len(doc) + len(q)
    firsts = [at + stop + index * len(q) for index in range(rounds - 1)] + [at + start]
    return Layout(
        tokens=anchor + x + doc + q * rounds,
        positions=[*range(at), *range(stop), *[*range(start, stop)] * (rounds - 1)],
        copies=[range(first, first + len(q)) for first in firsts],
        anchor=len(anchor),
        shared=ranges[0][:anchor_length] if strategy == "star" else range(len(anchor)),
        blocks=ranges,
        query=range(len(x) + len(doc), len(x) + len(doc) + len(q)),
        first_eligible=len(x) + max(0, len(anchor) - len(x) - len(q)),
    )


def causal(size: int) -> Tensor:
    """(size, size), True where a row sees a column."""
    return torch.ones(size, size, dtype=torch.bool).tril()


def visibility(layout: Layout, selected: list[Tensor], seen: list[list[list[int]]] | None = None) -> Tensor:
    """(kv_heads, rows, rows), True where a row sees a column. selected: per block (kv_heads, count), true positions.
    seen: per block and KV head the true positions of what it sees of all that; everything of the blocks before if None.
    """
    rows, at = len(layout.tokens), layout.anchor
    mask = torch.zeros(selected[0].shape[0], rows, rows, dtype=torch.bool)
    mask[:, :at, :at] = causal(at)
    for index, block in enumerate(layout.blocks):
        own = slice(at + block.start, at + block.stop)
        mask[:, own, own] = causal(len(block))
        if index > 0:
            mask[:, own, layout.shared.start : layout.shared.stop] = True
        for earlier in selected[:index] if seen is None else []:
            for head, positions in enumerate(earlier):
                mask[head, own, at + positions] = True
        for head, chosen in enumerate(seen[index] if seen else []):
            mask[head, own, [at + position for position in chosen]] = True
    for index, copy in enumerate(layout.copies):
        rows = slice(copy.start, copy.stop)
        for number, block in enumerate(layout.blocks):
            if round_of(number, layout) <= index:
                mask[:, rows, at + block.start : at + block.stop] = True
        mask[:, rows, rows] = causal(len(copy))
    return mask


def round_of(block: int, layout: Layout) -> int:
    """The round in which a block is read: consecutive blocks share one, the first rounds have as many or one more."""
    return block * len(layout.copies) // len(layout.blocks)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (heads, rows, d), halves convention, by cos and sin (rows, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (heads, rows, d), k and v (kv_heads, rows, d) of x (rows, hidden), before RoPE, after q_norm and k_norm."""
    q, k, v = (
        getattr(attention, name)(x).unflatten(-1, (-1, attention.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def scaled_logits(attention: Any, q: Tensor, k: Tensor) -> Tensor:
    """(kv_heads, group, queries, keys) of q (heads, queries, d) and k (kv_heads, keys, d), both after RoPE."""
    scaling = getattr(attention, "scaling", attention.head_dim**-0.5)
    return q.unflatten(0, (k.shape[0], -1)) @ k.transpose(1, 2)[:, None] * scaling


def attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(queries, heads * d): masked softmax of the whole matrix. mask (kv_heads, queries, keys), True = visible."""
    logits = scaled_logits(attention, q, k).masked_fill(~mask.to(q.device)[:, None], -math.inf)
    return (logits.softmax(-1) @ v[:, None]).flatten(0, 1).transpose(0, 1).flatten(1)


def pool(scores: Tensor) -> Tensor:
    """Max-pool of (kv_heads, tokens), inside the block: stride 1, padded so that the length stays."""
    return nn.functional.max_pool1d(scores[None], POOL, stride=1, padding=POOL // 2)[0]


def select(raw: Tensor, pooled: Tensor, eligible: Sequence[int], count: int) -> tuple[list[int], float]:
    """The `count` best of the `eligible` tokens of one block and KV head by `pooled` (tokens,), ties to the earlier.

    Also the margin: the gap, relative to the larger of the two, between the last selected and the first rejected
    score. Pooling makes these two equal when both windows hold the same token; then the order is certain as long as no
    other token's `raw` score (tokens,) comes close, so the gap is the one to the nearest of those. Infinite where
    nobody is selected or nobody rejected."""
    order = sorted(eligible, key=lambda token: (-float(pooled[token]), token))
    chosen, rejected = order[:count], order[count:]
    if not chosen or not rejected:
        return sorted(chosen), math.inf
    last, other = float(pooled[chosen[-1]]), float(pooled[rejected[0]])
    if last == other:
        other = sorted(raw.tolist(), key=lambda score: abs(score - last))[1]  # [0] is the token they share
    size = max(abs(last), abs(other))
    return sorted(chosen), abs(last - other) / size if size > 0 else 0.0


def compete(
    selected: list[Tensor], raw: Tensor, pooled: Tensor, budget: int, edge: bool
) -> tuple[list[list[list[int]]], float]:
    """Per block and KV head, the true positions that it sees of those that the blocks before it selected, and the
    smallest margin. raw, pooled: (kv_heads, tokens) by true position, scores that compare over blocks. edge: the last
    tokens that the block before selected come first, a quarter of them or of the budget, at most 32."""
    found, margins = [], [math.inf]
    for index in range(len(selected)):
        found.append([])
        for head in range(len(raw)):
            offered = [position for earlier in selected[:index] for position in earlier[head].tolist()]
            last = selected[index - 1][head].tolist() if index else []
            count = min(32, len(last) // 4, budget // 4) if edge else 0
            first = last[len(last) - count :] if len(offered) > budget else []
            others = [position for position in offered if position not in first]
            best, margin = select(raw[head], pooled[head], others, budget - len(first))
            found[-1].append([*best, *first])
            margins.append(margin)
    return found, min(margins)


def query_scores(attention: Any, q: Tensor, k: Tensor) -> Tensor:
    """(kv_heads, tokens): the attention that the query rows q (heads, m, d) pay to each key of a block k (kv_heads,
    tokens, d), were there nothing but the block; both after RoPE; mean over rows and the group's heads."""
    return scaled_logits(attention, q, k).softmax(-1).mean(dim=(1, 2))


def retaining_scores(heads: Mapping[str, Tensor], index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(kv_heads, tokens) by the trained heads of layer `index`: q (heads, tokens, d), k and v (kv_heads, tokens, d)
    before RoPE."""
    fc1, fc2 = (heads[f"model.layers.{index}.self_attn.{name}.weight"].to(q) for name in ("fc1", "fc2"))
    x = torch.cat([part.transpose(0, 1).flatten(1) for part in (q, k, v)], dim=-1)
    return (nn.functional.silu(x @ fc1.T) @ fc2.T).T


def edge_first(scores: Tensor, passing_length: int) -> Tensor:
    """(kv_heads, tokens): a block's last tokens before all others, as 2 is above every share of attention."""
    edge = min(32, passing_length // 4)
    return scores + 2.0 * (torch.arange(scores.shape[1]) >= scores.shape[1] - edge)


@torch.no_grad()
def dense_prefill(
    model: PreTrainedModel,
    prefix: Tokens,
    document: Tokens,
    query: Tokens,
    *,
    blocks: int,
    anchor_length: int | None,
    passing_length: int,
    compressor: str | None = "query-edge",
    strategy: str = "apb",
    heads: Mapping[str, Tensor] | None = None,
    score: Score | None = None,
    rounds: int = 1,
    passing_budget: int | None = None,
) -> OracleResult:
    """Prefill by strategy "apb" or "star"; one block is plain causal attention under either.
    compressor: "query", "query-edge" (a block's last min(32, passing_length // 4) tokens before all others), "recent",
    "retaining" (needs `heads`: a heads file's tensors by name), None (nothing passed).
    score(layer, block), both counted from 0, gives (kv_heads, tokens of the block, prefix included) in the compressor's
    place; these scores are used as they are, not pooled. star ignores compressor, score and passing_length, and its
    anchor_length is the number of block 1's first tokens that later blocks see (None: all).
    rounds: the query's rows of a round see the blocks up to that round, and score those of that round.
    passing_budget: most positions that a block sees per KV head of those selected by all blocks before it: the best, by
    scores that the compressor gives for the whole text. For the query's they are exp(logit - lse), the lse that of the
    row in the first round over all that it sees; the others' are the scores themselves."""
    if passing_length < 0 or (score is None and compressor not in ("query", "query-edge", "recent", "retaining", None)):
        raise ValueError(f"a negative passing_length, or an unknown compressor: {passing_length}, {compressor!r}")
    layout = lay_out((prefix, document, query), blocks, anchor_length, strategy, rounds)
    passes = strategy == "apb" and blocks > 1 and passing_length > 0 and (compressor is not None or score is not None)
    at, decoder = layout.anchor, model.model
    hidden = decoder.embed_tokens(torch.tensor(layout.tokens, device=model.device))  # (rows, hidden)
    cos, sin = (part[0] for part in decoder.rotary_emb(hidden, torch.tensor([layout.positions], device=model.device)))
    keys, values, selections, margins, sights = [], [], [], [math.inf], []

    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        raw_q, raw_k, v = project(attention, layer.input_layernorm(hidden))
        q, k = rope(raw_q, cos, sin), rope(raw_k, cos, sin)

        selected, compared = [], []
        question = layout.copies[0]
        sees = visibility(layout, [torch.empty(len(k), 0, dtype=torch.long)] * blocks)[
            :, question.start : question.stop
        ]
        measure = scaled_logits(attention, q[:, question.start : question.stop], k)
        measure = measure.masked_fill(~sees[:, None], -math.inf).logsumexp(-1, keepdim=True)
        for number, block in enumerate(layout.blocks):
            own = slice(at + block.start, at + block.stop)
            eligible = [t - block.start for t in block if t >= layout.first_eligible] if passes else []
            copy = layout.copies[round_of(number, layout)]
            asked = q[:, copy.start : copy.stop]
            if not eligible or (score is None and compressor == "recent"):
                chosen = [eligible[-passing_length:] for _ in k]
            else:
                if score is not None:
                    raw = pooled = score(index, number)
                else:
                    if compressor == "retaining":
                        raw = retaining_scores(heads or {}, index, raw_q[:, own], raw_k[:, own], v[:, own])
                    else:
                        raw = query_scores(attention, asked, k[:, own])
                        if compressor == "query-edge":
                            raw = edge_first(raw, passing_length)
                    pooled = pool(raw)
                assert raw.shape == (k.shape[0], len(block)), "one score per KV head and token of the block"
                picks = [select(*pair, eligible, passing_length) for pair in zip(raw, pooled, strict=True)]
                chosen = [tokens for tokens, _ in picks]
                margins += [margin for _, margin in picks]
            selected.append(torch.tensor(chosen, dtype=torch.long).reshape(k.shape[0], -1) + block.start)
            if score is None and compressor in ("query", "query-edge"):
                raw = (scaled_logits(attention, asked, k[:, own]) - measure).exp().mean(dim=(1, 2))
                pooled = pool(raw)
            elif not eligible or (score is None and compressor == "recent"):
                raw = pooled = torch.arange(block.start, block.stop).expand(len(k), -1)
            compared.append((raw, pooled))

        seen = None
        if passing_budget is not None:
            whole, pooled = (torch.cat(parts, -1) for parts in zip(*compared, strict=True))
            seen, margin = compete(
                selected, whole, pooled, passing_budget, compressor == "query-edge" and score is None
            )
            margins.append(margin)
            sights.append(seen)
        hidden = hidden + attention.o_proj(attend(attention, q, k, v, visibility(layout, selected, seen)))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        keys.append(k[:, at : at + layout.query.stop])
        values.append(v[:, at : at + layout.query.stop])
        selections.append(selected)

    logits = model.lm_head(decoder.norm(hidden[at + layout.query.stop - 1]))
    return OracleResult(logits, keys, values, selections, min(margins), sights)


@torch.no_grad()
def dense_decode(model: PreTrainedModel, result: OracleResult, token_ids: Tokens) -> Tensor:
    """logits (len(token_ids), vocab), row i for the token after token_ids[i]: the tokens follow the query, see all of
    prefix, document and query in the oracle's cache, and themselves causally. `result` is not changed."""
    tokens, past = [int(token) for token in token_ids], result.keys[0].shape[1]
    positions = torch.arange(past, past + len(tokens), device=model.device)
    hidden = model.model.embed_tokens(torch.tensor(tokens, device=model.device))
    cos, sin = (part[0] for part in model.model.rotary_emb(hidden, positions[None]))
    mask = torch.cat([torch.ones(len(tokens), past, dtype=torch.bool), causal(len(tokens))], dim=1)[None]
    for layer, old_k, old_v in zip(model.model.layers, result.keys, result.values, strict=True):
        q, k, v = project(layer.self_attn, layer.input_layernorm(hidden))
        q, k = rope(q, cos, sin), torch.cat([old_k, rope(k, cos, sin)], dim=1)
        mixed = attend(layer.self_attn, q, k, torch.cat([old_v, v], dim=1), mask)
        hidden = hidden + layer.self_attn.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


def near(positions: Tensor, window: int, chunked: bool) -> Tensor:
    """(rows, rows), True where a column's position is in the window of a row's, which may be a chunk of the text."""
    if chunked:
        return positions[:, None] // window == positions // window
    return positions[:, None] - positions < window


def within(layout: Layout, window: int, chunked: bool = False) -> Tensor:
    """(rows, rows), True where a row sees a column on a layer with a sliding window: the true tokens that the window
    holds, whatever block they stand in; a row of an anchor that is a copy sees those of that anchor, and the query's
    rows of a round nothing that is not read yet."""
    rows, at = len(layout.tokens), layout.anchor
    mask = torch.zeros(rows, rows, dtype=torch.bool)
    mask[:at, :at] = causal(at)
    stop = at + layout.query.start
    mask[at:stop, at:stop] = causal(layout.query.start)
    for index, copy in enumerate(layout.copies):
        for number, block in enumerate(layout.blocks):
            if round_of(number, layout) <= index:
                mask[copy.start : copy.stop, at + block.start : at + block.stop] = True
        mask[copy.start : copy.stop, copy.start : copy.stop] = causal(len(copy))
    return mask & near(torch.tensor(layout.positions), window, chunked)


def read_on(mask: Tensor, layout: Layout, tokens: int, window: int | None = None, chunked: bool = False) -> Tensor:
    """A mask (..., rows, rows) with ``tokens`` more rows and columns at its end, which follow the query, see all of
    prefix, document and query, and themselves causally, within the window if there is one."""
    rows, at, stop = len(layout.tokens), layout.anchor, layout.query.stop
    grown = torch.zeros(*mask.shape[:-2], rows + tokens, rows + tokens, dtype=torch.bool)
    grown[..., :rows, :rows] = mask
    grown[..., rows:, at : at + stop] = True
    grown[..., rows:, rows:] = causal(tokens)
    positions = torch.tensor([*layout.positions, *range(stop, stop + tokens)])
    return grown if window is None else grown & near(positions, window, chunked)


@contextmanager
def recurrent_over(model: PreTrainedModel, layout: Layout, answer: int) -> Iterator[None]:
    """Have recurrent layers read each sequence of rows from its beginning: the anchor; the text, the query and the
    answer's rows, which come last; the text of the rounds so far and the query's copy, for each round but the last."""
    at, rows = layout.anchor, len(layout.tokens)
    text = [*range(at, at + layout.query.stop)]
    sequences = [([*range(at)], at), ([*text, *range(rows, rows + answer)], len(text) + answer)]
    for index, copy in enumerate(layout.copies[:-1]):
        read = max(block.stop for number, block in enumerate(layout.blocks) if round_of(number, layout) <= index)
        sequences.append(([*text[:read], *copy], len(copy)))

    def read_so(forward: Any) -> Any:
        def run(hidden: Tensor | None = None, **options: Any) -> Any:
            hidden = options.pop("hidden_states") if hidden is None else hidden
            out = torch.empty_like(hidden)
            for sequence, counted in sequences:
                if sequence:
                    result = forward(hidden[:, sequence], **options)
                    result = result[0] if isinstance(result, tuple) else result
                    out[:, sequence[len(sequence) - counted :]] = result[:, len(sequence) - counted :]
            return out

        return run

    modules = [module for module in model.modules() if type(module).__name__.endswith(RECURRENT)]
    for module in modules:
        module.forward = read_so(module.forward)
    yield
    for module in modules:
        del module.forward


@torch.no_grad()
def masked_prefill(
    model: PreTrainedModel,
    prefix: Tokens,
    document: Tokens,
    query: Tokens,
    answer: Tokens,
    *,
    blocks: int,
    anchor_length: int | None,
    passing_length: int,
    strategy: str = "apb",
    rounds: int = 1,
    windows: Sequence[int | None] | None = None,
    chunked: bool = False,
    propagation: tuple[int, int] | None = None,
    went_on: list[int] | None = None,
) -> Tensor:
    """Logits (1 + len(answer), vocab) after the query and after each token of `answer`, of any decoder: transformers'
    layers over all rows at once, the attention here, under the masks of this file. Pairs are passed as
    "query-edge" passes them. Capped logits, sinks, sliding windows, values narrower than keys: as the layer asks, but
    for `windows` of layers that leave them to a mask, which are chunks of the text if `chunked`. Layers whose code
    would scale q by the number of the row are given the factor of the row's position.

    `propagation`: a layer, and how many tokens of the document go on above it: the query's last rows choose them by the
    attention that they pay in that layer. All other rows then see and are seen by nobody who counts. `went_on` is
    filled with the true positions of those tokens."""
    layout = lay_out((prefix, document, query), blocks, anchor_length, strategy, rounds)
    at, last = layout.anchor, layout.anchor + layout.query.stop - 1
    tokens = layout.tokens + [int(token) for token in answer]
    positions = layout.positions + [layout.query.stop + index for index in range(len(answer))]
    margins = []
    chosen_to_go_on: list[int] = [] if went_on is None else went_on

    def among_those_that_went_on(window: int | None) -> Tensor:
        """(rows, rows): causal by position among prefix, chosen tokens, the query's last rows and the answer."""
        place = torch.tensor(positions)
        alive = torch.zeros(len(tokens), dtype=torch.bool)
        alive[[at + token for token in (*range(len(prefix)), *chosen_to_go_on, *layout.query)]] = True
        alive[len(layout.tokens) :] = True
        seen = (place[:, None] >= place) & alive
        if window is not None:
            seen &= place[:, None] - place < window
        return seen | torch.eye(len(tokens), dtype=torch.bool)  # the others see at least themselves

    def choose_to_go_on(weights: Tensor, count: int) -> None:
        """By weights (kv_heads, group, rows, columns) of a whole layer."""
        stands = slice(at + len(prefix), at + layout.query.start)
        raw = weights[:, :, at + layout.query.start : at + layout.query.stop, stands].mean(2).sum((0, 1))
        # An odd number of tokens, at most 127 and an eighth of those that go on.
        reach = min(count // 8 // 2, 63)
        pooled = torch.stack([raw[max(token - reach, 0) : token + reach + 1].max() for token in range(len(raw))])
        picked, margin = select(raw, pooled, range(len(raw)), count)
        margins.append(margin)
        chosen_to_go_on[:] = [len(prefix) + token for token in picked]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **options: Any
    ) -> tuple[Tensor, None]:
        q, k, v = query[0], key[0], value[0]
        if module in warm:
            places = torch.tensor(positions)[:, None]
            q = q * (1 + module.attn_scale * torch.log(1 + (places + 1) // module.floor_scale))
        logits = q.unflatten(0, (k.shape[0], -1)) @ k.transpose(1, 2)[:, None] * scaling
        cap, sinks, window = (options.get(name) for name in ("softcap", "s_aux", "sliding_window"))
        window = windows[module.layer_idx] if windows else window
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        if propagation is not None and module.layer_idx > propagation[0]:
            visible = among_those_that_went_on(window).expand(k.shape[0], -1, -1)
        elif window is not None:
            mask = within(layout, window, chunked)
            visible = read_on(mask, layout, len(answer), window, chunked).expand(k.shape[0], -1, -1)
        else:
            selected = []
            for number, block in enumerate(layout.blocks):
                own = slice(at + block.start, at + block.stop)
                copy = layout.copies[round_of(number, layout)]
                raw = edge_first(logits[:, :, copy.start : copy.stop, own].softmax(-1).mean(dim=(1, 2)), passing_length)
                eligible = [t - block.start for t in block if t >= layout.first_eligible] if passing_length else []
                picks = [select(*pair, eligible, passing_length) for pair in zip(raw, pool(raw), strict=True)]
                margins.extend(margin for _, margin in picks)
                chosen = torch.tensor([tokens for tokens, _ in picks], dtype=torch.long)
                selected.append(chosen.reshape(k.shape[0], -1) + block.start)
            visible = read_on(visibility(layout, selected), layout, len(answer))
        logits = logits.masked_fill(~visible[:, None], -math.inf)
        if sinks is not None:
            column = sinks.view(k.shape[0], -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, column], -1)
        weights = logits.softmax(-1)[..., : k.shape[1]]
        if propagation is not None and module.layer_idx == propagation[0]:
            choose_to_go_on(weights, propagation[1])
        return (weights @ v[:, None]).flatten(0, 1).transpose(0, 1)[None], None

    warm = [module for module in model.modules() if getattr(module, "attn_temperature_tuning", False)]
    warm = [module for module in warm if not module.use_rope]
    for module in warm:
        module.attn_temperature_tuning = False
    AttentionInterface.register("oracle", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    with recurrent_over(model, layout, len(answer)):
        output = model(torch.tensor([tokens]), position_ids=torch.tensor([positions]), use_cache=False)
    model.set_attn_implementation(before)
    for module in warm:
        module.attn_temperature_tuning = True
    # Else a rounding error could change which pairs are passed, and a comparison would be a coin toss.
    assert min(margins, default=math.inf) > 1e-4, f"scores are too close to each other: {min(margins)}"
    logits = output.logits[0]
    return torch.cat([logits[last : last + 1], logits[len(layout.tokens) :]])
