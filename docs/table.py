"""Writes docs/models.md: the result of `apb check` for every family of decoders that transformers has."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from apb.check import Card, check
from apb.hf.wrappers import decoder_config

PAGE = Path(__file__).with_name("models.md")
# What default configurations leave out or have in another way than the checkpoints of the family.
SETTINGS: dict[str, dict[str, Any]] = {
    **{
        family: {"is_decoder": True}
        for family in (
            "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
            "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
        )
    },
    **{
        family: {"is_encoder_decoder": False}
        for family in (
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
            "whisper",
        )
    },
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "glm4v": {"text_config": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}},
    "glmga": {"text_config": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}},
    "hunyuan_vl": {"text_config": {"rope_parameters": {"rope_theta": 1e4, "xdrope_section": [16, 16, 16, 16]}}},
    "glm46v": {"text_config": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
}  # fmt: skip

TITLE = """# Models

Written by `python docs/table.py` over all families that transformers knows as causal decoders or as multimodal models
with text; a test fails when there is one that is not here. For every family, its default configuration is shrunk, given
random weights, and read by every strategy. *Works*: `full` gives transformers' own logits, and `ring`, `ulysses`,
`minference` with all columns and `apb` with everything passed on give those of `full`, after the prompt and during
decode. *As* another: a multimodal checkpoint, whose text decoder is of that family. *Differs*: a small copy was read
and did not come out right, or none could be made, so engines refuse it. `apb check --model PATH [--ranks R]` does the
same for any checkpoint, makes the comparison that engines make, and prints the figures.

An engine makes the first of these comparisons itself, before weights are read, and refuses a model whose logits differ.
The comparison takes a fraction of a second, once for each kind of model and the versions of all code involved; success
is recorded in `~/.cache/apb`. If no small copy can be made, as for some code that comes with checkpoints, the model
itself reads a short prompt. `verify=False` skips the comparison.

Layers with a sliding window are exact in every strategy: a row sees all keys in the model's window, fetched from the
ranks that hold them, without selection; so are chunks (Llama 4), windows whose edge stands still. Layers that share
keys and values (Gemma 3n and 4) read those of the layer that has them, which are kept once. Latent attention caches
latents, attends to keys and values expanded from them, and reads in one round, as does JetMoE, which repeats heads.

Recurrent layers (gated delta nets, Mamba, short convolutions) are exact under every strategy: the state runs through
prefix, blocks and question in order, and the anchor begins its own. A rank hands it on to the one that holds the next
rows, so that in these layers ranks work one after the other; every rank has the state after the question. Only the
ranks of gated delta nets (Qwen3-Next, Qwen3.5, OLMo-Hybrid, Lara) read at once: what rows do to such a state is affine,
so that each rank reads its rows without the state before them, by the same code with wider values, and composes what
the others' rows do to it. That takes more memory, and states are handed on where a rank has over 65,536 rows a round
(on CPUs 8,192), or a piece of the document fewer than 16. Rows that begin from a state are read one by one in Mamba 1
(Jamba) and lightning attention (MiniMax), whose code in transformers takes no state with several rows: with more ranks
or rounds these are slow. Decode is by CUDA graphs, one session at a time, whose states are copied in and back; not
where other layers have latent attention (Kimi Linear) or windows (Lara), which no graphs read yet. transformers reads
gated delta nets by the kernels of flash-linear-attention where these are installed (`fla-core` suffices), and else by
slow functions of its own. Of a multimodal checkpoint the text decoder alone is loaded.

Attention that a family's own code computes by matrix products (GPT-J, GPT-Neo, Falcon, XGLM ...) is followed from the
product of queries and keys to that with the values, and computed as everywhere; where something is added to the scores
(ALiBi) the model is refused. Decoders of pairs (BART, Marian, Whisper ...) and encoders are read where their
configuration says that they were trained as decoders: `is_encoder_decoder` false, `is_decoder` true.

GGUF files (`--model FILE.gguf`, or any part of a file in several parts) need `apb-llm[gguf]`. transformers reads those
of the families that it supports, expanded to the dtype asked for; the scaling of RoPE, which it ignores, is read as
well, or the file is refused.

Prompt and answer may be as long as the model's settings allow: `max_position_embeddings`, or its scaled length (RoPE of
type YaRN, linear or dynamic); `--allow-extrapolation` goes further. If an answer of a longrope model outgrows the
length limit of the short factors, prompt and answer are read again with the long ones, as in transformers for Phi-3.

| model type | result | layers, or the reason |
|---|---|---|
"""


def families() -> list[str]:
    """Model types that transformers knows as causal decoders, or as multimodal models that give text."""
    decoders = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    wrappers = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted({*decoders, *wrappers, *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def config_of(family: str) -> Any:
    """A family's configuration, of a multimodal one's text decoder; None if it needs parts or packages to be made."""
    try:
        return decoder_config(AutoConfig.for_model(family, **SETTINGS.get(family, {})))
    except Exception:  # a configuration of parts that are not given, or of a package that is not there
        return None


def row(family: str) -> str:
    """One line of the table."""
    config = config_of(family)
    if config is None:
        return line(family, "refused", "It has no configuration of its own: it is made of other models.")
    if config.model_type != family and config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return line(family, f"as `{config.model_type}`", "")
    return of_card(family, check(config), of_text_alone(config))


def of_text_alone(config: Any) -> bool:
    """True if a configuration is that of a model of text, with nothing beside it."""
    try:
        return config.get_text_config() is config
    except ValueError:  # a text encoder beside the decoder
        return False


def of_card(family: str, card: Card, alone: bool = True) -> str:
    """The line of a result; ``alone``: of a model of text alone."""
    if card.supported:
        return line(family, "works", card.layers)
    if card.refused is None:
        failed = next(result for result in card.results if not result.passed)
        return line(family, "differs", f"{failed.name}: {failed.note or f'{failed.error:.1g} of the largest logit'}")
    encoder = alone and "not causal" in card.refused
    return line(family, "not a decoder" if encoder else "differs" if card.layers else "refused", card.refused)


def line(family: str, result: str, reason: str) -> str:
    """A line of the table."""
    return f"| `{family}` | {result} | {' '.join(reason.split())} |\n"


def rows(page: str) -> dict[str, str]:
    """The table's lines in a page, by family."""
    lines = page[page.index("|---") :].splitlines(keepends=True)[1:]
    return {line.split("`")[1]: line for line in lines}


def works(family: str, known: dict[str, str]) -> bool:
    """True if a family works by the table's lines, or the one that its text decoder is of."""
    result = known[family].split(" | ")[1]
    return works(result.split("`")[1], known) if result.startswith("as ") else result == "works"


def main(again: list[str]) -> None:
    """Write the page; ``again``: the families to run, or none for all of them."""
    known = rows(PAGE.read_text()) if again else {}
    for family in families():
        if family in again or family not in known:
            known[family] = row(family)
            print(known[family], end="", flush=True)
    decoders = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    print(f"{sum(works(name, known) for name in decoders)} of {len(decoders)} causal decoders work")
    PAGE.write_text(TITLE + "".join(known[name] for name in sorted(known)))


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    main(sys.argv[1:])
