"""What the code of a model calls the cache that it takes and gives back: the one place that knows the names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers' own since 5.24; before that, and in code that comes with checkpoints; that of recurrent layers.
_NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(function: Callable[..., Any]) -> str | None:
    """What a function calls its argument that is the cache; None if it has none."""
    parameters = inspect.signature(function).parameters
    return next((name for name in _NAMES if name in parameters), None)


def takes_length(function: Callable[..., Any]) -> bool:
    """True if a function is told how long the cache is."""
    return any(f"{name}_length" in inspect.signature(function).parameters for name in _NAMES)


# What the installed transformers calls it.
OWN_NAME = cache_name(CausalLMOutputWithPast) or _NAMES[0]


def with_cache(module: nn.Module, known: Any) -> dict[str, Any]:
    """The argument that gives a model, or a module of it, a cache."""
    return {_name_of(type(module).forward): known}


def cache_of(output: Any) -> Any:
    """The cache that a model gave back; None if it gave none."""
    return next((output[name] for name in _NAMES if name in output), None)


@cache
def _name_of(forward: Callable[..., Any]) -> str:
    """Code that names no cache passes its arguments on to a model of transformers'."""
    return cache_name(forward) or OWN_NAME
