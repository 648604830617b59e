"""Errors of recurrent layers against fp64, read in one run of rows, handed on from run to run, or composed of runs.

    python benchmarks/recurrent_errors.py > benchmarks/results/recurrent_errors.json

One layer of random weights per family, rows of random numbers, on the CPU, by transformers' torch functions. An error
is the largest difference over the largest value: of the output of the last 4,096 rows, and of the final state. Gated
delta nets have heads that forget slowly, so that a state in front of a run counts in all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from apb.distributed.collectives import Group
from apb.hf.recurrent import recurrent_modules, take_over
from apb.layers.composing import Composition
from apb.layers.recurrent import RecurrentInput
from apb.planning.runs import Run

ROWS, RUNS = 4096, 8
SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
DELTA = {"layer_types": ["linear_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        **DELTA, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "kimi_linear": {**DELTA, "linear_num_heads": 2, "linear_head_dim": 32, "num_local_experts": 4, "n_group": 1},
    "bamba": {
        "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 1,
        "mamba_chunk_size": 64,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip


class InFloat64(TorchFunctionMode):
    """What asks for fp32 is given fp64: the layers' code computes their scans in fp32 whatever they are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch."""
        kwargs = {name: self._wide(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.float:
            return args[0].double()
        return func(*(self._wide(value) for value in args), **kwargs)

    @staticmethod
    def _wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value


def layer_of(family: str) -> tuple[nn.Module, Any]:
    """A model of one recurrent layer and one that attends, and the module of the first."""
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
    torch.manual_seed(0)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind._from_config(config, dtype=torch.float32).eval()
    module = recurrent_modules(model)[0]
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5)
        if type(module).__name__.endswith("GatedDeltaNet"):
            decay: Any = module.A_log
            decay.sub_(torch.linspace(0, 9, len(decay)))
    return model, module


def read(model: Any, module: nn.Module, hidden: Tensor, run: int, way: str) -> tuple[Tensor, list[Tensor]] | None:
    """A layer's output of all rows, ``run`` rows of which are handed on at a time, or composed as if ranks had them,
    and the state after them; None if that cannot be.
    """
    found: list[Any] = []

    def recur(layer: RecurrentInput) -> Tensor:
        state = layer.fresh()
        found.append(state)
        if way == "composed":
            out = torch.empty_like(layer.hidden)
            runs = [Run(0, start, start + run, start) for start in range(0, layer.hidden.shape[1], run)]
            if layer.composable is None:
                found.clear()
            else:
                Composition(runs, Group()).read(layer.composable, layer.hidden, state, out)
            return out
        return torch.cat([layer.read(rows, state) for rows in layer.hidden.split(run, 1)], 1)

    undo: Callable[[], None] = take_over(model, lambda: recur)
    with torch.no_grad():
        out = module(hidden)
    undo()
    if not found:
        return None
    return out, list(found[0].tensors().values())


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float(f"{float((got.double() - expected).abs().max() / expected.abs().max()):.2e}")


def main() -> None:
    """Print the errors as JSON."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results = []
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            for rows, run, way in (
                (ROWS, ROWS, "at once"),
                (ROWS * RUNS, ROWS * RUNS, "at once"),
                (ROWS * RUNS, ROWS, "handed on"),
                (ROWS * RUNS, ROWS, "composed"),
            ):
                model, module = layer_of(family)
                torch.manual_seed(1)
                hidden = torch.randn(1, rows, SMALL["hidden_size"]).to(dtype)
                model.to(dtype)
                found = read(model, module, hidden, run, way)
                if found is None:
                    continue
                out, states = found
                model.double()  # from the weights as the dtype has them
                with InFloat64():
                    wanted = read(model, module, hidden.double(), rows, "at once")
                assert wanted is not None, "any layer reads at once"
                exact, exact_states = wanted
                assert exact.dtype == torch.float64
                results.append(
                    {
                        "family": family,
                        "dtype": str(dtype).removeprefix("torch."),
                        "rows": rows,
                        "runs": rows // run,
                        "way": way,
                        "output_error": error(out[:, -ROWS:], exact[:, -ROWS:]),
                        "state_error": max(error(*pair) for pair in zip(states, exact_states, strict=True)),
                    }
                )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"command": "python benchmarks/recurrent_errors.py", **versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
