"""Training of the small model: a curriculum of lengths and kinds, scheduled by wall-clock time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from .data import BATCH, KINDS, LENGTHS, SELECTED, Batches, loader
from .model import Network, config, load, save
from .tokenizer import VOCABULARY, train_tokenizer

EASY = [KINDS.index("single"), KINDS.index("multikey")]


@dataclass(frozen=True)
class Settings:
    """Training settings; smaller ones allow a trial run on a small machine."""

    tokens: int = BATCH
    selected: int = SELECTED
    workers: int = 8
    stage: int = 0
    """Index of the first length."""
    rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.35
    """Share of the time, at the end, over which the learning rate falls to `floor` times its peak."""
    floor: float = 0.02
    language: float = 0.1
    """Loss weight of language modelling; answers have weight 1."""
    shortest: tuple[float, ...] = (0.0, 0.02, 0.07, 0.08, 0.08, 0.09, 0.18, 0.0)
    longest: tuple[float, ...] = (0.16, 0.07, 0.10, 0.10, 0.09, 0.09, 0.18, 1.0)
    """`shortest` and `longest`: minimum and maximum share of the time per length, regardless of accuracy."""
    pass_mark: float = 0.97
    checkpoint: float = 110.0
    """Seconds between checkpoints."""


class Curriculum:
    """Advances to the next length once the easy retrieval kinds are learned or the length's time is up."""

    def __init__(self, settings: Settings, seconds: float, last: int) -> None:
        self.settings, self.seconds, self.last = settings, seconds, last
        self.stage = multiprocessing.Value("i", min(settings.stage, last))
        self.hard = multiprocessing.Value("i", int(settings.stage > 1))
        self.since = 0.0
        self.recent: deque[tuple[float, float]] = deque(maxlen=2)

    def accuracy(self) -> float:
        """Share of right answers for the easy kinds at the current length, over about 20 steps."""
        right, total = (sum(pair[i] for pair in self.recent) for i in (0, 1))
        return right / total if len(self.recent) == 2 and total else 0.0

    def update(self, elapsed: float, right: float, total: float) -> str | None:
        """Add the answers of ten steps; returns a description of the change, or None."""
        self.recent.append((right, total))
        stage = self.stage.value
        spent = (elapsed - self.since) / self.seconds
        accuracy = self.accuracy()
        if not self.hard.value and stage >= 1 and (accuracy > 0.95 or elapsed > 0.28 * self.seconds):
            self.hard.value = 1
            return f"all kinds from here on (accuracy {accuracy:.3f})"
        passed = accuracy > self.settings.pass_mark and spent >= self.settings.shortest[stage]
        if stage < self.last and (passed or spent >= self.settings.longest[stage]):
            self.stage.value = stage + 1
            self.since = elapsed
            self.recent.clear()
            return f"length {LENGTHS[stage + 1]} from here on (accuracy {accuracy:.3f})"
        return None


def learning_rate(settings: Settings, step: int, share: float) -> float:
    """Warm-up by steps, then constant, then linear decay over the last part of the time."""
    fall = max(0.0, (share - (1 - settings.decay)) / settings.decay)
    return settings.rate * min(1.0, (step + 1) / settings.warmup) * max(settings.floor, 1 - (1 - settings.floor) * fall)


def optimizer_of(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, but not on embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.97), fused=model.device.type == "cuda")


class Trainer:
    """State of a training run: network, optimizer, curriculum, counts of right answers, log."""

    def __init__(
        self, out: Path, seconds: float, device: str, seed: int, init: Path | None, settings: Settings
    ) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.manual_seed(seed)
        self.out, self.seconds, self.settings = out, seconds, settings
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(init) if init else train_tokenizer()
        last = max(i for i, length in enumerate(LENGTHS) if settings.tokens % length == 0)
        self.curriculum = Curriculum(settings, seconds, last)
        sizes = {"tokens": settings.tokens, "selected": settings.selected}
        batches = Batches(self.tokenizer, seed, self.curriculum.stage, self.curriculum.hard, **sizes)
        # Workers are forked before the GPU is touched.
        self.batches = iter(loader(batches, settings.workers, pin=device != "cpu"))
        shape = config(VOCABULARY, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.model = load(init, device) if init else LlamaForCausalLM(shape).to(device)  # type: ignore[arg-type]
        self.network = Network(self.model, compiled=device != "cpu")
        self.optimizer = optimizer_of(self.model, settings)
        self.device = torch.device(device)
        self.counts = torch.zeros(len(LENGTHS), len(KINDS), 2, device=device)
        self.log: list[dict[str, Any]] = []
        self.stopped = False
        self.saved = 0
        self.waited = 0.0

    def step(self, number: int, share: float) -> torch.Tensor:
        """One update; returns the losses of answers and of language modelling (2,), on the device."""
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        length = batch.pop("length")
        tokens, places, spans, kinds, weights = (batch[k].to(self.device, non_blocking=True) for k in batch)
        tokens, spans = tokens.long(), spans.long()
        nll, right = self.network(tokens, length, places.long())
        answer = spans > 0
        known = (nll * weights).sum() / weights.sum().clamp(min=1)
        rest = nll.where(~answer, 0).sum() / (~answer).sum().clamp(min=1)
        loss = known + self.settings.language * rest
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate(self.settings, number, share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            wrong = torch.zeros(len(kinds) + 1, device=self.device).index_add_(0, spans, (~right).float())[1:]
            counts = self.counts[LENGTHS.index(length)]
            counts.index_add_(0, kinds, torch.stack(((wrong == 0).float(), torch.ones_like(wrong)), dim=-1))
        return torch.stack((known.detach(), rest.detach()))

    def checkpoint(self, name: str | None = None) -> None:
        """Save the model as `name` or as a numbered checkpoint, and keep the last two of those."""
        self.saved += 1
        target = self.out / (name or f"checkpoint-{self.saved:03}")
        save(self.model, self.tokenizer, target.with_suffix(".part"))
        shutil.rmtree(target, ignore_errors=True)
        target.with_suffix(".part").rename(target)
        for old in sorted(self.out.glob("checkpoint-???"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def note(self, entry: dict[str, Any]) -> None:
        """Append an entry to the log and print it."""
        self.log.append(entry)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)

    def run(self) -> None:
        """Train until the time is up or SIGTERM arrives."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))
        start = time.perf_counter()
        number, saved, mark = 0, start, (start, 0)
        taken = self.counts.cpu()
        shown = taken.clone()
        while not self.stopped and (elapsed := time.perf_counter() - start) < self.seconds:
            losses = self.step(number, elapsed / self.seconds)
            number += 1
            if number % 10:
                continue
            counts = self.counts.cpu()
            stage = self.curriculum.stage.value
            right, total = (counts - taken)[stage, EASY].sum(0).tolist()
            taken = counts
            changed = self.curriculum.update(elapsed, right, total)
            if changed:
                self.note({"step": number, "seconds": round(elapsed, 1), "change": changed})
            if number % 50 == 0:
                fresh = counts - shown
                shown = counts
                now = time.perf_counter()
                at = {
                    KINDS[kind]: round(100 * (fresh[stage, kind, 0] / fresh[stage, kind, 1]).item(), 1)
                    for kind in range(len(KINDS))
                    if fresh[stage, kind, 1]
                }
                entry = {
                    "step": number,
                    "seconds": round(elapsed, 1),
                    "length": LENGTHS[stage],
                    "rate": self.optimizer.param_groups[0]["lr"],
                    "loss": [round(value, 4) for value in losses.tolist()],
                    "accuracy": at,
                    "tokens_per_s": round((number - mark[1]) * self.settings.tokens / (now - mark[0])),
                    "waited_s": round(self.waited, 1),
                }
                if not all(value == value for value in losses.tolist()):
                    raise FloatingPointError(f"the loss is not a number at step {number}")
                self.note(entry)
                mark = (now, number)
                if now - saved > self.settings.checkpoint:
                    self.checkpoint()
                    saved = now
        self.note({"step": number, "seconds": round(time.perf_counter() - start, 1), "change": "done"})
        self.checkpoint("final")
        summary = {"settings": asdict(self.settings), "seconds": self.seconds, "steps": number, "log": self.log}
        (self.out / "training_log.json").write_text(json.dumps(summary, indent=1) + "\n")


def train_needle(
    out: Path, seconds: float, device: str, seed: int, init: Path | None, settings: Settings | None = None
) -> None:
    """Train the small model for `seconds` seconds and write it to `out/final`, with checkpoints and log beside it.

    Args:
        out: folder for checkpoints, log and the final model.
        seconds: wall time of the training loop; all schedules are shares of it.
        device: "cuda" or "cpu".
        seed: seed of weights and data.
        init: folder of a saved model to continue from (its tokenizer is kept), or None.
        settings: batch, rates and curriculum.
    """
    trainer = Trainer(Path(out), seconds, device, seed, init, settings or Settings())
    trainer.run()
