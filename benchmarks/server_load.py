"""What a server does under load, when clients leave, when ranks are lost, and with a document that is asked again.

    python benchmarks/server_load.py --out benchmarks/results/server_load_cpu.json
    python benchmarks/server_load.py --part load --requests 12 --clients 4 --longest 2048

Every part starts `apb serve` with the shipped model on this machine, and asks it over the loopback address:

load: clients that each ask the next of many texts (needles of random lengths); answers are compared with
    `engine.generate` on one rank, memory is that of all processes of the server.
leaving: the same, and half of the clients leave at a random moment.
killed, stopped: a rank gets SIGKILL or SIGSTOP in the middle of it; seconds until the server answers again, beside
    those that it takes to start.
overtaking: a short question that comes while a long text is read.
again: a second question on a long text, and one after the server was started again.

Results are written as they come.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

import apb
from apb.evaluation.tasks import Sample, generate
from apb.hardware import fingerprint
from apb.hf.loading import load_tokenizer, shipped_model

TASK = "single"
NEW_TOKENS = 24


@dataclass
class Asked:
    """What a client saw: the answer, its errors, and seconds from the request to the first text and to the end."""

    text: str = ""
    errors: list[str] = field(default_factory=list)
    first_s: float | None = None
    seconds: float = 0.0
    left: bool = False


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, start_s: float) -> None:
        self.process, self.port, self.start_s = process, port, start_s

    def ask(
        self,
        document: str,
        question: str,
        leave_s: float | None = None,
        reading: Callable[[], None] = lambda: None,
    ) -> Asked:
        """A streamed answer; the client leaves after ``leave_s``, and ``reading`` is called with the first progress."""
        asked, since = Asked(), time.monotonic()
        message = {"role": "user", "content": question}
        body = {"messages": [message], "document": document, "stream": True, "max_tokens": NEW_TOKENS, "temperature": 0}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1800)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                asked.errors.append(f"{response.status} {json.loads(response.read())['error']['code']}")
                return asked
            for line in response:
                if leave_s is not None and time.monotonic() - since > leave_s:
                    asked.left = True
                    return asked
                if line.startswith(b": read"):
                    reading()
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    asked.errors.append(str(event["error"]["code"]))
                for choice in event.get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    if piece and asked.first_s is None:
                        asked.first_s = time.monotonic() - since
                    asked.text += piece
        except (OSError, http.client.HTTPException) as error:
            asked.errors.append(type(error).__name__)
        finally:
            connection.close()
            asked.seconds = time.monotonic() - since
        return asked

    def get(self, path: str) -> tuple[int, str]:
        """A response's status and body; (0, "") if there is none."""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""

    def metric(self, name: str) -> float:
        """A figure of /metrics."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks."""
        children = psutil.Process(self.process.pid).children()
        return sorted((child for child in children if "spawn_main" in " ".join(child.cmdline())), key=lambda c: c.pid)

    def bytes(self) -> dict[str, int]:
        """Resident bytes of all processes, and of the documents in them."""
        every = [psutil.Process(self.process.pid), *self.ranks()]
        documents = self.metric('apb_document_bytes{place="device"}') * len(self.ranks())
        return {"resident": sum(each.memory_info().rss for each in every), "documents": int(documents)}


@contextmanager
def serving(options: argparse.Namespace, *more: str) -> Iterator[Server]:
    """A server with the options' ranks, on a free port."""
    command = [sys.executable, "-m", "apb.cli.main", "serve", "--port", "0", "--ranks", str(options.ranks)]
    command += ["--strategy", options.strategy, "--device", "cpu", *more]
    command += ["--blocks", str(options.blocks)] if options.strategy == "apb" else []
    since = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, b"")
    line = next(line.decode() for line in lines if b"serving" in line)
    rest = threading.Thread(target=lambda: [print(line.decode(), end="", file=sys.stderr) for line in lines])
    rest.start()
    server = Server(process, int(re.findall(r":(\d+)/v1", line)[0]), time.monotonic() - since)
    try:
        yield server
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(120)
        for each in [process, *started]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        rest.join()


class Bench:
    """The texts, and what each part measures."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.tokenizer = load_tokenizer(shipped_model())
        lengths = [self.random.randint(options.shortest, options.longest) for _ in range(options.requests)]
        self.samples = [generate(TASK, self.tokenizer, length, seed) for seed, length in enumerate(lengths)]
        self._expected: list[str] = []

    @property
    def expected(self) -> list[str]:
        """What the engine answers alone, on one rank."""
        if not self._expected:
            reading = {"blocks": self.options.blocks} if self.options.strategy == "apb" else {}
            engine = apb.Engine.from_pretrained(
                shipped_model(), strategy=self.options.strategy, device="cpu", **reading
            )
            for sample in self.samples:
                prompt = apb.Prompt.for_model(self.tokenizer, sample.document, sample.query)
                self._expected.append(engine.generate(prompt, max_new_tokens=NEW_TOKENS).text)
            engine.close()
        return self._expected

    def asked(self, server: Server, leaving: Callable[[int], float | None] = lambda number: None) -> list[Asked]:
        """Every sample, asked by the clients at once."""
        with ThreadPoolExecutor(self.options.clients) as clients:
            one = lambda number: server.ask(*text_of(self.samples[number]), leaving(number))  # noqa: E731
            return list(clients.map(one, range(len(self.samples))))

    def compared(self, answers: list[Asked]) -> dict[str, Any]:
        """How the answers compare with the engine's."""
        stayed = [(each, text) for each, text in zip(answers, self.expected, strict=True) if not each.left]
        seconds = sorted(each.seconds for each, _ in stayed if not each.errors)
        firsts = sorted(each.first_s for each, _ in stayed if each.first_s is not None)
        return {
            "answered": len(seconds),
            "left": sum(each.left for each in answers),
            "failed": [each.errors for each, _ in stayed if each.errors],
            "wrong": sum(each.text != text for each, text in stayed if not each.errors),
            "first_s": {"median": statistics.median(firsts), "worst": firsts[-1]} if firsts else None,
            "seconds": {"median": statistics.median(seconds), "worst": seconds[-1]} if seconds else None,
        }

    def load(self) -> dict[str, Any]:
        expected = self.expected
        with serving(self.options) as server:
            self.asked_once(server)
            before, over = server.bytes(), threading.Event()
            most: list[dict[str, int]] = []

            def look() -> None:
                while not over.wait(5):
                    most.append(server.bytes())

            watch = threading.Thread(target=look)
            watch.start()
            since = time.monotonic()
            found = self.compared(self.asked(server))
            whole_s = time.monotonic() - since
            over.set()
            watch.join()
            memory = {"before": before, "every_5_s": most, "after": server.bytes()}
            tokens = sum(sample.length for sample in self.samples)
            return found | {"whole_s": whole_s, "tokens_per_s": tokens / whole_s, "memory": memory, "n": len(expected)}

    def leaving(self) -> dict[str, Any]:
        self.expected  # noqa: B018
        with serving(self.options) as server:
            alone = self.asked_once(server).seconds
            goes = self.random.sample(range(len(self.samples)), len(self.samples) // 2)
            moments = {number: self.random.uniform(0, 4 * alone) for number in goes}
            found = self.compared(self.asked(server, moments.get))
            since = time.monotonic()
            while server.metric("apb_running_requests") + server.metric("apb_waiting_requests"):
                time.sleep(0.1)
            return found | {"idle_after_s": time.monotonic() - since}

    def killed(self) -> dict[str, Any]:
        return self._lost(signal.SIGKILL)

    def stopped(self) -> dict[str, Any]:
        return self._lost(signal.SIGSTOP)

    def _lost(self, number: signal.Signals) -> dict[str, Any]:
        self.expected  # noqa: B018
        with serving(self.options) as server:
            self.asked_once(server)
            answers: list[Asked] = []
            clients = threading.Thread(target=lambda: answers.extend(self.asked(server)))
            clients.start()
            while server.metric("apb_running_requests") < 2:
                time.sleep(0.05)
            old = server.ranks()
            old[-1].send_signal(number)
            since = time.monotonic()
            while server.get("/ready")[0] == 200:
                time.sleep(0.1)
            noticed = time.monotonic() - since
            while server.get("/ready")[0] != 200:
                time.sleep(0.1)
            ready = time.monotonic() - since
            again = self.asked_once(server)
            answered = time.monotonic() - since
            clients.join()
            _, alive = psutil.wait_procs(old, timeout=5)
            found = self.compared(answers) | {"failed": sorted({error for each in answers for error in each.errors})}
            found |= {"failed_requests": sum(bool(each.errors) for each in answers), "orphans": len(alive)}
            right = again.text == self.expected[0]
            return found | {
                "start_s": server.start_s,
                "noticed_s": noticed,
                "ready_s": ready,
                "answered_s": answered,
                "answered_right": right,
            }

    def overtaking(self) -> dict[str, Any]:
        long, short = (generate(TASK, self.tokenizer, n, 1 << 20) for n in (self.options.long, self.options.short))
        other = generate(TASK, self.tokenizer, self.options.short, 1 + (1 << 20))
        with serving(self.options) as server:
            self.asked_once(server)
            alone_short = server.ask(*text_of(other)).seconds
            alone_long = server.ask(*text_of(generate(TASK, self.tokenizer, self.options.long, 2 + (1 << 20)))).seconds
            begun, long_asked = threading.Event(), []
            thread = threading.Thread(target=lambda: long_asked.append(server.ask(*text_of(long), reading=begun.set)))
            since = time.monotonic()
            thread.start()
            begun.wait()
            came = time.monotonic() - since
            overtaken = server.ask(*text_of(short)).seconds
            thread.join()
            left = long_asked[0].seconds - came
            return {
                "tokens": [self.options.short, self.options.long],
                "short_alone_s": alone_short,
                "long_alone_s": alone_long,
                "short_s": overtaken,
                "long_still_needed_s": left,
                "share": overtaken / left,
                "long_s": long_asked[0].seconds,
            }

    def again(self) -> dict[str, Any]:
        sample = generate(TASK, self.tokenizer, self.options.long, 1 << 21)
        questions = [sample.query, f"{sample.query} Say it.", f"{sample.query} Again."]
        with tempfile.TemporaryDirectory() as folder:
            with serving(self.options, "--documents", folder) as server:
                self.asked_once(server)
                first, second = (server.ask(sample.document, question) for question in questions[:2])
            with serving(self.options, "--documents", folder) as server:
                self.asked_once(server)
                third = server.ask(sample.document, questions[2])
        first_s, second_s, third_s = (each.first_s or 0.0 for each in (first, second, third))
        found = {"tokens": sample.length, "first_s": first_s, "second_s": second_s, "after_restart_s": third_s}
        return found | {"second": second_s / first_s, "after_restart": third_s / first_s}

    def asked_once(self, server: Server) -> Asked:
        """The first sample, as a warm-up."""
        return server.ask(*text_of(self.samples[0]))


def text_of(sample: Sample) -> tuple[str, str]:
    """Document and question of a sample."""
    return sample.document, sample.query


PARTS = ("load", "leaving", "killed", "stopped", "overtaking", "again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all if left out")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--shortest", type=int, default=2048, help="tokens of the texts under load")
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--short", type=int, default=1024, help="tokens of the question that overtakes")
    parser.add_argument(
        "--long", type=int, default=32768, help="tokens of what it overtakes, and of what is asked again"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategy", default="apb")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"command": f"python {' '.join(sys.argv)}"}
    report |= fingerprint(torch.device("cpu"), torch.float32) | {"cores": os.cpu_count()}
    bench = Bench(options)
    for part in options.part or PARTS:
        report[part] = {"load_average_before": os.getloadavg()} | getattr(bench, part)()
        print(part, json.dumps(report[part], indent=1), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
