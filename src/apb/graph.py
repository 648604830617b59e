"""One decode step on a GPU: its lengths lie in the GPU's memory, so that one CUDA graph serves every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .distributed.collectives import Group
from .hf.attach import Attachment
from .hf.cache import ShardCache
from .kernels import fused
from .strategies.base import Layer, merge_over_ranks

# Steps run before a capture: the first ones compile kernels and set up communication.
_WARM_UP = 2
# RoPE variants that look at the largest position on the host, which a graph cannot do.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def why_not(attachment: Attachment, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why steps run as ordinary passes; None where they can be those of a :class:`Step`."""
    if device.type != "cuda":
        return f"device type {device.type} has no graphs"
    if len(attachment.devices) > 1:
        return f"layers lie on {len(attachment.devices)} devices"
    if attachment.peculiar:
        return f"layers have {', '.join(sorted(attachment.peculiar))}"
    parameters = getattr(attachment.model.config.get_text_config(), "rope_parameters", None) or {}
    # Some families have one set of parameters a kind of layer.
    sets = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    changing = sorted({str(part.get("rope_type")) for part in sets} & set(_LENGTH_DEPENDENT))
    if changing:
        return f"RoPE of type {' and '.join(changing)} depends on the length"
    return fused.why_not(device, dtype, head_dim)


class Step:
    """Reads one token after those in a cache, as long as the storage that was captured has room."""

    def __init__(
        self,
        attachment: Attachment,
        cache: ShardCache,
        group: Group,
        device: torch.device,
        forward: Callable[[Tensor, Tensor], Tensor],
        capture: bool,
    ) -> None:
        """Get ready to step.

        Args:
            attachment: the model.
            cache: a shard that has been filled by a prefill.
            group: the ranks that hold the shards; every one of them captures.
            device: a GPU.
            forward: (ids (1, 1), positions (1, 1)) -> logits (vocab,) fp32, by a pass of the model.
            capture: replay a CUDA graph: hundreds of kernels launched as one, with the same numbers out.
        """
        from .kernels import decode  # Triton: there where GPUs are

        self._cache = cache
        # What changes from step to step lies in the GPU's memory, at addresses that the graph knows. The functions
        # below hold these, not this object: a cycle would keep the cache alive after its session.
        self._ids = ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._position = position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._slot = slot = torch.zeros(1, dtype=torch.long, device=device)
        self._length = length = torch.zeros(1, dtype=torch.int32, device=device)

        def attend(layer: Layer) -> Tensor:
            alone = group.size == 1
            out, lse = decode.attention(layer.q, layer.k, layer.v, layer.scale, length=length, partial=not alone)
            if alone:
                return out
            return merge_over_ranks(layer, out, lse, group).wait()

        def run() -> Tensor:
            cache.slot = slot
            try:
                with torch.no_grad(), attachment.running(attend, cache.total):
                    return forward(ids, position)
            finally:
                cache.slot = None

        self._run = run
        if capture:
            self._place(0)
            self._run = _captured(run, device)

    def step(self, token: int) -> Tensor:
        """Read a token; logits (vocab,) fp32 of the next one."""
        self._place(token)
        logits = self._run()
        self._cache.total += 1
        if self._cache.keeps_new:
            self._cache.advance()
        return logits

    def _place(self, token: int) -> None:
        """Write down what the next step depends on; fills are queued, nothing waits."""
        self._ids.fill_(token)
        self._position.fill_(self._cache.total)
        self._slot.fill_(self._cache.held)
        self._length.fill_(self._cache.held + self._cache.keeps_new)


def _captured(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What replays ``run`` as a graph. It is run before that, and must bear being run again."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):  # each writes the same slot, which the first real step overwrites
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result.clone()

    return replay
