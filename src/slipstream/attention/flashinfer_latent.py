"""Full attention over a latent cache by FlashInfer's MLA kernels (written against flashinfer-python 0.6.16).

Its plan cuts the keys of every request at exact lengths, so a captured step is planned anew before every replay, into
the buffers that the wrapper was captured with; page ids are written by a kernel of ours inside the graph, as in
:mod:`slipstream.attention.flashinfer`. One kind of wrapper serves decode steps, prompts and mixed steps, absorbed.

Its kernels (``mla_hopper.cuh``, ``mla.cuh``) end a tile of 128 or 64 rows, which are queries times heads, at the key of
query ``(first row + rows) // heads``. Unless heads divide the rows, a query that the tile cuts loses its own key where
that key begins a tile of 64. So prompts are attended with heads padded to a power of two; decode steps lose nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.attention.backend import AttentionBackend, KVView
from slipstream.attention.flashinfer import DTYPES, WORKSPACE_BYTES
from slipstream.kernels import ops
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec

ROW, VALUE = 576, 512  # the one shape that it has kernels for
MOST_HEADS = 128  # rows of a tile


def flashinfer_supports_latent(spec: ModelSpec) -> str | None:
    """Why FlashInfer cannot serve a latent cache of this shape; None when it can. Does not import FlashInfer."""
    if (spec.head_dim, spec.value_dim) != (ROW, VALUE):
        own = f"{spec.head_dim} with values of {spec.value_dim}"
        return f"FlashInfer has MLA kernels for rows of {ROW} with values of {VALUE}, not {own}"
    if spec.num_heads > MOST_HEADS:
        return f"FlashInfer's MLA kernels read too few keys with more than {MOST_HEADS} heads, not {spec.num_heads}"
    if spec.dtype not in DTYPES:
        return f"FlashInfer has kernels for bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    return None


class _Schedule:
    """A wrapper, and the device buffers of one batch size: page ids, and room for what we do not read."""

    def __init__(self, wrapper: Any, indices: Tensor, requests: int) -> None:
        self.wrapper, self.indices = wrapper, indices
        self.last_page_len = torch.empty(requests, dtype=torch.int32, device=indices.device)
        self._planned = torch.cuda.Event()

    def plan(self, spec: ModelSpec, heads: int, size: int, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """starts: [B + 1] query rows; lengths: [B] keys. heads: padded ones among them.

        Does not wait for the device, but for the plan before.
        """
        if not self._planned.query():  # FlashInfer stages a plan in one pinned buffer
            self._planned.synchronize()
        self.wrapper.plan(
            _pinned(starts),
            _pinned([0, *accumulate(-(-length // size) for length in lengths)]),
            self.indices[:0] if self.wrapper._use_cuda_graph else self.indices,
            _pinned(lengths),
            heads,
            VALUE,
            ROW - VALUE,
            size,
            True,
            spec.scale,
            spec.dtype,
            spec.dtype,
        )
        self._planned.record()


class FlashInferLatentBackend(AttentionBackend):
    """``AttentionBackend`` by FlashInfer's MLA. Raises ``ValueError`` for shapes and dtypes without kernels."""

    def __init__(self, pool: KVPool, spec: ModelSpec) -> None:
        reason = flashinfer_supports_latent(spec)
        if reason is not None:
            raise ValueError(f"{reason}; use our own kernels instead (kernels='triton')")
        self.pool, self.spec = pool, spec
        self._wrapper = importlib.import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.k.device)
        self._captured: dict[tuple[int, int], _Schedule] = {}
        self._eager: _Schedule | None = None
        self._current: _Schedule | None = None
        self._batch: Batch | None = None
        self._heads = spec.num_heads

    def plan(self, batch: Batch) -> None:
        self._batch, size, num_heads = batch, self.pool.page_size, self.spec.num_heads
        self._heads = num_heads if batch.is_decode else 1 << (num_heads - 1).bit_length()
        if batch.is_decode and batch.graph_key is not None:
            if batch.graph_key not in self._captured:
                self._captured[batch.graph_key] = self._capture(batch)
            self._current = self._captured[batch.graph_key]
        else:
            if self._eager is None:
                self._eager = _Schedule(self._wrapper(self._workspace), batch.lengths[:0], 0)
            self._current = self._eager
            # Fresh buffers every time: the kernels of the step before may still read the last ones.
            pages = sum(-(-length // size) for length in batch.lengths_host)
            self._current.indices = torch.empty(pages, dtype=torch.int32, device=self._workspace.device)
            self._current.last_page_len = torch.empty_like(batch.lengths)
        self._current.plan(self.spec, self._heads, size, batch.query_start_host, batch.lengths_host)

    def view(self, layer: int) -> KVView:
        assert self._batch is not None and self._current is not None, "plan(batch) comes before view(layer)"
        if layer == 0:  # here and not in plan(): a captured step computes its page table inside the graph
            batch, schedule = self._batch, self._current
            ops.list_pages(
                batch.page_table, batch.lengths, self.pool.page_size, schedule.indices, schedule.last_page_len
            )
        return KVView(self.pool.k[layer], self.pool.v[layer], self._batch.slots)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, Hq, 576] -> [T, Hq, 512]."""
        assert self._current is not None, "plan(batch) comes before attend(layer, q)"
        latent, rotary = self.pool.k[layer][:, 0].split([VALUE, ROW - VALUE], dim=-1)
        padded = F.pad(q, (0, 0, 0, self._heads - q.shape[1])) if self._heads > q.shape[1] else q
        out = q.new_empty((*padded.shape[:2], VALUE))
        self._current.wrapper.run(padded[..., :VALUE], padded[..., VALUE:], latent, rotary, out=out)
        return out[:, : q.shape[1]]

    def _capture(self, batch: Batch) -> _Schedule:
        requests, device = batch.num_requests, batch.lengths.device
        starts, pages = (torch.zeros(requests + 1, dtype=torch.int32, device=device) for _ in range(2))
        indices = torch.zeros(batch.page_table.numel(), dtype=torch.int32, device=device)
        lengths = torch.zeros(requests, dtype=torch.int32, device=device)
        return _Schedule(self._wrapper(self._workspace, True, starts, pages, indices, lengths), indices, requests)


def _pinned(values: Sequence[int]) -> Tensor:
    """[n] int32 in pinned host memory, so that copies to the device do not block the host."""
    return torch.tensor(values, dtype=torch.int32, pin_memory=True)
