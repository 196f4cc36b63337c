"""Prediction by depth instead of time: a layer's tokens are chosen while the layer below is in its MLP.

Queries of earlier steps cannot know the token that was just drawn, and where a chain looks something up its queries are
about little else. The residual stream knows it: behind the attention of layer l - 1 it lacks no more than one MLP of
what layer l will see. So layer l's own projection of that stream is the predicted query, the lane selects with it
beside the MLP and the projections of the main lane, and the two meet where layer l attends. The deadline is an MLP and
not a step, which is too short for a cache rank elsewhere; in return nothing is kept from step to step, and there is no
first step, no stale set and no window to seed. (Ours; the paper predicts in time. InfiniGen, arXiv 2406.19707, looks
one layer ahead to prefetch, from before the attention.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.lanes import inferring, make_lane
from slipstream.asyncspade.sets import count_shared
from slipstream.attention.backend import AttentionBackend
from slipstream.attention.calibration import Calibration
from slipstream.attention.sparse import DENSE, INDEXING, SparseBackend
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.overlap import Lane, ThreadLane, Ticket
from slipstream.selection.oracle import Oracle, OracleSelector
from slipstream.selection.selector import Selector
from slipstream.types import Batch, ModelSpec, Selection

MEASURE = 16  # added to a step's variant: compare with what the true queries choose
Foresee = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, residual stream [T, H], positions [T] int64) -> the queries [T, Hq, D] that the layer would make of it."""


class Foreseen(Selector):
    """What the lane chose for a layer; for a layer that nothing was foreseen for, ``inner`` with the true query.

    measures: count, in ``counters`` ([2] int64: shared, wanted), how many tokens of the true query's set were there.
    """

    def __init__(self, inner: Selector, counters: Tensor) -> None:
        self.inner, self._counters = inner, counters
        self.tickets: dict[int, Ticket[Selection]] = {}
        self.measures = False

    def plan(self, batch: Batch, lengths: Tensor) -> None:
        self._seats = batch.seats
        self.inner.plan(batch, lengths)

    def select(self, layer: int, query: Tensor) -> Selection:
        if layer not in self.tickets:
            return self.inner.select(layer, query)
        found = self.tickets[layer].wait()
        if self.measures:
            self._counters.add_(count_shared(found, self.inner.select(layer, query), self._seats > 0))
        return found

    def attended(self, length: int) -> int:
        return self.inner.attended(length)


class ForesightBackend(SparseBackend):
    """``AttentionBackend`` with ``config.predictor`` "residual". foresee: the model's layers, asked ahead.

    The first sparse layer of a step selects with its true query: there is no layer below to do it beside.
    """

    def __init__(
        self,
        pool: KVPool,
        spec: ModelSpec,
        index: KeyIndex | None,
        config: AsyncSpade,
        dense: AttentionBackend,
        gate: int,
        foresee: Foresee,
        online: Calibration | None = None,
        lane: Lane | None = None,
    ) -> None:
        self.config, self._foresee = config, foresee
        # The layer waits for its choice, which therefore goes before the products that it runs beside.
        self.lane = make_lane(config.lane, pool.device, priority=-2) if lane is None else lane
        self._counters = torch.zeros(2, dtype=torch.int64, device=pool.device)
        on_cuda = pool.device.type == "cuda"
        self._counters_host = torch.zeros(2, dtype=torch.int64, pin_memory=True) if on_cuda else self._counters
        inner = config.inner(0)
        if isinstance(inner, Oracle):  # who reads keys lacks the newest one here
            chooses: Selector = OracleSelector(inner, pool, spec, inner.unread)
        else:
            chooses = inner.selector(pool, spec, index)
        self._foreseen = Foreseen(chooses, self._counters)
        super().__init__(pool, spec, index, self._foreseen, dense, gate, config.dense_layers, config.unread, online)
        # Each lane frees its tensors for itself: what the other still reads stays here until both have met.
        self._kept: list[Any] = []
        self._tickets: list[Ticket[Any]] = []
        if isinstance(self.lane, ThreadLane):
            weakref.finalize(self, self.lane.close)

    def _all_variants(self) -> Sequence[int]:
        found = list(super()._all_variants())
        measured = [variant + MEASURE for variant in found if variant % INDEXING != DENSE]
        return found + measured * bool(self.config.measure)

    def variant(self, lengths: Sequence[int]) -> int:
        found, every = super().variant(lengths), self.config.measure
        measures = every and found % INDEXING != DENSE and self._counts["sparse_steps"] % every == 0
        return found + MEASURE * bool(measures)

    def plan(self, batch: Batch) -> None:
        if self._tickets:  # a step died: nothing of it may run into this one
            self._tickets.clear()
            self._submit(list).wait()
            self.finish()
        super().plan(batch)
        self._foreseen.measures = bool(batch.num_decodes and batch.variant & MEASURE)
        if self._form != DENSE:
            chosen = sum(length > self.gate for length in batch.lengths_host[: batch.num_decodes])
            self._counts["predictions"] += chosen * (self.spec.num_layers - self.dense_layers - 1)

    def foresee(self, layer: int, residual: Tensor) -> None:
        """residual: [T, H] behind the attention of ``layer``: choose for the decode rows of the layer above."""
        batch = self._decodes
        if self._form == DENSE or batch is None or not self.dense_layers <= layer < self.spec.num_layers - 1:
            return
        rows = residual[: batch.num_requests]
        self._foreseen.tickets[layer + 1] = self._submit(self._choose, layer + 1, rows, batch.positions)
        self._kept.append(residual)

    def _choose(self, layer: int, residual: Tensor, positions: Tensor) -> Selection:
        found = self._foreseen.inner.select(layer, self._foresee(layer, residual, positions))
        self._kept.append(found)
        return found

    def _submit(self, work: Callable[..., Any], *args: Any) -> Any:
        ticket = self.lane.submit(inferring, work, *args)
        self._tickets.append(ticket)
        return ticket

    def _extend(self, layer: int, batch: Batch) -> None:
        # Beside the main lane too: the tokens that are new to the index are taken whatever it says of them.
        self._submit(super()._extend, layer, batch)

    def _relabel(self, layer: int, calibration: Calibration) -> None:
        if layer in self._foreseen.tickets:  # who chose by the old labels must be done with them
            self._foreseen.tickets[layer].wait()
        super()._relabel(layer, calibration)

    def finish(self) -> None:
        """Joins the lane; after this both lanes may use each other's memory anew."""
        tickets, self._tickets = self._tickets, []
        for ticket in tickets[-1:]:  # a lane works in order
            ticket.wait()
        self._foreseen.tickets = {}
        self._kept.clear()
        if self._foreseen.measures and self._counters_host is not self._counters:
            self._counters_host.copy_(self._counters, non_blocking=True)

    def stats(self) -> Mapping[str, float]:  # type: ignore[override]
        """Besides those of sparse attention. predictions: queries foreseen, per request, step and layer. overlap: share
        of the true queries' tokens that were chosen, of the steps measured so far."""
        shared, wanted = self._counters_host.tolist()
        found = {**super().stats(), "asyncspade_predictions": self._counts["predictions"]}
        return found | ({"asyncspade_overlap": shared / wanted} if wanted else {})
