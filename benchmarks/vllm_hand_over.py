"""What vLLM gains from documents that apb has read: seconds to the first token, in parts, and requests a second.

    python benchmarks/vllm_hand_over.py --model PATH --length 6144 --vllm-python .vllm/bin/python      # on a CPU
    python benchmarks/vllm_hand_over.py --shape llama-3.1-8b --length 32768 --length 131072 --tensor-parallel 1 \
        --tensor-parallel 2 --vllm-path DEST --out FILE                                                # on GPUs

Each length is a random text and 16 questions. One process reads the text with full attention and stores it; then, for
each number of tensor-parallel workers, one of vLLM alone and one with the store answer the same prompts: the first
question alone (24 greedy tokens, compared), then all 16 at once (8 tokens each), vLLM's own prefix cache cold and warm.
Random weights are written to a folder once. A line of JSON comes with every part, and --out has all there are so far.

On GPUs it needs vLLM for the interpreter that runs it (--vllm-path: a folder for its PYTHONPATH) or another one
(--vllm-python), 80 GiB of GPU memory each, and in --folder disk for weights and store: 16 GB and 18 GB for 131,072
tokens of the 8B shape, which should stay in the page cache. NVLink's multicast stays off.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUESTIONS, QUESTION, FIRST, EACH = 16, 32, 24, 8
"""Questions, tokens of one, tokens of the answer to the first, and to each of all."""
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
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        job = json.loads(Path(arguments.part).read_text())
        told = {"weights": weights, "read": read, "answer": answer}[job["do"]](job)
        Path(job["out"]).write_text(json.dumps(told))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        parts = list[dict[str, Any]]()
        parts_of(arguments, Path(folder), parts)


def parts_of(arguments: argparse.Namespace, folder: Path, parts: list[dict[str, Any]]) -> None:
    """Run the parts and write down what they tell."""

    def keep(part: dict[str, Any]) -> None:
        parts.append(part)
        print(json.dumps({name: value for name, value in part.items() if name != "top"}), flush=True)
        if arguments.out:
            report = {"command": f"python {' '.join(sys.argv)}", "model": arguments.model or arguments.shape}
            arguments.out.write_text(json.dumps({**report, "parts": parts}, indent=1) + "\n")

    def run(do: str, **job: Any) -> dict[str, Any]:
        """One part; an error is told, and the next parts go on."""
        path, out = folder / "job.json", folder / "out.json"
        out.unlink(missing_ok=True)
        path.write_text(json.dumps({"do": do, "model": model, "out": str(out), **job}))
        source = str(Path(__file__).parents[1] / "src")
        theirs = do == "answer"
        paths = [source, arguments.vllm_path] if theirs and arguments.vllm_path else [source]
        python = arguments.vllm_python if theirs else sys.executable
        command = [python, __file__, "--part", str(path), "--length", "0"]
        env = os.environ | _QUIET | {"PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        told = json.loads(out.read_text()) if out.exists() else {"error": (done.stdout + done.stderr)[-3000:]}
        # Loads that bring most of a text, of every worker.
        loads = re.findall(r"loaded (\d+) tokens in ([\d.]+) s", done.stdout + done.stderr)
        whole = [float(seconds) for tokens, seconds in loads if int(tokens) > 0.9 * job.get("length", 0)]
        told |= {"loading_s": whole} if whole else {}
        keep(
            {
                "part": do,
                **{name: job[name] for name in job if name not in ("store", "options")},
                "store": bool(job.get("store")),
                **told,
            }
        )
        return told

    model = arguments.model or str(folder / "weights")
    if arguments.shape:
        run("weights", shape=arguments.shape)
    for length in arguments.length:
        store = folder / f"store{length}"
        store.mkdir()
        run("read", length=length, store=str(store))
        for workers in arguments.tensor_parallel or [1]:
            options = json.loads(arguments.vllm_options)
            given = {"length": length, "tensor_parallel": workers, "options": options}
            alone = run("answer", store=None, **given)
            with_store = run("answer", store=str(store), **given)
            if "error" not in alone and "error" not in with_store:
                what = {"part": "compared", "length": length, "tensor_parallel": workers}
                keep({**what, **compared(alone, with_store)})


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Whether two answered alike, and by how much the log-probabilities of the likeliest first tokens differ."""
    both = set(one["top"]) & set(other["top"])
    return {
        "same_tokens": one["token_ids"] == other["token_ids"],
        "same_answers_of_16": sum(a == b for a, b in zip(one["answers"], other["answers"], strict=True)),
        "largest_logprob_difference": max((abs(one["top"][t] - other["top"][t]) for t in both), default=None),
    }


def texts(length: int, vocabulary: int) -> tuple[list[int], list[list[int]]]:
    """A random text and questions."""
    import torch

    count = length - QUESTION + QUESTION * QUESTIONS
    draw = torch.randint(min(vocabulary, 128_000), (count,), generator=torch.Generator().manual_seed(0)).tolist()
    rest = draw[length - QUESTION :]
    return draw[: length - QUESTION], [rest[QUESTION * n : QUESTION * (n + 1)] for n in range(QUESTIONS)]


def weights(job: dict[str, Any]) -> dict[str, Any]:
    """Write random weights of a shape."""
    from apb.hf.loading import pick_device, pick_dtype
    from apb.hf.random_weights import random_model, shape_config

    device = pick_device(None)
    random_model(shape_config(job["shape"]), pick_dtype(None, device), device).save_pretrained(job["model"])
    return {}


def read(job: dict[str, Any]) -> dict[str, Any]:
    """Read the text with full attention and store it."""
    import apb
    from apb.hardware import fingerprint
    from apb.hf.config import vocabulary
    from apb.hf.loading import load_model, pick_device, pick_dtype

    device = pick_device(None)
    model = load_model(Path(job["model"]), pick_dtype(None, device), device)  # random weights have no tokenizer
    engine = apb.Engine.from_model(model, strategy="full", allow_extrapolation=True, verify=False)
    text, _ = texts(job["length"], vocabulary(engine.model.config))
    engine.read(tokens=text[: len(text) // 4])  # kernels are compiled
    start = time.perf_counter()
    document = engine.read(tokens=text)
    reading_s = time.perf_counter() - start
    start = time.perf_counter()
    document.save(Path(job["store"], "document"))
    storing_s = time.perf_counter() - start
    size = sum(path.stat().st_size for path in Path(job["store"], "document").iterdir())
    machine = fingerprint(engine.device, engine.dtype)
    return {"reading_s": reading_s, "storing_s": storing_s, "bytes": size, "fingerprint": machine}


def answer(job: dict[str, Any]) -> dict[str, Any]:
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
    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        max_model_len=job["length"] + 64,
        tensor_parallel_size=job["tensor_parallel"],
        generation_config="vllm",
        kv_transfer_config=settings or None,
        **job["options"],
    )
    text, questions = texts(job["length"], llm.llm_engine.model_config.get_vocab_size())

    def ask(prompts: list[list[int]], tokens: int, logprobs: int | None = None) -> tuple[float, list[Any]]:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - start, [each.outputs[0] for each in outputs]

    ask([questions[0] * 8], 4)  # what is compiled at the first use
    first = text + questions[0]
    told: dict[str, Any] = {"vllm": vllm.__version__, "first_token_s": [], "again_s": []}
    for _ in range(3):
        llm.reset_prefix_cache()
        told["first_token_s"].append(ask([first], 1)[0])
        told["again_s"].append(ask([first], 1)[0])  # from vLLM's own cache, but for its last tokens
    _, (said,) = ask([first], FIRST, 20)
    told["token_ids"] = list(said.token_ids)
    told["top"] = {str(token): each.logprob for token, each in said.logprobs[0].items()}
    for name in ("cold", "warm"):
        if name == "cold":
            llm.reset_prefix_cache()
        seconds, outputs = ask([text + question for question in questions], EACH)
        told[f"requests_per_s_{name}"] = QUESTIONS / seconds
    told["answers"] = [list(each.token_ids) for each in outputs]
    return told


if __name__ == "__main__":
    main()
