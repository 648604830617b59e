"""What one process, and each of two, does with the extension."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import apb
from apb.distributed.collectives import Group
from apb.distributed.mesh import Mesh
from apb.evaluation import synthetic
from apb.evaluation.records import Store
from apb.evaluation.runner import Runner
from apb.evaluation.settings import Setting
from apb.hf.counting import model_shape
from apb.planning.cost import predict
from byte_checkpoint import VOCABULARY, byte_tokenizer
from extension.nearest import Nearest
from extension.neighbours import Neighbours
from extension.stride import Stride
from models import tiny_model, without_eos

PROMPT = apb.Prompt.from_tokens([1, 2], [(37 * i * i + 11 * i) % 97 for i in range(83)], [5, 6, 7])
ANSWER = (12, 70, 33)
METHOD = Neighbours(blocks=5, reach=6)
PASSING = apb.methods.APB(blocks=4, anchor_length=15, passing_length=3)
STRIDE = Stride(step=5)
DECODING = Nearest(last=12)


def model() -> Any:
    return without_eos(tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY))


def everything(folder: str) -> None:
    """One rank's part; writes what it saw to rankR.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(use(Group.of_world()), Path(folder, f"rank{dist.get_rank()}.pt"))
    dist.destroy_process_group()


def use(group: Group) -> dict[str, Any]:
    """Generate, plan, and the runner of evaluations with a strategy, a compressor and a decode method from outside."""
    mesh, found = Mesh.of(group), {}
    engine = apb.Engine.from_model(model(), byte_tokenizer(), strategy=METHOD, mesh=mesh)
    session = engine.prefill(PROMPT)
    found["logits"] = torch.stack([session.logits, *(session.extend([token]) for token in ANSWER)])
    found["answer"] = engine.generate(PROMPT, max_new_tokens=3).to_dict()
    found["cost"] = predict(engine.plan(PROMPT), model_shape(engine.model.config), 4).to_dict()
    engine.close()
    engine = apb.Engine.from_model(model(), strategy=PASSING, compressor=STRIDE, mesh=mesh)
    picked: list[Any] = []
    engine.prefill(PROMPT, on_selection=lambda layer, block, positions: picked.append((layer, block, positions)))
    found["picked"] = picked
    engine.close()
    engine = apb.Engine.from_model(model(), strategy="full", decoding=DECODING, mesh=mesh)
    session = engine.prefill(PROMPT)
    found["nearest"] = torch.stack([session.logits, *(session.extend([token]) for token in ANSWER)])
    found["decode"] = engine.generate(PROMPT, max_new_tokens=3).decode
    engine.close()
    engine = apb.Engine.from_model(model(), byte_tokenizer(), mesh=mesh)
    settings = [Setting(METHOD), Setting(replace(PASSING, anchor_length=None), STRIDE)]
    settings.append(Setting(apb.methods.Full(), decoding=DECODING))
    runner = Runner(engine, "tiny", settings, Store())
    rows = list(runner.run(synthetic.items(byte_tokenizer(), "single", 700, 1, seed=3)))
    found["records"] = [record for row in rows for record in row]
    engine.close()
    return found
