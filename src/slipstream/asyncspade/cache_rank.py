"""The cache rank: it holds the chains' keys and values, predicts the next query, and selects for it (paper, section 3).

An object that is told what the inference rank stores, layer by layer, and answers with the set for the next step. It
knows nothing of sockets: ``rank_process`` feeds it from a channel. All state is by seat and epoch: a chain's tokens
must come gapless from position 0 on, in every layer, or the set that is asked for is refused. So no set was ever chosen
from half a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.far_side import keys_only
from slipstream.asyncspade.mlp import QueryMLP
from slipstream.asyncspade.predictor import Predictor
from slipstream.asyncspade.protocol import Kind, ProtocolError
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.plan import MemoryPlan
from slipstream.kvcache.pool import KVPool
from slipstream.kvcache.table import Lease, PageTable
from slipstream.types import Batch, ModelSpec

Answer = tuple[Kind, tuple[Tensor, ...]]
"""A kind of message and its tensors, on the cache rank's device."""


@dataclass
class _Sitting:
    """Who sits in a seat. stored: tokens stored in each layer. told: number of the call that grew it last."""

    epoch: int
    lease: Lease
    stored: list[int]
    told: int = 0
    dropped: bool = False


class _Rows(NamedTuple):
    """Some requests of one step, on the device: what all layers need.

    seats, positions: [n] int64, the newest token's. lengths: [n] int32 with it. table: [n, N] int32.
    slots: [n] int64, where the newest token goes.
    """

    seats: Tensor
    positions: Tensor
    lengths: Tensor
    table: Tensor
    slots: Tensor


class CacheRank:
    """Replica of the pool, index, windows and selector of one inference rank.

    transfer "indices": sets are token positions, values are never sent here. "packed": keys and values of the whole
    set; "delta": of the tokens that the other side's seat does not hold. gate: no sets up to this many tokens.
    first_layer: layers before it attend to everything and are never told of.
    """

    def __init__(
        self,
        config: AsyncSpade,
        spec: ModelSpec,
        memory: MemoryPlan,
        num_seats: int,
        cos_sin: Tensor,
        gate: int,
        device: torch.device | str = "cpu",
        mlp: QueryMLP | None = None,
    ) -> None:
        self.config, self.spec, self.gate = config, spec, gate
        self.device, self.first_layer = torch.device(device), config.dense_layers
        self.packs, self.num_kv = config.transfer != "indices", spec.num_kv_heads
        shape = (spec.num_layers, memory.num_pages, spec.num_kv_heads, memory.page_size, spec.head_dim)
        value_dim = spec.value_dim if self.packs else keys_only(spec).value_dim
        self.pool = KVPool(*shape, dtype=spec.dtype, device=device, value_dim=value_dim)
        self.table = PageTable(memory.num_pages, memory.page_size, reuse=False)
        parts = config.inner().index
        self.index = None if parts is None else KeyIndex(self.pool, parts)
        inner = config.inner(config.spare)
        self.selector = inner.selector(self.pool, spec, self.index)
        self.budget = inner.budget
        self.predictor = Predictor(config, spec, num_seats, cos_sin.to(device), self.device, mlp)
        self._by_page = self.index is not None and inner.unread >= memory.page_size - 1
        self._seats: dict[int, _Sitting] = {}
        self._num_seats, self._num_calls = num_seats, 0
        self._held = self._empty_seats() if self.packs else None
        self._step: tuple[int, list[list[int]], _Rows] | None = None
        self.dropped: list[tuple[int, int]] = []  # seats and epochs that the other side is still to be told of

    @staticmethod
    def fixed_bytes(config: AsyncSpade, spec: ModelSpec, num_seats: int) -> int:
        """Memory beside the pool and its index."""
        held = 4 * spec.num_layers * spec.num_kv_heads * config.budget * (config.transfer != "indices")
        return (num_seats + 1) * (Predictor.seat_bytes(config, spec) + held)

    def _empty_seats(self) -> Tensor:
        """[L, M + 1, Hk, K] int32: which tokens the other side's seats hold, slot by slot; -1 for none."""
        shape = (self.spec.num_layers, self._num_seats + 1, self.num_kv, self.budget)
        return torch.full(shape, -1, dtype=torch.int32, device=self.device)

    # -- what may be told

    def prompt(self, layer: int, row: Sequence[int], k: Tensor, v: Tensor, q: Tensor) -> Answer | None:
        """Tokens of one chain, the next in this layer. row: seat, epoch, first position, whether a set is wanted.

        k, v: [m, Hk, D]; q: [w, Hq, D], the queries of the last w of them.
        """
        seat, epoch, first, wanted = row
        sitting = self._find(seat, epoch, opens=first == 0 and layer == self.first_layer)
        if sitting is None:
            return None
        last = first + len(k)
        self._check_gapless(sitting, layer, seat, first, last)
        if not self._grow(sitting, last):
            return None
        size = self.pool.page_size
        positions = torch.arange(first, last)
        pages = torch.tensor(sitting.lease.pages, dtype=torch.int32)
        slots = (pages[positions // size].long() * size + positions % size).to(self.device)
        self._store(layer, slots, k, v)
        table = pages.unsqueeze(0).to(self.device)
        self._extend(layer, table, [last], [last - first // size * size])
        if len(q) == 0:  # tokens whose queries nobody has any more
            return None
        newest = torch.arange(last - len(q), last, device=self.device)
        seats = torch.full_like(newest, seat)
        if layer == self.first_layer:
            self.predictor.advance(seats[:1], newest[:1], len(q))
        self.predictor.push_prompt(layer, q, newest, seats)
        if not wanted or last + 1 <= self.gate:
            return None
        lengths = torch.tensor([last], dtype=torch.int32, device=self.device)
        rows = _Rows(seats[-1:], newest[-1:], lengths, table, slots[-1:])
        predicted = self.predictor.step(layer, q[-1:], rows.seats, rows.positions)
        return self._choose(layer, [[seat, epoch, last + 1]], rows, predicted)

    def step(
        self, layer: int, step: int, told: Sequence[Sequence[int]], q: Tensor, k: Tensor, v: Tensor
    ) -> Answer | None:
        """One more token of each row. told: seat, epoch, length with it. q: [n, Hq, D]; k, v: [n, Hk, D]."""
        kept = [i for i, (seat, epoch, _) in enumerate(told) if self._find(seat, epoch) is not None]
        for i in kept:
            seat, _, length = told[i]
            self._check_gapless(self._seats[seat], layer, seat, length - 1, length)
            if layer == self.first_layer:
                self._grow(self._seats[seat], length)
        kept = [i for i in kept if not self._seats[told[i][0]].dropped]
        if not kept:
            return None
        if len(kept) < len(told):
            chosen = torch.tensor(kept, device=self.device)
            q, k = q[chosen], k[chosen]
            v = v[chosen] if len(v) else v
            told = [told[i] for i in kept]
        rows = self._rows(step, [list(row) for row in told])
        if layer == self.first_layer:
            self.predictor.advance(rows.seats, rows.positions)
        self._store(layer, rows.slots, k, v)
        self._extend_step(layer, rows, [length for _, _, length in told])
        predicted = self.predictor.step(layer, q, rows.seats, rows.positions)
        longer = [i for i, (_, _, length) in enumerate(told) if length + 1 > self.gate]
        if not longer:
            return None
        if len(longer) < len(told):
            chosen = torch.tensor(longer, device=self.device)
            rows, predicted = _Rows(*(column[chosen] for column in rows)), predicted[chosen]
        wanted = [[told[i][0], told[i][1], told[i][2] + 1] for i in longer]
        return self._choose(layer, wanted, rows, predicted)

    def fork(self, told: Sequence[Sequence[int]]) -> None:
        """told: a chain's seat and epoch, and those of another that goes on from it."""
        pairs = []
        for seat, epoch, other, other_epoch in told:
            sitting = self._find(seat, epoch)
            self._leave(other)
            if sitting is None:
                self._seats[other] = _Sitting(other_epoch, self.table.allocate(), [], 0, dropped=True)
                self.dropped.append((other, other_epoch))
                continue
            self._seats[other] = _Sitting(
                other_epoch, self.table.fork(sitting.lease), list(sitting.stored), sitting.told
            )
            pairs.append((seat, other))
        if pairs:
            sources, targets = torch.tensor(pairs, device=self.device).unbind(1)
            self.predictor.inherit(sources, targets)
            if self._held is not None:
                self._held.index_copy_(1, targets, self._held.index_select(1, sources))
        self._step = None

    def close(self, told: Sequence[Sequence[int]]) -> None:
        """told: seats and epochs of chains that are over."""
        for seat, epoch in told:
            if seat in self._seats and self._seats[seat].epoch == epoch:
                self._leave(seat)
        self._step = None

    def set_channels(self, layer: int, channels: Tensor) -> None:
        """Channels [Hk, r] of the labels from now on; those of all tokens so far are written anew."""
        if self.index is None or not self.index.parts.num_channels:
            raise ProtocolError("channels came for a method that has no labels")
        pages = {page for sitting in self._seats.values() for page in sitting.lease.pages}
        self.index.set_channels(layer, channels.to(self.device), self.pool.k[layer], pages)

    # -- who sits where

    def _find(self, seat: int, epoch: int, opens: bool = False) -> _Sitting | None:
        """The chain of this epoch, None if it was dropped; ``ProtocolError`` for one that never came."""
        sitting = self._seats.get(seat)
        if opens and (sitting is None or sitting.epoch != epoch):
            self._leave(seat)
            sitting = self._seats[seat] = _Sitting(epoch, self.table.allocate(), [0] * self.spec.num_layers)
            self.predictor.reset([seat])
            if self._held is not None:
                self._held[:, seat] = -1
        if sitting is None or sitting.epoch != epoch:
            raise ProtocolError(f"seat {seat} has no chain of epoch {epoch} here")
        return None if sitting.dropped else sitting

    def _leave(self, seat: int) -> None:
        sitting = self._seats.pop(seat, None)
        if sitting is not None:
            self.table.free(sitting.lease)

    def _check_gapless(self, sitting: _Sitting, layer: int, seat: int, first: int, last: int) -> None:
        if not self.first_layer <= layer < self.spec.num_layers or sitting.stored[layer] != first:
            raise ProtocolError(f"token {first} of seat {seat} came in layer {layer} out of turn")
        sitting.stored[layer] = last

    def _grow(self, sitting: _Sitting, length: int) -> bool:
        """Pages for so many tokens, taken from other chains if need be; False when the chain is dropped for them."""
        missing = length - sitting.lease.length
        if missing <= 0:
            return True
        self._num_calls += 1
        sitting.told = self._num_calls
        while not self.table.can_append(sitting.lease, missing):
            # Nobody says when a chain ends: who was told of least lately goes first.
            oldest = min(self._seats, key=lambda other: self._seats[other].told or self._num_calls + 1)
            self._drop(oldest)
            if sitting.dropped:
                return False
        self.pool.copy_pages(self.table.append(sitting.lease, missing))
        return True

    def _drop(self, seat: int) -> None:
        sitting = self._seats[seat]
        self.table.free(sitting.lease)
        sitting.lease, sitting.dropped, sitting.told = self.table.allocate(), True, 0
        self.dropped.append((seat, sitting.epoch))

    # -- one layer

    def _rows(self, step: int, told: list[list[int]]) -> _Rows:
        """Made once per step: all its layers have the same rows."""
        if self._step is not None and self._step[:2] == (step, told):
            return self._step[2]
        held = [self._seats[seat].lease.pages for seat, _, _ in told]
        width, size = max(map(len, held)), self.pool.page_size
        table = torch.tensor([pages + [0] * (width - len(pages)) for pages in held], dtype=torch.int32)
        seats, _, lengths = torch.tensor(told).unbind(1)
        positions = lengths - 1
        page = table.gather(1, (positions // size).unsqueeze(1)).squeeze(1).long()
        slots = page * size + positions % size
        columns = (seats.contiguous(), positions, lengths.int(), table, slots)
        rows = _Rows(*(column.to(self.device, non_blocking=True) for column in columns))
        self._step = (step, told, rows)
        return rows

    def _store(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        size = self.pool.page_size
        page, offset = slots // size, slots % size
        self.pool.k[layer][page, :, offset] = k
        if self.packs:
            self.pool.v[layer][page, :, offset] = v

    def _extend_step(self, layer: int, rows: _Rows, lengths: list[int]) -> None:
        """Index each row's newest token or, where the selector takes the newest anyway, each page that became full."""
        if not self._by_page:
            self._extend(layer, rows.table, lengths, [1] * len(lengths))
            return
        size = self.pool.page_size
        full = [i for i, length in enumerate(lengths) if length % size == 0]
        if full:
            self._extend(layer, rows.table[full], [lengths[i] for i in full], [size] * len(full))

    def _extend(self, layer: int, table: Tensor, lengths: list[int], counts: list[int]) -> None:
        if self.index is None:
            return
        starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths_there = torch.tensor(lengths, dtype=torch.int32).to(self.device)
        self.index.extend(layer, self.pool.k[layer], table, starts.to(self.device), lengths_there, max(counts))

    def _choose(self, layer: int, wanted: list[list[int]], rows: _Rows, predicted: Tensor) -> Answer:
        """The sets for the rows' next step. wanted: seat, epoch, length that each is for."""
        self.selector.plan(_batch(rows), rows.lengths)
        indices, counts = self.selector.select(layer, predicted)[:2]
        tags = torch.tensor(wanted)
        if not self.packs:
            return Kind.SETS, (tags, indices, counts)
        return Kind.PACK, (tags, *self._pack(layer, rows, indices, counts))

    def _pack(self, layer: int, rows: _Rows, indices: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        """What the other side's seats lack of these sets, and where it goes: the fields of a PACK behind its rows.

        A seat's set lies in its first slots, in any order. Tokens that lie there stay; the others take the slots of
        those that leave. A set that fits into fewer slots than the last one sends what lay behind them anew.
        """
        assert self._held is not None
        count = counts[:, :1]
        assert bool((counts == count).all()), "a selector gives all heads of a request as many tokens"
        held = self._held[layer].index_select(0, rows.seats)
        slot = torch.arange(held.shape[-1], device=self.device)
        live = (slot < count).unsqueeze(1)
        held = held.masked_fill(~live, -1)
        if self.config.transfer == "packed":
            held = torch.full_like(held, -1)
        # Row 0 of each table stands for "no token": indices are moved up by one.
        width = int(rows.lengths.max()) + 2
        blank = torch.zeros((*held.shape[:2], width), dtype=torch.bool, device=self.device)
        is_held = blank.scatter(2, held.long() + 1, True)
        is_chosen = blank.scatter(2, indices.long() + 1, True)
        is_held[..., 0] = is_chosen[..., 0] = False
        missing = live & ~is_held.gather(2, indices.long() + 1)
        free = live & ~is_chosen.gather(2, held.long() + 1)
        row, head, place = free.nonzero().unbind(1)  # as many in each row and head as are missing, in the same order
        token = indices[missing]
        held[row, head, place] = token
        self._held[layer].index_copy_(0, rows.seats, held)
        size, token = self.pool.page_size, token.long()
        page = rows.table[row, token // size].long()
        k, v = (store[layer][page, head, token % size] for store in (self.pool.k, self.pool.v))
        sizes = free.sum((1, 2), dtype=torch.int32)
        return count.squeeze(1).int(), sizes, (place * self.num_kv + head).int(), k, v


def _batch(rows: _Rows) -> Batch:
    """What a selector may look at."""
    count, device = len(rows.seats), rows.seats.device
    lengths = rows.lengths.tolist() if device.type == "cpu" else [1] * count
    return Batch(
        tokens=torch.zeros(count, dtype=torch.int64, device=device),
        positions=rows.positions,
        slots=rows.slots,
        page_table=rows.table,
        lengths=rows.lengths,
        query_start=torch.arange(count + 1, dtype=torch.int32, device=device),
        logit_rows=torch.arange(count, device=device),
        seats=rows.seats,
        lengths_host=lengths,
        query_start_host=list(range(count + 1)),
        pages_host=[()] * count,
        num_decodes=count,
    )
