"""The KV connector that vLLM loads: an adapter from vLLM's hooks to ``schedule.py`` and ``export.py``.

vLLM makes two of it: one beside its scheduler, one in its worker. No exception may leave a hook, for that would end
the engine and every request in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec
import structlog
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from gpu_prefill.caches import (
    as_layers,
    element_of,
    find_packing,
    in_layer_order,
    require_supported,
    scales_of,
    unbound,
)
from gpu_prefill.export import Exporter
from gpu_prefill.ranks import share_of
from gpu_prefill.schedule import ExportSchedule, StepPlan
from gpu_prefill.staging import Staging
from gpu_prefill.streams import streams_of
from transfer import keys
from transfer.errors import ConfigError
from transfer.geometry import KVGeometry
from transfer.layout import RopeOrder
from transfer.sender import KVSender
from transfer.shares import whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = structlog.get_logger()

P = ParamSpec("P")
R = TypeVar("R")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``kv_connector_extra_config``: what ``service.py`` tells the connector. ``rope_order`` is that of vLLM's K."""

    geometry: KVGeometry
    rope_order: RopeOrder
    sender_bytes: int
    frame_bytes: int
    budget_ms: float
    keys_dir: str = ""


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to worker, every step."""

    plan: StepPlan


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Worker to scheduler, every step. ``backlog_bytes`` is what the whole model's KV would be."""

    backlog_bytes: int
    failed: dict[str, str] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join the reports of two workers, or of one worker in two steps."""
        assert isinstance(other, WorkerReport)  # noqa: S101 - vLLM only joins what this class made
        return WorkerReport(max(self.backlog_bytes, other.backlog_bytes), self.failed | other.failed)


def contained(fallback: Callable[[], Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep a hook's exceptions from the engine: log them and return ``fallback()``."""

    def decorate(hook: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(hook)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return hook(*args, **kwargs)
            except Exception:
                log.exception("connector hook failed", hook=hook.__name__)
                answer: R = fallback()
                return answer

        return guarded

    return decorate


def is_staged(device: torch.device) -> bool:
    """Whether KV leaves caches there by :class:`Staging`; a CPU's are copied at once, which costs less."""
    return str(device.type) != "cpu"


def _nothing() -> None:
    return None


class IsthmusConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Exports prompts that carry a ticket; every other request passes untouched.

    Raises :class:`ConfigError` or :class:`EngineError` while vLLM starts if its caches cannot be exported.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = msgspec.convert(self._kv_transfer_config.kv_connector_extra_config, Settings)
        require_supported(vllm_config, kv_cache_config)
        self._block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._schedule = ExportSchedule(self._settings.sender_bytes)
        self._exporter: Exporter | None = None
        self._share = whole(self._settings.geometry)
        self._layer_index: dict[str, int] = {}

    # Beside the scheduler.

    @contained(_nothing)
    def on_new_request(self, request: Request) -> None:
        """Read the request's ticket, if it has one."""
        self._schedule.admit(request.request_id, request.kv_transfer_params, request.num_prompt_tokens)

    @contained(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:  # noqa: ARG002
        """Nothing is ever loaded; ``None`` asks the scheduler to come back when the backlog has shrunk."""
        return (None, False) if self._schedule.must_wait(request.request_id) else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Nothing to do: the scheduler's output carries the blocks."""

    @contained(lambda: StepMetadata(StepPlan()))
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Follow block tables and plan the step's exports."""
        scheduled = scheduler_output.num_scheduled_tokens
        computed_after: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            self._schedule.place(new.req_id, new.block_ids[0])
            computed_after[new.req_id] = new.num_computed_tokens + scheduled[new.req_id]
        running = scheduler_output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            running.req_ids, running.new_block_ids, running.num_computed_tokens, strict=True
        ):
            if request_id in running.resumed_req_ids:
                self._schedule.place(request_id, blocks[0] if blocks else ())
            elif blocks:
                self._schedule.extend(request_id, blocks[0])
            computed_after[request_id] = computed + scheduled[request_id]
        return StepMetadata(self._schedule.plan(computed_after, computes=bool(scheduled)))

    @contained(_nothing)
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take in the worker's report."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._schedule.report(report.backlog_bytes, report.failed)

    @contained(lambda: (False, None))
    def request_finished_all_groups(
        self,
        request: Request,
        block_ids: tuple[list[int], ...],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        """Free the blocks at once: what they held was copied in the step that computed it."""
        prefilled = request.status.name in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION")
        return False, self._schedule.finish(request.request_id, prefilled=prefilled)

    # In the worker.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Learn where the caches are and start the sender, unless another rank holds the same KV and sends it."""
        geometry, config = self._settings.geometry, self._vllm_config
        names = sorted(kv_caches, key=extract_layer_index)
        share = share_of(
            geometry,
            map(extract_layer_index, names),
            tp_rank=get_tensor_model_parallel_rank(),
            tp_size=config.parallel_config.tensor_parallel_size,
            pp_size=config.parallel_config.pipeline_parallel_size,
        )
        if share is None:
            log.info("another rank exports the same kv")
            return
        self._share = share
        caches = in_layer_order(kv_caches, share.geometry(geometry))
        layers = as_layers(caches, scales_of(config, names), config.cache_config.cache_dtype)
        element, packing = element_of(layers), find_packing(layers)
        with unbound(packing):
            staging = self._staging(layers[0].cache.device)
            sender = KVSender(
                geometry,
                max_backlog_bytes=self._sender_bytes,
                frame_bytes=self._settings.frame_bytes,
                share=share if share != whole(geometry) else None,
                keys=keys.client(Path(self._settings.keys_dir), "prefill") if self._settings.keys_dir else None,
            )
        self._exporter = Exporter(
            sender,
            layers,
            packing,
            element,
            kernel_blocks=self._block_size // layers[0].cache.shape[2],
            interleave_dims=geometry.rope_dims if self._settings.rope_order == "half" else 0,
            frame_bytes=self._settings.frame_bytes,
            budget_ms=self._settings.budget_ms,
            staging=staging,
        )
        self._layer_index = {name: index for index, name in enumerate(names)}
        log.info(
            "kv export ready",
            layers=str(share.layers),
            kv_heads=str(share.kv_heads),
            packing=packing,
            element=element.name.lower(),
        )

    @property
    def _sender_bytes(self) -> int:
        """The part of what may wait that is this rank's."""
        return self._settings.sender_bytes * self._share.size // whole(self._settings.geometry).size

    def _staging(self, device: torch.device) -> Staging | None:
        """On a GPU, a way off it that nothing waits for; :class:`ConfigError` if it would not hold a step's KV."""
        if not is_staged(device):
            return None
        settings = self._settings
        step_tokens: int = self._vllm_config.scheduler_config.max_num_batched_tokens
        step_bytes = 2 * step_tokens * settings.geometry.elements_per_token
        if settings.sender_bytes < step_bytes:
            raise ConfigError(
                f"a step of {step_tokens} tokens makes {step_bytes >> 20} MiB of KV; raise [prefill] sender_mib above"
                f" {settings.sender_bytes >> 20}, to twice that or more, or lower max_step_tokens"
            )
        streams = streams_of(device)
        return Staging(streams, device, slot_bytes=settings.frame_bytes, host_bytes=self._sender_bytes)

    @contained(_nothing)
    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Begin the step's transfers; this hook comes before the forward."""
        super().bind_connector_metadata(connector_metadata)
        if self._exporter is not None and isinstance(connector_metadata, StepMetadata):
            self._exporter.begin(connector_metadata.plan)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing is ever loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is ever loaded."""

    @contained(_nothing)
    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: AttentionMetadata, **kwargs: Any) -> None:  # noqa: ARG002
        """Export the layers that are there; full CUDA graphs skip this hook, so nothing may depend on it."""
        if self._exporter is not None:
            self._exporter.layer_saved(self._layer_index[layer_name])

    @contained(_nothing)
    def wait_for_save(self) -> None:
        """Export the rest of the step: every layer is queued by now, and stream order protects the blocks."""
        metadata = self._connector_metadata
        if self._exporter is not None and isinstance(metadata, StepMetadata):
            self._exporter.export(metadata.plan)

    @contained(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002
        """Tell the sender of aborted requests: this hook also comes in steps without a forward, in every release."""
        metadata = self._connector_metadata
        if self._exporter is not None and isinstance(metadata, StepMetadata):
            self._exporter.settle(metadata.plan)
        return None, None

    @contained(_nothing)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Report the backlog and failures; always, so that a deferred request sees the backlog shrink."""
        if self._exporter is None:
            return None
        backlog_bytes, failed = self._exporter.report()
        return WorkerReport(backlog_bytes * whole(self._settings.geometry).size // self._share.size, failed)

    @contained(_nothing)
    def shutdown(self) -> None:
        """Stop the sender."""
        if self._exporter is not None:
            self._exporter.close()
