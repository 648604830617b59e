"""Training of the small model: rows are what the prompt format says, and the fast forward is the model's own."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from apb.training.needle.data import KINDS, NeedleEncoder, make_batch, make_row
from apb.training.needle.model import Network, config
from apb.training.needle.train import Curriculum, Settings, learning_rate, train_needle

MODEL = Path(__file__).parents[2] / "models" / "needle"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_rows_are_text_that_the_tokenizer_would_cut_alike(tokenizer):
    """Rows are put together from cached pieces: the document's tokens must be those of its text."""
    encoder = NeedleEncoder(tokenizer)
    for seed in range(40):
        row = make_row(Random(seed), (272, 1088)[seed % 2], encoder, 0, 1, hard=seed % 4 > 0)
        assert len(row.ids) <= 1088
        assert row.ids[0] == 0
        first = min(first for first, _, kind in row.spans if KINDS[kind] != "reminder")
        text = tokenizer.decode(row.ids[1:first])
        assert "  " not in text
        for first, end, kind in row.spans:
            answer = tokenizer.decode(row.ids[first:end])
            assert answer.startswith(" ")
            assert KINDS[kind] == "reminder" or answer.endswith("</s>")


def test_batches_take_the_loss_at_answers_and_elsewhere(tokenizer):
    batch = make_batch(Random(1), 272, NeedleEncoder(tokenizer), 0, 1, hard=False, tokens=1088, selected=400)
    places, spans = batch["places"].tolist(), batch["spans"].tolist()
    assert len(set(places)) == len(places) == 400
    assert sorted(set(spans)) == list(range(len(batch["kinds"]) + 1))
    assert all((weight > 0) == (span > 0) for weight, span in zip(batch["weights"].tolist(), spans, strict=True))


def test_forward_over_packed_rows_is_the_models_own():
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(4096, 0, 1)).eval()
    ids = torch.randint(0, 4096, (2, 48))
    with torch.no_grad():
        nll, right = Network(model, compiled=False)(ids.flatten(), 48, torch.tensor([10, 60]))
        logits = model(ids).logits
    for place, row, column, value, hit in zip((10, 60), (0, 1), (10, 12), nll, right, strict=True):
        target = ids.flatten()[place + 1]
        assert torch.allclose(-logits[row, column].log_softmax(-1)[target], value, atol=1e-4)
        assert hit == (logits[row, column].argmax() == target)


def test_curriculum_waits_for_the_easy_kinds_and_for_its_least_time():
    curriculum = Curriculum(Settings(shortest=(0.1,) * 8, longest=(0.5,) * 8), seconds=100, last=7)
    curriculum.hard.value = 1
    assert curriculum.update(5, 99, 100) is None
    assert curriculum.update(9, 99, 100) is None  # learned, but too early
    assert "544" in curriculum.update(11, 99, 100)
    assert curriculum.update(30, 90, 100) is None
    assert "1088" in curriculum.update(62, 90, 100)  # not learned, but its time is up


def test_learning_rate_warms_up_and_falls():
    settings = Settings()
    assert learning_rate(settings, 0, 0.0) == pytest.approx(1e-3 / 200)
    assert learning_rate(settings, 1000, 0.5) == pytest.approx(1e-3)
    assert learning_rate(settings, 1000, 1.0) == pytest.approx(2e-5)


def test_training_runs_and_its_model_loads(tmp_path):
    small = Settings(tokens=272, selected=128, workers=0, stage=0)
    train_needle(tmp_path, 0.5, "cpu", 0, MODEL, small)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "final").dtype == torch.bfloat16
    assert (tmp_path / "training_log.json").exists()
    assert all(file.stat().st_size < 16 * 2**20 for file in (tmp_path / "final").iterdir())
