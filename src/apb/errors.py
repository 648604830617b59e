"""Errors with a meaning of their own (wrong or cancelled requests, lost ranks), and helpers for their messages."""

from __future__ import annotations

# The largest number allowed in a request: results computed from it stay within 64 bits.
LARGEST = 10**15


class InputError(ValueError):
    """A request that cannot be carried out as asked.

    The message is one sentence with the offending value, the limit, and the way out. The command line prints it and
    exits with status 2; the server answers it with a 4xx.
    """


class DoesNotFit(InputError):
    """A valid request that exceeds this machine's memory or this model's heads."""


class Cancelled(RuntimeError):
    """The caller cancelled a request while it was being read or answered."""


class NotFinite(RuntimeError):
    """The model's scores are NaN or infinite, so no token can be chosen; raised on all ranks.

    With ``APB_CHECK_FINITE=1`` in the environment every layer's attention is checked, at the cost of a pass over it,
    and the message names the first layer with such numbers.
    """


class RankError(RuntimeError):
    """A rank died or failed, or all were stopped; no rank is left running. The message names the rank and the cause."""


class Stopped(RankError):
    """All ranks were ended because a signal said so."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error, to be quoted in a sentence of ours."""
    if isinstance(error, KeyError):  # whose text is the key alone
        return f"there is no {error}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".:")


def unexpected(error: BaseException) -> str:
    """Message for an unexpected error: its name and text; if a GPU ran out of memory, also the way out."""
    text = " ".join(str(error).split()) or "no message"
    if type(error).__name__ != "OutOfMemoryError":  # torch's, which this module does not import
        return f"{type(error).__name__}: {text}"
    # After these sentences torch lists its own memory and gives advice that seldom helps here.
    text = ". ".join(text.removeprefix("CUDA out of memory. ").rstrip(".").split(". ")[:2])
    return (
        f"The GPU ran out of memory. {text}. Read in more rounds (--rounds), on more ranks (--ranks), or end other "
        "programs that use the GPU"
    )


def at_least(name: str, value: int, limit: int) -> None:
    """InputError unless ``value`` is a whole number from ``limit`` to ``LARGEST``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"A whole number is needed for {name}, not {value!r}.")
    if value < limit:
        raise InputError(f"{name[0].upper()}{name[1:]} must be at least {limit}, not {value}.")
    if value > LARGEST:
        raise InputError(f"{name[0].upper()}{name[1:]} must be at most {LARGEST:,}, not {value}.")
