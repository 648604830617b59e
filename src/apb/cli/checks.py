"""Checks of model, readings and ranks: errors are raised before a process starts or a weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..compressors import OPTIONS as COMPRESSOR_OPTIONS
from ..compressors import Compressor
from ..errors import InputError, at_least
from ..planning.methods import METHODS, Method
from ..planning.options import options_of
from ..reading import AUTO, Reading
from . import options
from .groups import values

if TYPE_CHECKING:
    import torch

    from ..evaluation.settings import Setting


@dataclass(frozen=True)
class Place:
    """A model, its device and its ranks, after the checks.

    Attributes:
        model: the checkpoint that was asked for.
        config: its configuration.
        device: the kind of device of every rank.
        dtype: of the weights.
        ranks: number of ranks, which share the work of the document's rows.
        tensor_parallel: number of processes that share the weights of a rank.
        gpus_per_rank: number of GPUs over which the layers of a rank are split.
    """

    model: options.Model
    config: Any
    device: torch.device
    dtype: torch.dtype
    ranks: int
    tensor_parallel: int
    gpus_per_rank: int

    @property
    def processes(self) -> int:
        """Number of processes to start."""
        return self.ranks * self.tensor_parallel

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of :meth:`apb.Engine.from_pretrained` beside those of reading, as plain, picklable values."""
        return {
            **values(self.model),
            "model": self.model.name,
            "device": self.device.type,
            "tensor_parallel": self.tensor_parallel,
            "gpus_per_rank": self.gpus_per_rank,
        }


def check_used(
    strategies: Sequence[str],
    asked: options.Options | options.Readings,
    rounds: int | None = None,
    compared: bool = False,
) -> None:
    """InputError for an option that was given and that none of the strategies named has, so that it would do nothing.

    Nothing is refused under "auto", which may choose any strategy, nor beside an unknown name, which others refuse.

    Args:
        strategies: their names.
        asked: the options of strategies and compressors.
        rounds: as given.
        compared: as for :func:`apb.planning.methods.make_method`.
    """
    if not all(name in METHODS for name in strategies):
        return
    owners: dict[str, list[str]] = {}
    for kind in METHODS.values():
        own = [name for name, each in options_of(kind).items() if each.metadata["compared"] or not compared]
        own += ["compressor", *COMPRESSOR_OPTIONS] if kind.passes else []
        own += ["rounds"] if kind.in_rounds else []
        for name in own:
            owners.setdefault(name, []).append(kind.name)
    given = [*asked.method, *asked.scoring]
    given += ["compressor"] if asked.compressor else []
    given += ["rounds"] if rounds is not None and rounds > 1 else []
    for name in given:
        if not set(owners[name]) & set(strategies):
            raise InputError(
                f"--{name.replace('_', '-')} is an option of {' and '.join(owners[name])}, not of "
                f"{' or '.join(strategies)}; leave it out, or choose another strategy."
            )


def check(
    model: options.Model,
    ranks: options.Ranks,
    methods: Iterable[Method] = (),
    compressors: Iterable[Compressor] = (),
) -> Place:
    """The place of a model; InputError if these ranks, methods and compressors cannot read it."""
    from ..distributed import launch
    from ..hf import float8, loading, supported
    from ..hf.config import query_heads
    from ..hf.tensor_parallel import check_shards
    from .quiet import quiet_libraries

    quiet_libraries()
    tensor_parallel = ranks.tensor_parallel
    at_least("tensor-parallel", tensor_parallel, 1)
    device = loading.pick_device(model.device)
    dtype = loading.pick_dtype(model.dtype, device)
    float8.check(model.quantization, device, dtype, tensor_parallel > 1)
    size = launch.ranks_to_use(ranks.ranks, device, tensor_parallel, ranks.gpus_per_rank)
    config = model.config()
    supported.check_supported(config)
    check_shards(config, tensor_parallel)
    for method in methods:
        method.check_model(query_heads(config) // tensor_parallel, size)
    for compressor in compressors:
        loaded(compressor, config)
    return Place(model, config, device, dtype, size, tensor_parallel, ranks.gpus_per_rank)


def check_reading(model: options.Model, ranks: options.Ranks, asked: options.Reading) -> tuple[Place, Reading]:
    """As :func:`check`, for one reading; errors of the reading alone are raised before torch is imported."""
    check_used([asked.strategy], asked.options, asked.rounds)
    if asked.approximate and asked.strategy != AUTO:
        raise InputError(f"--approximate goes with --strategy auto, not with {asked.strategy}; leave it out.")
    reading = Reading.of(**values(asked))
    # "auto" skips methods that cannot read this model.
    return check(model, ranks, () if reading.automatic else reading.methods, [reading.compressor]), reading


def check_readings(model: options.Model, ranks: options.Ranks, asked: options.Readings) -> tuple[Place, list[Setting]]:
    """As :func:`check`, for several readings, each of which must pass."""
    from ..evaluation.settings import settings

    check_used(asked.strategy or ["apb"], asked)
    found = settings(**asked.arguments())
    compressors = {setting.compressor for setting in found if setting.compressor is not None}
    return check(model, ranks, [setting.method for setting in found], compressors), found


def loaded(compressor: Compressor, config: Any) -> Compressor:
    """A compressor with its trained heads, if it has any; InputError if they do not fit the model."""
    from ..hf.heads import HeadShape, load_heads

    return compressor.loaded(partial(load_heads, **asdict(HeadShape.of(config))))
