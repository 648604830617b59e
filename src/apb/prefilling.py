"""Prefill: a model, a strategy and the ranks, from a prompt to a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .decoding import EXACT
from .distributed.collectives import Group
from .distributed.mesh import Mesh
from .errors import InputError, at_least
from .hardware import Hardware, Stopwatch
from .hf import fusing, loading, offloading, placement, shares, supported, verifying
from .hf.attach import CLOSED, Attachment
from .hf.cache import ShardCache
from .hf.config import softcap
from .hf.counting import model_shape
from .hf.heads import HeadShape, load_heads
from .hf.modules import attention_modules
from .hf.tensor_parallel import splits_heads
from .kernels.attention import choose
from .passes import prefill
from .passes.prefill import Look, Progress
from .passes.tokens import Decoder
from .planning.fitting import check_answer
from .planning.plan import Plan
from .prompt import Prompt, check_tokens
from .reading import Reading
from .session import Session
from .strategies import OnSelection, make_strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Prefiller:
    """Plans and makes the passes of one model on these ranks; :class:`apb.Engine` is the one that users have.

    Attributes:
        reading: the strategy, the compressor and the decode method, and their limits.
        model, tokenizer: what reads; the tokenizer may be None.
        devices, device, dtype: of the model; the first of its devices.
        mesh, group: all processes, and the ranks that share a prompt's rows.
        head_group: the processes that hold other KV heads of the same rows, with this one.
        backend, fused, graphs: as in :meth:`apb.Engine.from_model`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        seed: int = 0,
        backend: str = "auto",
        mesh: Mesh | None = None,
        fused: bool | None = None,
        graphs: bool = True,
        verify: bool = True,
        decoder: Decoder | None = None,
        **reading: Any,
    ) -> None:
        """Make an engine; ``decoder``: another engine's on the same model and ranks, to be used if it decodes alike."""
        self.reading = Reading.of(seed=seed, **reading)
        supported.check_supported(model.config)
        placement.check_map(model)
        if verify:
            verifying.verify(model.config, model)
        self.devices = placement.devices(model)
        self.device, self.dtype = self.devices[0], model.dtype
        if self.reading.decoding.offloads:
            offloading.check(model.config, self.devices)
        shape = HeadShape.of(model.config)
        choose(backend, self.device, self.dtype, shape.head_dim, softcap(model.config))
        self.model = model
        self.tokenizer = tokenizer
        self.backend = backend
        self.mesh = mesh or Mesh.join(self.device, gpus=len(self.devices))
        self.graphs = graphs
        self.group: Group = self.mesh.sequence
        self.head_group: Group = self.mesh.tensor if splits_heads(model.config) else Group()
        layers = attention_modules(model)
        places = [placement.device_of(layer) for layer in layers]
        read_heads = partial(load_heads, **asdict(shape), dtype=self.dtype, devices=places)
        self._compressor = self.reading.compressor.loaded(read_heads)
        self._hardware = Hardware.of(self.device, self.dtype, self.mesh.everyone.size)
        self._split = placement.split(model, layers) if len(self.devices) > 1 else ()
        obstacle = fusing.why_not(self.device) or shares.why_not(model, self.mesh.tensor.size)
        if obstacle is None and len(self.devices) > 1:
            obstacle = "layers lie on several GPUs, with accelerate's hooks between them"
        if fused and obstacle:
            raise InputError(f"fused=True cannot be had here: {obstacle}.")
        self.fused = obstacle is None if fused is None else fused
        self._attachment = Attachment.of(model, self.fused, self.mesh.tensor)
        wanted = self._attachment, self.group, self.reading.decoding, backend
        if decoder is None or (decoder.attachment, decoder.group, decoder.decoding, decoder.backend) != wanted:
            decoder = None
        self._decoder_is_own = decoder is None
        self._decoder = decoder or Decoder(*wanted, self.graphs)
        self._closed = False

    def close(self) -> None:
        """Restore the model to its state before the engine, which cannot read afterwards; may be called again."""
        if not self._closed:
            self._closed = True
            if self._decoder_is_own:
                self._decoder.close()
            self._attachment.release()

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._closed

    def plan(self, prompt: Prompt, max_new_tokens: int = 1) -> Plan:
        """The plan by which :meth:`prefill` would read a prompt; InputError if it cannot be read."""
        plan = self.plan_of(self.reading.lengths(prompt), max_new_tokens, prompt.asked)
        check_tokens(prompt.token_ids, self._attachment.vocabulary)
        return plan

    def plan_of(self, lengths: tuple[int, int, int], max_new_tokens: int = 1, asked: bool = True) -> Plan:
        """As :meth:`plan`, of a prompt of these (prefix, document, query) tokens as it is read."""
        if self._closed:  # another engine may still hold the model
            raise RuntimeError(CLOSED)
        at_least("max_new_tokens", max_new_tokens, 0)
        tensor, split = self.mesh.tensor.size, self._split
        place = self.group.size, self.model.config, self._hardware
        return self.reading.plan(lengths, *place, max_new_tokens, tensor, split, asked)

    def demand(self, plan: Plan, max_new_tokens: int) -> tuple[int, int, int]:
        """Bytes beside the weights on the fullest rank: a plan's peak, its cache with the answer, and what is there."""
        return self.reading.demand(plan, self.model.config, self._hardware, max_new_tokens, self.mesh.tensor.size)

    def prefill(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 1,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        between: Callable[[], None] | None = None,
        on_selection: OnSelection | None = None,
        look: Look | None = None,
        room: int = 0,
    ) -> Session:
        """Read a prompt.

        Args:
            prompt: the prompt to read.
            max_new_tokens: tokens to reserve room for after the prompt; more may follow, at the cost of a copy.
            progress: called after each layer's attention.
            cancelled: called before every layer; with several ranks before every round, and rank 0's result counts
                for all. :class:`apb.Cancelled` is raised once it returns True.
            between: called before every layer, on every rank. Other threads may use the engine until it returns, if
                none works while another does, and all ranks go through the same passes in the same order.
            on_selection: called layer by layer with the pairs that each of this rank's blocks passes on.
            look: called with the strategy and each layer's q, k, v, after its attention, in every round.
            room: tokens to have storage for beyond those, whether or not the model has positions for them.
        """
        plan = self.plan(prompt, max_new_tokens)
        prompt = self.reading.arranged(prompt)
        strategy = make_strategy(plan, self.group, self._compressor, self.backend)
        strategy.on_selection = on_selection
        read = partial(prefill.read, self._attachment, prompt, strategy, self._everyone, room=max_new_tokens + room)
        cache, logits, seconds = read(progress=progress, cancelled=cancelled, between=between, look=look)
        return self.session(plan, prompt, cache, logits, seconds, max_new_tokens)

    def session(
        self, plan: Plan, prompt: Prompt, cache: ShardCache, logits: Tensor, seconds: float, max_new_tokens: int
    ) -> Session:
        """The session of a prompt (as it is read, in its arrangement) whose cache and logits are there already."""

        def read_again(length: int) -> tuple[ShardCache, Tensor]:
            strategy = make_strategy(plan, self.group, self._compressor, self.backend)
            read = partial(prefill.read, self._attachment, prompt, strategy, self._everyone)
            return read(room=max_new_tokens, length=length)[:2]

        return Session(
            plan,
            cache,
            logits,
            seconds,
            prompt.token_ids,
            self._decoder,
            max_new_tokens,
            read_again,
            self.mesh.tensor,
            None if self.reading.allow_extrapolation else loading.position_limit(self.model.config),
        )

    def read_on(self, cache: ShardCache, token_ids: Sequence[int], max_new_tokens: int) -> tuple[Tensor, float]:
        """Read tokens after what a cache holds, exactly, whatever the decode method, as a prefill reads its question.

        Returns:
            logits: (vocab,) fp32 of the next token.
            seconds: time that this rank took.
        """
        watch = Stopwatch(self.device)
        exact = Decoder(self._attachment, self.group, EXACT, self.backend, graphs=False)
        return exact.start(cache, max_new_tokens).read(token_ids), watch.seconds()

    def inspect(self, prompt: Prompt, positions: Sequence[int], look: Look) -> tuple[Plan, Tensor]:
        """Read a prompt on one device, in one round, without a cache, and inspect every layer's attention.

        Args:
            prompt: the prompt to read.
            positions: positions in the prompt whose next-token logits are returned.
            look: as in :meth:`prefill`.

        Returns:
            plan: how it was read.
            logits: (positions, vocab) fp32.
        """
        if self.reading.propagation is not None:
            raise InputError(
                "Looking into a prefill takes all rows in all layers; make the engine without propagation."
            )
        if self.group.size > 1:
            raise InputError(f"Looking into a prefill takes one rank, and there are {self.group.size}; use one.")
        plan = replace(self.plan(prompt), rounds=1)
        prompt = self.reading.arranged(prompt)
        strategy = make_strategy(plan, self.group, self._compressor, self.backend)
        return plan, prefill.inspect(self._attachment, prompt, strategy, positions, look)

    def check(self, plan: Plan, token_ids: Sequence[int], max_new_tokens: int) -> None:
        """InputError if tokens that a plan ends with are not the model's, or do not fit with an answer."""
        at_least("max_new_tokens", max_new_tokens, 0)
        allowed = self.reading.allow_extrapolation
        tensor = self.mesh.tensor.size
        loading.check_fit(self.model.config, plan, max_new_tokens, allowed, tensor)
        shape = replace(model_shape(self.model.config).shared(tensor), split=self._split)
        check_answer(plan.total, shape, self._hardware, max_new_tokens)
        check_tokens(token_ids, self._attachment.vocabulary)

    def turns_otherwise(self, start: int, total: int) -> bool:
        """True if RoPE rotates a text of ``total`` tokens by other angles than its first ``start`` tokens alone."""
        return any(start <= length < total for length in self._attachment.switches)

    def device_of(self, layer: int) -> torch.device:
        """Where a layer's keys, values and states are."""
        return self._attachment.device_of(layer)

    @property
    def _everyone(self) -> Group:
        """All processes at work on a prompt."""
        return self.group if self.mesh.devices is None else self.mesh.everyone
