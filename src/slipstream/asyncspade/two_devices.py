"""The cache rank as a second device of this process, and the exchange with it.

The inference device keeps all keys and values; what comes back is indices. So attention is that of one device, and only
the work ahead moves. A decode step is cut into parts of some layers. Where one ends, the host launches, and waits for
nothing: its new keys and queries go over, the far side works on them, its sets come back and are stored. Before a part
begins, the step waits (on the device) for the sets of the same layers from the step before. That one wait is what makes
every buffer safe: whatever a part writes was read by the exchange of that part one step earlier. So the far side has
nearly a step's time for each part, and works while the next step runs.

In a captured step each part is a CUDA graph of its device, and the copies between them are launched by the host: no
capture spans two devices. (One that does takes memory of the second from outside the graph's pool: torch 2.11 routes
allocations to that pool on the capturing device only.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slipstream.asyncspade.backend import AsyncSpadeBackend
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.far_side import FarSide, KeyRows, Mail, Rooms, Step
from slipstream.asyncspade.lanes import FarLanes, inferring
from slipstream.asyncspade.sets import StoredSets
from slipstream.attention.backend import AttentionBackend
from slipstream.attention.calibration import Calibration
from slipstream.attention.sparse import SparseBackend
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec

PARTS = 4  # of a decode step: more of them cost launches, fewer leave the far side less time


class TwoDeviceBackend(AsyncSpadeBackend):
    """``AsyncSpadeBackend`` whose work ahead runs on ``config.cache_device``. lanes: where an exchange runs."""

    def __init__(
        self,
        pool: KVPool,
        spec: ModelSpec,
        config: AsyncSpade,
        dense: AttentionBackend,
        gate: int,
        num_seats: int,
        cos_sin: Tensor,
        calibration: Calibration,
        lanes: FarLanes | None = None,
    ) -> None:
        assert config.cache_device is not None
        far = torch.device(config.cache_device)
        self.far = side = FarSide(pool, spec, config, num_seats, cos_sin, calibration, far)
        self.lanes = FarLanes.between(pool.device, far) if lanes is None else lanes
        super().__init__(
            pool, spec, side.index, config, dense, gate, num_seats, side.predictor, side.online, self.lanes.work
        )
        pool.follow(self._follow)
        self._rows, self._rooms = KeyRows(pool), Rooms(pool.device, num_seats)
        layers = range(config.dense_layers, spec.num_layers)
        count = max(min(PARTS, len(layers)), 1)
        bounds = [layers.start + len(layers) * n // count for n in range(count + 1)]
        self._parts = [range(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        self._singles = [range(layer, layer + 1) for layer in layers]
        self._step: Step | None = None
        self._part = 0
        self._arriving: dict[int, Any] = {}  # by part, of the step before until this one's is there

    @staticmethod
    def seat_bytes(config: AsyncSpade, spec: ModelSpec) -> int:
        """Memory of one seat on the inference device."""
        queries = spec.num_layers * spec.num_heads * spec.head_dim * spec.dtype.itemsize
        return StoredSets.seat_bytes(spec, config.budget) + queries

    # -- once per step

    def plan(self, batch: Batch) -> None:
        died = self._step is not None and self._step.key is None
        if died or batch.seated or not batch.is_decode:
            self._settle()
        self._step = None
        super().plan(batch)
        self._await(0)

    def _forget(self, seats: Sequence[int]) -> None:
        self._submit(self.far.predictor.reset, seats)
        self.sets.reset(seats)

    def _plan_ahead(self, batch: Batch) -> None:
        own = dataclasses.replace(batch)  # lanes may read it when the engine has given it the next step's facts
        super()._plan_ahead(own)
        if self._work is not None and self._singles:
            parts = self._parts if batch.is_decode else self._singles
            self._part, key = 0, batch.graph_key
            self._step = Step(own, self._work, self._next_lengths, parts, key, self._indexes, self._max_query)

    def finish(self) -> None:
        """A captured step leaves its sets to the next one's waits. What another needed is given back by the host."""
        step = self._step
        if step is not None and step.key is None:
            if self.pool.device.type == "cuda" or step.parts is self._singles or step.work.heirs is not None:
                self._settle()
            self._step = None

    def _settle(self) -> None:
        """Wait (on the device) for everything that is on its way."""
        for part in sorted(self._arriving):
            self._await(part)

    def _await(self, part: int) -> None:
        ticket = self._arriving.pop(part, None)
        if ticket is not None:
            ticket.wait()

    def _follow(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._settle()
        self._submit(self.far.replica.copy_pages, pairs)

    # -- once per layer

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, Hq, D] -> [T, Hq, D]."""
        out = SparseBackend.attend(self, layer, q)
        step = self._step
        if step is None or layer < self.dense_layers:
            return out
        assert self._batch is not None
        for rows, kept in zip(step.work.take(q), (step.pushed, step.chosen), strict=True):
            if rows is not None:
                kept.append(rows)
        part = self._part
        if layer == step.parts[part].stop - 1:
            queries = [self._stacked(step, part, kept) for kept in (step.pushed, step.chosen)]
            step.pushed, step.chosen, self._part = [], [], part + 1
            self._batch.between(partial(self._exchange, step, part, *queries))
        return out

    def _stacked(self, step: Step, part: int, queries: list[Tensor]) -> Tensor | None:
        """[l, n, Hq, D]; of a captured step at a place that the next one may not write to before it was read."""
        if not queries or step.key is None:
            return torch.stack(queries) if queries else None
        shape = (len(queries), *queries[0].shape)
        return torch.stack(queries, out=self._rooms.of(part, shape, shape[1], queries[0].dtype))

    # -- once per part, by the host

    def _exchange(self, step: Step, part: int, pushed: Tensor | None, chosen: Tensor | None) -> None:
        lanes = self.lanes
        sent = lanes.out.submit(inferring, self._send, step, part, pushed, chosen)
        made = lanes.work.submit(inferring, self._work_on, step, part, sent)
        self._arriving[part] = lanes.back.submit(inferring, self._store, step, part, made)
        if part == 0:
            step.sent = sent
        if step.key is None:
            step.kept.append((pushed, chosen, sent, made))
        if step.is_last(part):
            step.sent.wait()  # the step's own tensors have been read: the next one's beginning may overwrite them
        else:
            self._await(part + 1)

    def _send(self, step: Step, part: int, pushed: Tensor | None, chosen: Tensor | None) -> Mail:
        far, facts = self.far, None
        if part == 0:
            self._note_sets(step.work)
            step.slots = self._rows.within(step.batch.slots)
            facts = far.over(torch.cat([x.flatten().long() for x in step.facts()]), "facts", step, part)
        assert step.slots is not None
        keys = self._rows.matrix[self._rows.of(step.parts[part], step.slots)]
        mail = {"keys": keys, "pushed": pushed, "chosen": chosen}
        self._counts["bytes_out"] += sum(x.nbytes for x in (*mail.values(), facts) if x is not None)
        over = {use: None if x is None else far.over(x, use, step, part) for use, x in mail.items()}
        return Mail(**over, facts=facts)  # type: ignore[arg-type]

    def _work_on(self, step: Step, part: int, sent: Any) -> Tensor | None:
        return self.far.work(step, part, sent.wait())

    def _store(self, step: Step, part: int, made: Any) -> None:
        flat, layers, last, work = made.wait(), step.parts[part], step.is_last(part), step.work
        if flat is not None:
            near = flat.to(self.pool.device, non_blocking=True)
            found = self.far.parts_of(near, self.far.shapes(step, part))
            self.sets.store_part(layers, found.indices, found.counts, found.seats.long())
            self._counts["bytes_in"] += near.nbytes
        if last and work.sources is not None and work.heirs is not None:
            self.sets.inherit(work.sources, work.heirs)
        if last and self._counters_host is not self._counters:
            self._counters_host.copy_(self._counters, non_blocking=True)

    def _relabel(self, layer: int, calibration: Calibration) -> None:
        assert self.index is not None, "labels are calibrated, and labels are in an index"
        channels = calibration.channels(self.index.parts.num_channels)[layer].to(self.far.device)
        self._submit(self.index.set_channels, layer, channels, self.far.replica.k[layer], set(self._labelled))

    def stats(self) -> dict[str, float]:  # type: ignore[override]
        sizes = {f"asyncspade_{name}": self._counts[name] for name in ("bytes_out", "bytes_in")}
        return {**super().stats(), **sizes}
