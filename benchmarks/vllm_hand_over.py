"""What vLLM gains from documents that apb has read: seconds to the first token, in parts, and requests a second.

    python benchmarks/vllm_hand_over.py --model PATH --length 6144 --vllm-python .vllm/bin/python      # on a CPU
    python benchmarks/vllm_hand_over.py --shape llama-3.1-8b --length 131072 --length 32768 --tensor-parallel 1 \
        --tensor-parallel 2 --vllm-path DEST --out FILE                                                # on GPUs

Each length is a random text and 16 questions. One process reads the texts with full attention and stores them; then,
for each number of tensor-parallel workers, one of vLLM with the store and one of vLLM alone answer the same prompts:
the first question alone (24 greedy tokens, compared), then all 16 at once (8 tokens each), vLLM's own prefix cache cold
and warm. Random weights are written to a folder once. Lengths are measured in the order in which they are given.

A line of JSON comes with every measurement, and --out has all there are so far. A part that fails, or takes more than
two thirds of what is left of --seconds, is stopped with all its processes; what it has measured stays, its error is
written down, and the next part goes on.

On GPUs it needs vLLM for the interpreter that runs it (--vllm-path: a folder for its PYTHONPATH) or another one
(--vllm-python), 80 GiB of GPU memory each, and in --folder room for weights and store: 16 GB, and 18 GB for 131,072
tokens of the 8B shape, in a RAM disk or a page cache that holds them. NVLink's multicast stays off.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUESTIONS, QUESTION, FIRST, EACH = 16, 32, 24, 8
"""Questions, tokens of one, tokens of the answer to the first, and to each of all."""
SPARE = 64
"""Positions that models have beyond the longest prompt, for the answers."""
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}

Tell = Callable[[int, dict[str, Any]], None]
"""Writes down what has been measured at a length."""


def main() -> None:
    """Run all parts, each in a process of its own, so that none holds another's memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="of random weights, such as llama-3.1-8b")
    parser.add_argument("--model", help="folder of a checkpoint instead")
    parser.add_argument("--length", type=int, action="append", required=True, help="tokens of text and question")
    parser.add_argument("--tensor-parallel", type=int, action="append", help="workers of vLLM; 1 if left out")
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--vllm-path", help="folder for the PYTHONPATH of vLLM's processes")
    parser.add_argument("--vllm-options", default="{}", help="JSON, for vLLM's engine")
    parser.add_argument("--folder", type=Path, help="for weights and store; a temporary one if left out")
    parser.add_argument("--seconds", type=float, default=86400.0, help="for all parts")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        job = json.loads(arguments.part.read_text())

        def tell(length: int, measured: dict[str, Any]) -> None:
            with Path(job["out"]).open("a") as out:
                out.write(json.dumps({"length": length, **measured}) + "\n")

        {"weights": weights, "read": read, "answer": answer}[job["do"]](job, tell)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        Parts(arguments, Path(folder)).run()


@dataclass
class Parts:
    """All parts of a run, and what they have told.

    Attributes:
        arguments: of the command line.
        folder: for weights, store, jobs and logs.
        told: for each part and length a dictionary of measurements, in the order of the first one.
    """

    arguments: argparse.Namespace
    folder: Path
    told: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> None:
        """Run the parts, those that tell most first."""
        self.end = time.monotonic() + self.arguments.seconds
        self.model = self.arguments.model or str(self.folder / "weights")
        store = self.folder / "store"
        store.mkdir()
        if self.arguments.shape:
            self._part("weights", shape=self.arguments.shape)
        self._part("read", store=str(store))
        for workers in self.arguments.tensor_parallel or [1]:
            given = {"tensor_parallel": workers, "options": json.loads(self.arguments.vllm_options)}
            self._part("answer", store=str(store), **given)
            self._part("answer", store=None, **given)
            for length in self.arguments.length:
                pair = [
                    one
                    for one in self.told
                    if (one["part"], one.get("tensor_parallel"), one.get("length")) == ("answer", workers, length)
                ]
                if len(pair) == 2 and all("token_ids" in one for one in pair):
                    self._keep({"part": "compared", "length": length, "tensor_parallel": workers}, compared(*pair))

    def _keep(self, part: dict[str, Any], measured: dict[str, Any]) -> None:
        """Add what has been measured to what the part has told, and write all of it."""
        known = [one for one in self.told if part.items() <= one.items()]
        if known:
            known[0].update(measured)
        else:
            self.told.append(part | measured)
        print(json.dumps({name: value for name, value in (part | measured).items() if name != "top"}), flush=True)
        if self.arguments.out:
            head = {
                "command": f"python {' '.join(sys.argv)}",
                "model": self.arguments.model or self.arguments.shape,
            }
            self.arguments.out.write_text(json.dumps({**head, "parts": self.told}, indent=1) + "\n")

    def _part(self, do: str, **job: Any) -> None:
        """Run one part; an error is told, and the next parts go on."""
        path, out, log = self.folder / "job.json", self.folder / "out.jsonl", self.folder / f"{len(self.told)}-{do}.log"
        out.write_text("")
        job = {"do": do, "model": self.model, "out": str(out), "lengths": self.arguments.length, **job}
        path.write_text(json.dumps(job))
        part = {"part": do} | {name: job[name] for name in ("shape", "tensor_parallel") if name in job}
        part |= {"store": bool(job["store"])} if do == "answer" else {}
        source, theirs = str(Path(__file__).parents[1] / "src"), do == "answer"
        paths = [source, self.arguments.vllm_path] if theirs and self.arguments.vllm_path else [source]
        python = self.arguments.vllm_python if theirs else sys.executable
        command = [python, __file__, "--part", str(path), "--length", "0"]
        env = os.environ | _QUIET | {"PYTHONPATH": os.pathsep.join(paths)}
        start, seen = time.monotonic(), 0
        last = start + 2 / 3 * (self.end - start)

        def collect() -> int:
            rows = out.read_text().split("\n")[:-1]  # whole ones
            for row in rows[seen:]:
                measured = json.loads(row)
                length = measured.pop("length")
                self._keep({**part, "length": length}, measured | loading(log.read_text(), length))
            return len(rows)

        with log.open("w") as into:
            process = subprocess.Popen(command, env=env, stdout=into, stderr=into, start_new_session=True)
            try:
                while process.poll() is None and time.monotonic() < last:
                    time.sleep(0.2)
                    seen = collect()
            finally:
                with suppress(ProcessLookupError):  # what vLLM has started goes as well
                    os.killpg(process.pid, signal.SIGKILL)
                stopped = process.wait() == -signal.SIGKILL
        seen = collect()
        took: dict[str, Any] = {"part_s": round(time.monotonic() - start, 1)}
        if process.returncode:
            why = f"stopped after {took['part_s']} s" if stopped else f"ended with {process.returncode}"
            took |= {"error": why, "log": log.read_text()[-3000:]}
        self._keep({**part, "length": None}, took)


def loading(log: str, length: int) -> dict[str, Any]:
    """Seconds of the loads that brought most of a text, of every worker."""
    loads = re.findall(r"loaded (\d+) tokens in ([\d.]+) s", log)
    whole = [float(seconds) for tokens, seconds in loads if 0.9 * length < int(tokens) <= length]
    return {"loading_s": whole} if whole else {}


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Whether two answered alike, and by how much the log-probabilities of the likeliest first tokens differ."""
    both = set(one["top"]) & set(other["top"])
    told = {
        "same_tokens": one["token_ids"] == other["token_ids"],
        "same_tokens_of_24": sum(a == b for a, b in zip(one["token_ids"], other["token_ids"], strict=True)),
        "largest_logprob_difference": max((abs(one["top"][t] - other["top"][t]) for t in both), default=None),
    }
    if "answers" in one and "answers" in other:
        told["same_answers_of_16"] = sum(a == b for a, b in zip(one["answers"], other["answers"], strict=True))
    return told


def texts(length: int, vocabulary: int) -> tuple[list[int], list[list[int]]]:
    """A random text and questions; no text begins as that of another length."""
    import torch

    count = length - QUESTION + QUESTION * QUESTIONS
    draw = torch.randint(min(vocabulary, 128_000), (count,), generator=torch.Generator().manual_seed(length)).tolist()
    rest = draw[length - QUESTION :]
    return draw[: length - QUESTION], [rest[QUESTION * n : QUESTION * (n + 1)] for n in range(QUESTIONS)]


def weights(job: dict[str, Any], tell: Tell) -> None:
    """Write random weights of a shape, with positions for the longest prompt and its answer."""
    from apb.hf.loading import pick_device, pick_dtype
    from apb.hf.random_weights import random_model, shape_config

    device = pick_device(None)
    config = shape_config(job["shape"])
    config.max_position_embeddings = max(config.max_position_embeddings, max(job["lengths"]) + SPARE)
    random_model(config, pick_dtype(None, device), device).save_pretrained(job["model"])


def read(job: dict[str, Any], tell: Tell) -> None:
    """Read the texts with full attention and store them."""
    import apb
    from apb.hardware import fingerprint
    from apb.hf.config import vocabulary
    from apb.hf.loading import load_model, pick_device, pick_dtype

    device = pick_device(None)
    model = load_model(Path(job["model"]), pick_dtype(None, device), device)  # random weights have no tokenizer
    engine = apb.Engine.from_model(model, strategy="full", allow_extrapolation=True, verify=False)
    for length in job["lengths"]:
        text, _ = texts(length, vocabulary(engine.model.config))
        engine.read(tokens=text[: len(text) // 4])  # kernels are compiled
        start = time.perf_counter()
        document = engine.read(tokens=text)
        reading_s = time.perf_counter() - start
        start = time.perf_counter()
        folder = Path(job["store"], f"document{length}")
        document.save(folder)
        storing_s = time.perf_counter() - start
        size = sum(path.stat().st_size for path in folder.iterdir())
        machine = fingerprint(engine.device, engine.dtype)
        tell(length, {"reading_s": reading_s, "storing_s": storing_s, "bytes": size, "fingerprint": machine})
        del document  # its memory is the next one's


def answer(job: dict[str, Any], tell: Tell) -> None:
    """What vLLM needs, alone or with a store."""
    import torch
    from vllm.config import KVTransferConfig

    import vllm
    from vllm import LLM, SamplingParams

    settings = job["store"] and KVTransferConfig(
        kv_connector="DocumentConnector",
        kv_connector_module_path="apb.integrations.vllm",
        kv_role="kv_consumer",
        kv_connector_extra_config={"store": job["store"]},
    )
    start = time.perf_counter()
    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        max_model_len=max(job["lengths"]) + SPARE,
        tensor_parallel_size=job["tensor_parallel"],
        generation_config="vllm",
        kv_transfer_config=settings or None,
        **job["options"],
    )
    started = {"vllm": vllm.__version__, "start_s": time.perf_counter() - start}

    def ask(prompts: list[list[int]], tokens: int, logprobs: int | None = None) -> tuple[float, list[Any]]:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - start, [each.outputs[0] for each in outputs]

    def forget() -> None:
        if not llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps its prefix cache: what follows would not be measured from an empty one")

    for length in job["lengths"]:
        text, questions = texts(length, llm.llm_engine.model_config.get_vocab_size())
        ask([questions[0] * 8], 4)  # what is compiled at the first use
        first = text + questions[0]
        firsts: dict[str, list[float]] = {"first_token_s": [], "again_s": []}
        for _ in range(3):
            forget()
            firsts["first_token_s"].append(ask([first], 1)[0])
            firsts["again_s"].append(ask([first], 1)[0])  # from vLLM's own cache, but for its last tokens
            tell(length, {**started, **firsts})
        _, (said,) = ask([first], FIRST, 20)
        top = {str(token): each.logprob for token, each in said.logprobs[0].items()}
        tell(length, {"token_ids": list(said.token_ids), "top": top})
        for name in ("cold", "warm"):
            if name == "cold":
                forget()
            seconds, outputs = ask([text + question for question in questions], EACH)
            answers = [list(each.token_ids) for each in outputs]
            tell(length, {f"requests_per_s_{name}": QUESTIONS / seconds, "answers": answers})


if __name__ == "__main__":
    main()
