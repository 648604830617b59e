"""Training of retaining heads: the model is frozen, and each layer's head learns during one forward of a sample."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...compressors import Head
from ...distributed.collectives import Group
from ...errors import InputError, at_least
from ...generation import check_seed
from ...hf.attach import Attachment
from ...hf.heads import HeadShape, save_heads
from ...hf.loading import position_limit
from ...hf.supported import check_supported
from ...kernels.attention import Segment, attention
from ...layers.base import AttentionInput
from ...layers.recurrent import from_the_start
from .data import Example, Samples, ahead, order
from .labels import answer_attention, head_loss, top_overlap

REPORT_EVERY = 20
CLIP = 0.5
"""Gradients are clipped to this absolute value, element by element."""
WARMUP = 300
"""Steps of learning-rate warm-up, but at most a tenth of all steps."""


@dataclass(frozen=True)
class Settings:
    """The training recipe; the defaults are Locret's, as APB uses it.

    Attributes:
        hidden: width of a head's hidden layer.
        steps: number of updates; the learning rate warms up over ``WARMUP`` steps, then falls linearly to 0.
        batch_size: samples per update, over all ranks.
        max_length: maximum tokens of a sample; longer ones lose the middle of their prompt.
        learning_rate: peak learning rate of AdamW (betas 0.9 and 0.95, no weight decay).
        seed: seed of the initial weights and of the order of the samples.

    Raises:
        InputError: a value is out of range.
    """

    hidden: int = 1024
    steps: int = 3000
    batch_size: int = 1
    max_length: int = 10240
    learning_rate: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, limit in {"hidden": 1, "steps": 1, "batch_size": 1, "max_length": 4}.items():
            at_least(name.replace("_", " "), getattr(self, name), limit)
        if not 0 < self.learning_rate < 1:
            raise InputError(f"The learning rate must be above 0 and below 1, not {self.learning_rate}.")
        check_seed(self.seed)

    def rate(self, step: int) -> float:
        """Learning rate of ``step``, counted from 0."""
        warmup = min(WARMUP, max(1, self.steps // 10))
        return self.learning_rate * min((step + 1) / warmup, (self.steps - step) / max(1, self.steps - warmup))


@dataclass(frozen=True)
class Report:
    """Progress: mean loss and mean :func:`top_overlap` since the last report, and seconds since the start."""

    step: int
    steps: int
    loss: float
    overlap: float
    seconds: float


class HeadTrainer:
    """Trains the heads of one model; every rank holds all heads and reads its share of each batch.

    A checkpoint (weights, optimizer, step) is kept as ``OUT.checkpoint`` until ``OUT`` is written. A trainer with the
    same options resumes from it; on the same device and number of ranks the result is bit for bit that of an
    uninterrupted run.

    Raises:
        InputError: the batch does not divide by the ranks, or the model is not supported or has too few positions.
    """

    def __init__(
        self, model: PreTrainedModel, samples: Samples, out: str | Path, settings: Settings, group: Group
    ) -> None:
        if settings.batch_size % group.size:
            raise InputError(
                f"A batch of {settings.batch_size} samples cannot be divided evenly among {group.size} ranks; "
                f"make it a multiple of {group.size}."
            )
        check_supported(model.config)
        check_positions(model.config, settings)
        self.samples, self.settings, self.group = samples, settings, group
        self.out = Path(out)
        self.path = self.out.with_name(self.out.name + ".checkpoint")
        self.shape = HeadShape.of(model.config)
        self.attachment = Attachment.of(model.requires_grad_(False))
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.weights = first_weights(self.shape, settings, self.device)
        self.optimizer = torch.optim.AdamW(self.weights.values(), betas=(0.9, 0.95), weight_decay=0.0)
        self.done = 0
        self._sums = torch.zeros(2, device=self.device)
        self._identity = {
            **asdict(settings),
            "data": samples.digest,
            "model": str(model.config.name_or_path),
            "shape": asdict(self.shape),
        }

    def run(self, report: Callable[[Report], None] = lambda _: None, checkpoint_every: int = 100) -> Path:
        """Train to the end and write the heads, in the model's dtype; returns their path.

        Args:
            report: called every ``REPORT_EVERY`` steps and at the end.
            checkpoint_every: steps between checkpoints.

        Raises:
            InputError: the checkpoint is unreadable, of another training, or not the same on all ranks; a sample is
                invalid; or a layer has a sliding window, capped logits or sinks.
        """
        self._resume()
        examples = self._examples()
        since, start = self.done, time.perf_counter()
        try:
            while self.done < self.settings.steps:
                self.step([next(examples) for _ in range(self.settings.batch_size // self.group.size)])
                last = self.done == self.settings.steps
                if last or self.done % REPORT_EVERY == 0:
                    loss, overlap = (self.group.sum(self._sums) / (self.done - since)).tolist()
                    report(Report(self.done, self.settings.steps, loss, overlap, time.perf_counter() - start))
                    since = self.done
                    self._sums.zero_()
                if last or self.done % checkpoint_every == 0:
                    self._save()
        finally:
            self.attachment.release()
        if self.group.rank == 0:
            save_heads(self.out, [self._head(layer) for layer in range(self.shape.layers)])
            self.path.unlink()
        self.group.barrier()
        return self.out

    def step(self, examples: list[Example]) -> None:
        """One update with this rank's samples of a batch."""
        for example in examples:
            self._learn(example)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.done)
        for weight in self.weights.values():
            assert weight.grad is not None, "every layer called attend"
            self.group.sum(weight.grad)
        nn.utils.clip_grad_value_(self.weights.values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    def _learn(self, example: Example) -> None:
        """Forward a sample with full attention, and accumulate every head's gradient within its layer."""
        prompt = len(example.prompt)
        ids = torch.tensor([example.prompt + example.answer], device=self.device)
        positions = torch.arange(ids.shape[1], device=self.device).unsqueeze(0)

        def attend(layer: AttentionInput) -> Tensor:
            assert layer.before_rope is not None, "requested below"
            if not layer.plain:
                raise InputError("Heads need plain attention to train: no sliding windows, capped logits or sinks.")
            labels = answer_attention(layer.q[prompt:], layer.k[:prompt], layer.scale)
            with torch.enable_grad():
                predicted = self._head(layer.index)(layer.before_rope[:prompt])
                loss = head_loss(predicted, labels) / self.settings.batch_size
                loss.backward()
            share = self.settings.batch_size * self.shape.layers
            overlap = top_overlap(predicted.detach(), labels)
            self._sums += torch.stack((loss.detach() / self.shape.layers, overlap / share))
            return attention(layer.q, [Segment(layer.k, layer.v, causal=True)], layer.scale)[0]

        with torch.no_grad(), self.attachment.running(attend, from_the_start, ids.shape[1], before_rope=True):
            self.attachment.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)

    def _head(self, layer: int) -> Head:
        """A layer's head cast to the model's dtype; gradients flow back to the fp32 weights."""
        return Head(*(self.weights[f"{layer}.{name}"].to(self.dtype) for name in ("fc1", "fc2")))

    def _examples(self) -> Iterator[Example]:
        """This rank's samples from the current step on."""
        batch, share = self.settings.batch_size, self.settings.batch_size // self.group.size
        indices = order(len(self.samples), self.settings.seed, self.done * batch)
        mine = (index for place, index in enumerate(indices) if place % batch // share == self.group.rank)
        return ahead(self.samples, mine)

    def _save(self) -> None:
        """Write the checkpoint atomically, on rank 0."""
        if self.group.rank != 0:
            return
        state = {
            "identity": self._identity,
            "step": self.done,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        part = self.path.with_name(self.path.name + ".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def _resume(self) -> None:
        """Resume from the checkpoint if there is one; InputError if it is of another training."""
        state = self._load() if self.path.is_file() else None
        step = torch.tensor(0 if state is None else state["step"], device=self.device)
        steps = self.group.all_gather(step.unsqueeze(0)).wait().flatten().tolist()
        if len(set(steps)) > 1:
            raise InputError(
                f"The ranks find different checkpoints at {str(self.path)!r} (steps {', '.join(map(str, steps))}); "
                "write to a folder that all of them share."
            )
        if state is None:
            return
        self.done = state["step"]
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _load(self) -> dict[str, Any]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found = state["identity"]
        except Exception as error:  # the reader may raise anything on malformed bytes
            raise InputError(f"The checkpoint {str(self.path)!r} cannot be read; delete it to start over.") from error
        for name, value in self._identity.items():
            if found.get(name) != value:
                raise InputError(
                    f"The checkpoint {str(self.path)!r} is of another training: its {name.replace('_', ' ')} was "
                    f"{found.get(name)} and is now {value}; give the same options, or delete it to start over."
                )
        return state


def positions(config: Any) -> int:
    """Maximum number of positions of a model; sys.maxsize if its configuration sets none."""
    return position_limit(config) or sys.maxsize


def check_positions(config: Any, settings: Settings) -> None:
    """Raise InputError if samples may be longer than the model's positions."""
    if settings.max_length > positions(config):
        raise InputError(
            f"Samples of up to {settings.max_length} tokens are longer than the model's {positions(config)} positions; "
            "cut them to that (--max-length)."
        )


def first_weights(shape: HeadShape, settings: Settings, device: torch.device) -> dict[str, nn.Parameter]:
    """fc1 and fc2 of every layer in fp32, initialised like ``torch.nn.Linear``; the same on every device."""
    weights = {}
    generator = torch.Generator().manual_seed(settings.seed)
    for layer in range(shape.layers):
        for name, rows, columns in (
            ("fc1", settings.hidden, shape.features),
            ("fc2", shape.kv_heads, settings.hidden),
        ):
            bound = columns**-0.5
            drawn = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
            weights[f"{layer}.{name}"] = nn.Parameter(drawn.to(device))
    return weights
