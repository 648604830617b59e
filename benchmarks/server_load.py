"""What a server does under load, when clients leave, when ranks are lost, and with a document that is asked again.

    python benchmarks/server_load.py --out benchmarks/results/server_load_cpu.json
    python benchmarks/server_load.py --part load --requests 12 --clients 4 --longest 2048

Every part starts `apb serve` with the shipped model on this machine, and asks it over the loopback address:

load: clients that each ask the next of many texts (needles of random lengths); answers are compared with
    `engine.generate` on one rank, memory is that of all processes of the server, at quarters of the run.
leaving: the same, and in half of the requests the client leaves at a random moment.
killed, stopped: a rank gets SIGKILL or SIGSTOP when a quarter has been answered; seconds until the server answers
    again, beside those that it takes to start. Clients that are told to come again do.
overtaking: a short question that comes while a long text is read, and both alone, in turns.
again: a second question on a long text, and one after the server was started again.

Results are written as they come. A file that exists keeps the parts that are not run, each with its own command.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
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
# How often the requests of `overtaking` are measured, in turns: a machine that others use is never the same twice.
ROUNDS = 3
# Seconds after which a client that was told to come again does.
AGAIN_S = 1.0


@dataclass
class Asked:
    """What a client saw: the answer, its errors, and seconds from the request to the first text and to the end.

    ``left`` is True if it left before the end, ``refused`` how often it was told to come again.
    """

    text: str = ""
    errors: list[str] = field(default_factory=list)
    first_s: float | None = None
    seconds: float = 0.0
    left: bool = False
    refused: int = 0


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
        asked, since, ended = Asked(), time.monotonic(), False
        message = {"role": "user", "content": question}
        body = {"messages": [message], "document": document, "stream": True, "max_tokens": NEW_TOKENS, "temperature": 0}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1800)
        connection.connect()

        def leave() -> None:
            asked.left = not ended
            with suppress(OSError):
                line_to_server.shutdown(socket.SHUT_RDWR)

        line_to_server: socket.socket = connection.sock
        leaving = threading.Timer(leave_s or 0.0, leave)
        if leave_s is not None:
            leaving.start()
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                asked.errors.append(f"{response.status} {json.loads(response.read())['error']['code']}")
                return asked
            for line in response:
                ended = ended or line.startswith(b"data: [DONE]")
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
            leaving.cancel()
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
            torch.set_num_threads(1)  # on a busy machine threads that wait for each other take many times as long
            engine = apb.Engine.from_pretrained(
                shipped_model(), strategy=self.options.strategy, device="cpu", **reading
            )
            for sample in self.samples:
                prompt = apb.Prompt.for_model(self.tokenizer, sample.document, sample.query)
                self._expected.append(engine.generate(prompt, max_new_tokens=NEW_TOKENS).text)
            engine.close()
        return self._expected

    def asked(
        self,
        server: Server,
        leaving: Callable[[int], float | None] = lambda number: None,
        answered: Callable[[int], None] = lambda count: None,
    ) -> list[Asked]:
        """Every sample, asked by the clients at once; ``answered`` is called with the number of requests that ended."""
        lock, count = threading.Lock(), 0

        def one(number: int) -> Asked:
            nonlocal count
            asked, refused = server.ask(*text_of(self.samples[number]), leaving(number)), 0
            while asked.errors == ["503 starting"]:
                time.sleep(AGAIN_S)
                asked, refused = server.ask(*text_of(self.samples[number])), refused + 1
            asked.refused = refused
            with lock:
                count += 1
                answered(count)
            return asked

        with ThreadPoolExecutor(self.options.clients) as clients:
            return list(clients.map(one, range(len(self.samples))))

    def compared(self, answers: list[Asked]) -> dict[str, Any]:
        """How the answers compare with the engine's."""
        stayed = [(each, text) for each, text in zip(answers, self.expected, strict=True) if not each.left]
        seconds = sorted(each.seconds for each, _ in stayed if not each.errors)
        firsts = sorted(each.first_s for each, _ in stayed if each.first_s is not None)
        return {
            "requests": len(answers),
            "answered": len(seconds),
            "left": sum(each.left for each in answers),
            "failed": [each.errors for each, _ in stayed if each.errors],
            "wrong": sum(each.text != text for each, text in stayed if not each.errors),
            "first_s": {"median": statistics.median(firsts), "worst": firsts[-1]} if firsts else None,
            "seconds": {"median": statistics.median(seconds), "worst": seconds[-1]} if seconds else None,
        }

    def load(self) -> dict[str, Any]:
        self.expected  # noqa: B018
        with serving(self.options) as server:
            self.asked_once(server)
            memory = {"before": server.bytes()}

            def look(count: int) -> None:
                if 4 * count % len(self.samples) < 4:
                    memory[f"after {count}"] = server.bytes()

            since = time.monotonic()
            found = self.compared(self.asked(server, answered=look))
            whole_s = time.monotonic() - since
            tokens = sum(sample.length for sample in self.samples)
            return found | {"tokens": tokens, "whole_s": whole_s, "tokens_per_s": tokens / whole_s, "memory": memory}

    def leaving(self) -> dict[str, Any]:
        self.expected  # noqa: B018
        with serving(self.options) as server:
            alone = self.asked_once(server).seconds
            goes = self.random.sample(range(len(self.samples)), len(self.samples) // 2)
            moments = {number: self.random.uniform(0, self.options.clients / 2 * alone) for number in goes}
            found = self.compared(self.asked(server, moments.get))
            since = time.monotonic()
            while server.metric("apb_running_requests") + server.metric("apb_waiting_requests"):
                time.sleep(0.1)
            idle_s = time.monotonic() - since
            right = self.asked_once(server).text == self.expected[0]
            return found | {"idle_after_s": idle_s, "answered_right_after": right}

    def killed(self) -> dict[str, Any]:
        return self._lost(signal.SIGKILL)

    def stopped(self) -> dict[str, Any]:
        return self._lost(signal.SIGSTOP)

    def _lost(self, number: signal.Signals) -> dict[str, Any]:
        self.expected  # noqa: B018
        with serving(self.options) as server:
            self.asked_once(server)
            answers: list[Asked] = []
            quarter = threading.Event()

            def look(count: int) -> None:
                if 4 * count >= len(self.samples):
                    quarter.set()

            clients = threading.Thread(target=lambda: answers.extend(self.asked(server, answered=look)))
            clients.start()
            quarter.wait()
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
            found |= {"clients": self.options.clients, "came_again": sum(bool(each.refused) for each in answers)}
            right = again.text == self.expected[0]
            return found | {
                "start_s": server.start_s,
                "beyond_start_s": answered - noticed - server.start_s,
                "noticed_s": noticed,
                "ready_s": ready,
                "answered_s": answered,
                "answered_right": right,
            }

    def overtaking(self) -> dict[str, Any]:
        seeds = itertools.count(1 << 20)

        def text(length: int) -> tuple[str, str]:
            return text_of(generate(TASK, self.tokenizer, length, next(seeds)))

        options, rounds = self.options, []
        with serving(options) as server:
            self.asked_once(server)
            for _ in range(ROUNDS):
                load = os.getloadavg()[0]
                short_alone, long_alone = (server.ask(*text(each)).seconds for each in (options.short, options.long))
                long, short, begun = text(options.long), text(options.short), threading.Event()
                with ThreadPoolExecutor(1) as client:
                    since = time.monotonic()
                    asked = client.submit(server.ask, *long, reading=begun.set)
                    begun.wait()
                    came = time.monotonic() - since
                    overtaken = server.ask(*short).seconds
                    whole = asked.result().seconds
                rounds.append(
                    {
                        "load": load,
                        "short_alone_s": short_alone,
                        "long_alone_s": long_alone,
                        "short_s": overtaken,
                        "long_still_needed_s": whole - came,
                        "share": overtaken / (whole - came),
                        "long_s": whole,
                        "slowed_s": whole - long_alone,
                    }
                )
        medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        return {"tokens": [options.short, options.long], "medians": medians, "rounds": rounds}

    def again(self) -> dict[str, Any]:
        sample = generate(TASK, self.tokenizer, self.options.long, 1 << 21)
        questions = [sample.query, *(f"{sample.query} {more}" for more in ("Say it.", "Again.", "Once more."))]
        with tempfile.TemporaryDirectory() as folder:
            with serving(self.options, "--documents", folder) as server:
                self.asked_once(server)
                # The second comes while the text is being written to the folder, the third when it has been.
                first, second, third = (server.ask(sample.document, question) for question in questions[:3])
            with serving(self.options, "--documents", folder) as server:
                self.asked_once(server)
                restarted = server.ask(sample.document, questions[3])
        asked = {"first": first, "second": second, "third": third, "after_restart": restarted}
        seconds = {name: each.first_s or 0.0 for name, each in asked.items()}
        shares = {name: each / seconds["first"] for name, each in seconds.items() if name != "first"}
        return {"tokens": sample.length, "first_token_s": seconds, "of_first": shares}

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
    report: dict[str, Any] = fingerprint(torch.device("cpu"), torch.float32) | {"cores": os.cpu_count()}
    if options.out is not None and options.out.exists():
        report = json.loads(options.out.read_text()) | report
    bench = Bench(options)
    for part in options.part or PARTS:
        about = {"command": f"python {' '.join(sys.argv)}", "load_average_before": os.getloadavg()}
        report[part] = about | getattr(bench, part)() | {"load_average_after": os.getloadavg()}
        print(part, json.dumps(report[part], indent=1), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
