"""AsyncSpade on one device: attend to what the step before selected, select for the step after beside the layer's rest.

Per layer, main lane: append K and V, attend to the stored set. Then, on the lane of the work ahead and in the order of
layers: index the new keys, push the query into the seat's window, predict the next one, select, store the set with the
next token's number appended. The two meet again at the step's end (:meth:`AsyncSpadeBackend.finish`), inside the graph
where the step is captured, so that a set is complete before any later step, of whatever batch, reads it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.asyncspade.ahead import Ahead
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.lanes import inferring, make_lane
from slipstream.asyncspade.predictor import Predictor
from slipstream.asyncspade.sets import StoredSets, count_shared
from slipstream.attention.backend import AttentionBackend
from slipstream.attention.calibration import Calibration
from slipstream.attention.sparse import DENSE, INDEXING, SparseBackend
from slipstream.kernels import ops, predict, sparse
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.overlap import Lane, StreamLane, ThreadLane
from slipstream.selection.selector import Selector
from slipstream.types import Batch, ModelSpec, Selection

AHEAD, MEASURE = 8, 16  # added to a step's variant: nobody is sparse yet, but somebody will be; compare with the truth
LATE, REPAIRED, HITS, WANTED = range(4)  # counters on the device


class AsyncSpadeBackend(SparseBackend):
    """``AttentionBackend`` whose selections are made one step ahead, from predicted queries, on a lane of their own.

    All state is by seat: windows (``predictor``), sets, and with a confidence gate the predicted queries. A request is
    selected for from ``gate`` tokens on, so that its first sparse step finds a set; the step that ends its prompt makes
    the first. The windows see every query, those of prompts and of dense steps too.
    With ``config.is_ahead`` False (the oracle) a set is made, on the same lane, in the step that attends to it.
    """

    uses_seats = True

    def __init__(
        self,
        pool: KVPool,
        spec: ModelSpec,
        index: KeyIndex | None,
        config: AsyncSpade,
        dense: AttentionBackend,
        gate: int,
        num_seats: int,
        predictor: Predictor | None,
        online: Calibration | None = None,
        lane: Lane | None = None,
    ) -> None:
        self.config, self.predictor = config, predictor
        if config.is_ahead:
            self.num_fresh = config.window  # so that tokens do not depend on what happens to be cached
        self.lane = make_lane(config.lane, pool.device) if lane is None else lane
        self.inner = config.inner().selector(pool, spec, index)
        self._truth = config.inner(0).selector(pool, spec, index)  # by the true query: to compare with, and to repair
        self._again = config.inner(0).selector(pool, spec, index)
        self.sets = StoredSets(self.inner, spec, config.budget, num_seats if config.is_ahead else 0, pool.device)
        selector: Selector = self.sets if config.is_ahead else _OnLane(self.inner, self._submit)
        super().__init__(pool, spec, index, selector, dense, gate, config.dense_layers, config.unread, online)
        self._counters = torch.zeros(4, dtype=torch.int64, device=pool.device)
        on_cuda = pool.device.type == "cuda"
        self._counters_host = torch.zeros(4, dtype=torch.int64, pin_memory=True) if on_cuda else self._counters
        self._threshold: Tensor | None = None
        if config.confidence is not None:
            self._threshold = torch.tensor(config.confidence, dtype=torch.float32, device=pool.device)
            shape = (spec.num_layers, num_seats + 1, spec.num_heads, spec.head_dim)
            self.predicted = torch.zeros(shape, dtype=spec.dtype, device=pool.device)
        # Extending the index is work ahead, unless a repair reads it and does not take the newest tokens regardless.
        self._extends_first = self._threshold is not None and config.repair == "select" and not self._by_page
        self._work: Ahead | None = None
        self._buffers: dict[tuple[int, int], Tensor] = {}  # static, of captured steps
        self._repair_buffers: dict[tuple[int, int], Tensor] = {}
        self._next_lengths = self._repaired_lengths = torch.empty(0)
        self._tickets: list[tuple[Any, ...]] = []  # and what the lane reads: freed, the main lane would reuse it
        self._stall_s = 0.0
        if isinstance(self.lane, ThreadLane):
            weakref.finalize(self, self.lane.close)

    @staticmethod
    def seat_bytes(config: AsyncSpade, spec: ModelSpec) -> int:
        """Memory of one seat."""
        if not config.is_ahead:
            return 0
        queries = spec.num_layers * spec.num_heads * spec.head_dim * spec.dtype.itemsize
        checked = 0 if config.confidence is None else queries
        return Predictor.seat_bytes(config, spec) + StoredSets.seat_bytes(spec, config.budget) + checked

    # -- variants

    def _all_variants(self) -> Sequence[int]:
        found = list(super()._all_variants())
        if not self.config.is_ahead or self.gate >= self.spec.max_position:
            return found
        found += [variant + AHEAD for variant in found if variant % INDEXING == DENSE]
        if self.config.measure:
            found += [variant + MEASURE for variant in found if variant % INDEXING != DENSE]
        return found

    def variant(self, lengths: Sequence[int]) -> int:
        found = super().variant(lengths)
        if not self.config.is_ahead:
            return found
        if found % INDEXING == DENSE:
            return found + AHEAD * any(self.gate <= length < self.spec.max_position for length in lengths)
        measure = self.config.measure
        return found + MEASURE * bool(measure and self._counts["sparse_steps"] % measure == 0)

    # -- once per step

    def plan(self, batch: Batch) -> None:
        if self._tickets:  # a step died: its requests are gone, but nothing may write to seats that are given out anew
            self._tickets = []
            self._submit(_nothing).wait()
        if self.config.is_ahead and batch.seated:
            self._forget(batch.seated)
        super().plan(batch)
        if self.config.is_ahead:
            self._plan_ahead(batch)

    def _forget(self, seats: Sequence[int]) -> None:
        """New chains sit there."""
        assert self.predictor is not None
        self.predictor.reset(seats)
        self.sets.reset(seats)

    def _plan_ahead(self, batch: Batch) -> None:
        self._work, variant = None, batch.variant if batch.num_decodes else DENSE
        if self.gate >= self.spec.max_position:
            return  # nobody ever gets that long
        selects = self._form != DENSE or bool(variant & AHEAD)
        if batch.is_decode:
            self._work = Ahead.of_decodes(batch, selects)
        else:
            self._work = Ahead.of_mixed(batch, selects, self.gate, self.config.window)
        if self._work.next is not None:
            self._next_lengths = self._lengths_of(self._work.next, batch, self._buffers)
            self.inner.plan(self._work.next, self._next_lengths)
            self._counts["predictions"] += self._num_predictions(self._work.next)
        if self._form != DENSE and self._threshold is not None and self.config.repair == "select":
            assert self._decodes is not None
            self._repaired_lengths = self._lengths_of(self._decodes, batch, self._repair_buffers)
            self._again.plan(self._decodes, self._repaired_lengths)
        if variant & MEASURE:
            assert self._decodes is not None
            self._truth.plan(self._decodes, self._lengths[0])

    def _lengths_of(self, rows: Batch, batch: Batch, static: dict[tuple[int, int], Tensor]) -> Tensor:
        """[n] int32 for lengths of ``rows`` that only the step knows; of captured steps always the same."""
        if batch.graph_key is None:
            return torch.empty_like(rows.lengths)
        if batch.graph_key not in static:
            static[batch.graph_key] = torch.empty_like(rows.lengths)
        return static[batch.graph_key]

    def _num_predictions(self, rows: Batch) -> int:
        real = (length for length, pages in zip(rows.lengths_host, rows.pages_host, strict=True) if pages[0])
        return sum(length >= self.gate for length in real) * (self.spec.num_layers - self.dense_layers)

    def finish(self) -> None:
        tickets, self._tickets = self._tickets, []
        if not tickets:
            return
        is_late, began = not isinstance(self.lane, StreamLane) and not tickets[-1][0].done(), time.perf_counter()
        for ticket, *_ in tickets:
            ticket.wait()
        if is_late:
            self._counts["stalls"] += 1
            self._stall_s += time.perf_counter() - began

    # -- once per layer, on the main lane

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, Hq, D] -> [T, Hq, D]."""
        out = super().attend(layer, q)
        if self.config.is_ahead and layer >= self.dense_layers and (self._indexes or self._work is not None):
            pushed, chosen = (None, None) if self._work is None else self._work.take(q)
            # Behind the attention above, which is the last reader of the set that this work replaces.
            self._tickets.append((self._submit(self._go_ahead, layer, pushed, chosen), pushed, chosen))
        return out

    def _submit(self, work: Callable[..., Any], *args: Any) -> Any:
        return self.lane.submit(inferring, work, *args)

    def _extend(self, layer: int, batch: Batch) -> None:
        if not self.config.is_ahead:
            self._submit(super()._extend, layer, batch).wait()
        elif self._extends_first:
            super()._extend(layer, batch)

    def _select_and_attend(self, layer: int, q: Tensor) -> Tensor:
        out = super()._select_and_attend(layer, q)
        if self._threshold is not None and layer >= self.dense_layers:
            self._repair(layer, q, out)
        return out

    def _repair(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Where prediction failed, by KV head: select again and attend to that, or attend to everything instead."""
        own, batch, k, v = self.spec.own(q), self._decodes, self.pool.k[layer], self.pool.v[layer]
        assert batch is not None and self._threshold is not None
        (count, num_heads, dim), num_kv = own.shape, self.spec.num_kv_heads
        if layer == self.dense_layers:
            if self.config.repair == "dense":  # each head is a request of its own
                heads = torch.arange(num_kv, dtype=torch.int32, device=q.device)
                self._head_table = (batch.page_table.unsqueeze(1) * num_kv + heads.view(-1, 1)).flatten(0, 1)
            self._flagged = batch.lengths.new_empty(count * num_kv)
            self._checked = self._lengths[0] * (batch.seats > 0)  # not padding rows
        predict.check_queries(
            q, self.predicted[layer], batch.seats, self._checked, num_kv, self._threshold, self._flagged,
            self._counters[REPAIRED : REPAIRED + 1],
        )  # fmt: skip
        if self.config.repair == "select":
            flagged = self._flagged.view(count, num_kv)
            torch.amax(flagged, 1, out=self._repaired_lengths)  # a request selects for all its heads, or not at all
            indices, counts, _ = self._again.select(layer, q)
            counts = counts * (flagged > 0)
            sparse.sparse_attention(own, k, v, batch.page_table, indices, counts, self.spec.scale, out)
            return
        rows = (count * num_kv, num_heads // num_kv, dim)
        ops.decode_attention(
            own.view(rows), k.view(-1, 1, *k.shape[2:]), v.view(-1, 1, *v.shape[2:]), self._head_table, self._flagged,
            self.spec.scale, out.view(*rows[:2], -1),
        )  # fmt: skip

    # -- once per layer, on the lane of the work ahead

    def _go_ahead(self, layer: int, pushed: Tensor | None, chosen: Tensor | None) -> None:
        """pushed, chosen: rows of the layer's queries, as :meth:`Ahead.take` gives them."""
        batch, work, predictor = self._batch, self._work, self.predictor
        assert batch is not None and predictor is not None
        if self._indexes and not self._extends_first:
            super()._extend(layer, batch)
        if work is None:
            return
        if layer == self.dense_layers:
            self._begin(batch, work)
        if pushed is not None:
            predictor.push_prompt(layer, pushed, work.positions, work.seats)
        if chosen is not None and work.next is not None:
            if batch.num_decodes and batch.variant & MEASURE:
                self._measure(layer, chosen[: batch.num_decodes])
            seats = work.next.seats
            guess = predictor.step(layer, chosen, seats, work.next.positions)
            self.sets.store(layer, self.inner.select(layer, guess), seats, self._next_lengths)
            if self._threshold is not None:
                self.predicted[layer].index_copy_(0, seats, guess)
        if layer == self.spec.num_layers - 1:
            self._end(work)

    def _begin(self, batch: Batch, work: Ahead) -> None:
        """Facts of the step that only the device knows when it is captured."""
        assert self.predictor is not None
        news = batch.query_start.diff()
        self.predictor.advance(batch.seats, (batch.lengths - news).long(), news.long())
        self._note_sets(work)

    def _note_sets(self, work: Ahead) -> None:
        """Count the sets that are not for this step; note for which lengths the new ones are."""
        if self._form != DENSE:
            assert self._decodes is not None
            seats, lengths = self._decodes.seats, self._lengths[0]
            is_late = (self.sets.made_for.index_select(0, seats) != lengths) & (lengths > 0) & (seats > 0)
            self._counters[LATE].add_(is_late.sum())
        if work.next is not None:
            seats, lengths = work.next.seats, work.next.lengths
            # Padding rows, all of seat 0 and of one token, keep a set of which their attention makes finite numbers.
            torch.mul(lengths, (lengths >= self.gate) | (seats == 0), out=self._next_lengths)
            made = (self._next_lengths + 1).long() * (self._next_lengths > 0)
            self.sets.made_for.index_copy_(0, seats, made)

    def _end(self, work: Ahead) -> None:
        if work.sources is not None and work.heirs is not None:
            assert self.predictor is not None
            self.predictor.inherit(work.sources, work.heirs)
            self.sets.inherit(work.sources, work.heirs)
            if self._threshold is not None:
                self.predicted.index_copy_(1, work.heirs, self.predicted.index_select(1, work.sources))
        if self._counters_host is not self._counters:
            self._counters_host.copy_(self._counters, non_blocking=True)

    def _measure(self, layer: int, q: Tensor) -> None:
        """Count the tokens of the true queries' sets that were in the sets of this step. q: [B, Hq, D]."""
        assert self._decodes is not None
        seats = self._decodes.seats
        stored, counts = (x[layer].index_select(0, seats) for x in (self.sets.indices, self.sets.counts))
        self._counters[HITS:].add_(count_shared(Selection(stored, counts), self._truth.select(layer, q), seats > 0))

    # -- numbers

    def stats(self) -> Mapping[str, float]:  # type: ignore[override]
        """Besides those of sparse attention. predictions: queries predicted, per request, step and layer. repaired: KV
        heads whose sets were replaced since prediction failed. late: sets that were not for the step that read them;
        stalls: steps at whose end the host waited for the work ahead (not where a device does), and for how long.
        overlap: share of the true queries' tokens that were in the sets, of the steps measured so far.
        """
        counters = self._counters_host.tolist()
        found = {
            **super().stats(),
            "asyncspade_predictions": self._counts["predictions"],
            "asyncspade_repaired": counters[REPAIRED],
            "asyncspade_late": counters[LATE],
            "asyncspade_stalls": self._counts["stalls"],
            "asyncspade_stall_s": self._stall_s,
            "asyncspade_bytes_out": 0,
            "asyncspade_bytes_in": 0,
        }
        return found | ({"asyncspade_overlap": counters[HITS] / counters[WANTED]} if counters[WANTED] else {})


class _OnLane(Selector):
    """Selects in the step that attends, through the lane: what the golden equality with ``SparseBackend`` is about."""

    def __init__(self, inner: Selector, submit: Callable[..., Any]) -> None:
        self._inner, self._submit = inner, submit

    def plan(self, batch: Batch, lengths: Tensor) -> None:
        self._inner.plan(batch, lengths)

    def select(self, layer: int, query: Tensor) -> Selection:
        return self._submit(self._inner.select, layer, query).wait()

    def attended(self, length: int) -> int:
        return self._inner.attended(length)


def _nothing() -> None:
    pass
