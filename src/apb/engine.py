"""The engine: a model and its tokenizer; documents, and answers to questions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .answering import Answering, whole
from .asking import NO_QUESTION, Asking, OfText, OfTokens
from .document import Document
from .errors import InputError
from .generation import Generation, Sampling
from .hardware import Stopwatch
from .hf.opening import Checkpoint
from .passes.prefill import Progress
from .planning.methods import Method
from .planning.plan import Plan
from .prefilling import Prefiller
from .prompt import Prompt
from .reading import AUTO, Reading
from .state import ROOM, State

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_OF_READING = ("backend", "fused", "graphs", "verify")


class Engine(Prefiller):
    """Reads prompts with one strategy and answers. Make one with :meth:`from_pretrained` or :meth:`from_model`.

    Under ``torchrun`` every rank makes the same engine and the same calls, and gets the same results.
    """

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

    def exactly(self) -> Engine:
        """An engine on the same model and ranks that reads exactly; this one, if it does."""
        if all(method.exact for method in self.reading.methods):
            return self
        reading = self.reading
        return self.reading_by(AUTO, allow_extrapolation=reading.allow_extrapolation, decoding=reading.decoding)

    def reading_by(self, strategy: str | Method, **options: Any) -> Engine:
        """An engine on the same model and ranks that reads otherwise; close it before this one.

        If it decodes by the same method, it replays the CUDA graphs that this one has captured.

        Args:
            strategy, options: as in :meth:`apb.reading.Reading.of`; what is left out is not this engine's, but its
                default.
        """
        return Engine(
            self.model,
            self.tokenizer,
            strategy=strategy,
            backend=self.backend,
            mesh=self.mesh,
            fused=self.fused,
            graphs=self.graphs,
            verify=False,  # done, or left out on request, when this one was made
            decoder=None if self.closed else self._decoder,
            **options,
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
        planned: Callable[[Plan], None] | None = None,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Document:
        """Read a document once, to be asked about any number of times; and make the decode method's indexes of it.

        Args:
            text: the document; or
            tokens: its token ids, with those of ``prefix`` before it.
            question: what it is read for, if that is known: blocks pass on what this question attends to. Token ids
                if the document is given as such.
            questions: several typical questions instead.
            system, chat_template: as in :meth:`apb.Prompt.from_chat`.
            after: a document that this one begins with: it grows, and is returned. Its part stays as it was read, and
                the rest is read exactly over it, so that the whole is exact if that part is.
            planned: called with the plan by which the document is read, before it is.
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
                raise InputError(NO_QUESTION)
        if after is not None:
            after.grow(asking, self.reading.arranged(prompt))
            return after
        if planned is not None:
            planned(self.plan(prompt))
        session = self.prefill(prompt, progress=progress, cancelled=cancelled, room=ROOM)
        compressor = self.reading.compressor.name
        state = State.of_session(session, self.reading.arranged(prompt), read_for, compressor)
        watch = Stopwatch(self.device)
        self.reading.decoding.build(state.cache)
        state.index_s = watch.seconds()
        return Document(self, asking, state)

    def load(self, folder: str | Path, *, verify: bool = True) -> Document:
        """A document that :meth:`apb.Document.save` has written; every rank must call it.

        It may have been written on another number of ranks. Its keys and values are read straight to the device; the
        decode method's indexes too, or they are made if they were not saved, or on another number of ranks.

        Args:
            folder: where it is.
            verify: compare the checksums of the files, which takes as long as reading them again.

        Raises:
            InputError: there is no document, it is damaged or of a newer version, or of another model or dtype.
        """
        from .restoring import load

        asking, state = load(self, Path(folder), verify)
        self.reading.decoding.build(state.cache)  # what was not saved
        return Document(self, asking, state)

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
