"""Keeping libraries from writing into the command line's own output."""

from __future__ import annotations

import logging
import warnings


def silence() -> None:
    """Turn off log lines and warnings of libraries, also of those that are yet to be imported.

    torchao, where it is installed, logs and warns while transformers imports it.
    """
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torchao|torch\.utils\._pytree")


def quiet_libraries() -> None:
    """Turn off progress bars too; errors of libraries reach the user as exceptions."""
    silence()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
