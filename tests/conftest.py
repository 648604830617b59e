"""What all tests share: quiet, offline, repeatable."""

from __future__ import annotations

import os

# Before torch and transformers are imported: no test may reach the network, and ranks must not fight for the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings

# No deadline: the first example of a test pays for imports. Derandomised: the same examples on every run.
settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("suite")
