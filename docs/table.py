"""Writes docs/models.md: the result of `apb check` on the default configuration of every family listed here."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoConfig

from apb.check import Card, check

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "glm", "glm4", "olmo2", "olmo3", "granite", "smollm3", "cohere",
    "cohere2", "stablelm", "nemotron", "gpt_neox", "gpt2", "opt", "starcoder2", "exaone4", "seed_oss", "gemma",
    "gemma2", "gemma3_text", "gpt_oss", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "glm4_moe", "minimax_m2",
    "deepseek_v3", "lfm2", "qwen3_next", "mamba2", "zamba2", "gemma3n_text", "llama4_text", "gptj", "bert",
)  # fmt: skip

TITLE = """# Models

Written by `python docs/table.py`; a test checks that it is up to date. For every family, its default configuration in
transformers is shrunk, given random weights, and read by every strategy. *Yes*: `full` gives transformers' own logits,
and `ring`, `ulysses`, `minference` with all columns and `apb` with everything passed on give those of `full`, after the
prompt and during decode. `apb check --model PATH [--ranks R]` does the same for any checkpoint, and prints the figures.

An engine makes the first of these comparisons itself, before weights are read, and refuses a model whose logits differ.
The comparison takes a fraction of a second, once for each kind of model and the versions of all code involved; success
is recorded in `~/.cache/apb`. If no small copy can be made, as for some code that comes with checkpoints, the model
itself reads a short prompt. `verify=False` skips the comparison.

Layers with a sliding window are exact in every strategy: a row sees all keys in the model's window, fetched from the
ranks that hold them, without selection. Latent attention caches latents, attends to keys and values expanded from them,
and reads in one round.

Recurrent layers (gated delta nets, Mamba, short convolutions) are exact under every strategy: the state runs through
prefix, blocks and question in order, and the anchor begins its own. A rank hands it on to the one that holds the next
rows, so that in these layers ranks work one after the other; every rank has the state after the question. Rows that
begin from a state are read one by one in Mamba 1 (Jamba) and lightning attention (MiniMax), whose code in transformers
takes no state with several rows: with more ranks or rounds these are slow. Decode goes without CUDA graphs. Of a
multimodal checkpoint the text decoder alone is loaded.

GGUF files (`--model FILE.gguf`, or any part of a file in several parts) need `apb[gguf]`. transformers reads those of
the families that it supports, expanded to the dtype asked for; the scaling of RoPE, which it ignores, is read as well,
or the file is refused.

Prompt and answer may be as long as the model's settings allow: `max_position_embeddings`, or its scaled length (RoPE of
type YaRN, linear or dynamic); `--allow-extrapolation` goes further. If an answer of a longrope model outgrows the
length limit of the short factors, prompt and answer are read again with the long ones, as in transformers for Phi-3.

| model type | supported | layers, or the reason |
|---|---|---|
"""


def row(card: Card) -> str:
    """One line of the table."""
    failed = "; ".join(result.name for result in card.results if not result.passed)
    reason = card.refused or (f"differs: {failed}" if failed else card.layers)
    return f"| `{card.model_type}` | {'yes' if card.supported else 'no'} | {reason} |\n"


def text() -> str:
    """The page."""
    return TITLE + "".join(row(check(AutoConfig.for_model(name))) for name in FAMILIES)


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    Path(__file__).with_name("models.md").write_text(text())
