"""Errors for checkpoints that cannot be loaded: an empty index, a pickle of more than tensors, a missing quantizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import InputError

# The pip packages of transformers' quantizers.
_PACKAGES = {
    "aqlm": "aqlm[gpu,cpu]",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "fouroversix": "fouroversix",
    "fp_quant": "fp_quant",
    "gptq": "optimum gptqmodel",
    "higgs": "flute-kernel",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "sinq": "sinq",
    "spqr": "spqr_quant[gpu]",
    "torchao": "torchao",
    "vptq": "vptq",
}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_index(model: str | Path) -> None:
    """InputError if the weights of a folder are in several files and the index names none of them."""
    for name in _WEIGHTS:
        if Path(model, name).is_file():
            return
        index = Path(model, f"{name}.index.json")
        if index.is_file():
            try:
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                named = isinstance(listed, dict) and set(listed.values())
            except (ValueError, KeyError, TypeError):
                named = False
            if not named:
                raise InputError(
                    f"The index {index.name!r} of {str(model)!r} names no weights; put the index there that came with "
                    "the checkpoint."
                )
            return


def not_only_tensors(model: str | Path, error: Exception) -> InputError:
    """The error for a pickle that torch refuses to read, because reading it might run code, or that is damaged."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"ask for {named[1]!r}, which may run any code" if named else "are no pickle of tensors alone"
    return InputError(
        f"The weights of {str(model)!r} {what}, so they are not read; take the checkpoint's safetensors, or convert it "
        "where you trust it."
    )


def quantizer(config: Any, quantization: Any = None) -> str | None:
    """transformers' name of the quantization method of the weights; None if they are not quantized."""
    chosen = quantization if quantization is not None else getattr(config, "quantization_config", None)
    method = chosen.get("quant_method") if isinstance(chosen, dict) else getattr(chosen, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def missing_quantizer(model: str | Path, method: str) -> InputError | None:
    """The error for a quantizer's package that is missing or too old; None for a quantizer that is not known here."""
    package = _PACKAGES.get(method)
    if package is None:
        return None
    return InputError(
        f"The weights of {str(model)!r} are quantized by {method!r}, which needs a package of its own: "
        f"pip install -U {package}."
    )
