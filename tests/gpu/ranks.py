"""What two ranks with so many GPUs each do; started by torchrun from test_ranks.py. Rank 0 prints one JSON object."""

from __future__ import annotations

import json
import random
import sys

import torch

from apb import Engine, Prompt
from models import placed, tiny_model
from oracle import dense_prefill


def main(gpus: int) -> None:
    draw = random.Random(0)
    errors: dict[str, float] = {}
    for length in (3, 1003):
        prompt = Prompt.from_tokens([1, 2], [draw.randrange(97) for _ in range(length)], [5, 6, 7, 8])
        plans = {"full": {}, "ring": {}, "ulysses": {}}
        if length > 100:
            plans |= {
                "apb": {"blocks": 5, "anchor_length": 40, "passing_length": 16},
                "star": {"blocks": 5, "anchor_length": 30},
            }
        for strategy, options in plans.items():
            model = tiny_model("llama", heads=8, kv_heads=2, head_dim=64)
            blocks = options.get("blocks", 1)
            expected = dense_prefill(
                model,
                prompt.prefix,
                prompt.document,
                prompt.query,
                blocks=blocks,
                anchor_length=options.get("anchor_length", 6),
                passing_length=options.get("passing_length", 0),
                strategy="star" if strategy == "star" else "apb",
            )
            placed(model, gpus, first=torch.distributed.get_rank() * gpus)
            engine = Engine.from_model(model, strategy=strategy, **options)
            assert len(engine.devices) == gpus
            session = engine.prefill(prompt)
            error = (session.logits.cpu() - expected.logits).abs().max().item()
            for layer in range(3):
                keys, values = session.gather_kv(layer)
                if keys is not None and values is not None:
                    error = max(error, (keys.cpu() - expected.keys[layer]).abs().max().item())
                    error = max(error, (values.cpu() - expected.values[layer]).abs().max().item())
            tokens = engine.generate(prompt, max_new_tokens=8, temperature=0.8, seed=3).token_ids
            every: list[list[int]] = [[], []]
            torch.distributed.all_gather_object(every, tokens)
            errors[f"{strategy} {length}"] = error if every[0] == every[1] else float("inf")
            engine.close()
    if torch.distributed.get_rank() == 0:
        print(json.dumps(errors))


if __name__ == "__main__":
    from apb.distributed.launch import join, local_device

    gpus_of_a_rank = int(sys.argv[1])
    device = local_device(torch.device("cuda"), gpus_of_a_rank)
    join(device, gpus_of_a_rank)
    main(gpus_of_a_rank)
