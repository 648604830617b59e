"""Ask a question of a very long text: fast prefill for causal decoders of transformers.

Importing this package is cheap: torch and transformers are imported when a name that needs them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import compressors, decoding, methods
    from .document import Document
    from .engine import Engine
    from .errors import Cancelled, InputError, NotFinite
    from .generation import Generation
    from .kernels.attention import Segment, attention
    from .planning.plan import Plan
    from .planning.propagation import Propagation
    from .prompt import Prompt
    from .session import Session
    from .tiers import Documents

__version__ = "0.2.0"

_HOMES = {
    "Cancelled": ".errors",
    "Document": ".document",
    "Documents": ".tiers",
    "Engine": ".engine",
    "Generation": ".generation",
    "InputError": ".errors",
    "NotFinite": ".errors",
    "Plan": ".planning.plan",
    "Prompt": ".prompt",
    "Propagation": ".planning.propagation",
    "Segment": ".kernels.attention",
    "Session": ".session",
    "attention": ".kernels.attention",
}
# Folders of what can be given to an engine as an object: ``apb.methods.APB(blocks=8)``.
_SUBMODULES = ("compressors", "decoding", "methods")
__all__ = [
    "Cancelled",
    "Document",
    "Documents",
    "Engine",
    "Generation",
    "InputError",
    "NotFinite",
    "Plan",
    "Prompt",
    "Propagation",
    "Segment",
    "Session",
    "__version__",
    "attention",
    "compressors",
    "decoding",
    "methods",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'apb' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
