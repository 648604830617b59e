"""Runs in vLLM's environment: the steps of a job, in one engine; what came of them is written.

    python in_vllm.py JOB.json OUT.json

A step is {"ask": prompts of token ids, "tokens": so many to answer}. After {"then": "remove" or "cut", "store": folder}
a document goes, or its files lose their second half, once the next step has been promised its tokens.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def remove(folder: str) -> None:
    """The store loses a document."""
    shutil.rmtree(folder)


def cut(folder: str) -> None:
    """As a disk that fails half-way: the first layers can be read, the others cannot."""
    for path in Path(folder).glob("*.safetensors"):
        os.truncate(path, path.stat().st_size // 2)


def schedule_ahead() -> None:
    """Have vLLM schedule ahead on a CPU too, where it does not by itself, whatever it is told."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def updated(config: Any) -> None:
        update(config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(updated)


def main() -> None:
    """Run the job."""
    from vllm.config import KVTransferConfig

    from apb.integrations.vllm import DocumentConnector
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    if (workers := job["options"].get("tensor_parallel_size", 1)) > 1:  # vLLM wants a NUMA node for each, or this
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(workers)))
    if job["options"].get("async_scheduling"):
        schedule_ahead()
    doomed: list[Any] = []
    promise = DocumentConnector.build_connector_meta

    def promised(self: DocumentConnector, scheduled: Any) -> Any:
        handovers = promise(self, scheduled)
        if handovers.all and doomed:
            doomed.pop()()
        return handovers

    DocumentConnector.build_connector_meta = promised  # type: ignore[method-assign]
    settings = KVTransferConfig(
        kv_connector="DocumentConnector",
        kv_connector_module_path="apb.integrations.vllm",
        kv_role="kv_consumer",
        kv_connector_extra_config=job["settings"],
    )
    llm = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        generation_config="vllm",
        kv_transfer_config=settings,
        **job["options"],
    )
    told = []
    for step in job["steps"]:
        if "then" in step:
            doomed.append(lambda step=step: {"remove": remove, "cut": cut}[step["then"]](step["store"]))
            continue
        sampling = SamplingParams(temperature=0, max_tokens=step["tokens"], ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in step["ask"]], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        for each in outputs:
            told.append(
                {
                    "token_ids": list(each.outputs[0].token_ids),
                    "apb": (each.kv_transfer_params or {}).get("apb"),
                    "cached": each.num_cached_tokens,
                    "seconds": seconds,
                }
            )
        assert not doomed, "nothing was promised"
    Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
