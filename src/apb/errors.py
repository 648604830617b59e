"""The errors with a meaning of their own: the request was wrong; it was cancelled; a rank was lost."""

from __future__ import annotations


class InputError(ValueError):
    """A request that cannot be carried out as asked.

    The message is one sentence with the offending value, the limit, and what to do. The command line prints it and
    exits with status 2; the server answers it with a 4xx.
    """


class DoesNotFit(InputError):
    """A request that makes sense, and is more than this machine's memory or this model's heads allow."""


class Cancelled(RuntimeError):
    """The caller said, while a prompt was being read, that it is not wanted any more."""


class RankError(RuntimeError):
    """A rank died or failed, or all were told to stop; no rank is left. The message says which and why."""


def first_line(error: BaseException) -> str:
    """What a library's error says, cut to the one line that fits into a sentence of ours."""
    if isinstance(error, KeyError):  # whose text is the key alone
        return f"there is no {error}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".:")
