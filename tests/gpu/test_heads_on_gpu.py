"""Retaining heads trained on a GPU: labels as in fp64, and a run that was interrupted ends like one that was not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from apb.distributed.collectives import Group
from apb.training.heads.data import Samples
from apb.training.heads.labels import answer_attention
from apb.training.heads.train import HeadTrainer, Report, Settings
from byte_checkpoint import byte_tokenizer
from models import tiny_model

pytestmark = pytest.mark.gpu


def test_labels():
    """From bf16 queries and keys the labels are fp64's to 1e-4."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(*shape, generator=generator).cuda().bfloat16() for shape in ((40, 8, 64), (5000, 2, 64)))
    logits = torch.einsum("qgid,kgd->gqik", q.double().unflatten(1, (2, 4)), k.double()) / 8
    torch.testing.assert_close(answer_attention(q, k, 0.125, 10_000).double(), logits.amax((1, 2)), rtol=0, atol=1e-4)


def test_interrupted(tmp_path):
    """bf16 on the GPU: stopped at step 40 and started again, the heads are bit for bit those of one run."""
    path = tmp_path / "data.jsonl"
    lines = [{"document": f"{i} lamps were lit. " * 40, "query": "How many?", "answer": str(i)} for i in range(9)]
    path.write_text("".join(json.dumps(fields) + "\n" for fields in lines))

    def trainer(name: str) -> HeadTrainer:
        model = tiny_model("llama", heads=4, kv_heads=2, head_dim=64, vocab=258).cuda().bfloat16()
        settings = Settings(hidden=256, steps=100, max_length=4096)
        return HeadTrainer(model, Samples(path, byte_tokenizer(), 4096), tmp_path / name, settings, Group())

    def stop(report: Report) -> None:
        if report.step == 60:
            raise KeyboardInterrupt

    whole = load_file(trainer("whole.safetensors").run())
    with pytest.raises(KeyboardInterrupt):
        trainer("stopped.safetensors").run(stop, checkpoint_every=40)
    resumed = load_file(trainer("stopped.safetensors").run())
    assert {value.dtype for value in whole.values()} == {torch.bfloat16}
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
