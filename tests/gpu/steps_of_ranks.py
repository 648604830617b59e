"""Decode steps of two processes with a GPU each; started by torchrun from test_steps_of_ranks.py.

They share the weights, or the sequence, and send messages by kernels or by NCCL. Rank 0 prints one JSON object: which
kernels there were and what was lacking, and for every way what it found.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import apb.hf.attach
import apb.passes.step
from apb import Engine, Prompt
from apb.distributed import launch
from apb.distributed.collectives import Group
from apb.distributed.mesh import Mesh
from apb.distributed.one_shot import QuickGroup, quick
from apb.hf.tensor_parallel import share
from models import tiny_model, without_eos

PROMPTS = [
    Prompt.from_tokens([1, 2], [(seed * i * i + 11 * i) % 97 for i in range(length)], [5, 6, 7])
    for length, seed in ((1003, 37), (400, 29), (2500, 53))
]
TOKENS = 20


def main(leave_graphs: bool) -> None:
    """Every way, then the end: with ``leave_graphs`` while graphs with NCCL's messages in them are alive."""
    device = launch.local_device(torch.device("cuda"))
    # A mesh has groups of its own, whose kernels are made once for all engines.
    mesh = Mesh.join(device, launch.world_size())
    ranks = Mesh.of(Group.of_world())
    made, lacking = quick(mesh.tensor, device)
    quick(ranks.sequence, device)
    kinds = [type(kind).__name__ for kind in made.kinds] if isinstance(made, QuickGroup) else []
    found: dict[str, Any] = {"kinds": kinds, "lacking": lacking}
    for dtype in () if leave_graphs else (torch.float32, torch.bfloat16):
        alone = chosen(Engine.from_model(model(device, dtype), mesh=Mesh.of(Group()), graphs=False, **reading(dtype)))
        for way, used in (("weights", mesh), ("sequence", ranks)):
            whole = model(device, dtype)
            read = share(whole, mesh.devices) if used is mesh and mesh.devices is not None else whole
            for by_nccl in (False, True):
                name = f"{way}, {'NCCL' if by_nccl else 'kernels'}, {dtype}"
                found[name] = compared(read, used, by_nccl, dtype) | {"alone": alone}
    if leave_graphs:
        read = share(model(device, torch.float32), mesh.devices)
        with by_nccl_alone():
            engine = Engine.from_model(read, mesh=mesh, **reading(torch.float32))
            session = engine.prefill(PROMPTS[1], max_new_tokens=TOKENS)
            answer(session)
            assert session.captured
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    launch.leave()


def reading(dtype: torch.dtype) -> dict[str, Any]:
    """Options of all engines: exact, so that tokens do not hang on which pairs rounding lets through; with fused parts
    and kernels for single rows in one dtype alone, because compiling takes long."""
    return {"strategy": "ring", "verify": False, "fused": None if dtype == torch.bfloat16 else False}


def model(device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The same on every process; an even vocabulary, which is cut."""
    made = tiny_model("llama", heads=8, kv_heads=2, head_dim=64, hidden=256, vocab=128)
    return without_eos(made).to(device, dtype)


def by_nccl_alone() -> ExitStack:
    """No kernels for messages inside it."""

    def none(group: Group, device: torch.device) -> tuple[Group, str | None]:
        return group, "left out here"

    stack = ExitStack()
    stack.enter_context(patch.object(apb.hf.attach, "quick", none))
    stack.enter_context(patch.object(apb.passes.step, "quick", none))
    return stack


def compared(read: PreTrainedModel, mesh: Mesh, by_nccl: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Tokens with and without graphs, of sessions one after the other and in turns, and the number of captures."""
    graph = torch.cuda.CUDAGraph
    with by_nccl_alone() if by_nccl else ExitStack():
        plain = chosen(Engine.from_model(read, mesh=mesh, graphs=False, **reading(dtype)))
        with patch.object(graph, "capture_begin", autospec=True, side_effect=graph.capture_begin) as begun:
            engine = Engine.from_model(read, mesh=mesh, **reading(dtype))
            first = engine.prefill(PROMPTS[0], max_new_tokens=TOKENS)
            tokens = [answer(first)]
            captures = begun.call_count
            later = [engine.prefill(each, max_new_tokens=TOKENS) for each in PROMPTS[1:]]
            turns = [[answer(session, 1)[0] for session in later] for _ in range(TOKENS)]
            tokens += [list(each) for each in zip(*turns, strict=True)]
            by_graph = [session.captured for session in (first, *later)]
            engine.close()
            more = begun.call_count - captures
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, tokens)
    return {
        "plain": plain,
        "tokens": tokens,
        "alike": all(each == tokens for each in everywhere),
        "captured": by_graph,
        "captures": captures,
        "more captures": more,
    }


def chosen(engine: Engine) -> list[list[int]]:
    """Greedy tokens after every prompt; closes the engine."""
    found = [answer(engine.prefill(each, max_new_tokens=TOKENS)) for each in PROMPTS]
    engine.close()
    return found


def answer(session: Any, tokens: int = TOKENS) -> list[int]:
    """Greedy tokens."""
    found = []
    for _ in range(tokens):
        found.append(int(session.logits.argmax()))
        session.extend(found[-1:])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leave-graphs", action="store_true")
    main(parser.parse_args().leave_graphs)
