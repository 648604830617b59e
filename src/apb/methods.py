"""The strategies as objects: ``apb.Engine.from_pretrained(model, strategy=apb.methods.APB(blocks=8))``.

A strategy of your own subclasses :class:`Method` or :class:`Blockwise`; see CONTRIBUTING.md.
"""

from .planning.methods import APB, METHODS, Blockwise, Full, Method, MInference, Ring, Star, Ulysses
from .planning.options import Share, option

__all__ = [
    "APB",
    "METHODS",
    "Blockwise",
    "Full",
    "MInference",
    "Method",
    "Ring",
    "Share",
    "Star",
    "Ulysses",
    "option",
]
