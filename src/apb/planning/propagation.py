"""Propagation: from a middle layer on, only the rows of the document that the question looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import InputError, at_least


@dataclass(frozen=True)
class Propagation:
    """Which rows go on above a layer; an option of every strategy. After FastKV (arXiv 2502.01068).

    Every row runs through layers 0 to ``layer``. The question's rows score the document's by their attention in that
    layer, and the best of the whole document go on, with prefix and question. Above, they attend exactly to each other.
    If all go on (``keep=1.0``), the strategy goes on as well, as if there were no propagation.

    Attributes:
        layer: index of the layer that scores, the last that reads every row; None: the first that sees the whole
            text, from the middle one on.
        keep: share of the document's tokens that go on, above 0 and at most 1.
    """

    layer: int | None = None
    keep: float = 0.2

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise InputError(f"The share of rows that go on must be above 0 and at most 1, not {self.keep!r}.")
        if self.layer is not None:
            at_least("layer of propagation", self.layer, 0)

    @classmethod
    def parsed(cls, text: str) -> Propagation | None:
        """What ``--propagate`` means: "off", "auto" (the defaults), a share, or SHARE@LAYER."""
        if text in ("off", "auto"):
            return None if text == "off" else cls()
        share, at, layer = text.partition("@")
        try:
            keep = float(share[:-1]) / 100 if share.endswith("%") else float(share)
            number = int(layer) if at else None
        except ValueError as error:
            raise InputError(
                f"--propagate takes a share such as 0.2, a share at a layer such as 0.2@14, auto or off, not {text!r}."
            ) from error
        return cls(number, keep)

    def __str__(self) -> str:
        """As ``--propagate`` takes it."""
        return f"{self.keep:g}" if self.layer is None else f"{self.keep:g}@{self.layer}"

    def settled(self, reach: Sequence[int | None], total: int) -> Propagation:
        """With its layer filled in.

        Args:
            reach: for every layer of the model its window in tokens; None if it sees all.
            total: tokens of the prompt.

        Raises:
            InputError: no layer is above, or the layer does not see the whole prompt.
        """
        whole = [index for index, window in enumerate(reach[:-1]) if window is None or window >= total]
        if not whole:
            raise InputError(
                "No layer below the last one sees the whole text, so none can tell which rows the question looks at; "
                "leave propagation off."
            )
        if self.layer is None:
            middle = min(len(reach) // 2, len(reach) - 2)
            return replace(self, layer=next((index for index in whole if index >= middle), whole[-1]))
        if self.layer > len(reach) - 2:
            raise InputError(
                f"Layer {self.layer} cannot be the last that reads every row: the model has layers 0 to "
                f"{len(reach) - 1}, and one must be above; name a layer up to {len(reach) - 2}."
            )
        if self.layer not in whole:
            nearest = min(whole, key=lambda index: abs(index - (self.layer or 0)))
            raise InputError(
                f"Layer {self.layer} has a sliding window of {reach[self.layer]} tokens, so its question's rows do not "
                f"see the whole text; name another layer, such as {nearest}."
            )
        return self

    def rows(self, document: int) -> int:
        """Number of a document's tokens that go on: at least one."""
        return max(round(self.keep * document), 1)
