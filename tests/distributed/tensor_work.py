"""What the processes of a mesh do: two ranks of two, models loaded so that each process holds its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import apb
import families
from apb.distributed.mesh import Mesh
from apb.hf.loading import load_model
from apb.hf.tensor_parallel import share

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


def _local(weight: Any) -> torch.Tensor:
    return weight.to_local() if hasattr(weight, "to_local") else weight
