"""A tiny checkpoint, and the same as a GGUF file of one part or several, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from byte_checkpoint import EOS, TEMPLATE, VOCABULARY, byte_symbol, save_checkpoint

TOKENS = ["th", "er", *map(byte_symbol, range(2, 256))]
MERGES = ["t h", "e r"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def save_folder(folder: Path, rope: dict[str, Any] | None = None) -> None:
    """The checkpoint whose tokens are bytes (but for pairs in the place of 0 and 1, as files have merges), with a chat
    template, its RoPE scaled like that, its matrices rounded to what Q8_0 of GGUF can hold."""
    save_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= rope or {}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"] |= {
        "vocab": {symbol: number for number, symbol in enumerate(TOKENS)},
        "merges": [merge.split() for merge in MERGES],
    }
    tokenizer["post_processor"] = None  # no BOS in front, as the files say
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                packed = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
                weight.copy_(torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))
    model.save_pretrained(folder)


def write(
    folder: Path,
    file: Path,
    *,
    family: str = "llama",
    rope: dict[str, Any] | None = None,
    factors: np.ndarray[Any, Any] | None = None,
    window: int | None = None,
    tensors: int = 0,
) -> None:
    """The checkpoint in ``folder`` as a GGUF file, or as one of parts with so many ``tensors`` each.

    ``rope``: settings of its scaling under their names in the file; ``factors``: by which frequencies are divided.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(file, family, split_max_tensors=tensors)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    for name, value in (rope or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        add[type(value)](f"{family}.rope.scaling.{name}", value)
    if window:
        writer.add_sliding_window(window)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*TOKENS, "<s>", "</s>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(10)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    for name, weight in model.state_dict().items():
        called, values = _called(name), weight.numpy()
        for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
            if part in called:  # llama.cpp rotates neighbours
                values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        if values.ndim > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(called, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(called, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _called(name: str) -> str:
    """A weight's name in a GGUF file."""
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.items():
        if name.startswith(ours):
            return name.replace(ours, theirs)
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers", "blk")
