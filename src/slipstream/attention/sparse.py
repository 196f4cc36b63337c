"""Attention over selected tokens: dense up to a gate, per request and step; above it what a selector chooses."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.attention.backend import AttentionBackend, KVView, prefill_part
from slipstream.attention.calibration import Calibration
from slipstream.kernels import ops, sparse
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.kvcache.table import NULL_PAGE
from slipstream.selection.selector import Selector
from slipstream.types import Batch, ModelSpec

DENSE, SPARSE, MIXED = 0, 1, 2  # which decode rows are longer than the gate: none, all, some
INDEXING = 4  # added to these where the step extends the index
CALIBRATION_TOKENS = 128


class SparseBackend(AttentionBackend):
    """``AttentionBackend`` that attends to a selection wherever a decoding request is longer than ``gate`` tokens.

    index: kept up for every token, those of prompts included; None for a selector that needs none. dense: attends to
    prompts, to the first ``dense_layers`` layers, and to all of a step whose decode rows are within the gate; such a
    step is the dense backend's to the bit. In a step where only some are within, those go through our own kernel.

    unread: newest tokens that the selector takes whatever the index says. Where they cover a page that is not full, the
    index need not know that page yet: decode steps then index a page when it fills, all its tokens at once, and the
    other steps run without that launch. Otherwise every step indexes its token.

    online: sums to calibrate the labels with, as there is no file. All prompt tokens count, step after step, until
    there are :data:`CALIBRATION_TOKENS` of them, and from the first step on the channels are the best known: whenever
    they change, the labels of all tokens so far are written anew. After that they stay for the engine's life.
    """

    gate: int

    def __init__(
        self,
        pool: KVPool,
        spec: ModelSpec,
        index: KeyIndex | None,
        selector: Selector,
        dense: AttentionBackend,
        gate: int,
        dense_layers: int = 0,
        unread: int = 0,
        online: Calibration | None = None,
    ) -> None:
        self.pool, self.spec, self.index, self.selector, self.dense = pool, spec, index, selector, dense
        self.gate, self.dense_layers = gate, dense_layers
        self._by_page = index is not None and unread >= pool.page_size - 1
        self.variants = self._all_variants()
        self._online = online
        self._recorder: Calibration | None = None
        self._labelled: set[int] = set()  # pages with labels of channels that may still change
        self._batch: Batch | None = None
        self._decodes: Batch | None = None
        self._form, self._indexes = DENSE, False
        self._plans_dense = False
        self._max_query = 1
        self._masked: dict[tuple[int, int], Tensor] = {}  # static buffers of captured steps
        self._starts: dict[tuple[int, int], Tensor] = {}
        self._query_start = torch.empty(0)
        self._lengths = torch.empty(0)
        self._counts: Counter[str] = Counter()

    def _all_variants(self) -> Sequence[int]:
        forms = (DENSE,) if self.gate >= self.spec.max_position else (DENSE, SPARSE, MIXED)
        indexing = tuple(INDEXING + form for form in forms)
        if self.index is None:
            return forms
        return (*forms, *indexing) if self._by_page else indexing

    def variant(self, lengths: Sequence[int]) -> int:
        longer = sum(length > self.gate for length in lengths)
        form = DENSE if longer == 0 else SPARSE if longer == len(lengths) else MIXED
        size = self.pool.page_size
        indexes = self.index is not None and (not self._by_page or any(length % size == 0 for length in lengths))
        return form + INDEXING * indexes

    def record(self, calibration: Calibration | None) -> None:
        """From now on add the tokens of all prompts to ``calibration``; None ends it."""
        self._recorder = calibration

    # -- once per step

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        variant = batch.variant if batch.num_decodes else DENSE
        self._form = variant % INDEXING
        self._indexes = bool(variant & INDEXING) or (self.index is not None and not batch.is_decode)
        if self._indexes:
            self._plan_index(batch)
        self._count(batch)
        self._watch(batch)
        self._plans_dense = True
        if self._form == DENSE:
            self.dense.plan(batch)
            return
        if not batch.is_decode:
            self.dense.plan(prefill_part(batch))
        elif self.dense_layers:
            self.dense.plan(batch)
        else:
            self._plans_dense = False
        self._decodes = batch if batch.is_decode else decode_part(batch)
        self._lengths = self._buffer(self._decodes)
        self.selector.plan(self._decodes, self._lengths[0])

    def _plan_index(self, batch: Batch) -> None:
        """How many of each request's newest tokens are indexed: [B + 1] int32 starts, and the most of one request."""
        self._max_query, self._query_start = batch.max_query, batch.query_start
        if not self._by_page:
            return
        self._max_query = batch.max_query + self.pool.page_size - 1
        if batch.graph_key is None:
            self._query_start = batch.query_start.clone()
        else:
            if batch.graph_key not in self._starts:
                self._starts[batch.graph_key] = torch.zeros_like(batch.query_start)
            self._query_start = self._starts[batch.graph_key]

    def _find_pages(self, batch: Batch) -> None:
        find_full_pages(batch, self.pool.page_size, self._query_start)

    def _buffer(self, batch: Batch) -> Tensor:
        """[2, B] or [1, B] int32: lengths of the rows that select, and of those that attend to everything."""
        if self._form == SPARSE:
            return batch.lengths.unsqueeze(0)
        if batch.graph_key is None:
            return batch.lengths.new_empty((2, batch.num_requests))
        if batch.graph_key not in self._masked:
            self._masked[batch.graph_key] = batch.lengths.new_empty((2, batch.num_requests))
        return self._masked[batch.graph_key]

    def _count(self, batch: Batch) -> None:
        rows = zip(batch.lengths_host[: batch.num_decodes], batch.pages_host, strict=False)
        lengths = [length for length, pages in rows if pages[0] != NULL_PAGE]  # without padding rows
        chosen = [length for length in lengths if length > self.gate]
        counts, dense_layers = self._counts, self.dense_layers
        counts["sparse_steps"] += bool(chosen)
        counts["sparse_rows"] += len(chosen)
        counts["dense_rows"] += len(lengths) - len(chosen)
        context = sum(lengths)
        spared = sum(length - self.selector.attended(length) for length in chosen)
        counts["tokens"] += context
        counts["spared"] += spared * (self.spec.num_layers - dense_layers)

    def _watch(self, batch: Batch) -> None:
        """Count the prompt tokens that this step will show to whoever calibrates."""
        num_tokens = batch.query_start_host[-1] - batch.query_start_host[batch.num_decodes]
        if self._recorder is not None:
            self._recorder.num_tokens += num_tokens
        if self._online is not None:
            if self._online.num_tokens >= CALIBRATION_TOKENS:
                self._online = None
                self._labelled.clear()
                return
            self._online.num_tokens += num_tokens
            self._labelled.update(page for pages in batch.pages_host for page in pages)

    # -- once per layer

    def view(self, layer: int) -> KVView:
        batch = self._batch
        assert batch is not None, "plan(batch) comes before view(layer)"
        if self._plans_dense:
            self.dense.view(layer)  # a backend may have work to do here
        return KVView(self.pool.k[layer], self.pool.v[layer], batch.slots)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, Hq, D] -> [T, Hq, D]."""
        batch = self._batch
        assert batch is not None, "plan(batch) comes before attend(layer, q)"
        if not batch.is_decode:
            self._calibrate(layer, q, batch)
        if self._indexes and layer >= self.dense_layers:
            self._extend(layer, batch)
        if self._form == DENSE or (batch.is_decode and layer < self.dense_layers):
            return self.dense.attend(layer, q)
        if batch.is_decode:
            return self._select_and_attend(layer, q.contiguous())
        num_decodes = batch.num_decodes
        decoded = self._select_and_attend(layer, q[:num_decodes].contiguous())
        return torch.cat((decoded, self.dense.attend(layer, q[num_decodes:])))

    def _extend(self, layer: int, batch: Batch) -> None:
        """Index the step's tokens."""
        assert self.index is not None, "only an index is extended"
        if layer == self.dense_layers and self._query_start is not batch.query_start:
            self._find_pages(batch)
        self.index.extend(
            layer, self.pool.k[layer], batch.page_table, self._query_start, batch.lengths, self._max_query
        )

    def _select_and_attend(self, layer: int, q: Tensor) -> Tensor:
        """The decode rows. q: [B, Hq, D] -> [B, Hq, D]."""
        batch, lengths, scale, own = self._decodes, self._lengths, self.spec.scale, self.spec.own(q)
        assert batch is not None
        k, v = self.pool.k[layer], self.pool.v[layer]
        if layer < self.dense_layers:
            return ops.decode_attention(own, k, v, batch.page_table, batch.lengths, scale)
        if self._form == SPARSE:
            out = q.new_empty((*own.shape[:-1], v.shape[-1]))
        else:
            if layer == self.dense_layers:  # here and not in plan(): a captured step knows its lengths only now
                torch.mul(batch.lengths, batch.lengths > self.gate, out=lengths[0])
                torch.sub(batch.lengths, lengths[0], out=lengths[1])
            out = ops.decode_attention(own, k, v, batch.page_table, lengths[1], scale)
        selection = self.selector.select(layer, q)
        indices, counts, rows = selection
        sparse.sparse_attention(own, k, v, batch.page_table, indices, counts, scale, out, rows)
        return out

    def _calibrate(self, layer: int, q: Tensor, batch: Batch) -> None:
        """Show the prompt rows of a step to whoever calibrates, and relabel if that is this engine itself."""
        watchers = [one for one in (self._recorder, self._online) if one is not None]
        if not watchers:
            return
        k_pages, size, row = self.pool.k[layer], self.pool.page_size, batch.query_start_host[batch.num_decodes]
        slots = batch.slots[row:]
        k = k_pages[slots // size, :, slots % size]
        for calibration in watchers:
            calibration.observe(layer, q[row:], k)
        if self._online is not None:
            self._relabel(layer, self._online)

    def _relabel(self, layer: int, calibration: Calibration) -> None:
        """From now on labels are of the channels that this calibration prefers."""
        assert self.index is not None, "labels are calibrated, and labels are in an index"
        channels = calibration.channels(self.index.parts.num_channels)[layer]
        self.index.set_channels(layer, channels, self.pool.k[layer], self._labelled)

    # -- numbers

    def stats(self) -> dict[str, float]:
        """Counted over decode rows: tokens are per KV head, tokens_attended is the mean of all layers."""
        counts = self._counts
        context = counts["tokens"]
        attended = context - counts["spared"] / self.spec.num_layers
        return {
            "sparse_steps": counts["sparse_steps"],
            "sparse_rows": counts["sparse_rows"],
            "dense_rows": counts["dense_rows"],
            "tokens_attended": attended,
            "tokens_in_context": context,
            "density": attended / context if context else 1.0,
            "index_bytes": 0 if self.index is None else self.index.bytes,
        }


def find_full_pages(batch: Batch, size: int, starts: Tensor) -> None:
    """Which of its newest tokens each request indexes, into ``starts`` [B + 1] int32, whose first is 0; on the device,
    where alone a captured step knows lengths.

    A decode row whose page is full indexes all of it, any other nothing. A prompt row indexes its tokens, and those
    before them in the same page.
    """
    num_decodes, counts = batch.num_decodes, batch.query_start.diff()
    decoded = (batch.lengths[:num_decodes] % size == 0) * size
    before = (batch.lengths - counts)[num_decodes:] % size
    counts = torch.cat((decoded, counts[num_decodes:] + before))
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])


def decode_part(batch: Batch) -> Batch:
    """The decode rows of a mixed step as a batch of its own (views; nothing is copied)."""
    count = batch.num_decodes
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[:count],
        positions=batch.positions[:count],
        slots=batch.slots[:count],
        page_table=batch.page_table[:count],
        lengths=batch.lengths[:count],
        query_start=batch.query_start[: count + 1],
        seats=batch.seats[:count],
        lengths_host=batch.lengths_host[:count],
        query_start_host=batch.query_start_host[: count + 1],
        pages_host=batch.pages_host[:count],
        heirs=[(b, seat) for b, seat in batch.heirs if b < count],
    )
