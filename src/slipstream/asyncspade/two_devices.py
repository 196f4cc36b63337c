"""The cache rank as a second device of this process: it has a copy of the keys, the index and the windows.

The inference device keeps all keys and values; what comes back is indices. So attention is that of one device, and only
the work ahead moves: per layer the new keys and the queries go over, a set comes back, both by peer copies on streams
beside the forward pass. The copy has the pages of the original, so that forks, prefixes and preemption need no code.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.asyncspade.ahead import Ahead
from slipstream.asyncspade.backend import AsyncSpadeBackend
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.mlp import QueryMLP
from slipstream.asyncspade.predictor import Predictor
from slipstream.attention.backend import AttentionBackend
from slipstream.attention.calibration import Calibration
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.plan import plan_memory
from slipstream.kvcache.pool import KVPool
from slipstream.overlap import InlineLane, Lane, PeerLane
from slipstream.types import Batch, ModelSpec, Selection


class _Far(NamedTuple):
    """A step's facts on the cache device: of the whole batch, of the rows that are pushed, of those selected for."""

    page_table: Tensor
    lengths: Tensor
    query_start: Tensor
    slots: Tensor
    pushed_seats: Tensor
    pushed_positions: Tensor
    next: Batch | None


def keys_only(spec: ModelSpec) -> ModelSpec:
    """The spec of a cache that has no values of its own."""
    return spec if spec.value_dim is not None else dataclasses.replace(spec, value_dim=spec.head_dim)


class TwoDeviceBackend(AsyncSpadeBackend):
    """``AsyncSpadeBackend`` whose work ahead runs on ``config.cache_device``, over ``replica``: the pool's keys again.

    Raises ``ValueError`` when that device has no room for them.
    """

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
        lane: Lane | None = None,
    ) -> None:
        assert config.cache_device is not None
        self.far = torch.device(config.cache_device)
        inner = config.inner()
        self.replica = _replica(pool, spec, config, num_seats, self.far)
        index, online = None, None
        if inner.index is not None:
            num_channels = inner.index.num_channels
            known = calibration.num_tokens > 0 and num_channels > 0
            index = KeyIndex(self.replica, inner.index, calibration.channels(num_channels) if known else None)
            online = calibration if num_channels and not known else None
        mlp = None
        if config.predictor_file is not None:
            mlp = QueryMLP.load(config.predictor_file, calibration.identity, config.rotate, self.far)
        predictor = Predictor(config, spec, num_seats, cos_sin.to(self.far), self.far, mlp)
        if lane is None:
            lane = PeerLane(pool.device, self.far) if pool.device.type == "cuda" else InlineLane()
        super().__init__(pool, spec, index, config, dense, gate, num_seats, predictor, online, lane)
        self.inner = inner.selector(self.replica, spec, index)
        pool.follow(lambda pairs: self._submit(self.replica.copy_pages, pairs))
        self._facts: _Far | None = None

    # -- on the lane

    def _go_ahead(self, layer: int, pushed: Tensor | None, chosen: Tensor | None) -> None:
        batch, work, predictor = self._batch, self._work, self.predictor
        assert batch is not None and predictor is not None
        if layer == self.dense_layers:
            self._facts = self._begin_far(batch, work)
        facts, size = self._facts, self.pool.page_size
        assert facts is not None
        near = self.pool.k[layer][batch.slots // size, :, batch.slots % size]
        keys = self.replica.k[layer]
        keys[facts.slots // size, :, facts.slots % size] = self._over(near)
        if self._indexes and self.index is not None:
            self.index.extend(layer, keys, facts.page_table, facts.query_start, facts.lengths, self._max_query)
        if work is None:
            return
        if pushed is not None:
            predictor.push_prompt(layer, self._over(pushed), facts.pushed_positions, facts.pushed_seats)
        if chosen is not None and work.next is not None and facts.next is not None:
            guess = predictor.step(layer, self._over(chosen), facts.next.seats, facts.next.positions)
            found = self.inner.select(layer, guess)
            device = self.pool.device
            back = Selection(*(part.to(device, non_blocking=True) for part in found[:2]))
            with self._on(device):
                self.sets.store(layer, back, work.next.seats, self._next_lengths)
        if layer == self.spec.num_layers - 1:
            self._end_far(work)

    def _begin_far(self, batch: Batch, work: Ahead | None) -> _Far:
        """Send the step's facts over; what only the device knows when a step is captured is found here first."""
        if self._indexes and self._query_start is not batch.query_start:
            self._find_pages(batch)
        over, nothing = self._over, batch.seats[:0]
        starts = self._query_start if self._indexes else batch.query_start
        upcoming = None
        if work is not None:
            assert self.predictor is not None
            news = batch.query_start.diff()
            self.predictor.advance(over(batch.seats), over((batch.lengths - news).long()), over(news.long()))
            self._note_sets(work)
            if work.next is not None:
                upcoming = dataclasses.replace(
                    work.next,
                    seats=over(work.next.seats),
                    positions=over(work.next.positions),
                    page_table=over(work.next.page_table),
                )
                self.inner.plan(upcoming, over(self._next_lengths))
        return _Far(
            over(batch.page_table),
            over(batch.lengths),
            over(starts),
            over(batch.slots),
            over(nothing if work is None else work.seats),
            over(nothing if work is None else work.positions),
            upcoming,
        )

    def _end_far(self, work: Ahead) -> None:
        if work.sources is not None and work.heirs is not None:
            assert self.predictor is not None
            self.predictor.inherit(self._over(work.sources), self._over(work.heirs))
            self.sets.inherit(work.sources, work.heirs)
        if self._counters_host is not self._counters:
            self._counters_host.copy_(self._counters, non_blocking=True)

    def _over(self, x: Tensor) -> Tensor:
        return x.to(self.far, non_blocking=True)

    def _on(self, device: torch.device) -> AbstractContextManager[object]:
        """Kernels that are not torch's own run on the current device."""
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _relabel(self, layer: int, calibration: Calibration) -> None:
        assert self.index is not None, "labels are calibrated, and labels are in an index"
        channels = calibration.channels(self.index.parts.num_channels)[layer].to(self.far)
        self._submit(self.index.set_channels, layer, channels, self.replica.k[layer], set(self._labelled))


def _replica(pool: KVPool, spec: ModelSpec, config: AsyncSpade, num_seats: int, device: torch.device) -> KVPool:
    """A pool of the same pages, with keys only."""
    plain, parts = keys_only(spec), config.inner().index
    fits = plan_memory(
        plain,
        page_size=pool.page_size,
        device=device,
        extra_bytes_per_token=0 if parts is None else parts.bytes_per_token(spec),
        fixed_bytes=(num_seats + 1) * Predictor.seat_bytes(config, spec),
    )
    if device.type == "cuda" and fits.num_pages < pool.num_pages:
        raise ValueError(
            f"cache_device {device} has room for the keys of {fits.num_tokens:,} tokens, the cache holds "
            f"{pool.num_tokens:,}: lower kv_memory"
        )
    shape = (spec.num_layers, pool.num_pages, spec.num_kv_heads, pool.page_size, spec.head_dim)
    return KVPool(*shape, dtype=spec.dtype, device=device, value_dim=plain.value_dim)
