"""Accuracy of the small model with full attention, per kind and length, on samples outside the training data.

`python -m apb.training.needle.evaluate MODEL OUT.json [DEVICE] [SAMPLES] [LENGTHS,COMMA,SEPARATED]`
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ...evaluation.tasks import QUERY_START, TAUGHT, Sample, generate, score
from ...hardware import fingerprint
from ...hf.cache_names import cache_of, with_cache
from .data import BATCH, LENGTHS
from .model import Network, load

SEEDS = 1_000_000
"""Seed of the first sample; training uses other random streams."""
ONCE = ("common_words", "frequent_words")
"""Kinds without an accuracy target: half the samples, and only without the query in front."""
PARTIAL = ("multivalue", "multiquery", "variable_tracking", "common_words", "frequent_words")
"""Kinds with several answers and partial credit: scored on greedily decoded text."""


@dataclass(frozen=True)
class Item:
    """A tokenized sample; the document is kept as tokens only."""

    sample: Sample
    document: numpy.ndarray
    query: list[int]
    answer: list[int]

    def prompt(self, bos: int, front: bool) -> Tensor:
        """Token ids (tokens,) int64: BOS, the query too if `front`, document, query."""
        start = [bos, *self.query] if front else [bos]
        return torch.from_numpy(numpy.concatenate((start, self.document, self.query)).astype(numpy.int64))


_tokenizer: Any = None


def _start(path: str) -> None:
    global _tokenizer  # noqa: PLW0603 - one tokenizer per worker process
    torch.set_num_threads(1)
    _tokenizer = AutoTokenizer.from_pretrained(path)


def make_item(work: tuple[str, int, int]) -> Item:
    """Generate and tokenize the sample (task, length, seed), in a worker process."""
    task, length, seed = work
    sample = generate(task, _tokenizer, length, seed)
    parts = (sample.document, QUERY_START + sample.query, " " + sample.answer)
    document, query, answer = (_tokenizer.encode(part, add_special_tokens=False) for part in parts)
    sample = replace(sample, document="")
    return Item(sample, numpy.array(document, dtype=numpy.int16), query, [*answer, _tokenizer.eos_token_id])


def rows(items: list[Item], size: int) -> Iterator[list[Item]]:
    """Yield groups of up to `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def forced(network: Network, items: list[Item], bos: int, front: bool, tokens: int) -> list[bool]:
    """True per item if greedy decoding yields the whole answer, checked in one forward by teacher forcing."""
    longest = max(1 + len(item.document) + 2 * len(item.query) + len(item.answer) for item in items)
    length = min(size for size in (*LENGTHS, 2 * LENGTHS[-1]) if size >= longest)
    result: list[bool] = []
    for group in rows(items, max(1, tokens // length)):
        flat = torch.full((max(tokens, length),), bos, dtype=torch.long)
        places: list[int] = []
        owners: list[int] = []
        for index, item in enumerate(group):
            prompt = item.prompt(bos, front)
            ids = torch.cat((prompt, torch.tensor(item.answer)))
            flat[index * length : index * length + len(ids)] = ids
            places += range(index * length + len(prompt) - 1, index * length + len(ids) - 1)
            owners += [index] * len(item.answer)
        missing = -len(places) % 1024  # one compiled shape for nearly all groups
        padded = torch.tensor(places + [0] * missing, device=network.device)
        _, right = network(flat.to(network.device), length, padded)
        wrong = {owner for owner, good in zip(owners, right.tolist(), strict=False) if not good}
        result += [index not in wrong for index in range(len(group))]
    return result


@torch.inference_mode()
def decode(model: LlamaForCausalLM, prompts: list[Tensor], steps: int) -> list[list[int]]:
    """Greedy decoding of a batch of prompts with the plain model, padded on the right with the padding masked."""
    device = model.device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for index, prompt in enumerate(prompts):
        ids[index, : len(prompt)] = prompt
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = model.model(ids.to(device), use_cache=True)
        cache = cache_of(out)
        last = out.last_hidden_state[torch.arange(len(prompts), device=device), lengths - 1]
        token: Tensor = model.lm_head(last).argmax(-1)
        found = [token]
        mask = (torch.arange(longest, device=device)[None] < lengths[:, None]).long()
        for step in range(steps - 1):
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            out = model.model(
                token[:, None],
                **with_cache(model.model, cache),
                attention_mask=mask,
                position_ids=(lengths + step)[:, None],
                use_cache=True,
            )
            token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            found.append(token)
    return torch.stack(found, dim=1).tolist()


def evaluate(model: Path, device: str, samples: int, lengths: list[int]) -> dict[str, Any]:
    """Accuracy in percent by kind and length, without and with the query in front."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(model)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokens = BATCH if device != "cpu" else 1
    results: list[dict[str, Any]] = []
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    with multiprocessing.get_context("fork").Pool(workers, _start, (str(model),)) as pool:
        work = [
            [(task, length, SEEDS + i) for i in range(max(1, samples // (1 + (task in ONCE))))]
            for length in lengths
            for task in TAUGHT
        ]
        made = [pool.map_async(make_item, part, chunksize=4) for part in work]
        network = Network(load(model, device), compiled=device != "cpu")
        plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16" if device != "cpu" else "float32")
        plain = plain.to(device).eval()
        for part, pending in zip(work, made, strict=True):
            task, length, _ = part[0]
            items = pending.get()
            for front in (False, True)[: 1 if task in ONCE else 2]:
                start = time.perf_counter()
                with torch.no_grad():
                    exact = forced(network, items, bos, front, tokens)
                scores = [100.0 * good for good in exact]
                if task in PARTIAL:
                    left = [index for index, good in enumerate(exact) if not good]
                    for chunk in (left[i : i + 16] for i in range(0, len(left), 16)):
                        steps = max(len(items[index].answer) for index in chunk) + 2
                        outputs = decode(plain, [items[index].prompt(bos, front) for index in chunk], steps)
                        for index, ids in zip(chunk, outputs, strict=True):
                            text = str(tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids))
                            scores[index] = score(items[index].sample, text)
                entry = {
                    "task": task,
                    "length": length,
                    "query_in_front": front,
                    "samples": len(items),
                    "exact": round(100 * sum(exact) / len(exact), 1),
                    "score": round(sum(scores) / len(scores), 1),
                    "seconds": round(time.perf_counter() - start, 2),
                }
                results.append(entry)
                print(json.dumps(entry), flush=True)
    return {
        "attention": "full",
        "dtype": "float32"
        if device == "cpu"
        else "bfloat16 products, fp32 residual stream; greedy decoding by the plain bfloat16 model",
        "command": f"python -m apb.training.needle.evaluate MODEL OUT.json {device} {samples}",
        "fingerprint": fingerprint(torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16),
        "first_seed": SEEDS,
        "results": results,
    }


def main(arguments: list[str]) -> None:
    """Evaluate with positional arguments."""
    if not 2 <= len(arguments) <= 5:
        raise SystemExit(f"usage: {(__doc__ or '').strip().splitlines()[-1]}")
    model, out, device, samples, lengths = (*arguments, *["", "", "", "", ""][len(arguments) :])
    sizes = [int(part) for part in (lengths or "4096,16384,32768").split(",")]
    result = evaluate(Path(model), device or "cuda", int(samples or 200), sizes)
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
