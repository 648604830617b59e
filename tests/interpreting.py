"""Triton's interpreter, which replaces functions of Triton's language at every launch, and again at every call of a
function by a kernel: a quarter of its time. Once is enough where nothing is compiled."""

from __future__ import annotations

import sys
from typing import Any


def prepare_once() -> None:
    """Leave the language replaced from the first launch on, if the interpreter has been imported."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or hasattr(interpreter._patch_lang, "replaced"):
        return
    replace, tl = interpreter._patch_lang, interpreter.tl
    replaced: set[str] = set()

    def replace_once(function: Any) -> Any:
        seen = {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}
        if not seen <= replaced:
            replace(function)
            replaced.update(seen)
        return interpreter._LangPatchScope()  # of nothing: what is replaced stays so

    if hasattr(interpreter, "_LangPatchScope"):  # not in older versions of Triton
        replace_once.replaced = replaced  # type: ignore[attr-defined]
        interpreter._patch_lang = replace_once
