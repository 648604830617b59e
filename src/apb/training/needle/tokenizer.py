"""The small model's tokenizer: byte-level BPE trained on generated text, with digits in groups of up to three."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ...evaluation.tasks import FILLERS, TAUGHT
from ...evaluation.tasks.chapters import NOTES, heading
from ...evaluation.tasks.chapters import QUESTIONS as CHAPTER_QUESTIONS
from ...evaluation.tasks.lexicon import NAMES, TITLES, WORDS
from ...evaluation.tasks.material import Encoder
from ...evaluation.tasks.needles import LIST_STARTS, QUESTIONS, SEVERAL, STATEMENTS

VOCABULARY = 4096
BOS, EOS = "<s>", "</s>"
# A word includes the space before it; a number does not. Line breaks include whitespace before them.
PATTERN = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


class Bytes:
    """Placeholder for the tokenizer before it is trained: one id per byte."""

    bos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode())


def corpus(seed: int = 0) -> Iterator[str]:
    """Training text: every digit group and every word of the lists many times, and text of every task and filler."""
    rng = Random(f"tokenizer {seed}")
    for _ in range(40):
        yield " ".join(f"{n:0{width}}" for width in (1, 2, 3) for n in range(10**width))
        yield "".join(f" {word}" for word in (*WORDS, *NAMES, *TITLES))
    for _ in range(2):
        yield "\n\n".join((*STATEMENTS, *QUESTIONS, *SEVERAL, *LIST_STARTS, *CHAPTER_QUESTIONS, *NOTES))
    for filler in FILLERS.values():
        sentence = filler(rng)
        yield "".join(segment for _ in range(3000) for segment in sentence())
    encoder = Encoder(Bytes())
    for build in TAUGHT.values():
        for _ in range(200):
            material = build(rng, 4000, encoder)
            for fact in material.facts:
                yield "".join(fact.segments)
            for question in material.questions:
                yield "\n\n" + question.text + " " + ", ".join(question.answers)
    yield "".join("".join(heading(" " + title)) for title in TITLES)
    # Letters and letter pairs of words outside the lists: names, capitals, endings.
    yield " ".join(word.capitalize() for word in (*WORDS, *NAMES))


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer; it puts BOS in front of a text, as training prompts do, and has no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair="$A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
