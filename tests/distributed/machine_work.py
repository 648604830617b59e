"""What one of two machines does, under torchrun: read a prompt, and count what left through its network."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import apb
import families
from apb.distributed.launch import leave

PROMPT = apb.Prompt.from_tokens([5, 96], [(37 * i + 11) % families.VOCABULARY for i in range(4001)], [41, 94, 147])
# Ethernet, IP and TCP, with time stamps, before every packet's load.
HEADERS = 14 + 20 + 32
READINGS = {
    "ring": {"strategy": "ring"},
    "ulysses": {"strategy": "ulysses"},
    "apb": {"strategy": "apb", "blocks": 4, "anchor_length": 600, "passing_length": 300},
    "sliding": {"strategy": "apb", "blocks": 8},
}


def model(reading: str) -> torch.nn.Module:
    """The same weights everywhere; one of the readings is of layers that slide."""
    window = {"sliding_window": 400} if reading == "sliding" else {"sliding_window": None}
    return families.make("MistralForCausalLM", {**families.SMALL, **window, "max_position_embeddings": 8192})


def sent(interface: str) -> int:
    """Bytes that an interface has sent, without headers."""
    folder = Path("/sys/class/net", interface, "statistics")
    return int((folder / "tx_bytes").read_text()) - HEADERS * int((folder / "tx_packets").read_text())


def there_and_back(numbers: int) -> float:
    """Seconds until fp32 numbers of machine 0 have come back from machine 1; of use on machine 0 alone."""
    message = torch.ones(numbers)
    began = time.perf_counter()
    for sender in range(2):
        if sender == dist.get_rank():
            dist.send(message, 1 - sender)
        else:
            dist.recv(message, sender)
    return time.perf_counter() - began


def main(folder: str, interface: str) -> None:
    """Write {reading: bytes sent, logits} of this machine's rank."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, options in READINGS.items():
        engine = apb.Engine.from_model(model(name), **options)
        engine.group.barrier()
        before = sent(interface)
        session = engine.prefill(PROMPT)
        engine.group.barrier()
        results[name] = {"sent": sent(interface) - before, "logits": session.logits.tolist()}
        engine.close()
    results |= {"number_s": there_and_back(1), "megabyte_s": there_and_back(250_000)}
    Path(folder, f"rank{engine.group.rank}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
