"""Public checkpoints of the folder that APB_REAL_MODELS names: 64 greedy tokens are transformers', in fp32 on the CPU.

Takes minutes a model; without the variable nothing runs.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import apb
from apb.distributed.launch import launch
from apb.hf.loading import load_config, load_model, load_tokenizer
from models import transformers_says, without_eos

FOLDER = Path(os.environ.get("APB_REAL_MODELS") or "not given")
LENGTHS = dict.fromkeys(("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"), (1024, 4096))
CASES = [(name, length) for name, lengths in LENGTHS.items() for length in lengths]
STRATEGIES = ("ring", "ulysses")
TOKENS = 64

pytestmark = [
    # Checkpoints of gigabytes do not belong in a repository, and the tests' command must not depend on a download.
    pytest.mark.skipif(not FOLDER.is_dir(), reason="APB_REAL_MODELS names no folder of checkpoints"),
    pytest.mark.timeout(3600),
]


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A checkpoint in fp32 that never ends its answer; its weights rounded to ``dtype``."""
    return without_eos(load_model(path, dtype, torch.device("cpu")).float())


@cache
def prompt_of(name: str, length: int) -> apb.Prompt:
    """So many tokens of this repository's own pages, and a question."""
    tokenizer = load_tokenizer(FOLDER / name)
    pages = sorted(Path(__file__).parents[2].glob("docs/*.md"))
    question = tokenizer("\n\nIn one sentence, what is this text about?", add_special_tokens=False)["input_ids"]
    text = tokenizer("\n".join(page.read_text() for page in pages), add_special_tokens=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return apb.Prompt.from_tokens(start, text[: length - len(start) - len(question)], question)


@cache
def expected(name: str, length: int) -> list[int]:
    """What transformers generates."""
    prompt = prompt_of(name, length)
    assert len(prompt) == length
    return transformers_says(loaded(FOLDER / name), prompt.token_ids, TOKENS)


def strategies(name: str) -> list[str]:
    """Those that two ranks can share the heads of a model by."""
    odd = load_config(FOLDER / name).get_text_config().num_attention_heads % 2
    return [strategy for strategy in STRATEGIES if not (odd and strategy == "ulysses")]


def answers(folder: str, name: str, length: int) -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, said = loaded(FOLDER / name), {}
    for strategy in strategies(name):
        engine = apb.Engine.from_model(model, strategy=strategy)
        said[strategy] = engine.generate(prompt_of(name, length), max_new_tokens=TOKENS).token_ids
        engine.close()
    torch.save(said, Path(folder, f"rank{dist.get_rank()}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "length"), CASES)
def test_full(name: str, length: int) -> None:
    """On one rank."""
    engine = apb.Engine.from_model(loaded(FOLDER / name), strategy="full")
    assert engine.generate(prompt_of(name, length), max_new_tokens=TOKENS).token_ids == expected(name, length)


@pytest.mark.parametrize(("name", "length"), CASES)
def test_two_ranks(name: str, length: int, tmp_path: Path) -> None:
    """Ring and, where the heads can be shared out, ulysses; both ranks say the same."""
    launch(answers, 2, str(tmp_path), name, length)
    for rank in range(2):
        said = torch.load(tmp_path / f"rank{rank}.pt")
        assert said == dict.fromkeys(strategies(name), expected(name, length))


@pytest.mark.parametrize("name", LENGTHS)
def test_gguf(name: str) -> None:
    """The GGUF file that a checkpoint was made from, rounded to bfloat16 as that is: tokens and answer are the same."""
    pytest.importorskip("gguf", reason="gguf is not installed: the extra gguf brings it")
    path = FOLDER / f"{name}.gguf"
    prompt, tokenizer = prompt_of(name, 1024), load_tokenizer(FOLDER / name)
    text = tokenizer.decode(prompt.document)
    assert load_tokenizer(path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    engine = apb.Engine.from_model(loaded(path, torch.bfloat16), strategy="full")
    assert engine.generate(prompt, max_new_tokens=TOKENS).token_ids == expected(name, 1024)
