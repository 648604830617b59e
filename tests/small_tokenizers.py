"""Small tokenizers of the kinds that models come with, each with control tokens, a chat template and its quirks."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "The keeper of the lighthouse was called Maud. Who was the keeper?\n\nShe wrote <s> and </s> in the margin.\n",
    "A list: 1, 2, 3.\n\n\nIt's what they don't say that counts, [INST] or not. <|im_end|> </s></s> <s><s>\n",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% else %}<<SYS>>{{ message['content'] }}<</SYS>>{% endif %}{% endfor %}"
)
TRIMMED = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def byte_level() -> PreTrainedTokenizerBase:
    """Byte-level BPE as Qwen's: signs and line ends in one token, markers that are added and not special, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([*CORPUS, "end.\n\n end.\n\n\n"], trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("   ", normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML + "{# <tool_call> #}"
    return fast


def _pieces(tokenizer: Tokenizer, chat_template: str, **options: object) -> PreTrainedTokenizerFast:
    """With the decoder and the BOS of Llama's tokenizers, and control tokens that merges lead to as well."""
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    )
    fast.chat_template = chat_template
    return fast


def _merged(pre_tokenizer: object) -> Tokenizer:
    """BPE over whole texts, as from SentencePiece: spaces are signs like any other, bytes are the last resort."""
    learning = Tokenizer(models.BPE())
    learning.normalizer = normalizers.Replace(" ", "▁")
    learning.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, show_progress=False, min_frequency=1, max_token_length=6
    )
    learning.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    learned = json.loads(learning.to_str())["model"]
    vocabulary = learned["vocab"] | {byte: len(learned["vocab"]) + number for number, byte in enumerate(BYTES)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizer  # type: ignore[assignment]
    return tokenizer


def space_first() -> PreTrainedTokenizerBase:
    """A space in front of the text, as Llama's and Mistral's newer ones."""
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _pieces(_merged(metaspace), INST)


def space_always() -> PreTrainedTokenizerBase:
    """A space in front of the text and behind every control token, as converted tokenizers have it."""
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return _pieces(_merged(metaspace), INST)


def space_by_normalizer() -> PreTrainedTokenizerBase:
    """The same by a normalizer, as Llama-2's; an end-of-turn marker takes white space along, as Phi-3's."""
    tokenizer = _merged(None)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(
        [AddedToken(name, rstrip=True, normalized=False, special=True) for name in ("<|user|>", "<|end|>")]
    )
    return _pieces(tokenizer, "{{ bos_token }}<|user|>\n{{ messages[-1]['content'] }}<|end|>\n")


def unigram() -> PreTrainedTokenizerBase:
    """Unigram, whose likeliest piece for "</s>" is the control token; lines are trimmed by the template."""
    letters = sorted({letter for text in CORPUS for letter in text if not letter.isspace()} | {"▁", "\n"})
    words = ["▁the", "▁keeper", "▁was", "▁of", "house", "light", "▁▁", "\n\n", "▁Maud", "er", "ed"]
    vocabulary = [(name, 0.0) for name in (*SPECIAL, "<start_of_turn>", "<end_of_turn>")]
    vocabulary += [(byte, -20.0) for byte in BYTES]
    vocabulary += [(letter, -9.0) for letter in letters] + [(word, -6.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    # Not special, as in some releases of Gemma; and a tag of HTML, which is text like any other.
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False) for name in ("<start_of_turn>", "<end_of_turn>", "<td>", "\n\n\n")]
    )
    return _pieces(tokenizer, TRIMMED)


def word_pieces() -> PreTrainedTokenizerBase:
    """WordPiece as BERT's: small letters only, a token at both ends, signs put back next to words when decoded."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[USER]"], show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([*CORPUS, "[ u s e r ] [cls] [sep] don ' t"], trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        additional_special_tokens=["[USER]"],
        clean_up_tokenization_spaces=True,
    )
    fast.chat_template = "[CLS]{% for message in messages %}[USER] {{ message['content'] }} [SEP]{% endfor %}"
    return fast


def slow() -> PreTrainedTokenizerBase:
    """One in Python, which tells no offsets: bytes."""
    tokenizer = ByT5Tokenizer(extra_ids=3)
    tokenizer.chat_template = "<pad>{% for message in messages %}{{ message['content'] }}<extra_id_0>{% endfor %}"
    return tokenizer


def from_gguf() -> PreTrainedTokenizerBase:
    """One that transformers makes of a GGUF file, which holds pieces, their kinds and a template."""
    from gguf import GGUFWriter

    pieces = space_first().get_vocab()
    listed = sorted(pieces, key=lambda piece: pieces[piece])
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | dict.fromkeys(BYTES, 6)
    with TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder, "tokenizer.gguf"), "llama")
        writer.add_vocab_size(len(listed))
        writer.add_tokenizer_model("llama")
        writer.add_token_list(listed)
        writer.add_token_scores([-float(number) for number in range(len(listed))])
        writer.add_token_types([kinds.get(piece, 1) for piece in listed])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_chat_template(INST)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return AutoTokenizer.from_pretrained(folder, gguf_file="tokenizer.gguf")


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": byte_level,
    "space first": space_first,
    "space always": space_always,
    "space by normalizer": space_by_normalizer,
    "unigram": unigram,
    "word pieces": word_pieces,
    "slow": slow,
}
"""By name; each makes a new one."""
if find_spec("gguf"):
    KINDS["GGUF"] = from_gguf
