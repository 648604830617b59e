"""A checkpoint opened for reading: checked before its weights are read, then loaded on this process's devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distributed.launch import check_split, local_device
from ..distributed.mesh import Mesh
from . import loading, supported, verifying
from .tensor_parallel import check_shards

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """What to load and where; the fields are arguments of :meth:`apb.Engine.from_pretrained`."""

    model: str | Path
    dtype: str | torch.dtype | None
    device: str | None
    trust_remote_code: bool
    tensor_parallel: int
    quantization: Any
    gpus_per_rank: int

    def opened(self, verify: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Mesh]:
        """Model, tokenizer and processes; ``verify``: compare models of this kind with transformers' own first."""
        config = loading.load_config(self.model, self.trust_remote_code)
        supported.check_supported(config)
        if verify:  # before its weights are read
            verifying.verify(config)
        place = local_device(loading.pick_device(self.device), self.gpus_per_rank)
        check_split(place, self.gpus_per_rank, self.tensor_parallel)
        dtype = loading.pick_dtype(self.dtype, place)
        tokenizer = loading.load_tokenizer(self.model, self.trust_remote_code)
        check_shards(config, self.tensor_parallel)
        mesh = Mesh.join(place, self.tensor_parallel, self.gpus_per_rank)
        model = loading.load_model(
            self.model, dtype, place, self.trust_remote_code, mesh.devices, self.quantization, self.gpus_per_rank
        )
        return model, tokenizer, mesh
