"""The parts of AsyncTLS put together, for whoever builds an engine."""

from __future__ import annotations

import torch

from slipstream.asynctls.backend import AsyncTLSBackend, OffloadBackend
from slipstream.asynctls.config import AsyncTLS
from slipstream.asynctls.offload import HostPool, HotBuffer, Stage, choose_lane
from slipstream.asynctls.residency import Residency
from slipstream.asynctls.selector import AsyncTLSSelector, QueryPredictor
from slipstream.attention.backend import AttentionBackend
from slipstream.attention.calibration import Calibration
from slipstream.attention.sparse import SparseBackend
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.overlap import Lane
from slipstream.types import ModelSpec


def assemble(
    config: AsyncTLS,
    pool: KVPool,
    spec: ModelSpec,
    index: KeyIndex | None,
    dense: AttentionBackend,
    gate: int,
    num_seats: int,
    *,
    stage: Stage | None = None,
    online: Calibration | None = None,
    predictor: QueryPredictor | None = None,
    lane: Lane | None = None,
) -> SparseBackend:
    """The backend of ``config``. With offload ``pool`` is a :class:`HostPool` and ``dense`` is one over ``stage``.

    gate: tokens up to which a request attends to everything; with offload, of at most all ``blocks`` of it.
    """
    assert index is not None, "level 1 reads summaries, level 2 labels"
    if config.candidates == "current" and not config.offload:
        selector = config.selector(pool, spec, index)
        return SparseBackend(pool, spec, index, selector, dense, gate, config.dense_layers, config.unread, online)
    config.check_seats(num_seats)
    residency = Residency(
        spec, num_pages=pool.num_pages, page_size=pool.page_size, block=config.block, most=config.blocks,
        num_slots=config.num_slots(num_seats), num_seats=num_seats, device=pool.device,
    )  # fmt: skip
    chosen = AsyncTLSSelector(config, pool, spec, index, residency, predictor=predictor)
    common = (pool, spec, index, chosen, dense)
    if not config.offload:
        return AsyncTLSBackend(*common, gate, config.dense_layers, config.unread, online)
    assert isinstance(pool, HostPool) and stage is not None
    hot = HotBuffer(spec, pool.page_size, config.block, config.num_slots(num_seats), num_seats, pool.device)
    return OffloadBackend(
        *common, dense_up_to(config, gate), 0, config.unread, online, hot=hot, stage=stage,
        lane=lane or choose_lane(config.lane, pool.device), transfer=config.transfer,
    )  # fmt: skip


def dense_up_to(config: AsyncTLS, gate: int) -> int:
    """The gate with KV on the host: all blocks of a dense request must fit in its slots."""
    most = config.blocks * config.block
    if config.min_context is not None and config.min_context > most:
        raise ValueError(
            f"min_context = {config.min_context}: with offload a request is dense in slots, and those hold blocks x "
            f"block = {most} tokens: lower min_context, or raise blocks"
        )
    return min(gate, most)


def check_offload(config: AsyncTLS, device: torch.device, cuda_graphs: bool) -> None:
    """``ValueError`` for options that do not go together on this device."""
    if config.transfer == "pooled" and device.type == "cuda" and cuda_graphs:
        raise ValueError("transfer='pooled' looks at the host in a step: set cuda_graphs=False, or transfer='gather'")
    if config.host_file is not None and device.type == "cuda":
        raise ValueError("a file cannot be pinned for a GPU: leave host_file out, or use device='cpu'")
    dense_up_to(config, 0)
