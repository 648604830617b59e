"""Which models' tokens of several sessions can be read in one pass."""

from __future__ import annotations

from ..hf.attach import Attachment


def why_alone(attachment: Attachment) -> str | None:
    """The reason why each token of a model's sessions needs a pass of its own; None if several are read in one."""
    if attachment.recurrent:
        return "recurrent layers read rows in order, and write their state in place"
    if attachment.length_dependent:
        return f"RoPE of type {' and '.join(attachment.length_dependent)} has one length for all rows of a pass"
    if attachment.expands:
        return "keys and values are expanded from what a cache holds, which the model does to one cache"
    if attachment.asks_total:
        return "the model's code counts the tokens before a pass, which differ from session to session"
    return None


def refuse_counting(attachment: Attachment) -> None:
    """Note that the model's code counts the tokens before a pass, and raise: it was one pass for several sessions."""
    attachment.asks_total = True
    raise RuntimeError(f"Tokens of several sessions cannot be read in one pass: {why_alone(attachment)}.")
