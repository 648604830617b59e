"""Finding, checking and loading models; checks run before weights are read."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError, first_line
from ..planning.plan import Plan
from . import damaged, float8, gguf, placement, rope
from .config import expands, query_heads, shared_layers
from .decoders import auto_knows, decoder_class
from .hub import check_there
from .supported import RECURRENT_FAMILIES
from .tensor_parallel import settings, shared
from .windows import chunked
from .wrappers import NAMES, decoder_config, is_wrapper

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def shipped_model() -> Path:
    """The folder of the small model that comes with this package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "models" / "needle", package.parents[1] / "models" / "needle"):
        if (folder / "config.json").is_file():
            return folder
    raise InputError("The model that ships with apb is not in this installation; name another one with --model.")


def load_config(model: str | Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a checkpoint folder, GGUF file or hub id, of a multimodal one's text decoder.

    InputError if there is none.
    """
    return gguf.load_config(model) if gguf.is_gguf(model) else decoder_config(_whole_config(model, trust_remote_code))


def _whole_config(model: str | Path, trust_remote_code: bool) -> Any:
    """The configuration as transformers reads it."""
    check_there(model)
    adapter = Path(model, "adapter_config.json")
    if adapter.is_file() and not Path(model, "config.json").is_file():
        return _whole_config(_base_of(adapter), trust_remote_code)
    try:
        return AutoConfig.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration's own checks may raise anything
        reason = (
            first_line(error)
            if Path(model).exists()
            else f"there is no such folder, and as a hub id: {first_line(error)}"
        )
        raise InputError(f"The model {str(model)!r} cannot be loaded: {reason}.") from error


def _base_of(adapter: Path) -> str:
    """The model that an adapter of peft was made for, as its configuration names it."""
    if find_spec("peft") is None:
        raise InputError(f"{str(adapter.parent)!r} is an adapter, which needs peft: pip install 'apb-llm[adapters]'.")
    try:
        return str(json.loads(adapter.read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"The adapter {str(adapter.parent)!r} does not name its base model.") from error


def load_tokenizer(model: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, GGUF file or hub id; of an adapter without one, its base model's."""
    if gguf.is_gguf(model):
        return gguf.load_tokenizer(model)
    adapter = Path(model, "adapter_config.json")
    if adapter.is_file() and not Path(model, "tokenizer_config.json").is_file():
        return load_tokenizer(_base_of(adapter), trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except Exception as error:  # the library tokenizers raises nothing more specific for an unreadable file
        if Path(model).is_dir() and not any(Path(model).glob("*token*")):
            raise InputError(
                f"There is no tokenizer in {str(model)!r}; put the model's tokenizer.json there."
            ) from error
        raise InputError(
            f"The tokenizer of {str(model)!r} cannot be loaded: {first_line(error)}; put a tokenizer.json there that "
            "this version of transformers reads."
        ) from error


def load_model(
    model: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    mesh: DeviceMesh | None = None,
    quantization: Any = None,
    gpus: int = 1,
) -> PreTrainedModel:
    """The weights of a checkpoint, in ``dtype`` on ``device``, ready for inference; of a mesh, this process's share.

    Safetensors go straight to the device, a tensor at a time; GGUF files are expanded. Torch files are read with
    ``weights_only``: no code from a checkpoint runs unless ``trust_remote_code``. Of a multimodal checkpoint the text
    decoder's weights alone are loaded. Quantization is transformers' own: as in the checkpoint's configuration, or one
    of its configurations as ``quantization``; or "fp8", in which linear layers are rounded to fp8 once they are loaded.
    Adapters are transformers' too: a folder with one of peft's is loaded onto its base model. With several ``gpus`` the
    layers are split over that many, beginning
    with ``device``; DoesNotFit, before weights are read, if they are too small. InputError if weights are missing or
    have other shapes than in the configuration.
    """
    loaded: Any
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    # Wrong shapes are reported by _check_weights: transformers names them in a log line only.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    rounded = float8.check(quantization, device, dtype, mesh is not None)
    if quantization is not None and not rounded:
        options["quantization_config"] = quantization
    damaged.check_index(model)
    places: dict[str, Any] = {"": device}
    if gpus > 1:
        places = _places(model, dtype, device, trust_remote_code, quantization, gpus)
    whole = None if gguf.is_gguf(model) else _whole_config(model, trust_remote_code)
    wrapped = whole is not None and is_wrapper(whole)
    by_class = wrapped or (whole is not None and not auto_knows(whole))
    try:
        kind: Any = AutoModelForCausalLM
        if mesh is None:
            options["device_map"] = places
        if mesh is not None or by_class:
            options["config"] = load_config(model, trust_remote_code)
        if by_class:
            kind = decoder_class(options["config"])
        if wrapped:
            options["key_mapping"] = NAMES
        if mesh is not None:
            options |= settings(mesh)
            kind = shared(decoder_class(options["config"]), mesh)
        if gguf.is_gguf(model):
            loaded = gguf.load_model(model, kind, options)
        else:
            loaded = kind.from_pretrained(str(model), **options)
    except InputError:  # a sentence already
        raise
    except UnpicklingError as error:
        raise damaged.not_only_tensors(model, error) from error
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, NotImplementedError) as error:
        method = damaged.quantizer(load_config(model, trust_remote_code), quantization)
        missing = damaged.missing_quantizer(model, method) if method and isinstance(error, ImportError) else None
        raise missing or InputError(f"The weights of {str(model)!r} cannot be loaded: {first_line(error)}.") from error
    weights, found = loaded
    # Quantizers may change names and shapes, so only plain weights and those of expanded GGUF files are checked.
    if gguf.is_gguf(model) or getattr(weights, "hf_quantizer", None) is None:
        _check_weights(str(model), found)
    return (float8.round_layers(weights) if rounded else weights).eval()


def _check_weights(model: str, found: dict[str, Any]) -> None:
    """InputError if weights were initialized at random, because the checkpoint lacks them or has other shapes."""
    for name, there, needed in sorted(found["mismatched_keys"]):
        raise InputError(
            f"The weights of {model!r} do not fit its configuration: {name} has shape {tuple(there)} and should have "
            f"{tuple(needed)}; give the configuration that belongs to them."
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"The checkpoint {model!r} lacks weights that its configuration asks for: {missing[0]}{more}; "
            "give the configuration that belongs to them."
        )


def _places(
    model: str | Path, dtype: torch.dtype, first: torch.device, trust_remote_code: bool, quantization: Any, gpus: int
) -> dict[str, Any]:
    """The GPU of every module, from the first GPU on."""
    config = load_config(model, trust_remote_code)
    # The size of quantized weights is not known here: then the GPUs' memory is no limit.
    quantized = quantization is not None or getattr(config, "quantization_config", None) is not None
    memory = None if quantized else torch.cuda.get_device_properties(first).total_memory
    places = placement.device_map(config, gpus, dtype, memory)
    return {name: torch.device(first.type, (first.index or 0) + gpu) for name, gpu in places.items()}


def check_fit(config: Any, plan: Plan, new_tokens: int, allow_extrapolation: bool, tensor: int = 1) -> None:
    """InputError if a plan does not fit the model: its positions, its number of heads."""
    text = config.get_text_config()
    total = plan.total + new_tokens
    limit = position_limit(config)
    if limit is not None and total > limit and not allow_extrapolation:
        raise InputError(
            f"The prompt and the answer need {total} positions ({plan.total} + {new_tokens} new tokens), "
            f"{total - limit} more than the model's {limit}; shorten the document or the answer, or allow "
            "extrapolation (--allow-extrapolation of generate, read, ask and serve, allow_extrapolation in Python)."
        )
    plan.method.check_model(query_heads(config) // tensor, plan.ranks)
    if text.model_type in RECURRENT_FAMILIES and tensor > 1:
        raise InputError(
            f"{config.model_type!r} models have recurrent layers, whose weights are not shared yet; read on more ranks "
            "instead, without tensor parallelism."
        )
    if plan.going_on < plan.document and (reason := why_all_rows(config)):
        raise InputError(f"{config.model_type!r} models have {reason}; read without propagation.")
    if plan.rounds > 1 and expands(config):
        raise InputError(
            f"{config.model_type!r} models keep in the cache what keys and values are expanded from, latents or fewer "
            "heads, which later rounds cannot attend to; read in one round."
        )


def why_all_rows(config: Any) -> str | None:
    """The layers that keep propagation from leaving rows behind in a model; None if it can."""
    text = config.get_text_config()
    if any(x is not None for x in shared_layers(config)) or chunked(text):
        return "layers that share keys and values or see chunks, which takes all rows"
    if text.model_type in RECURRENT_FAMILIES:
        return "recurrent layers, whose state runs through every row"
    return None


def position_limit(config: Any) -> int | None:
    """The number of positions that a model supports, scaled RoPE included; None if its configuration has no limit."""
    return rope.reach(config.get_text_config())


def pick_device(device: str | None) -> torch.device:
    """The device asked for; by default a GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"Unknown device {device!r}; choose cpu or cuda.") from error
    if picked.type not in ("cpu", "cuda"):
        raise InputError(f"Unknown device {device!r}; choose cpu or cuda.")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise InputError("CUDA was asked for, but torch sees no GPU here; use --device cpu.")
    return picked


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or bfloat16 on a GPU and float32 on the CPU."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
