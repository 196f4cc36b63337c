"""TOVA (Oren et al. 2024, arXiv 2401.06104): a chain keeps a bounded set of tokens per layer and evicts for good.

A prompt is prefilled densely into pages. In the step that ends it, each layer keeps the ``budget`` tokens that the last
prompt row attends to most, averaged over all heads, and copies them into the chain's *seat*: a fixed piece of memory in
which it decodes from then on, so that its pages can be given back. Each further token takes a free slot of the seat, or
that of the token that the step before attended to least. Positions stay logical: keys are stored rotated.

Cancelled chains leave nothing behind: whoever gets the seat next fills it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from slipstream.attention.backend import AttentionBackend, KVView, move_tokens, prefill_part
from slipstream.kernels import sparse
from slipstream.kvcache.pool import KVPool
from slipstream.selection.tova import Tova
from slipstream.types import Batch, ModelSpec


class TovaBackend(AttentionBackend):
    """``AttentionBackend`` that decodes in seats. ``dense`` attends for prompts, over the pool's pages.

    k, v: [L, M + 1, Hk, C, D]: C = ``config.budget`` slots for each of M = ``max_num_seqs`` seats, and for seat 0, that
    of padding rows. victims: [L, M + 1] int64, the slot that a full seat's next token takes.
    A chain of at most that many tokens evicts nothing: its attention is full attention.
    add: sums weights over ranks that have other heads each, in place; None: all heads are here.
    """

    holds_kv_in_seats = True

    def __init__(
        self,
        pool: KVPool,
        spec: ModelSpec,
        dense: AttentionBackend,
        config: Tova,
        max_num_seqs: int,
        add: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        shape = (spec.num_layers, max_num_seqs + 1, spec.num_kv_heads, config.budget, spec.head_dim)
        self.pool, self.spec, self.dense, self.budget = pool, spec, dense, config.budget
        self.gate, self._add = config.budget, add or (lambda weights: weights)
        self.k = torch.zeros(shape, dtype=spec.dtype, device=pool.device)
        self.v = torch.zeros_like(self.k) if spec.value_dim is None else self.k[..., : spec.value_dim]
        self.victims = torch.zeros(shape[:2], dtype=torch.int64, device=pool.device)
        self._batch: Batch | None = None
        self._num_evicted = 0

    @staticmethod
    def seat_bytes(spec: ModelSpec, budget: int, max_num_seqs: int) -> int:
        """Memory of all seats, in bytes."""
        return (max_num_seqs + 1) * (budget * spec.kv_bytes_per_token() + 8 * spec.num_layers)

    def stats(self) -> Mapping[str, float]:
        """tova_evicted_tokens: what chains lost, in each layer so many. tova_seat_bytes: memory of the seats."""
        size = self.seat_bytes(self.spec, self.budget, self.k.shape[1] - 1)
        return {**self.dense.stats(), "tova_evicted_tokens": self._num_evicted, "tova_seat_bytes": size}

    # -- one step

    def plan(self, batch: Batch) -> None:
        self._batch, lengths, num_decodes = batch, batch.lengths_host, batch.num_decodes
        self._prompts = batch if num_decodes == 0 else None if batch.is_decode else prefill_part(batch)
        if self._prompts is not None:
            self.dense.plan(self._prompts)
        self._num_evicted += sum(length > self.budget for length in lengths[:num_decodes])
        self._num_evicted += sum(max(0, lengths[b] - self.budget) for b, _ in batch.heirs if b >= num_decodes)

    def view(self, layer: int) -> KVView:
        batch = self._batch
        assert batch is not None, "plan(batch) comes before view(layer)"
        if layer == 0 and batch.num_decodes:
            self._find_slots(batch)
        if self._prompts is None:
            return KVView(self.k[layer], self.v[layer], self._slots[layer])
        self._pages = self.dense.view(layer)
        if batch.num_decodes == 0:
            return self._pages
        # Two stores, but the model writes to one: it gets blank pages for all, which attend() shares out.
        num_tokens, size = batch.tokens.numel(), self.pool.page_size
        shape = (2, -(-num_tokens // size), self.spec.num_kv_heads, size, self.spec.head_dim)
        k, v = self.k.new_empty(shape)
        if self.spec.value_dim is not None:
            v = k[..., : self.spec.value_dim]
        self._blank = KVView(k, v, torch.arange(num_tokens, device=self.k.device))
        return self._blank

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, Hq, D] -> [T, Hq, Dv]."""
        batch = self._batch
        assert batch is not None, "plan(batch) comes before attend(layer, q)"
        count = batch.num_decodes
        if count == 0:
            out = self.dense.attend(layer, q)
        elif self._prompts is None:
            out = self._attend_seats(layer, q)
        else:
            seats = KVView(self.k[layer], self.v[layer], self._slots[layer])
            move_tokens(self._blank, slice(0, count), seats)
            move_tokens(self._blank, slice(count, None), self._pages)
            out = torch.cat((self._attend_seats(layer, q[:count]), self.dense.attend(layer, q[count:])))
        for b, seat in batch.heirs:
            if b >= count:
                self._move_in(layer, b, seat, q[batch.query_start_host[b + 1] - 1])
            elif layer == self.spec.num_layers - 1:
                self._copy_seat(batch.seats[b : b + 1], seat)
        return out

    def _find_slots(self, batch: Batch) -> None:
        """Where each layer's new tokens go, [L, B], and how many slots are filled with them, [B]: once per step."""
        seats, lengths = batch.seats[: batch.num_decodes], batch.lengths[: batch.num_decodes]
        before = lengths.long() - 1
        slots = torch.where(before < self.budget, before, self.victims.index_select(1, seats))
        self._slots = slots + seats * self.budget
        self._seats, self._filled = seats, lengths.clamp(max=self.budget)
        self._chosen: list[Tensor] = []

    def _attend_seats(self, layer: int, q: Tensor) -> Tensor:
        out, weights = sparse.tova_attention(
            q, self.k[layer], self.v[layer], self._seats, self._filled, self.spec.scale
        )
        self._chosen.append(sparse.lowest_slots(self._add(weights), self._filled))
        if layer == self.spec.num_layers - 1:
            self.victims.index_copy_(1, self._seats, torch.stack(self._chosen))
        return self.spec.own(out)

    # -- into the seats

    def _move_in(self, layer: int, b: int, seat: int, query: Tensor) -> None:
        """The prompt of request ``b`` is stored in this layer's pages: fill a seat. query: [Hq, D] of its last row."""
        assert self._batch is not None
        length, size, budget = self._batch.lengths_host[b], self.pool.page_size, self.budget
        pages = self._batch.page_table[b, : -(-length // size)]
        k, v = (_tokens(store[layer].index_select(0, pages), length) for store in (self.pool.k, self.pool.v))
        if length >= budget:
            weights = self._add(_sum_weights(query, k, self.spec.scale)).nan_to_num(nan=-1.0)
            # Of equal weights the earlier token stays; slots are in the order of tokens.
            kept = weights.sort(descending=True, stable=True).indices[:budget].sort().values
            self.victims[layer, seat].copy_(weights[kept].argmin())
            k, v = k.index_select(1, kept), v.index_select(1, kept)
        self.k[layer, seat, :, :length].copy_(k)
        self.v[layer, seat, :, :length].copy_(v)

    def _copy_seat(self, source: Tensor, seat: int) -> None:
        """A prompt that ended with forced rows is in a seat already: its siblings get copies. source: [1] int64."""
        for store in (self.k, self.v, self.victims):
            store[:, seat].copy_(store.index_select(1, source)[:, 0])


def _tokens(pages: Tensor, length: int) -> Tensor:
    """pages: [N, Hk, S, D] of one request -> [Hk, length, D]."""
    return pages.transpose(0, 1).flatten(1, 2)[:, :length]


def _sum_weights(query: Tensor, k: Tensor, scale: float) -> Tensor:
    """query: [Hq, D], k: [Hk, n, D] -> [n] fp32 softmax weights, summed over query heads."""
    grouped = query.view(k.shape[0], -1, query.shape[-1]).float()
    weights = torch.matmul(grouped, k.float().transpose(1, 2)).mul_(scale).softmax(-1)
    return weights.sum((0, 1))
