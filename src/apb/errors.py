"""The one exception that means "the request was wrong", as opposed to "it failed"."""

from __future__ import annotations


class InputError(ValueError):
    """A request that cannot be carried out as asked.

    The message is one sentence with the offending value, the limit, and what to do. The command line prints it and
    exits with status 2; the server answers it with a 4xx.
    """


def first_line(error: BaseException) -> str:
    """What a library's error says, cut to the one line that fits into a sentence of ours."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".:")
