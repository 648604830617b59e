"""A tokenizer whose tokens are bytes, and a tiny checkpoint with it on disk: no download, any text, any language."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from models import tiny_model

BOS, EOS = 256, 257
VOCABULARY = 258
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Token i is byte i, BOS is 256 and EOS 257: BPE over the byte alphabet with no merges."""
    alphabet = [byte_symbol(byte) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


def byte_symbol(byte: int) -> str:
    """The printable character that stands for a byte in a byte-level vocabulary."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in visible else chr(256 + sum(other not in visible for other in range(byte)))


def save_checkpoint(folder: Path) -> None:
    """A three-layer Llama of 4096 positions with that tokenizer; it ends its answer at EOS."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=VOCABULARY)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = BOS, EOS
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
