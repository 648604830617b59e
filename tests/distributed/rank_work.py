"""What the ranks of the distributed tests do: everything in one start, since every process costs seconds of imports.

Four processes are started. Groups of the first one, two, three and four of them read every case; each rank writes down
what it got, and the tests compare that in the process that started them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

import apb
import families
import hybrids
import ropes
from alive import peak_of
from apb.decoding import Decoding, Dense, Pages, Retrieval, Squeezed, Streamed
from apb.distributed.collectives import Group, Pending
from apb.distributed.mesh import Mesh
from apb.layers.base import AttentionInput
from apb.layers.shards import Merging, merge_over_ranks
from apb.passes import tokens
from apb.passes.capture import captured
from apb.passes.step import Stepper
from apb.serving.alive import SignsOfLife
from apb.session import extend_together
from byte_checkpoint import VOCABULARY, byte_tokenizer
from cases import CASES, Case, Outcome, read
from chosen import RECENT
from models import tiny_model, without_eos
from replayed import standing_in

# Query heads, KV heads, document: groups of 1, 4 and 8; prime lengths, from fewer tokens than ranks on.
EXACT = ((12, 12, 499), (12, 3, 1499), (24, 3, 499), (24, 3, 2), (12, 3, 5))
EXACT_ANSWER = 8
SIZES = (1, 2, 3, 4)
# Strategies, blocks a rank (None: their own) and passing budgets whose memory is counted.
WIDE = (
    *(("ring", None, None), ("ulysses", None, None), ("star", 1, None), ("star", 2, None)),
    *(("apb", 1, None), ("apb", 2, None), ("apb", 3, None), ("apb", 3, 150)),
)
WIDE_DOCUMENT = 1800
PROMPT = Case(1, document=90).prompt
LONG = apb.Prompt.from_tokens([5], [(37 * i * i + 11 * i) % VOCABULARY for i in range(470)], [41, 94, 7])
PAGES, SQUEEZED = Pages(0.6, page_size=4), Squeezed(0.7, cluster_size=5)
DECODED: dict[str, Decoding] = {
    "exact": Dense(),
    "pages": PAGES,
    "squeezed": SQUEEZED,
    "all pages": replace(PAGES, share=1.0),
    "all clusters": replace(SQUEEZED, share=1.0),
    "streamed": Streamed(),
    "all fetched": Retrieval(1.0),
}
SAMPLING = {"max_new_tokens": 24, "temperature": 1.0, "seed": 7}


@dataclass
class Chosen:
    """What one rank saw of three tokens by a decode method: logits after each; of every layer at the first one q, k, v
    and the merged output; and the share of its keys that was attended to."""

    logits: Tensor
    layers: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    share: float


@dataclass
class Record:
    """What one rank of a group of some size saw."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)  # bytes in a prefill
    cached: dict[str, int] = field(default_factory=dict)  # bytes after it
    refused: dict[str, str] = field(default_factory=dict)  # the sentence, where a case cannot be run so
    generated: dict[str, Any] = field(default_factory=dict)
    collectives: dict[str, Any] = field(default_factory=dict)
    exact: dict[tuple[Any, ...], tuple[Tensor, list[int]]] = field(default_factory=dict)
    peculiar: dict[tuple[str, str], tuple[Tensor, int]] = field(default_factory=dict)  # logits, bytes in a prefill
    ropes: dict[tuple[str, str, int], list[int]] = field(default_factory=dict)  # by kind, strategy, length: the answer
    replayed: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)  # run, replayed, messages of a replay
    scored: list[Tensor] = field(default_factory=list)  # log-probabilities, logits of a token read after them
    asked: dict[str, list[Any]] = field(default_factory=dict)  # by strategy: logits or tokens of one question each
    stored: dict[str, list[Any]] = field(default_factory=dict)  # by strategy: what a loaded document says
    stepped: list[tuple[Tensor, list[int], list[bool]]] = field(default_factory=list)  # logits, bytes sent, by graphs?
    carried: list[tuple[list[Tensor], list[int], list[bool]]] = field(
        default_factory=list
    )  # logits and states; as above
    chosen: dict[str, Chosen] = field(default_factory=dict)  # by decode method
    indexed: list[bool] = field(default_factory=list)  # is a loaded document's index that of the shard?
    alive: dict[tuple[str, int | None, int | None], int] = field(
        default_factory=dict
    )  # bytes at the widest moment of a prefill


def cases(size: int) -> list[str]:
    """What so many ranks read: every number of blocks; everything on most ranks, where each has the fewest blocks, and
    of the rest every other case on two and the others on three. One alone reads the rest in test_engine.py."""
    names = list(CASES)
    numbers, rest = names[:5], names[5:]
    return numbers + {1: [], 2: rest[::2], 3: rest[1::2], 4: rest}[size]


def peculiar(size: int) -> list[tuple[str, str]]:
    """Of the peculiar layers: everything on two ranks, on most ranks a third of every model's readings."""
    return {2: families.CASES, 4: families.CASES[::3]}.get(size, [])


def everything(folder: str) -> None:
    """One rank's part of all tests; writes {size: Record} to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, records = dist.get_rank(), {}
    for size in SIZES:
        group = Group(rank, size, dist.new_group(range(size)))
        if rank < size:
            records[size] = record(group)
            records[size].stored = store(group, Path(folder))
            records[size].indexed = load_indexes(group, Path(folder, "indexed"))
        dist.barrier()
    torch.save(records, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def record(group: Group) -> Record:
    """All that a group of one size does."""
    seen = Record()
    for name in cases(group.size):
        case = CASES[name]
        engine = case.engine(group=group)
        try:
            with counting() as sent:
                session = engine.prefill(case.prompt)
        except apb.InputError as error:
            seen.refused[name] = str(error)
            continue
        seen.sent[name] = sum(sent)
        shards = [session._cache.shard(layer) for layer in range(3)]
        seen.cached[name] = sum(part.numel() * part.element_size() for shard in shards for part in shard)
        seen.outcomes[name] = read(engine, case)
    seen.generated = generate(group)
    seen.collectives = collect(group)
    seen.replayed = replay(group)
    seen.scored = score(group)
    seen.asked = ask(group)
    if group.size in (2, 3) and os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        seen.stepped = [step_in_turns(group, by_graphs) for by_graphs in (False, True)]
        if group.size == 2:
            seen.carried = [carry(group, by_graphs) for by_graphs in (False, True)]
    seen.chosen = choose_keys(group)
    seen.exact = read_exactly(group)
    if group.size > 1:
        seen.alive = count_alive(group)
    seen.peculiar = read_families(group)
    if group.size == 2:
        seen.ropes = read_ropes(group)
    return seen


@contextmanager
def counting() -> Iterator[list[int]]:
    """The bytes that this rank sends to others, one entry a call, of the collectives that strategies use."""
    sent: list[int] = []
    all_gather, shift, all_to_all = Group.all_gather, Group.shift, Group.all_to_all
    send, broadcast = Group.send, Group.broadcast

    def count(*parts: Tensor) -> int:
        return sum(part.numel() * part.element_size() for part in parts)

    def counted_all_gather(group: Group, x: Tensor, into: Tensor | None = None) -> Pending:
        sent.append((group.size - 1) * count(x))
        return all_gather(group, x, into)

    def counted_shift(group: Group, x: Tensor) -> Pending:
        sent.append(count(x) if group.size > 1 else 0)
        return shift(group, x)

    def counted_all_to_all(group: Group, parts: list[Tensor], shapes: Any) -> list[Tensor]:
        sent.append(count(*(part for rank, part in enumerate(parts) if rank != group.rank)))
        return all_to_all(group, parts, shapes)

    def counted_send(group: Group, x: Tensor, to: int) -> Pending:
        sent.append(count(x))
        return send(group, x, to)

    def counted_broadcast(group: Group, x: Tensor, source: int = 0) -> Tensor:
        states = x.dtype == torch.uint8  # logits, which are broadcast too, are in no prediction
        sent.append((group.size - 1) * count(x) if states and source == group.rank else 0)
        return broadcast(group, x, source)

    with (
        patch.object(Group, "send", counted_send),
        patch.object(Group, "broadcast", counted_broadcast),
        patch.object(Group, "all_gather", counted_all_gather),
        patch.object(Group, "shift", counted_shift),
        patch.object(Group, "all_to_all", counted_all_to_all),
    ):
        yield sent


def generate(group: Group) -> dict[str, Any]:
    """Answers of sampling and of streaming, with a tokenizer of bytes."""
    model = without_eos(tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY))
    engine = apb.Engine.from_model(model, byte_tokenizer(), blocks=5, mesh=Mesh.of(group))
    prompt = apb.Prompt.from_tokens(
        *([token % 256 for token in part] for part in (PROMPT.prefix, PROMPT.document, PROMPT.query))
    )
    drawn = engine.generate(prompt, **SAMPLING)
    streamed = "".join(engine.stream(prompt, **SAMPLING))
    unseeded = engine.generate(prompt, max_new_tokens=24, temperature=1.0)
    model.generation_config.eos_token_id = drawn.token_ids[5]
    stopped = engine.generate(prompt, **SAMPLING)
    cold = engine.generate(prompt, max_new_tokens=24, temperature=1e-40).token_ids
    greedy = engine.generate(prompt, max_new_tokens=24).token_ids
    engine.close()
    with patch.dict("os.environ", APB_CHECK_FINITE="1"):
        engine = apb.Engine.from_model(model, byte_tokenizer(), blocks=5, mesh=Mesh.of(group))
    model.model.layers[1].self_attn.v_proj.weight[3, 3] = float("nan")
    broken = ""
    try:
        engine.generate(prompt, **SAMPLING)
    except apb.NotFinite as error:
        broken = str(error)
    return {
        "cold": cold,
        "greedy": greedy,
        "broken": broken,
        "drawn": drawn.to_dict(),
        "streamed": streamed,
        "unseeded": unseeded.token_ids,
        "stopped": stopped.to_dict(),
    }


WINDOWS = "apb, windows"
ASKED = [tuple((7 * i + 31 * j + 2) % VOCABULARY for j in range(2 + i)) for i in (0, 5, 2, 0)]


def ask(group: Group) -> dict[str, list[Any]]:
    """Questions about a document that stays read, a kept one among them; its own question's logits come first."""
    model = without_eos(Case(1).model())
    found: dict[str, list[Any]] = {}
    for strategy in ("full", "ring", "ulysses", "apb"):
        if strategy in ("full", "ulysses") and group.size != (1 if strategy == "full" else 2):
            continue
        blocks = {"blocks": 5} if strategy == "apb" else {}
        engine = apb.Engine.from_model(model, strategy=strategy, mesh=Mesh.of(group), **blocks)
        document = engine.read(tokens=PROMPT.document, prefix=PROMPT.prefix, question=PROMPT.query)
        said: list[Any] = [engine.prefill(PROMPT).logits]
        for number, query in enumerate(ASKED):
            said.append(document.ask(query, keep=number == 2, max_new_tokens=3).token_ids)
        said.append(document.prefill(ASKED[1]).logits)
        document = engine.read(tokens=PROMPT.document, prefix=PROMPT.prefix, question=PROMPT.query)
        document.ask(ASKED[1], max_new_tokens=1)
        said.append(document.prefill(PROMPT.query).logits)
        found[strategy] = said
        engine.close()
    return found


def store(group: Group, folder: Path) -> dict[str, list[Any]]:
    """Questions about documents that fewer ranks have written (the first one: read now), written again by these.

    Before each question the document leaves the device, for host memory or for disk.
    """
    plenty = 1 << 40
    found: dict[str, list[Any]] = {}
    for strategy in ("ring", "apb", WINDOWS):
        blocks = {} if strategy == "ring" else {"blocks": 5}
        model = families.make(*families.PECULIAR["gemma3_text"]) if strategy == WINDOWS else Case(1).model()
        name = "apb" if strategy == WINDOWS else strategy
        engine = apb.Engine.from_model(without_eos(model), strategy=name, mesh=Mesh.of(group), **blocks)
        place = folder / strategy
        if group.size == 1:
            engine.read(tokens=PROMPT.document, prefix=PROMPT.prefix, question=PROMPT.query).save(place)
        host = plenty if strategy == "ring" else 0
        documents = apb.Documents(engine, plenty, host, folder / f"{strategy} of {group.size}", plenty)
        documents.add("it", engine.load(place))
        found[strategy] = []
        for query in ASKED[1:]:
            documents.make_room(plenty)
            assert documents.place("it") == ("host" if host else "disk")
            found[strategy].append(documents.ask("it", query, max_new_tokens=3).token_ids)
        document = documents.document("it")
        found[strategy] += [document.prefill(query).logits for query in (PROMPT.query, ASKED[1])]
        document.save(place)
        if strategy == WINDOWS:  # as on one rank: those further tokens see, wherever they are
            document.rest()
            held = torch.tensor([document.state.cache.held])
            found[strategy].append(group.all_gather(held).wait().sum((0, 1)).tolist())
        engine.close()
    return found


def score(group: Group) -> list[Tensor]:
    """Log-probabilities of tokens that may follow, and the logits of others that do."""
    engine = CASES["five blocks"].engine(group=group)
    session = engine.prefill(PROMPT)
    results = [session.score(tokens)[0] for tokens in ([7, 8, 9], [7])]
    results.append(session.extend([5, 6]))
    results.append(session.score([7, 8])[0])
    engine.close()
    return results


def choose_keys(group: Group) -> dict[str, Chosen]:
    """Tokens after a prompt by every method of :data:`DECODED`."""
    found = {}
    for name, method in DECODED.items():
        engine = apb.Engine.from_model(Case(1).model(), strategy="ring", decoding=method, mesh=Mesh.of(group))
        session, noted = engine.prefill(LONG), []

        def noting(layer: AttentionInput, *partial: Tensor, noted: list[Any] = noted, **group: Any) -> Merging:
            merging = merge_over_ranks(layer, *partial, **group)
            noted.append((layer.q, layer.k.clone(), layer.v.clone(), merging))
            return merging

        with patch.object(tokens, "merge_over_ranks", noting):
            logits = torch.stack([session.extend([token]) for token in (3, 9, 12)])
        layers = [(q[0], k, v, merging.wait()[0]) for q, k, v, merging in noted[:3]]
        found[name] = Chosen(logits, layers, session.share)
        engine.close()
    return found


def load_indexes(group: Group, folder: Path) -> list[bool]:
    """If the indexes of a document that fewer ranks have written (the first one: read now) are those of this shard, and
    so when these ranks have written it again."""
    engine = apb.Engine.from_model(Case(1).model(), strategy="ring", decoding=PAGES, mesh=Mesh.of(group))
    if group.size == 1:
        engine.read(tokens=LONG.document, prefix=LONG.prefix).save(folder)
    same = []
    for _ in range(2):
        document = engine.load(folder)
        for layer, index in document.state.cache.indexes[PAGES.index_key].items():
            anew, keys = PAGES.new_index(), document.state.cache.shard(layer)[0].transpose(0, 1)
            anew.extend(keys[:, : max(keys.shape[1] - RECENT, 0)])
            same.append(all(torch.equal(part, anew.tensors()[name]) for name, part in index.tensors().items()))
            same.append(bool(anew.tensors()))
        document.save(folder)
    engine.close()
    return same


def read_exactly(group: Group) -> dict[tuple[Any, ...], tuple[Tensor, list[int]]]:
    """Logits of the exact strategies through a greedy answer, and its tokens, by (heads, kv_heads, document, strategy).

    One rank alone reads by full attention, which the others must give.
    """
    results = {}
    for heads, kv_heads, document in EXACT:
        model = tiny_model("llama", heads=heads, kv_heads=kv_heads, head_dim=16, hidden=96, vocab=VOCABULARY)
        prompt = apb.Prompt.from_tokens([5], [(37 * i * i + 11 * i) % VOCABULARY for i in range(document)], [41, 94])
        for strategy in ("full",) if group.size == 1 else ("ring", "ulysses"):
            engine = apb.Engine.from_model(model, strategy=strategy, mesh=Mesh.of(group))
            session = engine.prefill(prompt, max_new_tokens=EXACT_ANSWER)
            logits, tokens = [session.logits], []
            for _ in range(EXACT_ANSWER):
                tokens.append(int(logits[-1].argmax()))
                logits.append(session.extend([tokens[-1]]))
            engine.close()
            results[heads, kv_heads, document, strategy] = (torch.stack(logits), tokens)
    return results


def read_families(group: Group) -> dict[tuple[str, str], tuple[Tensor, int]]:
    """Models with peculiar layers under every strategy: logits through decode, and the bytes that prefill sent."""
    results = {}
    for family, found in groupby(peculiar(group.size), itemgetter(0)):
        model = families.make(*families.PECULIAR[family])
        for _, reading in found:
            with counting() as sent:
                logits = families.read(model, reading, group)
            results[family, reading] = (logits, sum(sent) - families.decode_bytes(model, group.size))
    return results


def read_ropes(group: Group) -> dict[tuple[str, str, int], list[int]]:
    """Greedy answers of models whose RoPE depends on the length, on either side of where it changes: each kind at every
    length and each strategy at every length, but one strategy for a kind and a length."""
    answers = {}
    for (number, name), (turn, strategy) in product(
        enumerate(("dynamic", "longrope, phi3")), enumerate(("ring", "ulysses"))
    ):
        engine = apb.Engine.from_model(ropes.scaled(name), strategy=strategy, mesh=Mesh.of(group))
        for length in ropes.LENGTHS[(number + turn) % 2 :: 2]:
            result = engine.generate(ropes.prompt_of(length), max_new_tokens=ropes.ANSWER)
            answers[name, strategy, length] = result.token_ids
        engine.close()
    return answers


def wide_model() -> PreTrainedModel:
    """A model whose attention is wider than its stream of rows and its MLP; merging in fp32 shows in bf16."""
    return tiny_model("llama", heads=12, kv_heads=3, head_dim=64, layers=2, hidden=96).to(torch.bfloat16)


@contextmanager
def patience() -> Iterator[None]:
    """Give gloo's threads, which hold what they send a moment longer, that moment after every collective."""
    wait, all_to_all = Pending.wait, Group.all_to_all

    def patient_wait(pending: Pending) -> Tensor:
        result = wait(pending)
        time.sleep(0.01)
        return result

    def patient_all_to_all(group: Group, parts: list[Tensor], shapes: Any) -> list[Tensor]:
        result = all_to_all(group, parts, shapes)
        time.sleep(0.01)
        return result

    with patch.object(Pending, "wait", patient_wait), patch.object(Group, "all_to_all", patient_all_to_all):
        yield


def count_alive(group: Group) -> dict[tuple[str, int | None, int | None], int]:
    """Bytes alive at the widest moment of a prefill, beside weights, by strategy, blocks a rank and passing budget."""
    results = {}
    model = wide_model()
    prompt = apb.Prompt.from_tokens([], [(37 * i * i + 11 * i) % 97 for i in range(WIDE_DOCUMENT)], [41, 94])
    for strategy, blocks, budget in WIDE:
        count = None if blocks is None else blocks * group.size
        options = {"strategy": strategy, "blocks": count, "passing_budget": budget}
        engine = apb.Engine.from_model(model, mesh=Mesh.of(group), **options)
        with patience():
            results[strategy, blocks, budget] = peak_of(model, partial(engine.prefill, prompt))
        engine.close()
    return results


def collect(group: Group) -> dict[str, Any]:
    """Every collective, on numbers that say which rank they come from."""
    mine = torch.tensor([[10.0 * group.rank, 10.0 * group.rank + 1]])
    gathered = group.all_gather(mine)
    empty = group.all_gather(torch.empty(2, 0, 3))
    shifted = group.shift(mine)
    parts = [torch.full((group.rank + 1, to + 1), 10.0 * group.rank + to) for to in range(group.size)]
    received = group.all_to_all(parts, [(source + 1, group.rank + 1) for source in range(group.size)])
    told = group.broadcast(mine.clone())
    told_by_last = group.broadcast(mine.clone(), group.size - 1)
    handed = mine.clone()  # from rank to rank, each adding its own
    if group.rank:
        handed += group.receive(torch.empty_like(mine), group.rank - 1)
    if group.rank + 1 < group.size:
        group.send(handed, group.rank + 1).wait()
    group.barrier()
    waited = gathered.wait()
    return {
        "all_gather": waited,
        "all_gather, waited twice": gathered.wait(),
        "all_gather of nothing": empty.wait(),
        "all_gather of a view": group.all_gather(torch.arange(6.0).view(2, 3).T + group.rank).wait(),
        "shift": shifted.wait(),
        "all_to_all": received,
        "broadcast": told,
        "broadcast of the last": told_by_last,
        "handed on": handed,
        "gather": group.gather(mine),
    }


def replay(group: Group) -> list[tuple[Tensor, Tensor, int]]:
    """A step that gathers twice, captured once, for several inputs."""
    given = torch.zeros(3)

    def step(group: Group) -> Tensor:
        everyone = group.all_gather((group.rank + 1) * given).wait()
        squares = group.all_gather((everyone.sum(0) * given).view(3, 1).T).wait()
        return torch.cat([everyone.flatten(), squares.flatten()]) - 1

    with standing_in():
        replayed = captured(step, group, torch.device("cpu"))
    results = []
    for value in (1.0, 5.0, -2.0):
        given.copy_(torch.arange(3) + value)
        with counting() as sent:
            result = replayed()
        results.append((step(group), result, len(sent)))
    return results


def step_in_turns(group: Group, by_graphs: bool) -> tuple[Tensor, list[int], list[bool]]:
    """Two sessions of one engine read tokens in turn, then in one pass: logits, what was sent, and after which tokens
    there was a graph.

    Rank 0 captures for the first session, the others for the second.
    """
    model = without_eos(tiny_model("llama", heads=2, kv_heads=1, head_dim=16, layers=2))
    engine = apb.Engine.from_model(model, blocks=5, mesh=Mesh.of(group))
    prompts = [apb.Prompt.from_tokens([5], [(37 * i + 11) % 97 for i in range(count)], [41, 94]) for count in (90, 31)]
    with stepping(by_graphs) as sent:
        first = engine.prefill(prompts[0], max_new_tokens=8 if group.rank == 0 else 1)
        logits, by_graph = [first.extend([3])], [first.captured]
        second = engine.prefill(prompts[1], max_new_tokens=8)
        for session, token in ((second, 4), (first, 5), (second, 6)):
            logits.append(session.extend([token]))
            by_graph.append(session.captured)
        for ordered in ((first, second), (second, first)):
            extend_together(ordered, [7, 8])
            logits += [session.logits for session in ordered]
            by_graph += [session.captured for session in ordered]
    engine.close()
    return torch.stack(logits), sent, by_graph


def carry(group: Group, by_graphs: bool) -> tuple[list[Tensor], list[int], list[bool]]:
    """As :func:`step_in_turns`, by a model with recurrent layers: logits after each token and both sessions' states."""
    engine = apb.Engine.from_model(hybrids.make("qwen3_5_text"), strategy="ring", mesh=Mesh.of(group), verify=False)
    with stepping(by_graphs) as sent:
        sessions = [
            engine.prefill(each, max_new_tokens=1 if each is LONG and group.rank == 0 else 8) for each in (LONG, PROMPT)
        ]
        logits, by_graph = [], []
        for token in (3, 4, 5):
            for session in sessions:
                logits.append(session.extend([token]))
                by_graph.append(session.captured)
    states = [
        part.clone() for each in sessions for state in each.cache.states.values() for part in state.tensors().values()
    ]
    engine.close()
    return [torch.stack(logits), *states], sent, by_graph


@contextmanager
def stepping(by_graphs: bool) -> Iterator[list[int]]:
    """Tokens are read by what stands in for graphs, or by ordinary passes; what this rank sends, as of counting."""
    with ExitStack() as stack:
        if by_graphs:
            stack.enter_context(patch.object(Stepper, "why_not", lambda *_: None))
            stack.enter_context(standing_in())
        yield stack.enter_context(counting())


def stop_on_rank_1() -> None:
    """One rank is stopped while the other waits for it."""
    dist.init_process_group("gloo")
    SignsOfLife(patience_s=2).start()
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def exit_on_rank_1() -> None:
    """One rank ends without a word while the other waits for it."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def fail_on_rank_1(kind: type[Exception]) -> None:
    """One rank fails while the other waits for it."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise kind("the reason.\nand what torch adds to it")
    dist.barrier()
