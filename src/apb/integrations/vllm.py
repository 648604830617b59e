"""vLLM takes the keys and values of documents in a store as if it had computed them.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "DocumentConnector",
        "kv_connector_module_path": "apb.integrations.vllm", "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"store": "FOLDER"}}'

Exact documents serve every prompt that begins as they do. Approximate ones serve prompts whose question they were read
for, or as the setting "approximate" says. vLLM finds cached blocks again by hashes of their tokens. Those of a request
that gets an approximate document are salted with the document's key before vLLM looks anything up: what comes of it is
found by requests for the same document, under the same setting, alone.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from ..asking import THIS
from .loading import Handover, Load, Loader, Place
from .lookup import ALLOWANCES, Found, Lookup, Stored, same_model

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.apb")  # vLLM shows what loggers below its own name write


@dataclass
class Handovers(KVConnectorMetadata):
    """What the workers are to load with a step."""

    all: list[Handover]


class DocumentConnector(KVConnectorBase_V1):
    """Hands documents of a store to vLLM; it never writes one.

    Settings (``kv_connector_extra_config``):
        store: the folder of documents.
        approximate: "this question" (the default), "no question", "another question" or "never": for which question an
            approximate document may have been read. Each allows what those before it allow.
        model: the name that documents carry as that of their model, if it is not the one that vLLM was given.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        _check(vllm_config)
        settings = self._kv_transfer_config
        self._block = vllm_config.cache_config.block_size
        # Where the next step is scheduled before the workers have told how this one went, a load that fails within a
        # step comes too late: such a request waits for its load, while others go on.
        self._ahead = bool(vllm_config.scheduler_config.async_scheduling)
        # A store may vanish at any time; its documents can always be computed.
        settings.kv_load_failure_policy = "recompute"
        if role == KVConnectorRole.SCHEDULER:
            self._allowance = settings.get_from_extra_config("approximate", THIS)
            if self._allowance not in ALLOWANCES:
                raise ValueError(f"'approximate' is one of {', '.join(ALLOWANCES)}, not {self._allowance!r}.")
            self._salt = secrets.token_hex(16)
            store = Path(settings.get_from_extra_config("store", ""))
            if not store.is_dir():
                raise ValueError(f"The store {str(store)!r} is no folder; name it as 'store' in the extra config.")
            unfit = Fitting.to(vllm_config, settings.get_from_extra_config("model", None))
            self._lookup = Lookup(store, unfit, logger.warning)
            self._found: dict[str, Found] = {}
            self._refused: dict[str, Found] = {}
            self._handed: dict[str, Handover] = {}
            self._next: list[Handover] = []
            # A request that waits for its load has its blocks in vLLM's own cache only once they have arrived. Others
            # that want the same ones wait for that, instead of loading a copy each.
            self._shares = self._ahead and bool(vllm_config.cache_config.enable_prefix_caching)
            self._first: dict[tuple[str, str | None], str] = {}
            self._pool: BlockPool | None = None
        else:
            self._loader = Loader(self._block, logger.warning)
            self._places: dict[str, Place] = {}
            self._awaited: list[Load] = []
            self._waiting: list[Load] = []
            self._failed: set[int] = set()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """True: a captured step could not wait for layers."""
        return True

    # --- the scheduler ------------------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """See the base class."""
        self._pool = gpu_block_pool

    def on_new_request(self, request: Request) -> None:
        """Choose a request's document, before its blocks are looked up in vLLM's own cache."""
        prompt = request.prompt_token_ids
        if prompt is None or request.mm_features or request.lora_request is not None or request.resumable:
            return  # the same token ids have other keys and values there
        found, refused = self._lookup.find(prompt, self._allowance)
        if refused is not None and (found is None or found.tokens < refused.tokens):
            self._refused[request.request_id] = refused
            logger.info(
                "%s: the document %s was read for %s; it is left out, as 'approximate' is %r.",
                request.request_id, refused.document.folder.name, refused.read_for, self._allowance,
            )  # fmt: skip
        if found is None or found.tokens < self._block:
            return
        self._found[request.request_id] = found
        if not found.document.exact:
            request.cache_salt = f"{self._salt} {found.document.key} {request.cache_salt or ''}"
            request.block_hashes.clear()
            request.update_block_hashes()

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See the base class; the last token is always computed, for its logits."""
        found = self._found.get(request.request_id)
        if found is None or not found.document.there():
            return 0, False
        more = min(found.tokens, request.num_tokens - 1) - num_computed_tokens
        if more >= self._block and self._first.get(_shared(request, found), request.request_id) != request.request_id:
            return None, False  # later: another request is loading the document, and vLLM's own cache will have it
        return (more, self._ahead) if more > 0 else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """See the base class."""
        if not num_external_tokens:
            self._arrived(request.request_id)
            return
        found = self._found[request.request_id]
        if self._shares and num_external_tokens >= self._block:
            self._first[_shared(request, found)] = request.request_id
        stop = min(found.tokens, request.num_tokens - 1)
        paths = tuple(map(str, found.document.paths))
        (ids,) = blocks.get_block_ids()
        handover = Handover(request.request_id, paths, stop - num_external_tokens, stop, tuple(ids))
        self._handed[request.request_id] = handover
        self._next.append(handover)
        logger.info(
            "%s: tokens %d to %d come from the document %s, %s.",
            request.request_id, handover.start, stop, found.document.folder.name,
            "exact" if found.document.exact else f"approximate, read for {found.read_for}",
        )  # fmt: skip

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Handovers:
        """See the base class."""
        handovers, self._next = Handovers(self._next), []
        return handovers

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Forget documents that could not be loaded, and have nobody else find their blocks."""
        invalid = connector_output.invalid_block_ids
        for request in [each for each, handed in self._handed.items() if invalid & set(handed.blocks)]:
            self._found.pop(request, None)
            self._arrived(request)
            blocks = self._handed.pop(request).blocks_to_fill(self._block)
            if self._pool is not None:
                self._pool.evict_blocks(blocks)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Tell with the answer which document it came from, if any, or which one was left out."""
        self._arrived(request.request_id)
        found = self._found.pop(request.request_id, None)
        refused = self._refused.pop(request.request_id, None)
        handed = self._handed.pop(request.request_id, None)
        told: dict[str, Any] = {}
        if found is not None:
            told = {**found.to_dict(), "loaded_tokens": handed.stop - handed.start if handed else 0}
        if refused is not None:
            told["left_out"] = refused.to_dict()
        return False, {"apb": told} if told else None

    def _arrived(self, request: str) -> None:
        """Others need not wait for what this request loads, any more."""
        self._first = {shared: first for shared, first in self._first.items() if first != request}

    # --- a worker -----------------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """See the base class."""
        handovers = self._get_connector_metadata()
        assert isinstance(handovers, Handovers)
        if handovers.all and not self._places:
            model = self._vllm_config.model_config
            self._places = _places(forward_context.no_compile_layers, model.get_total_num_kv_heads(), model.dtype)
        for handover in handovers.all:
            load = self._loader.start(handover, self._places, synchronize=self._ahead)
            (self._waiting if self._ahead else self._awaited).append(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """See the base class."""
        for load in self._awaited:
            load.wait(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """The step is over: a load that some layer did not wait for counts as failed, for nothing wrong is answered."""
        for load in self._awaited:
            if not load.awaited:
                load.finish()
            self._settle(load, load.awaited)
        self._awaited = []

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See the base class."""
        over = [load for load in self._waiting if load.done]
        self._waiting = [load for load in self._waiting if load not in over]
        for load in over:
            self._settle(load, True)
        return None, {load.handover.request for load in over} or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See the base class."""
        failed, self._failed = self._failed, set()
        return failed

    def shutdown(self) -> None:
        """See the base class."""
        if self.role == KVConnectorRole.WORKER:
            self._loader.close()

    def _settle(self, load: Load, seen: bool) -> None:
        handed = load.handover
        if load.error is not None or not seen:
            self._failed |= handed.blocks_to_fill(self._block)
        else:
            logger.info("%s: loaded %d tokens in %.3f s.", handed.request, handed.stop - handed.start, load.seconds)


@dataclass(frozen=True)
class Fitting:
    """Says why documents are not of vLLM's model, or None; see :class:`Lookup`."""

    model: str
    dtype: str
    shape: dict[int, tuple[int, int]]

    @classmethod
    def to(cls, config: VllmConfig, name: str | None) -> Fitting:
        """What fits to vLLM's model."""
        model, parallel = config.model_config, config.parallel_config
        heads = model.get_total_num_kv_heads(), model.get_head_size()
        shape = dict.fromkeys(range(model.get_num_layers(parallel)), heads)
        return cls(name or model.model, str(model.dtype).removeprefix("torch."), shape)

    def __call__(self, stored: Stored) -> str | None:
        manifest, document = stored.manifest, f"The document in {str(stored.folder)!r} is left out: it"
        name = manifest["model"]["name"]
        if not same_model(name, self.model):
            return f"{document} is of the model {name!r}, not of {self.model!r}; if they are one, name it as 'model'."
        if manifest["dtype"] != self.dtype:
            return f"{document} is in {manifest['dtype']}, and vLLM runs in {self.dtype}; start it with that dtype."
        if stored.shape != self.shape:
            return f"{document} is of a model of another shape, {stored.shape}, not {self.shape}."
        if not stored.whole:
            return (
                f"{document} does not hold every token in every layer: of layers with a sliding window it keeps the "
                "last ones, after propagation those that went on, and vLLM hands all of them on to other prompts."
            )
        return None


def _shared(request: Request, found: Found) -> tuple[str, str | None]:
    """The same for requests that find a document's blocks in vLLM's own cache once one of them has loaded it."""
    return found.document.key, request.cache_salt


def _check(config: VllmConfig) -> None:
    """ValueError for what this connector cannot serve."""
    parallel = config.parallel_config
    if config.model_config.use_mla:
        raise ValueError("Models with latent attention keep no keys and values of heads; documents of them have none.")
    if config.speculative_config is not None:
        raise ValueError("Documents hold nothing for the layers of a draft model; leave speculative decoding out.")
    if getattr(parallel, "decode_context_parallel_size", 1) > 1 or parallel.pipeline_parallel_size > 1:
        raise ValueError("Documents go to tensor-parallel workers only; leave other kinds of parallelism out.")


def _places(layers: dict[str, Any], heads: int, dtype: Any) -> dict[str, Place]:
    """Where this worker keeps keys and values, by layer, in the order in which layers run; ``heads`` is the model's."""
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    found = {}
    for name, layer in layers.items():
        cache = getattr(layer, "kv_cache", None)
        if cache is None or not cache.numel() or getattr(layer, "kv_sharing_target_layer_name", None) is not None:
            continue
        held = layer.num_kv_heads

        def write(keys: Any, values: Any, slots: Any, layer: Any = layer) -> None:
            # Not a copy into the cache: back-ends pack keys in orders of their own.
            layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)

        first = rank * heads // size  # with fewer heads than workers several hold the same one
        found[name] = Place(extract_layer_index(name), range(first, first + held), write, cache.device, dtype)
    return dict(sorted(found.items(), key=lambda item: item[1].layer))
