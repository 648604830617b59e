"""Replacement of a model's attention without changes to its code: one function registered with transformers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from ..distributed.collectives import Group
from ..distributed.one_shot import quick
from ..errors import InputError
from ..layers.base import AttentionInput, as_wide
from ..layers.recurrent import Recur, RecurrentInput
from ..layers.routing import Attend
from .before_rope import BeforeRope
from .cache_names import with_cache
from .chunking import chunk_mlps
from .config import expands, shared_layers
from .fusing import fuse_parts
from .modules import attention_modules, layer_index
from .placement import device_of, devices
from .positions import set_positions
from .products import follow_products
from .recurrent import recurrent_modules, take_over
from .rope import length_dependent, pin_length, switches
from .shares import run_shares
from .shares import why_not as why_not_shares
from .stream import Stream
from .temperature import has_own, warmed, without_own
from .windows import chunked, layer_count, not_handed_over

NAME = "apb"
CLOSED = "The engine was closed and its model given back; make a new engine to go on."


@dataclass
class _Run(threading.local):
    """The pass that this thread is in: threads take turns with a model, and their passes are interleaved.

    Attributes:
        attend: computes its attention; None outside.
        recur: reads the rows of recurrent layers; None outside.
        total: tokens of the whole prompt and answer so far.
        positions: those of the rows, (1, rows).
        calls, recurrent_calls: layers of either kind so far.
        before_rope: q, k and v before RoPE, if they are wanted.
    """

    attend: Attend | None = None
    recur: Recur | None = None
    total: int = 0
    positions: Tensor | None = None
    calls: int = 0
    recurrent_calls: int = 0
    before_rope: BeforeRope | None = None


class Attachment:
    """A model whose attention this package computes, until :meth:`release`; make one with :meth:`of`.

    The model's own modules, weights and code are unchanged. While attached it runs only inside :meth:`running`.
    """

    def __init__(self, model: PreTrainedModel, fused: bool, tensor: Group) -> None:
        self.model = model
        self.fused = fused
        # Why layers of shared weights are run by transformers, whose messages CUDA graphs cannot capture; else None.
        self.left_shared = why_not_shares(model, tensor.size)
        self.modules = attention_modules(model)
        recurrent = recurrent_modules(model)
        self.recurrent = len(recurrent)
        self._index = {module: layer_index(model, module) for module in (*recurrent, *self.modules)}
        # Indices of the layers that attend.
        self.attending = {self._index[module] for module in self.modules}
        self.devices = devices(model)
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        self.layers = layer_count(model.config)
        text = model.config.get_text_config()
        # RoPE variants of the model that read the largest position on the host, which CUDA graphs cannot capture.
        self.length_dependent = length_dependent(text)
        # Lengths beyond which a prompt must be read again (longrope).
        self.switches = switches(text)
        # True if a cache holds what keys and values are expanded from.
        self.expands = expands(model.config)
        # True once the model's own code is known to ask a cache how many tokens were read before a pass.
        self.asks_total = False
        self._windows, self._chunked = not_handed_over(text), chunked(text)
        # By layer the one whose keys and values it attends to, if it has none of its own.
        self._shared = shared_layers(model.config)
        self._warm = {module for module in self.modules if has_own(module)}
        # Properties of layers beside a plain softmax, of those that have been run.
        self.peculiar: set[str] = set()
        # By layer with a sliding window, its length, of those that have been run.
        self.windows: dict[int, int] = {}
        # By layer, True if all its attention was finite, on its device; None if not checked.
        self.finite: dict[int, Tensor] | None = {} if os.environ.get("APB_CHECK_FINITE") else None
        self._run = _Run()
        # MiniMax's code refuses a cache that is not its own if it is to use one; its layers use it all the same.
        self._use_cache = text.model_type != "minimax"
        self._original = model.config._attn_implementation
        self._was_training = model.training
        self._undo = [set_positions(model, lambda: self._run.positions)]
        model.eval()
        _set_implementation(model, NAME)
        for module in self.modules:
            module.apb = self  # type: ignore[assignment]
        if not model._can_set_attn_implementation():
            self._undo.append(follow_products(self.modules, _attention))
        stream = Stream() if fused else None
        if tensor.size > 1 and self.left_shared is None:
            self._undo.append(run_shares(model, quick(tensor, self.devices[0])[0], stream))
        self._undo += [] if stream is None else [fuse_parts(model, stream)]
        self._undo += [pin_length(model, lambda: self._run.total), chunk_mlps(model), without_own(self.modules)]
        self._undo.append(take_over(model, lambda: None if self._run.recur is None else self._counted))
        self._users = 0

    @classmethod
    def of(cls, model: PreTrainedModel, fused: bool = False, tensor: Group | None = None) -> Attachment:
        """The attachment of a model, shared by all engines on it; each must :meth:`release` it once.

        ``fused``: compile modules (see :mod:`apb.hf.fusing`); InputError if engines on one model disagree.
        ``tensor``: the processes that share the model's weights, which all call this; None if each has them all.
        """
        attached = (getattr(module, "apb", None) for module in model.modules())
        attachment = next((found for found in attached if isinstance(found, cls)), None) or cls(
            model, fused, tensor or Group()
        )
        if attachment.fused != fused:
            raise InputError("Another engine on this model has another setting of fused; close it first.")
        attachment._users += 1
        return attachment

    def release(self) -> None:
        """Restore the model, once the last engine on it has released it."""
        self._users -= 1
        if self._users:
            return
        for module in self.modules:
            del module.apb
        for undo in reversed(self._undo):
            undo()
        _set_implementation(self.model, self._original)
        self.model.train(self._was_training)

    def device_of(self, layer: int) -> torch.device:
        """Where a layer's keys, values and states are."""
        return device_of(next(module for module, index in self._index.items() if index == layer))

    def last_logits(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """One pass over this rank's rows (1, rows), inside :meth:`running`; logits (vocab,) fp32 of the last row."""
        # By number, models whose upper layers need no rows but the last would leave out the others.
        last: Any = [ids.shape[1] - 1] if ids.shape[1] > 1 and any(x is not None for x in self._shared) else 1
        output = self._model(ids, positions, **self._keeping(cache), logits_to_keep=last)
        return output.logits[0, -1].float().contiguous()

    def all_logits(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """As :meth:`last_logits`, of every row: logits (rows, vocab) fp32."""
        output = self._model(ids, positions, **self._keeping(cache))
        return output.logits[0].float().contiguous()

    def logits(self, ids: Tensor, positions: Tensor, rows: list[int]) -> Tensor:
        """As :meth:`last_logits`, without a cache: logits (len(rows), vocab) fp32 of some rows."""
        # No tensor of rows: the last layer may be on another device than the first.
        output = self._model(ids, positions, use_cache=False, logits_to_keep=rows)
        return output.logits[0].float()

    def _keeping(self, cache: Cache) -> dict[str, Any]:
        return {**with_cache(self.model, cache), "use_cache": self._use_cache}

    def _model(self, ids: Tensor, positions: Tensor, **options: Any) -> Any:
        self._run.positions = positions
        return self.model(input_ids=ids, position_ids=positions, **options)

    def _counted(self, layer: RecurrentInput) -> Tensor:
        run = self._run
        assert run.recur is not None, "called where recurrent layers are taken over"
        run.recurrent_calls += 1
        return run.recur(layer)

    @contextmanager
    def running(self, attend: Attend, recur: Recur, total: int, before_rope: bool = False) -> Iterator[None]:
        """Let ``attend`` compute every layer's attention of the forward pass inside.

        Args:
            attend: see :data:`Attend`.
            recur: reads the rows of the recurrent layers, see :data:`Recur`.
            total: tokens of the whole prompt and answer so far, over all ranks (RoPE variants depend on it).
            before_rope: pass q, k, v before RoPE to ``attend``.
        """
        if not self._users:
            raise RuntimeError(CLOSED)
        run = self._run
        run.attend, run.recur, run.total = attend, recur, total
        run.calls = run.recurrent_calls = 0
        run.before_rope = BeforeRope((each, self._index[each]) for each in self.modules) if before_rope else None
        try:
            yield
            if run.calls != len(self.modules):
                raise InputError(
                    f"{type(self.model).__name__} has {len(self.modules)} attention layers "
                    f"but {run.calls} called the attention function: its results cannot be trusted."
                )
            if run.recurrent_calls != self.recurrent:
                raise InputError(
                    f"{type(self.model).__name__} has {self.recurrent} recurrent layers but {run.recurrent_calls} "
                    "were called: its results cannot be trusted."
                )
        finally:
            run.attend = run.recur = run.positions = None
            if run.before_rope is not None:
                run.before_rope.remove()
                run.before_rope = None

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, **softmax: Any
    ) -> Tensor:
        """One layer: q (1, heads, rows, d), k and v (1, kv_heads, keys, d) -> (1, rows, heads, v's d).

        ``softmax``: a layer's ``softcap`` and ``sinks``, as in :class:`apb.layers.base.AttentionInput`.
        """
        run = self._run
        if run.attend is None:
            raise RuntimeError(
                "This model is attached to an apb.Engine; call engine.close() before you use it in another way."
            )
        if q.shape[0] != 1:
            raise InputError(f"One prompt at a time: the batch has {q.shape[0]} rows.")
        run.calls += 1
        if module in self._warm:
            assert run.positions is not None, "passes have positions"
            q = warmed(module, q, run.positions)
        index = self._index[module]
        before = run.before_rope.pop(index) if run.before_rope is not None else None
        if window is None:
            window = self._windows[index]
        asked = {"a window": window, **softmax, "latent attention": None if v.shape[-1] == k.shape[-1] else 1}
        self.peculiar |= {name for name, value in asked.items() if value is not None}
        if window is not None:
            self.windows[index] = window
        width = v.shape[-1]
        v = as_wide(v, k)
        if window is not None and window >= run.total:
            window = None
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out = run.attend(
            AttentionInput(index, q, k, v, scale, before, window, self._chunked, self._shared[index], **softmax)
        )
        if self.finite is not None:
            self._look_at(index, out)
        return out[..., :width].contiguous().unsqueeze(0)

    def _look_at(self, index: int, out: Tensor) -> None:
        """Record on the device if a layer's attention is finite, without waiting, so that graphs can capture it."""
        assert self.finite is not None, "called where layers are looked at"
        if index not in self.finite:
            self.finite[index] = torch.ones((), dtype=torch.bool, device=out.device)
        self.finite[index].logical_and_(out.isfinite().all())

    def forget_not_finite(self) -> None:
        """Begin to look anew; in place, because captured steps write to these addresses."""
        for finite in (self.finite or {}).values():
            finite.fill_(True)

    def first_not_finite(self) -> int | None:
        """The first layer whose attention was not finite; None if all were, or if it was not checked."""
        return next((index for index, finite in sorted((self.finite or {}).items()) if not finite), None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers."""
    attachment = getattr(module, "apb", None)
    if attachment is None:
        raise RuntimeError(f"{type(module).__name__} was not there when the model was attached to an apb.Engine.")
    if attention_mask is not None:
        raise InputError(
            f"Attention masks are not supported (padding, or a mask that {type(module).__name__} makes itself): "
            "give one prompt without padding."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softmax = {"softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    return attachment(module, query, key, value, scale, kwargs.get("sliding_window"), **softmax), None


# No mask is registered under this name, so transformers builds none: the plan determines which keys every row sees.
AttentionInterface.register(NAME, _attention)


def _set_implementation(model: PreTrainedModel, name: str) -> None:
    """Set the name of a model's attention, which decides on its masks also where its code has attention of its own."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation = name
