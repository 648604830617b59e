"""Keeps the libraries below from writing between the lines of the command line's own output."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Errors only from transformers and torch's launcher; no progress bars of theirs. Results carry the facts."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch.distributed", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
