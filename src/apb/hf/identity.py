"""What tells models apart: their configuration and their weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import damaged, float8
from .tensor_parallel import beginning

if TYPE_CHECKING:
    import torch

# Fields of a configuration that say where it comes from and how it is run, not what the model computes.
_CIRCUMSTANCES = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def weights_digest(model: torch.nn.Module) -> Any:
    """A sha256 of 64 values of every parameter, with their names and shapes.

    The same of a model whose weights are shared; then all processes that share them must ask.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_own_parameters(model)):
        values = beginning(parameter.detach(), 64).float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + values.tobytes())
    return digest


def _own_parameters(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights, without a copy of the embedding as output: weights that are tied may be shared unequally."""
    config = getattr(model, "config", None)
    tied = config is not None and getattr(config.get_text_config(), "tie_word_embeddings", False)
    copy = model.get_output_embeddings().weight if tied and model.get_output_embeddings() is not None else None
    embedding = model.get_input_embeddings().weight if tied else None
    for name, weight in model.named_parameters():
        if weight is embedding or weight is not copy:
            yield name, weight


def fingerprint(model: Any) -> str:
    """16 hex digits of a model's configuration and weights."""
    fields = {name: value for name, value in model.config.to_dict().items() if name not in _CIRCUMSTANCES}
    digest = weights_digest(model)
    digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    return str(digest.hexdigest()[:16])


def quantization(model: Any) -> str | None:
    """What the weights were quantized by: fp8 of this package, or transformers' name of the method; None if nothing."""
    rounded = any(isinstance(module, float8.Float8Linear) for module in model.modules())
    return float8.NAME if rounded else damaged.quantizer(model.config)
