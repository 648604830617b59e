"""Restricting transformers' tensor parallelism to a sub-mesh; left alone, it would use all processes.

The sharding of each layer is the model's own plan in transformers; this module only sets the mesh. Versions of
transformers differ in the arguments and results of its two classmethods around loading.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from ..errors import InputError
from .config import kv_heads, query_heads
from .windows import layer_count

_PREPARE = "prepare_distribute_model"


def check_shards(config: Any, size: int) -> None:
    """Raise InputError if a model's weights cannot be sharded over ``size`` processes."""
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    if size > 1 and not plan:
        raise InputError(f"{config.model_type!r} models have no plan for tensor parallelism in transformers.")
    counts = {("query heads", query_heads(config))}
    counts |= {("KV heads", kv_heads(config, layer)) for layer in range(layer_count(config))}
    for name, count in sorted(counts):
        if count % size:
            raise InputError(
                f"{count} {name} do not divide by {size} (--tensor-parallel); use a number that divides them."
            )


def shared(kind: type[PreTrainedModel], mesh: DeviceMesh) -> type[PreTrainedModel]:
    """Subclass of a model class whose ``from_pretrained`` with :func:`settings` shards the weights over ``mesh``."""

    def prepare(cls: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        return distributed_config, _device(mesh), _as_taken(mesh)

    return type(kind.__name__, (kind,), {_PREPARE: classmethod(prepare), "__module__": kind.__module__})


def settings(mesh: DeviceMesh) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained``."""
    return {"distributed_config": DistributedConfig(tp_size=mesh.size(), tp_plan="auto")}


def share(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Shard the weights of a model that every process of the mesh holds in full; each keeps its own shard."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:  # they are sharded differently
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model = type(model).maybe_distribute_model(model, settings(mesh)["distributed_config"], _as_taken(mesh))
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, DTensor):  # its shard is a view, which would keep the full weight alive
                share = DTensor.from_local(
                    weight.to_local().detach().clone(),
                    weight.device_mesh,
                    weight.placements,
                    run_check=False,
                    shape=weight.shape,
                    stride=weight.stride(),
                )
                setattr(module, name, torch.nn.Parameter(share, requires_grad=False))
    return model


def splits_heads(config: Any) -> bool:
    """True if processes that share a model's weights hold their own KV heads each; in some models they hold all."""
    plan = getattr(config.get_text_config(), "base_model_tp_plan", None) or {}
    return not any("attn" in name and style == "colwise_gather_output" for name, style in plan.items())


def beginning(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` values of a weight; if it is shared every process that has a part of it must ask."""
    if not isinstance(weight, DTensor):
        return weight.flatten()[:count]
    (place,) = weight.placements
    mesh, local = weight.device_mesh, weight.to_local()
    rows = -(-count // max(math.prod(weight.shape[1:]), 1))
    if rows * mesh.size() > weight.shape[0]:  # small, and perhaps not divided evenly
        return weight.full_tensor().flatten()[:count]
    if not place.is_shard(0):
        shape = (rows, *weight.shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        piece = local[:rows].contiguous()
        weight = DTensor.from_local(piece, mesh, [place], run_check=False, shape=torch.Size(shape), stride=stride)
        return weight.full_tensor().flatten()[:count]
    first = local.new_empty(count)
    if mesh.get_local_rank() == 0:  # which has the first rows
        first.copy_(local[:rows].flatten()[:count])
    torch.distributed.broadcast(first, group=mesh.get_group(), group_src=0)
    return first


class _Meshes:
    """Replaces transformers' holder of meshes; there is only one mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def get_mesh(self, dims: str | tuple[str, ...]) -> DeviceMesh:
        """The tensor mesh, whatever dimensions are requested."""
        return self._mesh


def _as_taken(mesh: DeviceMesh) -> Any:
    """The mesh as this version of transformers expects it: from 5.20 on in a holder."""
    try:
        from transformers.distributed.utils import TransformersDeviceMesh  # noqa: F401
    except ImportError:
        return mesh
    return _Meshes(mesh)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())
