"""Keeps the libraries below from writing between the lines of the command line's own output."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """No log lines and no progress bars but our own: what matters of theirs reaches the user as an exception."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
