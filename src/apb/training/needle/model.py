"""The small model's configuration, and a fast forward over packed rows, equivalent to LlamaForCausalLM's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS = 6, 2, 64, 384, 6
THETA = 1e6
EPS = 1e-5


def config(vocabulary: int, bos: int, eos: int) -> LlamaConfig:
    """A Llama configuration of about 11 million parameters."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=EPS,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )


def low(x: Tensor) -> Tensor:
    """Cast to the precision of matrix products: bf16 on a GPU."""
    return x.bfloat16() if x.is_cuda else x


def normalize(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in fp32, with the result in the precision of matrix products."""
    x = x.float()
    return low(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Linear layer without bias, in the precision of matrix products."""
    return functional.linear(x, low(weight))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (tokens, heads, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def project(
    x: Tensor, norm: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Part of a layer before attention: (tokens, width) -> q, k, v (tokens, heads, head_dim) after RoPE."""
    h = normalize(x, norm)
    q = linear(h, query).unflatten(-1, (HEADS, HEAD_DIM))
    k = linear(h, key).unflatten(-1, (KV_HEADS, HEAD_DIM))
    v = linear(h, value).unflatten(-1, (KV_HEADS, HEAD_DIM))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def finish(x: Tensor, attended: Tensor, out: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Part of a layer after attention; the residual stream stays in fp32."""
    x = x + linear(attended, out)
    h = normalize(x, norm)
    return x + linear(functional.silu(linear(h, gate)) * linear(h, up), down)


def judge(x: Tensor, norm: Tensor, vocabulary: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target (tokens,), and True where it is the most likely token (tokens,)."""
    logits = linear(normalize(x, norm), vocabulary).float()
    nll = logits.logsumexp(-1) - logits.gather(-1, target[:, None]).squeeze(-1)
    return nll, logits.argmax(-1) == target


class Network:
    """Runs a LlamaForCausalLM on packed tokens (rows of equal length, end to end).

    Only attention depends on the length of a row, so everything else is compiled once for all lengths.
    """

    def __init__(self, model: LlamaForCausalLM, compiled: bool) -> None:
        self.model = model
        self.device = model.device
        self.project, self.finish, self.judge = project, finish, judge
        if compiled:
            self.project = torch.compile(project, dynamic=False)
            self.finish = torch.compile(finish, dynamic=False)
            self.judge = torch.compile(judge, dynamic=False)
        self.backends: dict[int, tuple[SDPBackend, bool]] = {}
        self.angles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, length: int, backend: SDPBackend, expand: bool) -> Tensor:
        """Causal attention inside each row: (tokens, heads, head_dim) -> (tokens, heads * head_dim)."""
        q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
        if expand:
            k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not expand)
        return out.transpose(1, 2).flatten(0, 1).flatten(-2)

    def choose(self, tokens: int, length: int) -> tuple[SDPBackend, bool]:
        """The fastest back-end for a length, and whether to repeat KV heads; timed once, forward and backward."""
        if self.device.type != "cuda":
            return SDPBackend.MATH, True
        if length not in self.backends:
            times: dict[tuple[SDPBackend, bool], float] = {}
            q, k, v = (
                torch.randn(tokens, heads, HEAD_DIM, device=self.device, dtype=torch.bfloat16, requires_grad=True)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                for expand in (False, True):
                    try:
                        for _ in range(3):
                            torch.cuda.synchronize()
                            start = time.perf_counter()
                            with torch.enable_grad():
                                self.attend(q, k, v, length, backend, expand).sum().backward()
                            torch.cuda.synchronize()
                            times[backend, expand] = time.perf_counter() - start
                    except RuntimeError as error:
                        times.pop((backend, expand), None)
                        print(
                            f"length {length}: {backend.name} expand={expand} not possible: {error}"[:300], flush=True
                        )
            self.backends[length] = min(times, key=lambda key: times[key])
            shown = ", ".join(f"{key[0].name} expand={key[1]} {t * 1e3:.1f} ms" for key, t in times.items())
            print(f"attention at length {length}: {shown}", flush=True)
        return self.backends[length]

    def rope(self, tokens: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin (tokens, head_dim) with positions from 0 in each row, rounded as in inference."""
        if (tokens, length) not in self.angles:
            inverse = THETA ** -(torch.arange(0, HEAD_DIM, 2, device=self.device).float() / HEAD_DIM)
            angles = torch.arange(length, device=self.device).float()[:, None] * inverse
            angles = torch.cat((angles, angles), dim=-1).repeat(tokens // length, 1)
            self.angles[tokens, length] = low(angles.cos()), low(angles.sin())
        return self.angles[tokens, length]

    def hidden(self, tokens: Tensor, length: int) -> Tensor:
        """Residual stream after the last layer: (tokens, width)."""
        backend, expand = self.choose(len(tokens), length)
        cos, sin = self.rope(len(tokens), length)
        x = self.model.model.embed_tokens(tokens).float()
        for layer in self.model.model.layers:
            a, m = layer.self_attn, layer.mlp
            q, k, v = self.project(
                x, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, cos, sin
            )
            attended = self.attend(q, k, v, length, backend, expand)
            x = self.finish(
                x,
                attended,
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                m.gate_proj.weight,
                m.up_proj.weight,
                m.down_proj.weight,
            )
        return x

    def __call__(self, tokens: Tensor, length: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of the token after each place, and True where it is the most likely one."""
        x = self.hidden(tokens, length).index_select(0, places)
        return self.judge(x, self.model.model.norm.weight, self.model.lm_head.weight, tokens[places + 1])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights in bf16 (two files), configuration and tokenizer."""
    copy: Any = LlamaForCausalLM(model.config).bfloat16()
    copy.load_state_dict({name: t.detach().to("cpu", torch.bfloat16) for name, t in model.state_dict().items()})
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    out.mkdir(parents=True, exist_ok=True)
    copy.save_pretrained(out, max_shard_size="12MB")
    tokenizer.save_pretrained(out)


def load(path: Path, device: str, **options: Any) -> LlamaForCausalLM:
    """Load a saved model with fp32 weights."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    return model.to(device)  # type: ignore[arg-type]
