"""GGUF files, of one part or several: expanded by transformers; settings that it would silently drop are refused.

transformers reads the tokenizer, its chat template, the settings that it knows and the weights, but neither files of
several parts nor the scaling of RoPE.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import modeling_gguf_pytorch_utils as expanding
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import is_gguf_available, logging

from ..errors import InputError, first_line
from . import rope

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def is_gguf(model: str | Path) -> bool:
    """True if ``model`` is the name of a GGUF file."""
    return str(model).endswith(".gguf") and not Path(model).is_dir()


def load_config(model: str | Path) -> Any:
    """The configuration of a file, with the scaling of its RoPE; InputError if it cannot be read."""
    with _reading(model) as (reader, source):
        return _config(reader, source, str(model))


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a file, and its chat template."""
    with _reading(model) as (_, source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source)
    return tokenizer


def load_model(model: str | Path, kind: Any, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A file's weights by ``kind.from_pretrained`` with these options, and its report of missing ones."""
    if "quantization_config" in options:
        raise InputError(f"The weights of a GGUF file such as {str(model)!r} are expanded: leave the quantization out.")
    options = dict(options)
    if hasattr(transformers, "GgufConfig"):  # newer versions may leave weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _reading(model) as (reader, source):
        if "config" not in options:
            options["config"] = _config(reader, source, str(model))
        loaded, found = kind.from_pretrained(**source, **options)
        ends = [_value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    # An answer ends at the end of a turn too; of the two ids transformers reads only the first.
    ends = sorted({end for end in ends if end is not None})
    if ends and loaded.generation_config is not None:
        loaded.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return loaded, found


def parts(path: Path) -> list[Path]:
    """All parts of the model to which the file at ``path`` belongs, in order; InputError if one is missing."""
    named = _PART.search(path.name)
    if named is None:
        return [path]
    count = int(named[2])
    names = [f"{path.name[: named.start()]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, name in enumerate(names, 1):
        if not path.with_name(name).is_file():
            raise InputError(f"Part {number} of {count} of {str(path)!r} is missing: put {name} beside the others.")
    return [path.with_name(name) for name in names]


@contextmanager
def _reading(model: str | Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """gguf's reader of a file, and transformers' arguments for it; errors become InputError with one sentence."""
    path = Path(model).absolute()
    if not path.is_file():
        raise InputError(f"The model file {str(model)!r} does not exist.")
    if not is_gguf_available():
        raise InputError(f"Reading {str(model)!r} needs the package gguf: pip install 'apb-llm[gguf]'.")
    import gguf as module

    gguf: Any = module  # two of its attributes are replaced below
    files = parts(path)
    try:
        reader = _read(files)
        with ExitStack() as undone:
            undone.enter_context(_put(gguf, "GGUFReader", lambda _: reader))  # all parts as one, read once
            # A table that takes a while is made once, and not for every module; the bar heeds transformers' settings.
            undone.enter_context(_put(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)))
            undone.enter_context(_put(expanding, "tqdm", logging.tqdm))
            # From an empty folder: a tokenizer.json in the file's own would be taken for what is in the file.
            empty = undone.enter_context(TemporaryDirectory())
            yield reader, {"pretrained_model_name_or_path": empty, "gguf_file": str(files[0])}
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of damaged files, or files with contents unknown to transformers or gguf
        reason = first_line(error) or type(error).__name__
        raise InputError(f"The GGUF file {str(model)!r} cannot be read: {reason}.") from error


@contextmanager
def _put(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of a module's name, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _read(files: list[Path]) -> Any:
    """gguf's reader of the first of a file's parts, with the tensors of all."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Reader over a plain array: slicing a mapped one is several times slower, and a vocabulary takes a million."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

    first, *others = map(Reader, files)
    for other in others:
        first.tensors.extend(other.tensors)
    return first


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _config(reader: Any, source: dict[str, str], name: str) -> Any:
    config = AutoConfig.from_pretrained(**source)
    _complete(config.get_text_config(), reader, name)
    return config


def _complete(text: Any, reader: Any, name: str) -> None:
    """Add a file's attention settings that transformers ignores to a configuration; InputError if that fails."""
    family = _value(reader, "general.architecture")
    window = _value(reader, f"{family}.attention.sliding_window")
    if window and not getattr(text, "sliding_window", None):
        if not hasattr(text, "sliding_window") or getattr(text, "layer_types", None):
            raise _left_out(name, f"a sliding window of {window} tokens")
        text.sliding_window = window
    sets = rope.parameter_sets(text)
    if any(rope.kind(parameters) != "default" for parameters in sets.values()):
        return  # transformers has read them
    start = f"{family}.rope.scaling."
    given = {key.removeprefix(start): _value(reader, key) for key in reader.fields if key.startswith(start)}
    factors = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name.startswith("rope_f")}
    for layers, parameters in sets.items():
        if layers != "sliding_attention":
            scaled = _scaling(given, factors, parameters)
            if scaled is None:
                raise _left_out(name, f"RoPE scaled by {', '.join([*given, *factors])}")
            parameters.update(scaled)


def _scaling(given: dict[str, Any], factors: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE's scaling as transformers' settings, empty for none; None if it cannot be expressed.

    Args:
        given: the file's settings of it, without the prefix of their names.
        factors: tensors by which the file divides frequencies.
        parameters: transformers' settings without scaling.
    """
    settings = {name: value for name, value in given.items() if name != "finetuned"}
    kind = settings.pop("type", "linear")  # llama.cpp's default
    factor = settings.pop("factor", 0)
    if kind == "none" or not factor:
        return _llama3(factors, parameters["rope_theta"]) if factors else {}
    if kind == "linear" and not settings and not factors:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and set(settings) == {"original_context_length"} and not factors:
        length = settings["original_context_length"]
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    return None


def _llama3(factors: dict[str, Any], theta: float) -> dict[str, Any] | None:
    """Llama 3's settings that divide frequencies by these factors; None if the factors are not Llama 3's."""
    divided = factors.get("rope_freqs.weight")
    if divided is None or len(factors) > 1:
        return None
    settings: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": round(float(divided.max()), 4),
        "original_max_position_embeddings": 8192,
    }
    settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    dim = 2 * len(divided)
    config = transformers.LlamaConfig(
        head_dim=dim, max_position_embeddings=131072, rope_parameters={**settings, "rope_theta": theta}
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = theta ** -(np.arange(0, dim, 2) / dim)
    return settings if np.allclose(plain / divided, frequencies.numpy(), rtol=1e-4) else None


def _left_out(name: str, what: str) -> InputError:
    return InputError(
        f"transformers does not read {what} from {name!r}: use the checkpoint that the file was made from."
    )
