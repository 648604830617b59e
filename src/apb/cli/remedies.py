"""What is missing for a model on this machine, and the command or option that mends it."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..errors import InputError

# Optional parts: the extra, the modules that it brings, what they are for.
_EXTRAS = (
    ("serve", ("fastapi", "uvicorn", "prometheus_client"), "apb serve"),
    ("report", ("matplotlib",), "plots of apb report, bench and plan"),
    ("gguf", ("gguf",), "--model FILE.gguf"),
    ("guided", ("llguidance",), "answers that follow a JSON schema"),
    ("adapters", ("peft",), "LoRA and other adapters"),
    ("quantization", ("torchao",), "torchao's quantizations"),
    ("lm-eval", ("lm_eval",), "lm-evaluation-harness"),
)

Row = dict[str, Any]


def extras() -> list[Row]:
    """For each optional part: ``name``, ``usable``, ``why``."""
    rows = []
    for extra, modules, what in _EXTRAS:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        why = f"{what}: pip install 'apb-llm[{extra}]'" if missing else what
        rows.append({"name": extra, "usable": not missing, "why": why})
    return rows


def of_model(model: str | None, ranks: int) -> list[Row]:
    """For each thing that a model needs: ``name``, ``usable``, ``why``; what follows from a failure is left out.

    Args:
        model: as for every command.
        ranks: that it is to be read on.
    """
    from ..hf import chat, loading, supported
    from ..hf.config import layers_in_words

    name = str(model or loading.shipped_model())
    rows: list[Row] = []

    def add(what: str, usable: bool, why: str) -> None:
        rows.append({"name": what, "usable": usable, "why": why})

    try:
        config = loading.load_config(name)
        supported.check_supported(config)
    except InputError as error:
        add("model", False, str(error))
        return rows
    add("model", True, f"{config.model_type}: {layers_in_words(config)}")
    limit = loading.position_limit(config)
    add("positions", True, "no limit known" if limit is None else f"{limit:,}; --allow-extrapolation goes further")
    try:
        tokenizer = loading.load_tokenizer(name)
        template = chat.template_of(tokenizer)
        plain = "none: prompts are plain text; --chat-template gives one to a chat model that lost its own"
        add("chat template", True, plain if template is None else "its own")
    except InputError as error:
        add("tokenizer", False, str(error))
    _memory(config, ranks, add)
    return rows


def _memory(config: Any, ranks: int, add: Any) -> None:
    """Whether weights fit, and the longest document that does."""
    import torch

    from ..compressors import make_compressor
    from ..hardware import Hardware
    from ..hf import counting, loading
    from ..planning.fitting import longest
    from ..planning.plan import Plan

    device = loading.pick_device(None)
    hardware = Hardware.of(device, loading.pick_dtype(None, device), ranks)
    shape = counting.model_shape(config)
    weights, room = shape.parameters * hardware.element_bytes, hardware.memory
    size = f"{weights / 2**30:.1f} GiB of {room / 2**30:.1f} GiB"
    processes = -(-weights // (room * 3 // 4))  # a quarter is left for the cache
    fits = weights < room
    add("weights", fits, size if fits else f"{size}: --tensor-parallel {processes}, or --gpus-per-rank {processes}")
    if not fits:
        return
    plan = Plan.build(prefix=1, document=1 << 24, query=64, ranks=ranks, strategy="apb")
    tokens = longest(plan, shape, hardware, 512, make_compressor("query-edge"))
    reach = f"{tokens:,} tokens by apb on {ranks} rank{'s'[: ranks - 1]}, as predicted"
    gpus = torch.cuda.device_count()
    if gpus > ranks:
        reach += f"; --ranks {gpus} uses all GPUs"
    add("longest document", tokens > 0, reach)
