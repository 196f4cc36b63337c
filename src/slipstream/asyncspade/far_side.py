"""The cache rank on a second device: a copy of the keys, the index and the windows, and the work ahead over them.

It gets a step's facts once and then one part of the layers after the other: new keys and queries in, sets for the next
step out. For a captured step the work of a part is a CUDA graph of this device, whose inputs and outputs never move.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slipstream.asyncspade.ahead import Ahead
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.lanes import Recorded
from slipstream.asyncspade.mlp import QueryMLP
from slipstream.asyncspade.predictor import Predictor
from slipstream.attention.calibration import Calibration
from slipstream.attention.sparse import find_full_pages
from slipstream.kernels import predict
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.plan import plan_memory
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec


class Mail(NamedTuple):
    """What one part of the layers sends, l of them: new keys [l * T * Hk, D], queries [l, n, Hq, D] that enter the
    windows, and those that tokens are selected for. facts: of the whole step, with its first part."""

    keys: Tensor
    pushed: Tensor | None
    chosen: Tensor | None
    facts: Tensor | None = None


class Found(NamedTuple):
    """The sets of a part for the next step: [l, n, Hk, K] and [l, n, Hk], and whose they are: [n]. All int32."""

    indices: Tensor
    counts: Tensor
    seats: Tensor


@dataclass
class Step:
    """One step as both sides know it. parts: its layers, part by part. lengths: of the next sets (near, made on the
    way). key: of a captured step, None of another. far: its facts on the far device."""

    batch: Batch
    work: Ahead
    lengths: Tensor
    parts: Sequence[range]
    key: tuple[int, int] | None
    indexes: bool
    max_query: int
    pushed: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    slots: Tensor | None = None  # near: rows of the step's new keys within a layer
    sent: Any = None  # the ticket of the first part's mail
    far: _Facts | None = None
    kept: list[Any] = field(default_factory=list)  # what lanes read: freed, the lane that made it would reuse it

    def facts(self) -> list[Tensor]:
        """Tensors of integers that the far side needs."""
        batch, work = self.batch, self.work
        found = [batch.page_table, batch.lengths, batch.query_start, batch.slots, batch.seats, batch.positions]
        if work.pushed and work.seats is not batch.seats:
            found += [work.seats, work.positions]
        if work.next is not None:
            found.append(self.lengths)
            if work.next is not batch:
                found += [work.next.seats, work.next.positions, work.next.page_table]
        if work.sources is not None and work.heirs is not None:
            found += [work.sources, work.heirs]
        return found

    def is_last(self, part: int) -> bool:
        return part == len(self.parts) - 1


class _Facts:
    """The near tensors' twins on the far device."""

    def __init__(self, step: Step, flat: Tensor, slots_of: KeyRows, size: int, by_page: bool) -> None:
        names = step.facts()
        pieces = flat.split([x.numel() for x in names])
        # Copies: the mail may be overwritten by the next step's while this one's last parts are at work.
        own = {id(x): y.to(x.dtype, copy=True).view(x.shape) for x, y in zip(names, pieces, strict=True)}
        self._own = own
        batch = step.batch
        self.batch = self._moved(batch)
        self.batch.lengths, self.batch.query_start = own[id(batch.lengths)], own[id(batch.query_start)]
        self.slots = slots_of.within(own[id(batch.slots)])
        self.starts = self.batch.query_start
        if step.indexes and by_page:
            self.starts = torch.zeros_like(self.starts)
            find_full_pages(self.batch, size, self.starts)
        self.next: Batch | None = None
        if (upcoming := step.work.next) is not None:
            self.next = self._moved(upcoming)
            self.lengths = own[id(step.lengths)]
            self.rows = torch.arange(len(self.lengths), device=flat.device)

    def _moved(self, batch: Batch) -> Batch:
        seats, positions, page_table = map(self.of, (batch.seats, batch.positions, batch.page_table))
        return dataclasses.replace(batch, seats=seats, positions=positions, page_table=page_table)

    def of(self, near: Tensor) -> Tensor:
        return self._own[id(near)]


class KeyRows:
    """Rows of a pool's keys as one matrix [L * P * Hk * S, D]: those of some slots, in all heads of some layers."""

    def __init__(self, pool: KVPool) -> None:
        num_layers, num_pages, self._heads, self._size, dim = pool.k.shape
        self.matrix = pool.k.view(-1, dim)
        layers = torch.arange(num_layers, device=pool.device) * (num_pages * self._heads * self._size)
        self._first = layers.view(-1, 1, 1) + torch.arange(self._heads, device=pool.device) * self._size

    def within(self, slots: Tensor) -> Tensor:
        """[T] int64 slots -> rows of the first head within any layer."""
        return slots // self._size * (self._heads * self._size) + slots % self._size

    def of(self, layers: range, within: Tensor) -> Tensor:
        """[l * T * Hk] int64."""
        return (self._first[layers.start : layers.stop] + within.view(-1, 1)).flatten()


class Rooms:
    """Static memory for captured steps: a piece for each use, whatever the batch size. num_rows: the largest."""

    def __init__(self, device: torch.device, num_rows: int) -> None:
        self._device, self._num_rows = device, num_rows
        self._rooms: dict[Any, Tensor] = {}

    def of(self, use: Any, shape: Sequence[int], num_rows: int, dtype: torch.dtype) -> Tensor:
        """Of a batch of so many rows."""
        size = math.prod(shape)
        key = use, each = use, -(-size // num_rows)
        if key not in self._rooms:
            self._rooms[key] = torch.zeros(each * self._num_rows, dtype=dtype, device=self._device)
        return self._rooms[key][:size].view(tuple(shape))


class FarSide:
    """``replica``: the pool's keys again, in the pages of the original, so that forks, prefixes and preemption need no
    code. Raises ``ValueError`` when ``device`` has no room for them."""

    def __init__(
        self,
        pool: KVPool,
        spec: ModelSpec,
        config: AsyncSpade,
        num_seats: int,
        cos_sin: Tensor,
        calibration: Calibration,
        device: torch.device,
    ) -> None:
        self.device, self.spec, self._budget = device, spec, config.budget
        self.replica = _replica(pool, spec, config, num_seats, device)
        inner = config.inner()
        self.index: KeyIndex | None = None
        self.online: Calibration | None = None  # where there is no file: to be calibrated on the way
        if inner.index is not None:
            num_channels = inner.index.num_channels
            known = calibration.num_tokens > 0 and num_channels > 0
            self.index = KeyIndex(self.replica, inner.index, calibration.channels(num_channels) if known else None)
            self.online = calibration if num_channels and not known else None
        mlp = None
        if config.predictor_file is not None:
            mlp = QueryMLP.load(config.predictor_file, calibration.identity, config.rotate, device)
        self.predictor = Predictor(config, spec, num_seats, cos_sin.to(device), device, mlp)
        self._selector = inner.selector(self.replica, spec, self.index)
        self._by_page = self.index is not None and config.unread >= pool.page_size - 1
        self._rows, self._rooms, self._recorded = KeyRows(self.replica), Rooms(device, num_seats), Recorded(device)

    @staticmethod
    def seat_bytes(config: AsyncSpade, spec: ModelSpec) -> int:
        """Memory of one seat: its window, and its place in mail and answers of captured steps."""
        sets = 4 * spec.num_layers * (spec.num_kv_heads * (config.budget + 1) + 1)
        new = spec.num_layers * (spec.num_heads + spec.num_kv_heads) * spec.head_dim * spec.dtype.itemsize
        return Predictor.seat_bytes(config, spec) + sets + new

    def over(self, x: Tensor, use: str, step: Step, part: int) -> Tensor:
        """x, on this device: of a captured step always at the same place."""
        if step.key is None:
            return x.to(self.device, non_blocking=True)
        room = self._rooms.of((use, part), x.shape, step.batch.num_requests, x.dtype)
        return room.copy_(x, non_blocking=True)

    def work(self, step: Step, part: int, mail: Mail) -> Tensor | None:
        """Store the keys, push the queries, select. -> the :class:`Found` in one piece [n] int32, None for no sets."""
        out, found = None, None
        if step.work.next is not None:
            rows = len(step.lengths)
            shapes = self.shapes(step, part)
            size = (sum(map(math.prod, shapes)),)
            if step.key is None:
                out = torch.empty(size, dtype=torch.int32, device=self.device)
            else:
                out = self._rooms.of(("found", part), size, rows, torch.int32)
            found = self.parts_of(out, shapes)
        if step.key is None:
            self._do(step, part, mail, found)
        else:
            self._recorded.run((step.key, part), partial(self._do, step, part, mail, found))
        return out

    def shapes(self, step: Step, part: int) -> list[tuple[int, ...]]:
        layers, rows, heads = len(step.parts[part]), len(step.lengths), self.spec.num_kv_heads
        return [(layers, rows, heads, self._budget), (layers, rows, heads), (rows,)]

    @staticmethod
    def parts_of(flat: Tensor, shapes: list[tuple[int, ...]]) -> Found:
        pieces = flat.split([math.prod(shape) for shape in shapes])
        return Found(*(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)))

    def _do(self, step: Step, part: int, mail: Mail, found: Found | None) -> None:
        if part == 0:
            assert mail.facts is not None
            step.far = self._begin(step, mail.facts)
        far, layers = step.far, step.parts[part]
        assert far is not None
        self._rows.matrix[self._rows.of(layers, far.slots)] = mail.keys
        if found is not None and far.next is not None:
            found.seats.copy_(far.next.seats)
        pieces = [partial(self._layer, step, far, mail, found, n, layer) for n, layer in enumerate(layers)]
        if step.key is None:
            for piece in pieces:
                piece()
        else:
            self._recorded.in_turns(pieces)
        if step.is_last(part) and step.work.sources is not None and step.work.heirs is not None:
            self.predictor.inherit(far.of(step.work.sources), far.of(step.work.heirs))

    def _begin(self, step: Step, flat: Tensor) -> _Facts:
        far = _Facts(step, flat, self._rows, self.replica.page_size, self._by_page)
        news = far.batch.query_start.diff()
        self.predictor.advance(far.batch.seats, (far.batch.lengths - news).long(), news.long())
        if far.next is not None:
            self._selector.plan(far.next, far.lengths)
        return far

    def _layer(self, step: Step, far: _Facts, mail: Mail, found: Found | None, n: int, layer: int) -> None:
        """The n-th layer of a part."""
        if step.indexes and self.index is not None:
            batch = far.batch
            self.index.extend(layer, self.replica.k[layer], batch.page_table, far.starts, batch.lengths, step.max_query)
        if mail.pushed is not None:
            work = step.work
            self.predictor.push_prompt(layer, mail.pushed[n], far.of(work.positions), far.of(work.seats))
        if mail.chosen is not None and far.next is not None and found is not None:
            guess = self.predictor.step(layer, mail.chosen[n], far.next.seats, far.next.positions)
            best = self._selector.select(layer, guess)
            predict.store_sets(best.indices, best.counts, far.rows, far.lengths, found.indices[n], found.counts[n])


def keys_only(spec: ModelSpec) -> ModelSpec:
    """The spec of a cache that has no values of its own."""
    return spec if spec.value_dim is not None else dataclasses.replace(spec, value_dim=spec.head_dim)


def _replica(pool: KVPool, spec: ModelSpec, config: AsyncSpade, num_seats: int, device: torch.device) -> KVPool:
    """A pool of the same pages, with keys only."""
    plain, parts = keys_only(spec), config.inner().index
    fits = plan_memory(
        plain,
        page_size=pool.page_size,
        device=device,
        extra_bytes_per_token=0 if parts is None else parts.bytes_per_token(spec),
        fixed_bytes=(num_seats + 1) * FarSide.seat_bytes(config, spec),
    )
    if device.type == "cuda" and fits.num_pages < pool.num_pages:
        raise ValueError(
            f"cache_device {device} has room for the keys of {fits.num_tokens:,} tokens, the cache holds "
            f"{pool.num_tokens:,}: lower kv_memory"
        )
    shape = (spec.num_layers, pool.num_pages, spec.num_kv_heads, pool.page_size, spec.head_dim)
    return KVPool(*shape, dtype=spec.dtype, device=device, value_dim=plain.value_dim)
