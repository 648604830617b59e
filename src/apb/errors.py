"""The one exception that means "the request was wrong", as opposed to "it failed"."""


class InputError(ValueError):
    """A request that cannot be carried out as asked.

    The message is one sentence with the offending value, the limit, and what to do. The command line prints it and
    exits with status 2; the server answers it with a 4xx.
    """
