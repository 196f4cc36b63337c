"""Full attention over the paged cache with our own kernels: the definition that every other backend is measured by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slipstream.attention.backend import AttentionBackend, KVView
from slipstream.kernels import ops
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec


@dataclass(frozen=True)
class Full:
    """Every token attends to every token before it. No options."""


class DenseBackend(AttentionBackend):
    """``AttentionBackend`` by :func:`ops.decode_attention` and :func:`ops.prefill_attention`.

    Nothing is planned: the kernels cut their work on the device, from ``batch.lengths``. A captured step keeps working
    as long as the batch's tensors are the static buffers that it was captured with.
    """

    def __init__(self, pool: KVPool, spec: ModelSpec) -> None:
        self.pool = pool
        self.spec = spec
        self._batch: Batch | None = None

    def plan(self, batch: Batch) -> None:
        self._batch = batch

    def view(self, layer: int) -> KVView:
        assert self._batch is not None, "plan(batch) comes before view(layer)"
        return KVView(self.pool.k[layer], self.pool.v[layer], self._batch.slots)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, Hq, D] -> [T, Hq, D]."""
        batch = self._batch
        assert batch is not None, "plan(batch) comes before attend(layer, q)"
        k, v = self.pool.k[layer], self.pool.v[layer]
        if batch.is_decode:
            return ops.decode_attention(q, k, v, batch.page_table, batch.lengths, self.spec.scale)
        return ops.prefill_attention(
            q, k, v, batch.page_table, batch.query_start, batch.lengths, self.spec.scale, batch.max_query
        )
