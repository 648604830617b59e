"""The engine: a model, a strategy and the ranks, from a prompt to a session to an answer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .answering import Answering, whole
from .asking import Asking, OfText, OfTokens
from .decoding import EXACT
from .distributed.collectives import Group
from .distributed.mesh import Mesh
from .document import ROOM, Document, State
from .errors import InputError, at_least
from .generation import Generation, Sampling
from .hardware import Hardware, Stopwatch
from .hf import fusing, loading, placement, verifying
from .hf.attach import CLOSED, Attachment, attention_modules
from .hf.cache import ShardCache
from .hf.config import softcap
from .hf.heads import HeadShape, load_heads
from .hf.opening import Checkpoint
from .kernels.attention import choose
from .layers.base import AttentionInput
from .passes import prefill
from .passes.prefill import Progress
from .passes.tokens import Decoder
from .planning.plan import Plan
from .prompt import Prompt, check_tokens
from .reading import AUTO, Reading
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
            quantization: "fp8", in which linear layers multiply at twice the rate on GPUs that have it; or a
                quantization configuration of transformers, such as ``TorchAoConfig``, not needed for one that comes
                with the checkpoint.
            tensor_parallel: number of processes that make up a rank and share its weights.
            gpus_per_rank: GPUs over which accelerate splits the layers of one rank, whole layers on each; they work
                one after the other. For models too large for one GPU.
            options: see :meth:`from_model`.
        """
        Reading.of(**{name: value for name, value in options.items() if name not in _NOT_OF_READING})
        place = tensor_parallel, quantization, gpus_per_rank
        checkpoint = Checkpoint(model, dtype, device, trust_remote_code, *place)
        loaded, tokenizer, mesh = checkpoint.opened(options.get("verify", True))
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

    def demand(self, plan: Plan, max_new_tokens: int) -> tuple[int, int, int]:
        """Bytes beside the weights on the fullest rank: a plan's peak, its cache with the answer, and what is there."""
        return self.reading.demand(plan, self.model.config, self._hardware, max_new_tokens, self.mesh.tensor.size)

    def exactly(self) -> Engine:
        """An engine on the same model and ranks that reads exactly; this one, if it does."""
        if all(method.exact for method in self.reading.methods):
            return self
        return Engine(
            self.model,
            self.tokenizer,
            strategy=AUTO,
            allow_extrapolation=self.reading.allow_extrapolation,
            decoding=self.reading.decoding,
            backend=self.backend,
            mesh=self.mesh,
            fused=self.fused,
            graphs=self.graphs,
            verify=False,
        )

    def prefill(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 1,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        between: Callable[[], None] | None = None,
        on_selection: OnSelection | None = None,
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
            room: tokens to have storage for beyond those, whether or not the model has positions for them.
        """
        plan = self.plan(prompt, max_new_tokens)
        prompt = self.reading.arranged(prompt)
        strategy = make_strategy(plan, self.group, self._compressor, self.backend)
        strategy.on_selection = on_selection
        read = partial(prefill.read, self._attachment, prompt, strategy, self._everyone, room=max_new_tokens + room)
        cache, logits, seconds = read(progress=progress, cancelled=cancelled, between=between)
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

    def read(
        self,
        text: str | None = None,
        *,
        tokens: Sequence[int] | None = None,
        prefix: Sequence[int] = (),
        question: str | Sequence[int] | None = None,
        questions: Sequence[str] = (),
        system: str | None = None,
        chat_template: str | Path | None = None,
        after: Document | None = None,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Document:
        """Read a document once, to be asked about any number of times.

        Args:
            text: the document; or
            tokens: its token ids, with those of ``prefix`` before it.
            question: what it is read for, if that is known: blocks pass on what this question attends to. Token ids
                if the document is given as such.
            questions: several typical questions instead.
            system, chat_template: as in :meth:`apb.Prompt.from_chat`.
            after: a document that this one begins with: it grows, and is returned. Its part stays as it was read, and
                the rest is read exactly over it, so that the whole is exact if that part is.
            progress, cancelled: as in :meth:`prefill`.
        """
        if text is not None and tokens is None:
            asking: Asking = OfText(self.needed_tokenizer(), text, system, chat_template)
        elif tokens is not None and text is None:
            asking = OfTokens(tuple(prefix), tuple(tokens))
        else:
            raise InputError("Give either the text of a document or its tokens.")
        prompt, read_for = asking.first(question, questions)
        if self.reading.propagation is not None:
            if after is not None:
                raise InputError("A document cannot go on from one that was read with propagation; read it without.")
            if not read_for:
                raise InputError(
                    "With propagation a document is read for a question, which chooses the rows that go on; give the "
                    "question, or read it without propagation."
                )
        if after is not None:
            after.grow(asking, self.reading.arranged(prompt))
            return after
        session = self.prefill(prompt, progress=progress, cancelled=cancelled, room=ROOM)
        compressor = self.reading.compressor.name
        return Document(self, asking, State.of_session(session, self.reading.arranged(prompt), read_for, compressor))

    def load(self, folder: str | Path, *, verify: bool = True) -> Document:
        """A document that :meth:`apb.Document.save` has written; every rank must call it.

        It may have been written on another number of ranks. Its keys and values are read straight to the device.

        Args:
            folder: where it is.
            verify: compare the checksums of the files, which takes as long as reading them again.

        Raises:
            InputError: there is no document, it is damaged or of a newer version, or of another model or dtype.
        """
        from .store import load

        return Document(self, *load(self, Path(folder), verify))

    def read_on(self, cache: ShardCache, token_ids: Sequence[int], max_new_tokens: int) -> tuple[Tensor, float]:
        """Read tokens after what a cache holds, exactly, whatever the decode method, as a prefill reads its question.

        Returns:
            logits: (vocab,) fp32 of the next token.
            seconds: time that this rank took.
        """
        watch = Stopwatch(self.device)
        exact = Decoder(self._attachment, self.group, EXACT, self.backend, graphs=False)
        return exact.start(cache, max_new_tokens).read(token_ids), watch.seconds()

    def check(self, plan: Plan, token_ids: Sequence[int], max_new_tokens: int) -> None:
        """InputError if tokens that a plan ends with are not the model's, or do not fit with an answer."""
        at_least("max_new_tokens", max_new_tokens, 0)
        allowed = self.reading.allow_extrapolation
        loading.check_fit(self.model.config, plan, max_new_tokens, allowed, self.mesh.tensor.size)
        check_tokens(token_ids, self._attachment.vocabulary)

    def turns_otherwise(self, start: int, total: int) -> bool:
        """True if RoPE rotates a text of ``total`` tokens by other angles than its first ``start`` tokens alone."""
        return any(start <= length < total for length in self._attachment.switches)

    def device_of(self, layer: int) -> torch.device:
        """Where a layer's keys and values are."""
        return placement.device_of(self._attachment.modules[layer])

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._closed

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
        return whole(self._stream(prompt, Sampling(**sampling), progress, cancelled))

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
        self.needed_tokenizer()
        return self._stream(prompt, Sampling(**sampling), progress, cancelled)

    def _stream(
        self, prompt: Prompt, sampling: Sampling, progress: Progress | None, cancelled: Callable[[], bool] | None
    ) -> Generator[str, None, Generation]:
        session = self.prefill(prompt, max_new_tokens=sampling.max_new_tokens, progress=progress, cancelled=cancelled)
        return (yield from self.answering.stream(session, sampling, cancelled))

    def needed_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; InputError if the engine has none."""
        if self.tokenizer is None:
            raise InputError("Text needs a tokenizer; give one to Engine.from_model.")
        return self.tokenizer

    @property
    def answering(self) -> Answering:
        """What answers this engine's sessions."""
        return Answering(self.model, self.tokenizer, self.devices, self._everyone)

    @property
    def _everyone(self) -> Group:
        """All processes at work on a prompt."""
        return self.group if self.mesh.devices is None else self.mesh.everyone
