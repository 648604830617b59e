"""The engine: a model, a strategy and the ranks, from a prompt to a session to an answer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distributed.collectives import Group
from .distributed.launch import check_split, local_device
from .distributed.mesh import Mesh
from .errors import InputError, at_least
from .generation import Detokenizer, Generation, Sampling, decode
from .hardware import Hardware, Stopwatch, fingerprint, peak_bytes
from .hf import fusing, loading, placement, verifying
from .hf.attach import CLOSED, Attachment, attention_modules
from .hf.cache import ShardCache
from .hf.config import softcap
from .hf.heads import HeadShape, load_heads
from .hf.sampling import left_out
from .hf.tensor_parallel import check_shards
from .kernels.attention import choose
from .layers.base import AttentionInput
from .passes import prefill
from .passes.prefill import Progress
from .passes.tokens import Decoder
from .planning.plan import Plan
from .prompt import Prompt, check_tokens
from .reading import Reading
from .session import Session
from .strategies import OnSelection, Strategy, make_strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_OF_READING = ("backend", "fused", "graphs", "verify")


class Engine:
    """Reads prompts with one strategy and answers. Make one with :meth:`from_pretrained` or :meth:`from_model`.

    Under ``torchrun`` every rank makes the same engine and the same calls, and gets the same results.
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
        **reading: Any,
    ) -> None:
        self.reading = Reading.of(seed=seed, **reading)
        loading.check_supported(model.config)
        placement.check_map(model)
        if verify:
            verifying.verify(model.config, model)
        self.devices = placement.devices(model)
        self.device, self.dtype = self.devices[0], model.dtype
        shape = HeadShape.of(model.config)
        choose(backend, self.device, self.dtype, shape.head_dim, softcap(model.config))
        self.model = model
        self.tokenizer = tokenizer
        self.backend = backend
        self.mesh = mesh or Mesh.join(self.device, gpus=len(self.devices))
        self.graphs = graphs and self.mesh.devices is None
        self.group: Group = self.mesh.sequence
        layers = attention_modules(model)
        places = [placement.device_of(layer) for layer in layers]
        read_heads = partial(load_heads, **asdict(shape), dtype=self.dtype, devices=places)
        self._compressor = self.reading.compressor.loaded(read_heads)
        self._hardware = Hardware.of(self.device, self.dtype, self.mesh.everyone.size)
        self._split = placement.split(model, layers) if len(self.devices) > 1 else ()
        obstacle = fusing.why_not(self.device) or ("weights are shared" if self.mesh.devices else None)
        if obstacle is None and len(self.devices) > 1:
            obstacle = "layers lie on several GPUs, with accelerate's hooks between them"
        if fused and obstacle:
            raise InputError(f"fused=True cannot be had here: {obstacle}.")
        self.fused = obstacle is None if fused is None else fused
        self._attachment = Attachment.of(model, self.fused)
        self._decoder = Decoder(self._attachment, self.group, self.reading.decoding, backend, self.graphs)
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel: int = 1,
        quantization: Any = None,
        gpus_per_rank: int = 1,
        **options: Any,
    ) -> Engine:
        """Load a checkpoint folder, GGUF file or hub id.

        Args:
            model: folder, file (any part of one in several) or id.
            dtype: "bfloat16", "float16" or "float32"; bfloat16 on GPUs and float32 on the CPU if None.
            device: "cpu" or "cuda"; a GPU if there is one, by default.
            trust_remote_code: run code that comes with the checkpoint (transformers' meaning).
            quantization: a quantization configuration of transformers, such as ``TorchAoConfig``; not needed for one
                that comes with the checkpoint.
            tensor_parallel: number of processes that make up a rank and share its weights.
            gpus_per_rank: GPUs over which accelerate splits the layers of one rank, whole layers on each; they work
                one after the other. For models too large for one GPU.
            options: see :meth:`from_model`.
        """
        Reading.of(**{name: value for name, value in options.items() if name not in _NOT_OF_READING})
        config = loading.load_config(model, trust_remote_code)
        loading.check_supported(config)
        if options.get("verify", True):  # before its weights are read
            verifying.verify(config)
        place = local_device(loading.pick_device(device), gpus_per_rank)
        check_split(place, gpus_per_rank, tensor_parallel)
        weights = loading.pick_dtype(dtype, place)
        tokenizer = loading.load_tokenizer(model, trust_remote_code)
        check_shards(config, tensor_parallel)
        mesh = Mesh.join(place, tensor_parallel, gpus_per_rank)
        loaded = loading.load_model(model, weights, place, trust_remote_code, mesh.devices, quantization, gpus_per_rank)
        return cls(loaded, tokenizer, mesh=mesh, **options)

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
    ) -> Engine:
        """Use a model already in memory, in its dtype and on its device, until :meth:`close`.

        Layers may be on several GPUs, as placed by accelerate (``device_map`` of transformers).

        Options:
            strategy, compressor, decoding, rounds, allow_extrapolation, approximate, seed, and the options of
                strategies, compressors and decode methods that are given by name: as in
                :meth:`apb.reading.Reading.of`.
            backend: attention back-end, "auto", "torch" or "reference".
            fused: compile norms, activations and rotary embeddings, which takes some seconds on their first run, and
                use a kernel of this package for linear layers with a single row; None does so on GPUs that can.
            graphs: decode by CUDA graphs where they can be captured, with the same numbers out. They are captured once,
                and later changes of the model have no effect on them.
            verify: compare a short prompt with transformers' own pass, on a small random copy, unless that has been
                done for models of this kind; InputError if the results differ.
        """
        return cls(model, tokenizer, **options)

    def close(self) -> None:
        """Restore the model to its state before the engine, which cannot read afterwards; may be called again."""
        if not self._closed:
            self._closed = True
            self._decoder.close()
            self._attachment.release()

    def plan(self, prompt: Prompt, max_new_tokens: int = 1) -> Plan:
        """The plan by which :meth:`prefill` would read a prompt; InputError if it cannot be read."""
        if self._closed:  # another engine may still hold the model
            raise RuntimeError(CLOSED)
        at_least("max_new_tokens", max_new_tokens, 0)
        plan = self.reading.plan(
            prompt,
            self.group.size,
            self.model.config,
            self._hardware,
            max_new_tokens,
            self.mesh.tensor.size,
            self._split,
        )
        check_tokens(prompt.token_ids, self._attachment.vocabulary)
        return plan

    def prefill(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 1,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        on_selection: OnSelection | None = None,
    ) -> Session:
        """Read a prompt.

        Args:
            prompt: the prompt to read.
            max_new_tokens: tokens to reserve room for after the prompt; more may follow, at the cost of a copy.
            progress: called after each layer's attention.
            cancelled: called before every layer; with several ranks before every round, and rank 0's result counts
                for all. :class:`apb.Cancelled` is raised once it returns True.
            on_selection: called layer by layer with the pairs that each of this rank's blocks passes on.
        """
        plan = self.plan(prompt, max_new_tokens)
        prompt = self.reading.arranged(prompt)
        strategy = make_strategy(plan, self.group, self._compressor, self.backend)
        strategy.on_selection = on_selection
        read = partial(prefill.read, self._attachment, prompt, everyone=self._everyone, max_new_tokens=max_new_tokens)
        cache, logits, seconds = read(strategy, progress=progress, cancelled=cancelled)

        def read_again(length: int) -> tuple[ShardCache, Tensor]:
            return read(make_strategy(plan, self.group, self._compressor, self.backend), length=length)[:2]

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

    def inspect(
        self, prompt: Prompt, positions: Sequence[int], look: Callable[[Strategy, AttentionInput], None]
    ) -> tuple[Plan, Tensor]:
        """Read a prompt on one device, in one round, without a cache, and inspect every layer's attention.

        Args:
            prompt: the prompt to read.
            positions: positions in the prompt whose next-token logits are returned.
            look: called with the strategy and each layer's q, k, v, after its attention.

        Returns:
            plan: how it was read.
            logits: (positions, vocab) fp32.
        """
        if self.group.size > 1:
            raise InputError(f"Looking into a prefill takes one rank, and there are {self.group.size}; use one.")
        plan = replace(self.plan(prompt), rounds=1)
        prompt = self.reading.arranged(prompt)
        strategy = make_strategy(plan, self.group, self._compressor, self.backend)
        return plan, prefill.inspect(self._attachment, prompt, strategy, positions, look)

    def generate(
        self,
        prompt: Prompt,
        *,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        **sampling: Any,
    ) -> Generation:
        """Read a prompt and answer it; ``sampling`` as in :class:`apb.generation.Sampling`.

        ``progress`` and ``cancelled`` as in :meth:`prefill`; rank 0's ``cancelled`` is also called before every token.
        """
        tokens = self._tokens(prompt, Sampling(**sampling), progress, cancelled)
        while True:
            try:
                next(tokens)
            except StopIteration as stop:
                return stop.value

    def stream(
        self,
        prompt: Prompt,
        *,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        **sampling: Any,
    ) -> Generator[str, None, Generation]:
        """As :meth:`generate`, but yield the answer's text in pieces, which joined are the whole text.

        The generator's return value is the :class:`Generation`.
        """
        if self.tokenizer is None:
            raise InputError("Streaming text needs a tokenizer; give one to Engine.from_model.")
        return self._tokens(prompt, Sampling(**sampling), progress, cancelled)

    def _tokens(
        self,
        prompt: Prompt,
        sampling: Sampling,
        progress: Progress | None,
        cancelled: Callable[[], bool] | None,
    ) -> Generator[str, None, Generation]:
        """Yield pieces of text as tokens are chosen (empty ones left out); return the Generation."""
        session = self.prefill(prompt, max_new_tokens=sampling.max_new_tokens, progress=progress, cancelled=cancelled)
        watch = Stopwatch(self.device)
        detokenizer = Detokenizer(self.tokenizer) if self.tokenizer is not None else None
        token_ids: list[int] = []
        text, ended = "", False
        for token, ended in decode(session, sampling, self.model, self._everyone, cancelled, self.tokenizer):
            token_ids.append(token)
            if detokenizer is not None:
                last = ended or len(token_ids) == sampling.max_new_tokens
                piece = detokenizer.add(token, last)
                text += piece
                if piece:
                    yield piece
        result = self._result(session, text, token_ids, ended, watch.seconds())
        result.notes += left_out(self.model, sampling, self.tokenizer)
        return result

    def _result(self, session: Session, text: str, token_ids: list[int], ended: bool, decode_s: float) -> Generation:
        # The slowest and the largest rank count, and every rank reports the same.
        largest = max(map(peak_bytes, self.devices))
        figures = torch.tensor(
            [session.timing["prefill_s"], decode_s, largest, session.share], dtype=torch.float64, device=self.device
        )
        every = self._everyone.all_gather(figures).wait()
        prefill_s, decode_s, peak, _ = every.amax(0).tolist()
        share = float(every[:, 3].mean())
        return Generation(
            text=text,
            token_ids=token_ids,
            finish_reason="stop" if ended else "length",
            strategy=session.plan.strategy,
            exact=session.plan.exact,
            plan=session.plan.to_dict(),
            timing={
                "prefill_s": prefill_s,
                "decode_s": decode_s,
                "decode_tokens_per_s": len(token_ids) / decode_s if decode_s else 0.0,
            },
            memory={"peak_bytes": int(peak)},
            fingerprint=fingerprint(self.device, self.dtype),
            decode={
                "method": session.decoding.name,
                "exact": session.decoding.exact or share >= 1,
                "share": share,
            },
            prompt_tokens=session.plan.total,
            choice=session.plan.reason,
        )

    @property
    def _everyone(self) -> Group:
        """All processes at work on a prompt."""
        return self.group if self.mesh.devices is None else self.mesh.everyone
