"""How long a question waits for its first token: reading everything for it, or asking a document that stays read.

    python benchmarks/follow_up.py --length 32768 --out benchmarks/results/follow_up.json
    python benchmarks/follow_up.py --shape llama-3.1-8b --length 131072 --strategy full --out follow_up_h200.json

For each strategy: seconds to read text and question anew, to read the document once, and then from asking a question to
its first token: with the document on the device, in host memory (pinned, where there is a GPU; with the rate of its
bytes beside that of bare copies of as many), and on disk (in the page cache, and cold where it can be dropped). Weights
are those of --model, else the shipped ones, or random ones of a --shape; texts are random tokens. Results are written
as they come, and a part that fails leaves its traceback in place of its figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import apb
from apb.hardware import Stopwatch, fingerprint
from apb.hf.config import vocabulary
from apb.hf.loading import pick_device, pick_dtype, shipped_model
from apb.hf.random_weights import random_model, shape_config

QUESTION = 30
"""Tokens of a question."""
PLENTY = 1 << 60
"""More bytes than there are documents."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="of random weights, such as llama-3.1-8b")
    parser.add_argument("--model", help="folder or hub id of a checkpoint")
    parser.add_argument("--strategy", action="append", help="repeatable; full and apb if left out")
    parser.add_argument("--length", type=int, default=32768, help="tokens of document and question")
    parser.add_argument("--questions", type=int, default=5, help="asked in each place")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one if left out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = pick_device(None)
    if arguments.shape:
        model = random_model(shape_config(arguments.shape), pick_dtype(None, device), device)
        warm = apb.Engine.from_model(model, strategy="full", allow_extrapolation=True)
    else:
        warm = apb.Engine.from_pretrained(arguments.model or shipped_model(), strategy="full")
    report: dict[str, Any] = {
        "command": f"python {' '.join(sys.argv)}",
        "model": arguments.model or arguments.shape or "needle",
        "fingerprint": fingerprint(warm.device, warm.dtype),
        "length": arguments.length,
        "question": QUESTION,
        "rows": [],
    }

    def write() -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    for strategy in arguments.strategy or ["full", "apb"]:
        engine = apb.Engine.from_model(warm.model, strategy=strategy, allow_extrapolation=True)
        # Kernels are compiled, in all places. As many tokens as a question has are left for the last chunk of rows.
        Measured(engine, arguments.length // 4, 1, arguments.folder, {}, lambda: None).everything()
        row: dict[str, Any] = {"strategy": strategy}
        report["rows"].append(row)
        Measured(engine, arguments.length, arguments.questions, arguments.folder, row, write).everything()
        engine.close()
    print(json.dumps(report, indent=1))


@dataclass
class Measured:
    """The seconds of one strategy, written to ``row`` as they come."""

    engine: apb.Engine
    length: int
    questions: int
    folder: Path | None
    row: dict[str, Any]
    write: Callable[[], None]
    asked: list[list[int]] = field(default_factory=list)

    def everything(self) -> None:
        """All parts, each of which may fail on its own."""
        engine, size = self.engine, vocabulary(self.engine.model.config)
        count = self.length + QUESTION * self.questions
        draw = torch.randint(size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
        text, rest = draw[: self.length - QUESTION], draw[self.length - QUESTION :]
        self.asked = [rest[QUESTION * number : QUESTION * (number + 1)] for number in range(self.questions)]
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            self.part("anew", lambda: self.anew(text))
            documents = apb.Documents(engine, PLENTY, PLENTY)
            self.part("read", lambda: self.read(documents, text))
            self.part("device", lambda: self.from_device(documents))
            self.part("host", lambda: self.from_host(documents))
            self.part("disk", lambda: self.from_disk(documents, folder))
            documents.forget("text")

    def part(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Write what a part measures; if it fails, its traceback, and go on with the next."""
        try:
            self.row[name] = measure()
        except Exception:
            self.row[name] = {"error": traceback.format_exc()}
            traceback.print_exc()
        if "strategy" in self.row:
            print(f"{self.row['strategy']}, {name}: {json.dumps(self.row[name])}", file=sys.stderr, flush=True)
        self.write()

    def anew(self, text: list[int]) -> dict[str, Any]:
        """Text and question read by one prefill."""
        session = self.engine.prefill(apb.Prompt.from_tokens([], text, self.asked[0]))
        return {"first_token_s": session.timing["prefill_s"]}

    def read(self, documents: apb.Documents, text: list[int]) -> dict[str, Any]:
        """The document alone, to be asked."""
        document = documents.read("text", tokens=text)
        return {"seconds": document.state.prefill_s, "blocks": document.plan.blocks}

    def from_device(self, documents: apb.Documents) -> dict[str, Any]:
        """The first question after reading, and others."""
        every = [self.first_token(documents, question) for question in self.asked]
        return {**of(every), "bytes": documents.bytes()["device"]}

    def from_host(self, documents: apb.Documents) -> dict[str, Any]:
        """Each question after the document has left for host memory, where its copy stays."""
        result: dict[str, Any] = {"move_down_s": self.move_down(documents)}
        size, every = documents.bytes()["host"], []
        for question in self.asked:
            self.move_down(documents)
            every.append(self.first_token(documents, question))
        rate = copy_rate(self.engine.device)
        result |= {**of(every), "bytes": size, "bytes_per_s": size / statistics.median(every)}
        return {**result, "copy_bytes_per_s": rate, "of_copy_rate": rate and result["bytes_per_s"] / rate}

    def from_disk(self, kept: apb.Documents, folder: str) -> dict[str, Any]:
        """Each question after the document has left for disk: with its files in the page cache, then without."""
        document = kept.document("text")
        documents = apb.Documents(self.engine, PLENTY, 0, folder, PLENTY)  # without room in host memory
        documents.add("text", document)
        result: dict[str, Any] = {"move_down_s": self.move_down(documents), "bytes": documents.bytes()["disk"]}
        for name, cold in (("page_cache", False), ("cold", True)):
            every = []
            for question in self.asked[:3]:
                self.move_down(documents)
                if cold and not dropped(documents.folder):
                    break
                every.append(self.first_token(documents, question))
            result[name] = of(every) if every else "not measured: the page cache cannot be dropped here"
        documents.forget("text")
        return result

    def move_down(self, documents: apb.Documents) -> float:
        """Seconds to have the document leave the device, as if others had been asked since."""
        watch = Stopwatch(self.engine.device)
        documents.make_room(PLENTY)
        assert documents.place("text") in ("host", "disk"), f"it is at {documents.place('text')}"
        return watch.seconds()

    def first_token(self, documents: apb.Documents, question: list[int]) -> float:
        """Seconds from asking to the first token."""
        start = time.perf_counter()
        int(documents.document("text").prefill(question).logits.argmax())
        return time.perf_counter() - start


def of(seconds: list[float]) -> dict[str, Any]:
    """The median, the first, and all."""
    return {"first_token_s": statistics.median(seconds), "all_s": seconds}


def copy_rate(device: torch.device, size: int = 1 << 30, repeats: int = 8) -> float | None:
    """Bytes per second from pinned host memory to a GPU, of copies of a GiB; None without a GPU."""
    if device.type != "cuda":
        return None
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    there.copy_(host, non_blocking=True)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        there.copy_(host, non_blocking=True)
    stop.record()
    stop.synchronize()
    return size * repeats / (start.elapsed_time(stop) / 1e3)


def dropped(folder: Path | None) -> bool:
    """Drop files from the page cache, if the system lets us: True if a page in the middle of each is gone."""
    if folder is None or not hasattr(os, "RWF_NOWAIT"):
        return False
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
            except BlockingIOError:  # it would have to be read from the disk
                continue
            except OSError:
                return False
            return False
    return True


if __name__ == "__main__":
    main()
