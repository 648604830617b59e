"""Keeping libraries from writing into the command line's own output."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Turn off log lines and progress bars of libraries; their errors reach the user as exceptions."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
