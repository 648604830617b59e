"""Verification of a kind of model: a small random copy is read by this package and by transformers alone.

Some families leave restrictions beside causality (a window, a chunk, a bidirectional part) to the mask, which this
package never builds. Logits are compared instead of trusting that all such cases are known.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..distributed.collectives import Group
from ..errors import InputError, first_line
from ..layers.base import AttentionInput, LayerKind
from ..layers.shards import NewRows, full_partial, merge_over_ranks, window_partial
from .attach import Attachment
from .cache import ShardCache
from .cache_names import cache_of, with_cache
from .decoders import decoder_class
from .positions import first_position
from .reference import without_kernels
from .shrinking import VOCABULARY, shrink

# Limits of differences relative to the largest logit: of a small fp32 copy, and of a model that has no small copy.
TOLERANCE = 1e-4
_ROUGH = {torch.float32: 1e-3}
# Several times as long as the windows of a small copy.
PROMPT = (*((37 * i + 11) % (VOCABULARY - 2) + 1 for i in range(107)), 42, 95, 148)
ANSWER = (12, 70, 33)

_verified: set[str] = set()


def verify(config: Any, model: PreTrainedModel | None = None) -> None:
    """InputError if logits of a configuration's kind of model differ from those of transformers' own pass.

    A success is recorded in the user's cache folder, for the kind of model and the versions of all code involved. If no
    small copy can be made, ``model`` itself reads the short prompt; without ``model``, as before its weights are
    loaded, the check is skipped.
    """
    text = config.get_text_config()
    kind = kind_of(config, model)
    if kind is None:
        return
    small = _shrunk(text)
    key = _key(kind, text if small is None else small)
    if key in _verified:
        return
    note = _folder() / key
    if not os.path.exists(note):
        copy = None if small is None else _copy(kind, small)
        if copy is not None:
            with without_kernels(copy):
                _compare(copy, TOLERANCE, "a small copy with random weights")
        elif model is not None:
            _compare(model, _ROUGH.get(model.dtype, 5e-2), "a short prompt")
        else:
            return
        with suppress(OSError):  # without a record the check runs again
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    _verified.add(key)


def kind_of(config: Any, model: PreTrainedModel | None = None) -> Any:
    """The class of a configuration's decoder, ``model``'s own if that is one; None for code that is not loaded."""
    text = config.get_text_config()
    known = decoder_class(text)
    return type(model) if model is not None and (known is None or type(model.config) is type(text)) else known


def small_model(kind: type[PreTrainedModel], small: Any) -> PreTrainedModel:
    """A model of a shrunk configuration with peaked logits and attention, so that errors show."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too
        model: PreTrainedModel = kind._from_config(small, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("sinks"):
                    weight.normal_()
                elif weight.ndim > 1:
                    weight.mul_(3)
    return model


def _shrunk(text: Any) -> Any:
    try:
        return shrink(text)
    except Exception:  # a configuration with its own names for sizes
        return None


def _copy(kind: Any, small: Any) -> PreTrainedModel | None:
    """A small copy that transformers can run; None if there is none."""
    try:
        model = small_model(kind, small)
        with without_kernels(model):
            _theirs(model)
    except Exception:  # a model's code may fail in any way on sizes that it was not written for
        return None
    return model


def _compare(model: PreTrainedModel, tolerance: float, subject: str) -> None:
    """InputError if logits after any token of PROMPT and ANSWER differ from transformers' own."""
    name = model.config.model_type
    try:
        expected, logits = _theirs(model), _ours(model)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"Models of type {name!r} cannot be read here: {first_line(error)}.") from error
    errors = (logits - expected).abs().amax(-1) / expected.abs().max()
    wrong = (~(errors <= tolerance)).nonzero()  # NaN is wrong too
    if len(wrong):
        raise InputError(
            f"Models of type {name!r} with these settings do not come out right here: from token {int(wrong[0])} of "
            f"{subject} on, logits are off from transformers' own by {float(errors.max()):.1g} of the largest; "
            "use transformers itself, or verify=False to go on all the same."
        )


def _theirs(model: PreTrainedModel) -> Tensor:
    """Logits (tokens, vocabulary) fp32 by transformers' eager attention: PROMPT in one pass, then ANSWER's tokens."""
    attention, known, logits = model.config._attn_implementation, None, []
    first = first_position(model.config.get_text_config())
    model.set_attn_implementation("eager")  # the others get no mask if they need none
    try:
        for ids, positions in _parts(model):
            # Not all count what is known already (Bamba); the first positions are the model's own, which may be odd.
            told: dict[str, Tensor] = {} if known is None else {"position_ids": positions + first}
            with torch.no_grad():
                output = model(ids, **with_cache(model, known), use_cache=True, **told)
            known = cache_of(output)
            logits.append(output.logits[0].float())
    finally:
        model.set_attn_implementation(attention)
    return torch.cat(logits)


def _ours(model: PreTrainedModel) -> Tensor:
    """The same with this package's attention."""
    attachment = Attachment.of(model)
    shard = ShardCache(attachment.layers, capacity=len(PROMPT) + len(ANSWER), keeps_new=True, total=0)
    logits = []

    def attend(layer: AttentionInput) -> Tensor:
        rows = NewRows(shard.total - layer.q.shape[0], [range(shard.total)])
        partial = full_partial if layer.kind is LayerKind.FULL else window_partial
        return merge_over_ranks(layer, *partial(layer, rows, "reference"), Group()).wait()

    try:
        for ids, positions in _parts(model):
            shard.expect(range(shard.total, shard.total + ids.shape[1]))
            with torch.no_grad(), attachment.running(attend, shard.recur, shard.total):
                logits.append(attachment.all_logits(ids, positions, shard))
    finally:
        attachment.release()
    return torch.cat(logits)


def _parts(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """PROMPT, and then each token of ANSWER: token ids of the model and positions, (1, tokens) each."""
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    ids = torch.tensor([[*PROMPT, *ANSWER]], device=model.device) % vocabulary
    positions = torch.arange(ids.shape[1], device=model.device).unsqueeze(0)
    lengths = [len(PROMPT), *(1 for _ in ANSWER)]
    return list(zip(ids.split(lengths, 1), positions.split(lengths, 1), strict=True))


def _key(kind: type[PreTrainedModel], config: Any) -> str:
    """File name of a record, from all that the result depends on: class, settings, and the versions of the code."""
    settings = config.to_json_string(use_diff=False)
    parts = [torch.__version__, transformers.__version__, f"{kind.__module__}.{kind.__qualname__}", settings]
    parts.append(_state(Path(__file__).parents[1]))
    try:
        parts.append(_state(Path(inspect.getfile(kind))))
    except (OSError, TypeError):  # typed in, as in a notebook: the next of that name may be another
        parts.append(str(time.time_ns()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _state(path: Path) -> str:
    """Names, sizes and times of a file, or of all modules in a folder."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return " ".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def _folder() -> Path:
    """The folder of the records of successful checks."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "apb", "verified")
