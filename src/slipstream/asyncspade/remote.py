"""The inference rank: it runs the forward pass and attends to what a cache rank in another process selected.

It tells the rank each layer's queries, keys and values as soon as they are there, does not wait, and finds the answer
one step later. Own tokens that the rank could not know are appended here. What is not there in time is waited for
(``late="wait"``, bounded), replaced by the set of an earlier step and all newer tokens (``"stale"``), or, when the rank
is lost, attended to in full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.feed import Feed, Place
from slipstream.asyncspade.protocol import Message
from slipstream.asyncspade.rank_link import RankLink
from slipstream.attention.backend import AttentionBackend
from slipstream.attention.calibration import Calibration
from slipstream.attention.sparse import SparseBackend
from slipstream.kernels import ops, sparse
from slipstream.kvcache.pool import KVPool
from slipstream.selection.selector import Selector
from slipstream.types import Batch, ModelSpec, Selection

Keep = Callable[[int, Message, Sequence[Place]], None]


class RemoteSets:
    """What has come: for each layer and seat the epoch and the length that its set is for. Waits, and counts that."""

    def __init__(self, feed: Feed, config: AsyncSpade, num_layers: int) -> None:
        self.feed, self.stale = feed, config.max_stale if config.late == "stale" else 0
        self.made: list[dict[int, tuple[int, int]]] = [{} for _ in range(num_layers)]
        self.num_late = self.num_stalls = 0
        self.stall_s = 0.0

    def age(self, layer: int, seat: int, length: int) -> int:
        """Steps that the seat's set is old; a large number where there is none of the chain that sits there."""
        epoch, made_for = self.made[layer].get(seat, (0, 0))
        return length - made_for if epoch == self.feed.epochs.get(seat) else 1 << 30

    def bring(self, layer: int, wanted: Sequence[tuple[int, int]], keep: Keep) -> None:
        """Give ``keep`` all sets of this layer that came, and wait for those of ``wanted``, (seat, length) each.

        Not for what cannot come, not for what an older set may stand in for, and not beyond the link's timeout: then
        the rank is lost.
        """
        self._take(layer, keep)
        if not self._missing(layer, wanted, 0):
            return
        self.feed.wait(0.0)
        self._take(layer, keep)
        if self._missing(layer, wanted, self.stale):
            self._stall(layer, wanted, keep)
        self.num_late += sum(0 < self.age(layer, seat, length) <= self.stale for seat, length in wanted)

    def _stall(self, layer: int, wanted: Sequence[tuple[int, int]], keep: Keep) -> None:
        began, link = time.perf_counter(), self.feed.link
        while self._missing(layer, wanted, self.stale):
            left = began + link.timeout_s - time.perf_counter()
            if left <= 0:
                link.lose(f"it sent no set within {link.timeout_s:g} s")
                break
            self.feed.wait(left)
            self._take(layer, keep)
        self.num_stalls += 1
        self.stall_s += time.perf_counter() - began

    def _take(self, layer: int, keep: Keep) -> None:
        for message, places in self.feed.take(layer):
            keep(layer, message, places)
            for place in places:
                self.made[layer][place.seat] = place.epoch, place.length

    def _missing(self, layer: int, wanted: Sequence[tuple[int, int]], stale: int) -> bool:
        """Whether one has no set of at most this age, and it may still come."""
        return any(
            self.age(layer, seat, length) > stale and self.feed.is_coming(seat, length) for seat, length in wanted
        )

    def stats(self) -> Mapping[str, float]:
        return {
            "asyncspade_late": self.num_late,
            "asyncspade_stalls": self.num_stalls,
            "asyncspade_stall_s": self.stall_s,
            **self.feed.link.stats(),
        }


class RemoteBackend(SparseBackend):
    """``AttentionBackend`` for ``transfer="indices"``: all keys and values are here, so the cache rank may be lost.

    indices: [L, M + 1, Hk, K + 1] int32, counts: [L, M + 1, Hk] int32: the latest set of each seat, with the token of
    the step that it is for. A request whose set is neither here nor coming attends to everything in that layer.
    """

    uses_seats = True

    def __init__(
        self,
        pool: KVPool,
        spec: ModelSpec,
        config: AsyncSpade,
        link: RankLink,
        dense: AttentionBackend,
        gate: int,
        num_seats: int,
        online: Calibration | None = None,
    ) -> None:
        self.config, self.link = config, link
        inner = config.inner(config.spare)
        kept, self._num_channels = inner.budget, getattr(inner.index, "num_channels", 0)
        super().__init__(pool, spec, None, _Far(kept), dense, gate, config.dense_layers, 0, online)
        self.num_fresh = config.window  # so that tokens do not depend on what happens to be cached
        self.feed = Feed(link)
        self.sets = RemoteSets(self.feed, config, spec.num_layers)
        shape = (spec.num_layers, num_seats + 1, spec.num_kv_heads, kept + 1)
        self.indices = torch.full(shape, -1, dtype=torch.int32, device=pool.device)
        self.counts = torch.zeros(shape[:-1], dtype=torch.int32, device=pool.device)
        self._num_fallbacks = 0

    @staticmethod
    def seat_bytes(config: AsyncSpade, spec: ModelSpec) -> int:
        """Memory of one seat."""
        return 4 * spec.num_layers * spec.num_kv_heads * (config.budget + 1)

    def plan(self, batch: Batch) -> None:
        self.link.poll()
        self.feed.plan(batch)
        super().plan(batch)
        self._indexes = True  # :meth:`_extend` tells the rank, which keeps the index
        rows = zip(batch.seats.tolist(), batch.lengths_host[: batch.num_decodes], strict=False)
        self._wanted = [(b, seat, length) for b, (seat, length) in enumerate(rows) if length > self.gate]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, Hq, D] -> [T, Hq, Dv]."""
        self._q = q
        return super().attend(layer, q)

    def finish(self) -> None:
        self.feed.finish()

    def close(self) -> None:
        self.link.close()

    def _extend(self, layer: int, batch: Batch) -> None:
        self.feed.tell(layer, self._q, self._newest, self._tokens)

    def _relabel(self, layer: int, calibration: Calibration) -> None:
        self.link.set_channels(layer, calibration.channels(self._num_channels)[layer])

    def _newest(self, layer: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys [n, Hk, D] twice: values stay here."""
        assert self._batch is not None
        slots, size = self._batch.slots if rows is None else self._batch.slots[rows], self.pool.page_size
        k = self.pool.k[layer][slots // size, :, slots % size]
        return k, k

    def _tokens(self, layer: int, b: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        assert self._batch is not None
        k = paged_tokens(self.pool.k[layer], self._batch.page_table[b], first, last)
        return k, k

    # -- attention

    def _keep(self, layer: int, message: Message, places: Sequence[Place]) -> None:
        _, indices, counts = message.tensors
        rows, seats, newest = torch.tensor([(place.row, place.seat, place.length - 1) for place in places]).unbind(1)
        if len(places) != len(indices):
            indices, counts = indices[rows], counts[rows]
        whole = torch.nn.functional.pad(indices, (0, 1), value=-1)
        whole.scatter_(2, counts.long().unsqueeze(-1), newest.int().view(-1, 1, 1).expand(-1, counts.shape[1], 1))
        device = self.pool.device
        seats = seats.to(device)
        self.indices[layer].index_copy_(0, seats, whole.to(device))
        self.counts[layer].index_copy_(0, seats, (counts + 1).to(device))

    def _select_and_attend(self, layer: int, q: Tensor) -> Tensor:
        """The decode rows. q: [B, Hq, D] -> [B, Hq, D]."""
        batch, k, v, scale = self._decodes, self.pool.k[layer], self.pool.v[layer], self.spec.scale
        assert batch is not None
        if layer < self.dense_layers:
            return ops.decode_attention(q, k, v, batch.page_table, batch.lengths, scale)
        self.sets.bring(layer, [(seat, length) for _, seat, length in self._wanted], self._keep)
        ages = {b: self.sets.age(layer, seat, length) for b, seat, length in self._wanted}
        ready = [b for b, age in ages.items() if age <= self.sets.stale]
        self._num_fallbacks += len(ages) - len(ready)
        if len(ready) == len(q) and not any(ages.values()):
            out = q.new_empty((*q.shape[:-1], v.shape[-1]))
            sets = self.indices[layer], self.counts[layer]
            sparse.sparse_attention(q, k, v, batch.page_table, *sets, scale, out, batch.seats)
            return out
        rows = torch.tensor(ready, dtype=torch.int64, device=q.device)
        out = ops.decode_attention(q, k, v, batch.page_table, batch.lengths.index_fill(0, rows, 0), scale)
        if ready:
            indices, counts = self._with_newer(layer, batch.seats[rows], batch.lengths[rows], [ages[b] for b in ready])
            part = torch.empty_like(out[rows])
            sparse.sparse_attention(q[rows], k, v, batch.page_table[rows], indices, counts, scale, part)
            out[rows] = part
        return out

    def _with_newer(self, layer: int, seats: Tensor, lengths: Tensor, ages: list[int]) -> tuple[Tensor, Tensor]:
        """The seats' sets and the tokens since: for each of ``ages`` so many, the last one ``lengths - 1``."""
        indices, counts = self.indices[layer][seats], self.counts[layer][seats]
        indices = torch.nn.functional.pad(indices, (0, max(ages)), value=-1)
        age = torch.tensor(ages, dtype=torch.int32, device=seats.device).view(-1, 1, 1)
        place = torch.arange(indices.shape[-1], dtype=torch.int32, device=seats.device) - counts.unsqueeze(-1)
        newer = lengths.view(-1, 1, 1) - age + place
        return torch.where((place >= 0) & (place < age), newer, indices).int(), counts + age.squeeze(-1)

    def stats(self) -> Mapping[str, float]:  # type: ignore[override]
        """Besides those of sparse attention. late: stale sets used, by request and layer; stalls: waits for a set;
        fallbacks: requests that attended to everything in a layer since no set could come; losses: connections that
        broke; strays: answers that were for nobody any more.
        """
        return {**super().stats(), "asyncspade_fallbacks": self._num_fallbacks, **self.sets.stats()}


class _Far(Selector):
    """Selects elsewhere; here it only counts. budget: tokens of a set without the newest."""

    def __init__(self, budget: int) -> None:
        self._budget = budget

    def plan(self, batch: Batch, lengths: Tensor) -> None: ...

    def select(self, layer: int, query: Tensor) -> Selection:
        raise AssertionError("sets come from the cache rank")

    def attended(self, length: int) -> int:
        return min(self._budget, length - 1) + 1


def paged_tokens(pages: Tensor, table: Tensor, first: int, last: int) -> Tensor:
    """pages: [P, Hk, S, D] of a layer, table: [N] of one request -> its tokens first .. last, [last - first, Hk, D]."""
    size = pages.shape[2]
    skipped = first // size * size
    held = pages.index_select(0, table[first // size : -(-last // size)].long()).transpose(1, 2).flatten(0, 1)
    return held[first - skipped : last - skipped]
