"""Full attention by FlashInfer's paged kernels (Ye et al., MLSys 2025; written against flashinfer-python 0.6.16).

FlashInfer plans on the host how a step is cut into pieces. Its FlashAttention-2 plan depends on the page *counts* of
the requests only, so a captured step is planned anew only when a request enters a new page, and everything that changes
every token (page ids, tokens in the last page) is written by one small kernel inside the captured graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from slipstream.attention.backend import AttentionBackend, KVView
from slipstream.kernels import ops
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec

WORKSPACE_BYTES = 256 << 20
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
LAYOUT = "HND"
TENSOR_CORE_GROUP = 4  # query heads per KV head from which FlashInfer's tensor-core kernel is the faster one


def flashinfer_supports(spec: ModelSpec) -> str | None:
    """Why FlashInfer cannot serve a model of this shape; None when it can. Does not import FlashInfer."""
    if spec.value_dim is not None:
        return "these kernels of FlashInfer are not for latent caches"
    if spec.head_dim not in HEAD_DIMS:
        return f"FlashInfer has kernels for head dimensions {HEAD_DIMS}, not {spec.head_dim}"
    if spec.dtype not in DTYPES:
        return f"FlashInfer has kernels for bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    return None


class _Schedule:
    """What one FlashInfer wrapper needs planned: page counts, and the device buffers that hold page lists.

    counts: pages that hold tokens, per request, as of the last plan. indices: [capacity] int32 page ids, request after
    request. last_page_len: [B] int32 tokens in the last page of each request.
    """

    def __init__(self, wrapper: Any, indices: Tensor, last_page_len: Tensor) -> None:
        self.wrapper, self.indices, self.last_page_len = wrapper, indices, last_page_len
        self.counts: list[int] | None = None
        self._planned = torch.cuda.Event()

    def wait_for_copies(self) -> None:
        """FlashInfer stages a plan in one pinned buffer, which must have reached the device before it is refilled."""
        if not self._planned.query():
            self._planned.synchronize()

    def mark_copies(self) -> None:
        self._planned.record()


class FlashInferBackend(AttentionBackend):
    """``AttentionBackend`` by FlashInfer. Raises ``ValueError`` for shapes and dtypes without kernels.

    One decode wrapper per captured graph; one prefill wrapper for everything eager (prompts, mixed steps, decode
    steps outside a graph). ``WORKSPACE_BYTES`` of device memory are shared by all, 8 MiB more belong to each wrapper.
    """

    def __init__(self, pool: KVPool, spec: ModelSpec) -> None:
        reason = flashinfer_supports(spec)
        if reason is not None:
            raise ValueError(f"{reason}; use our own kernels instead (kernels='triton')")
        self.pool, self.spec = pool, spec
        self._library = importlib.import_module("flashinfer")
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.k.device)
        self._decodes: dict[tuple[int, int], _Schedule] = {}
        self._eager: _Schedule | None = None
        self._current: _Schedule | None = None
        self._batch: Batch | None = None

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        if batch.is_decode and batch.graph_key is not None:
            self._current = self._decodes.get(batch.graph_key)
            if self._current is None:
                self._current = self._decodes[batch.graph_key] = self._decode_schedule(batch)
            self._plan_decode(self._current, batch.lengths_host)
        else:
            self._current = self._plan_eager(batch)

    def view(self, layer: int) -> KVView:
        assert self._batch is not None and self._current is not None, "plan(batch) comes before view(layer)"
        if layer == 0:
            # Here and not in plan(): a captured step computes its lengths and page table inside the graph.
            # Here and not in attend(): FlashInfer's kernels read lengths before they wait for the kernel before them.
            schedule, batch = self._current, self._batch
            ops.list_pages(
                batch.page_table, batch.lengths, self.pool.page_size, schedule.indices, schedule.last_page_len
            )
        return KVView(self.pool.k[layer], self.pool.v[layer], self._batch.slots)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, Hq, D] -> [T, Hq, D]."""
        assert self._current is not None, "plan(batch) comes before attend(layer, q)"
        pages = (self.pool.k[layer], self.pool.v[layer])
        out: Tensor = self._current.wrapper.run(q, pages, out=torch.empty_like(q))
        return out

    def _decode_schedule(self, batch: Batch) -> _Schedule:
        size, device = batch.num_requests, batch.lengths.device
        indptr = torch.zeros(size + 1, dtype=torch.int32, device=device)
        indices = torch.zeros(batch.page_table.numel(), dtype=torch.int32, device=device)
        last_page_len = torch.ones(size, dtype=torch.int32, device=device)
        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=self.spec.num_heads // self.spec.num_kv_heads >= TENSOR_CORE_GROUP,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=last_page_len,
            backend="fa2",
        )
        return _Schedule(wrapper, indices, last_page_len)

    def _plan_decode(self, schedule: _Schedule, lengths: Sequence[int]) -> None:
        counts = self._page_counts(lengths)
        if counts == schedule.counts:
            return
        schedule.wait_for_copies()
        schedule.wrapper.plan(
            _pinned([0, *accumulate(counts)]),
            schedule.indices[:0],  # page ids come from the page table on the device
            _pinned(self._last_page_lengths(lengths)),
            self.spec.num_heads,
            self.spec.num_kv_heads,
            self.spec.head_dim,
            self.pool.page_size,
            q_data_type=self.spec.dtype,
            sm_scale=self.spec.scale,
        )
        schedule.mark_copies()
        schedule.counts = counts

    def _plan_eager(self, batch: Batch) -> _Schedule:
        if self._eager is None:
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, LAYOUT, backend="fa2")
            empty = torch.empty(0, dtype=torch.int32, device=self._workspace.device)
            self._eager = _Schedule(wrapper, empty, empty)
        schedule = self._eager
        counts = self._page_counts(batch.lengths_host)
        # Fresh buffers every time: the kernels of the step before may still read the last ones.
        schedule.indices = torch.empty(sum(counts), dtype=torch.int32, device=self._workspace.device)
        schedule.last_page_len = torch.empty(len(counts), dtype=torch.int32, device=self._workspace.device)
        schedule.wait_for_copies()
        schedule.wrapper.plan(
            _pinned(batch.query_start_host),
            _pinned([0, *accumulate(counts)]),
            schedule.indices,
            _pinned(self._last_page_lengths(batch.lengths_host)),
            self.spec.num_heads,
            self.spec.num_kv_heads,
            self.spec.head_dim,
            self.pool.page_size,
            causal=True,
            q_data_type=self.spec.dtype,
            sm_scale=self.spec.scale,
        )
        schedule.mark_copies()
        return schedule

    def _page_counts(self, lengths: Sequence[int]) -> list[int]:
        size = self.pool.page_size
        return [-(-length // size) for length in lengths]

    def _last_page_lengths(self, lengths: Sequence[int]) -> list[int]:
        size = self.pool.page_size
        return [(length - 1) % size + 1 for length in lengths]


def _pinned(values: Sequence[int]) -> Tensor:
    """[n] int32 in pinned host memory, so that FlashInfer's copies to the device do not block the host."""
    return torch.tensor(values, dtype=torch.int32, pin_memory=True)
