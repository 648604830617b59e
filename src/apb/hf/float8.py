"""A model whose linear layers are rounded to fp8 when it is loaded, and multiply in fp8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..kernels.float8 import MULTIPLE, linear, scaled

NAME = "fp8"
"""What ``quantization`` is called."""
_CAPABILITY = (8, 9)
# Small layers whose outputs choose between others.
_CHOOSERS = ("gate", "router")


class Float8Linear(nn.Linear):
    """A linear layer with weights in fp8 and a scale for every output."""

    weight_scale: Tensor

    @classmethod
    def rounded(cls, layer: nn.Linear) -> Float8Linear:
        """The layer of a plain one, without a copy of its bias."""
        found = cls.__new__(cls)
        nn.Module.__init__(found)
        found.in_features, found.out_features = layer.in_features, layer.out_features
        weight, scale = scaled(layer.weight.detach())
        found.weight = nn.Parameter(weight, requires_grad=False)
        found.bias = layer.bias
        found.register_buffer("weight_scale", scale)
        return found.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """See :func:`apb.kernels.float8.linear`."""
        return linear(input, self.weight, self.weight_scale, self.bias)


def check(quantization: Any, device: torch.device, dtype: torch.dtype, shared: bool) -> bool:
    """True if fp8 was asked for, by its name; InputError for another name, or where it cannot be had.

    ``shared``: processes share the weights of a rank.
    """
    if not isinstance(quantization, str):
        return False
    if quantization != NAME:
        raise InputError(
            f"Unknown quantization {quantization!r}; choose {NAME}, or give a quantization configuration of "
            "transformers to Engine.from_pretrained."
        )
    # First: on the CPU the dtype is another one without having been asked for.
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise InputError(f"{NAME} needs a GPU that multiplies in it: NVIDIA's Ada, Hopper or a later one.")
    if dtype != torch.bfloat16:
        raise InputError(f"Layers in {NAME} give their results in bfloat16; leave --dtype out, or set it to bfloat16.")
    if shared:
        raise InputError(f"Ranks that share weights cannot have them in {NAME} yet; leave tensor parallelism out.")
    return True


def round_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Replace a model's linear layers by :class:`Float8Linear`, one after the other; returns the model.

    The output layer, choosers of experts, experts that are stacked, and layers of other widths than multiples of 16
    stay as they are.

    Raises:
        InputError: the weights are quantized already.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(f"The weights are quantized already; leave the quantization {NAME} out.")
    output = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is not nn.Linear or layer is output or name in _CHOOSERS:
                continue
            if not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE):
                setattr(module, name, Float8Linear.rounded(layer))
    return model
