"""What the processes of a mesh do: two ranks of two, models loaded so that each process holds its share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

import apb
import families
from apb.distributed import one_shot
from apb.distributed.collectives import Group
from apb.distributed.mesh import Mesh
from apb.distributed.one_shot import OneShot, QuickGroup
from apb.hf import fusing
from apb.hf.loading import load_model
from apb.hf.tensor_parallel import share
from apb.passes import step
from models import tiny_model, without_eos
from replayed import Graph, standing_in

# An even vocabulary: not all versions of transformers cut one that is odd.
EVEN = {"vocab_size": 504}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", families.SMALL | EVEN),
    "phi3": ("Phi3ForCausalLM", families.SMALL | EVEN),
    "qwen3": ("Qwen3ForCausalLM", families.WIDE | EVEN),
}
for name in ("gemma2", "gpt_oss", "qwen3_moe"):
    SHAPES[name] = (families.PECULIAR[name][0], families.PECULIAR[name][1] | EVEN)
PROPAGATED = {**families.APB, "propagation": apb.Propagation(1, 0.3)}
# Each process holds its own KV heads, or all of them.
STORED = ("llama", "phi3")
READINGS = ("full", "ulysses", "apb, 3 rounds")


def everything(folder: str) -> None:
    """One process's part; writes {(family, reading): logits and all keys of layer 1, "shared": parameters held}."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[Any, Any] = {}
    cpu = torch.device("cpu")
    mesh = Mesh.join(cpu, 2)
    for family, shape in SHAPES.items():
        model = load_model(Path(folder, family), torch.float32, cpu, mesh=mesh.devices)
        model.generation_config.eos_token_id = None
        for reading in READINGS:
            engine = apb.Engine.from_model(model, mesh=mesh, **families.READINGS[reading])
            session = engine.prefill(families.PROMPT)
            keys, _ = session.gather_kv(1)
            logits = torch.stack([session.logits, *(session.extend([token]) for token in families.ANSWER)])
            results[family, reading] = (logits, keys)
            results[family, "whole cache"] = session.to_dynamic_cache() is not None
            drawn = engine.generate(families.PROMPT, max_new_tokens=4, temperature=1.0).token_ids
            engine.close()
        results[family, "drawn"] = drawn
        results[family, "held"] = sum(_local(weight).numel() for weight in model.parameters())
        model = share(families.make(*shape), mesh.devices)
        shares = [_local(weight) for weight in model.parameters()]
        results[family, "kept alive"] = sum(x.untyped_storage().nbytes() - x.nbytes for x in shares)
        engine = apb.Engine.from_model(model, strategy="ring", mesh=mesh)
        results[family, "in memory"] = engine.prefill(families.PROMPT).logits
        engine.close()
        engine = apb.Engine.from_model(model, mesh=mesh, **PROPAGATED)
        session = engine.prefill(families.PROMPT)
        results[family, "propagated"] = session.positions(2), session.extend([1])
        engine.close()
        if family in STORED:
            results[family, "stored"] = store(apb.Engine.from_model(model, strategy="ring", mesh=mesh), folder, family)
    torch.save(results, Path(folder, f"rank{dist.get_rank()}.pt"))
    dist.destroy_process_group()


def store(engine: apb.Engine, folder: str, family: str) -> list[torch.Tensor]:
    """What documents say: one that was read here, the same from disk, and one that a single process has written."""
    document = engine.read(tokens=families.PROMPT.document, prefix=families.PROMPT.prefix)
    document.save(Path(folder, f"{family} of four"))
    loaded = [engine.load(Path(folder, f"{family} of {writer}")) for writer in ("four", "one")]
    return [each.prefill(families.PROMPT.query).logits for each in (document, *loaded)]


STEPS = (3, 60)
LENGTHS = (90, 31)


def stepping_model() -> PreTrainedModel:
    """A model whose layers are all cut, with biases where Qwen2 has them."""
    return without_eos(tiny_model("qwen2", heads=4, kv_heads=2, head_dim=16, layers=2, vocab=96))


def prompt_of(length: int) -> apb.Prompt:
    return apb.Prompt.from_tokens([5], [(37 * i + 11) % 96 for i in range(length)], [41, 94])


def read_steps(engine: apb.Engine) -> Tensor:
    """Logits (lengths, steps, vocabulary) after each of the tokens, in sessions that take turns."""
    sessions = [engine.prefill(prompt_of(length), max_new_tokens=8) for length in LENGTHS]
    return torch.stack([torch.stack([each.extend([token]) for each in sessions]) for token in STEPS], 1)


def steps(folder: str, size: int) -> None:
    """Steps of two processes a rank, with and without graphs, by messages of each kind; writes what each gave."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = Mesh.join(torch.device("cpu"), size)
    model = share(stepping_model(), mesh.devices)
    results: dict[Any, Any] = {}
    for kernels in (False, True):
        with ExitStack() as stack:
            if kernels:
                stack.enter_context(one_shot_messages())
            engine = apb.Engine.from_model(model, mesh=mesh, blocks=5, backend="torch")
            results["passes", kernels] = read_steps(engine)
            engine.close()
            stack.enter_context(patch.object(step.Stepper, "why_not", lambda *_: None))
            stack.enter_context(standing_in())
            from apb.kernels import matvec  # needs Triton

            counting = ((matvec, "several"), (matvec, "gated"), (QuickGroup, "row_sum_onto"))
            ways = {each[1]: stack.enter_context(counted(*each)) for each in counting if kernels}
            begin = stack.enter_context(
                patch.object(Graph, "capture_begin", autospec=True, side_effect=Graph.capture_begin)
            )
            for graphs in (False, True):
                engine = apb.Engine.from_model(model, mesh=mesh, blocks=5, graphs=graphs)
                began = begin.call_count
                with summing() as sums:
                    results["steps", kernels, graphs] = read_steps(engine)
                results["sums", kernels, graphs] = sums
                results["ways", kernels, graphs] = {name: len(calls) for name, calls in ways.items()}
                results["captures", kernels, graphs] = begin.call_count - began
                engine.close()
    torch.save(results, Path(folder, f"rank{dist.get_rank()}.pt"))
    dist.destroy_process_group()


def _local(weight: Any) -> torch.Tensor:
    return weight.to_local() if hasattr(weight, "to_local") else weight


@contextmanager
def one_shot_messages() -> Iterator[None]:
    """Kernels for small messages, with gloo in place of the kernel that sums, and for layers of a single row."""

    def quick(group: Group, device: torch.device) -> tuple[Group, str | None]:
        if group.size == 1:
            return group, "there is one rank"
        made = QuickGroup(group.rank, group.size, group.process_group, kinds=(OneShot(group, device),))
        return made, None

    def summed(shot: OneShot, room: Tensor) -> Tensor:
        total = room.clone()
        dist.all_reduce(total, group=dist.distributed_c10d._resolve_process_group(shot._name))
        return total

    def memory(count: int, dtype: torch.dtype, *_: Any) -> tuple[Tensor, None]:
        return torch.zeros(count, dtype=dtype), None

    with (
        patch.object(fusing, "why_not", lambda device: None),
        patch.object(torch, "compile", lambda function, **_: function),
        patch("apb.hf.attach.quick", quick),
        patch.object(step, "quick", quick),
        patch.object(one_shot, "_symmetric", memory),
        patch.object(OneShot, "_summed", summed),
    ):
        yield


@contextmanager
def summing() -> Iterator[list[int]]:
    """The numbers in every sum that this process takes part in, outside graphs."""
    found: list[int] = []
    reduce = dist.all_reduce

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(x.numel())
        return reduce(x, *args, **kwargs)

    with patch.object(dist, "all_reduce", counted):
        yield found


@contextmanager
def counted(holder: Any, name: str) -> Iterator[list[int]]:
    """One entry for every call of a function."""
    calls: list[int] = []
    function = getattr(holder, name)

    def called(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    with patch.object(holder, name, called):
        yield calls
