"""Whether a model is there, looked at before torch is imported: a folder, a file, or an id of the hub."""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path
from ssl import SSLError
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from ..errors import InputError

# Seconds that the hub may take to answer. transformers tries for half a minute where there is no network.
_PATIENCE_S = 2.0


def check_there(model: str | Path) -> None:
    """InputError if a model is no folder or file here, and is not to be had from the hub either.

    Without a network an id is good if the hub's cache has it, and only the cache is asked from then on.
    """
    if Path(model).exists():
        return
    name = str(model)
    file = name.endswith(".gguf")
    if file or Path(model).is_absolute() or name.startswith((".", "~")):
        raise InputError(f"The model {'file' if file else 'folder'} {name!r} does not exist.")
    why = offline()
    if not why or _is_cached(name):
        return
    raise InputError(
        f"The model {name!r} cannot be loaded: there is no such folder here, the hub's cache (HF_HOME) does not have "
        f"it, and {why}; name a local folder, or fetch it where there is a network."
    )


@cache
def offline() -> str:
    """Why files cannot be fetched from the hub, whose library is offline from then on; empty if they can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if _answers(constants.ENDPOINT):
        return ""
    # As the variable of this name would have it: with it unset, every file of the cache costs seconds of retries.
    constants.HF_HUB_OFFLINE = True
    return f"{constants.ENDPOINT} does not answer (HF_ENDPOINT names a mirror, https_proxy a proxy)"


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = (try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json"))
        return any(isinstance(file, (str, os.PathLike)) for file in found)
    except HFValidationError as error:
        raise InputError(f"The model {name!r} is neither a folder here nor an id of the hub.") from error


def _answers(url: str) -> bool:
    """True if there is any answer. Looking up a name may hang for longer than any limit, so a thread does it."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=_PATIENCE_S).close()
        except HTTPError:
            pass
        except (OSError, ValueError) as error:
            if not isinstance(getattr(error, "reason", None), SSLError):  # of which transformers says more
                return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    return answered.is_set()
