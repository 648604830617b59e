"""The errors with a meaning of their own: the request was wrong; it was cancelled; a rank was lost. How to say them."""

from __future__ import annotations

# No number of a request is larger: what is computed with it stays within 64 bits.
LARGEST = 10**15


class InputError(ValueError):
    """A request that cannot be carried out as asked.

    The message is one sentence with the offending value, the limit, and what to do. The command line prints it and
    exits with status 2; the server answers it with a 4xx.
    """


class DoesNotFit(InputError):
    """A request that makes sense, and is more than this machine's memory or this model's heads allow."""


class Cancelled(RuntimeError):
    """The caller said, while a prompt was being read, that it is not wanted any more."""


class NotFinite(RuntimeError):
    """The model's scores are no numbers to choose a token by: NaN, or infinity. All ranks raise it.

    With ``APB_CHECK_FINITE=1`` in the environment every layer's attention is looked at, at the price of a pass over it,
    and the message names the first layer that gave such numbers.
    """


class RankError(RuntimeError):
    """A rank died or failed, or all were told to stop; no rank is left. The message says which and why."""


def first_line(error: BaseException) -> str:
    """What a library's error says, cut to the one line that fits into a sentence of ours."""
    if isinstance(error, KeyError):  # whose text is the key alone
        return f"there is no {error}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".:")


def unexpected(error: BaseException) -> str:
    """An error that nobody has a sentence for: its name and what it says; where a GPU is full, also what helps."""
    text = " ".join(str(error).split()) or "no message"
    if type(error).__name__ != "OutOfMemoryError":  # torch's, which this module does not import
        return f"{type(error).__name__}: {text}"
    # Behind these sentences torch counts its own memory, and gives advice that is seldom what helps here.
    text = ". ".join(text.removeprefix("CUDA out of memory. ").rstrip(".").split(". ")[:2])
    return (
        f"The GPU ran out of memory. {text}. Read in more rounds (--rounds), on more ranks (--ranks), or end other "
        "programs that use the GPU"
    )


def at_least(name: str, value: int, limit: int) -> None:
    """InputError unless ``value`` is a whole number of at least ``limit``, and no absurd one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"A whole number is needed for {name}, not {value!r}.")
    if value < limit:
        raise InputError(f"{name[0].upper()}{name[1:]} must be at least {limit}, not {value}.")
    if value > LARGEST:
        raise InputError(f"{name[0].upper()}{name[1:]} must be at most {LARGEST:,}, not {value}.")
