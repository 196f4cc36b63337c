"""The inference rank that gives its keys and values away: chains decode over packed sets that the cache rank sends.

A prompt is prefilled densely into pages. In the step that ends it the cache rank gets to know all of it, the pages are
given back, and from then on a seat holds no more than the set of the next step and the newest tokens. What the rank
sends is the whole set (``transfer="packed"``) or what the seat lacks (``"delta"``). A lost rank takes these chains with
it: their step fails with an error that says so, and later requests find the rank again or fail likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from slipstream.asyncspade.channel import ChannelLost
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.feed import Feed, Place
from slipstream.asyncspade.protocol import Message
from slipstream.asyncspade.rank_link import RankLink, Refused
from slipstream.asyncspade.remote import RemoteSets, paged_tokens
from slipstream.attention.backend import AttentionBackend, KVView, move_tokens, prefill_part
from slipstream.kernels import ops
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec, PeerLost


class RankLost(PeerLost):
    """The keys and values of running requests were with a cache rank that is gone."""


class PackedBackend(AttentionBackend):
    """``AttentionBackend`` that decodes in seats which a cache rank fills. ``dense`` attends for prompts, over pages.

    k, v: [L, M + 1, Hk, C, D]: a seat's set in its first slots, in any order, and behind it the tokens since.
    counts: [L, M + 1] int32, tokens of the set. own_k, own_v: [L, M + 1, Hk, R, D], the R newest tokens, by position.
    """

    uses_seats = holds_kv_in_seats = True
    gate = 0

    def __init__(
        self, pool: KVPool, spec: ModelSpec, config: AsyncSpade, link: RankLink, dense: AttentionBackend, num_seats: int
    ) -> None:
        self.pool, self.spec, self.link, self.dense = pool, spec, link, dense
        self.num_fresh = config.window  # so that tokens do not depend on what happens to be cached
        self.feed = Feed(link)
        self.sets = RemoteSets(self.feed, config, spec.num_layers)
        shape = (spec.num_layers, num_seats + 1, spec.num_kv_heads, config.budget, spec.head_dim)
        self.k = torch.zeros(shape, dtype=spec.dtype, device=pool.device)
        self.v = torch.zeros_like(self.k)
        self._newer = config.spare
        self.own_k = self.k.new_zeros((*shape[:3], self._newer, spec.head_dim))
        self.own_v = torch.zeros_like(self.own_k)
        self.counts = torch.zeros(shape[:2], dtype=torch.int32, device=pool.device)
        self._homes: dict[int, int] = {}  # seat -> epoch of the chain that decodes there
        self._batch: Batch | None = None

    @staticmethod
    def seat_bytes(config: AsyncSpade, spec: ModelSpec) -> int:
        """Memory of one seat."""
        return (config.budget + config.spare) * spec.kv_bytes_per_token() + 4 * spec.num_layers

    # -- once per step

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        self.link.poll()
        if not self.link.is_up:
            with suppress(ChannelLost, Refused):  # said below, with what it means
                self.link.connect(self.link.timeout_s)
        if not self.link.is_up:
            raise RankLost(f"{self.link.name} is lost ({self.link.why}), and without it nothing can be decoded")
        self.feed.plan(batch)
        seats = batch.seats[: batch.num_decodes].tolist()
        if any(self._homes.get(seat) != self.feed.epochs[seat] for seat in seats):
            raise RankLost(f"{self.link.name} was lost, and with it the keys and values of running requests")
        self._homes |= {seat: self.feed.epochs[seat] for _, seat in batch.heirs}
        self._wanted = list(zip(seats, batch.lengths_host, strict=False))
        self._prompts = batch if not seats else None if batch.is_decode else prefill_part(batch)
        if self._prompts is not None:
            self.dense.plan(self._prompts)

    def view(self, layer: int) -> KVView:
        batch = self._batch
        assert batch is not None, "plan(batch) comes before view(layer)"
        count = batch.num_decodes
        if layer == 0 and count:
            self._seats = batch.seats[:count]
            self._slots = self._seats * self._newer + batch.positions[:count] % self._newer
        if self._prompts is None:
            return self._own(layer)
        self._pages = self.dense.view(layer)
        if count == 0:
            return self._pages
        # Two stores, but the model writes to one: it gets blank pages for all, which attend() shares out.
        num_tokens, size = batch.tokens.numel(), self.pool.page_size
        shape = (2, -(-num_tokens // size), self.spec.num_kv_heads, size, self.spec.head_dim)
        k, v = self.k.new_empty(shape)
        self._blank = KVView(k, v, torch.arange(num_tokens, device=self.k.device))
        return self._blank

    def _own(self, layer: int) -> KVView:
        return KVView(self.own_k[layer], self.own_v[layer], self._slots)

    def finish(self) -> None:
        """Seats that go on from chains that decode get copies; those of prompts get their first set like any other."""
        self.feed.finish()
        batch = self._batch
        assert batch is not None
        for b, heir in batch.heirs:
            if b < batch.num_decodes:
                seat = batch.seats[b]
                for store in (self.k, self.v, self.own_k, self.own_v, self.counts):
                    store[:, heir] = store[:, seat]
                for made in self.sets.made:
                    if int(seat) in made:
                        made[heir] = self.feed.epochs[heir], made[int(seat)][1]

    def close(self) -> None:
        self.link.close()

    # -- once per layer

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, Hq, D] -> [T, Hq, D]."""
        batch = self._batch
        assert batch is not None, "plan(batch) comes before attend(layer, q)"
        count = batch.num_decodes
        if count and self._prompts is not None:
            move_tokens(self._blank, slice(0, count), self._own(layer))
            move_tokens(self._blank, slice(count, None), self._pages)
        self.feed.tell(layer, q, self._newest, self._tokens)
        if count == 0:
            return self.dense.attend(layer, q)
        out = self._attend_seats(layer, q[:count])
        return out if self._prompts is None else torch.cat((out, self.dense.attend(layer, q[count:])))

    def _newest(self, layer: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        slots = self._slots if rows is None else self._slots[rows]
        seat, offset = slots // self._newer, slots % self._newer
        return self.own_k[layer][seat, :, offset], self.own_v[layer][seat, :, offset]

    def _tokens(self, layer: int, b: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        assert self._batch is not None and b >= self._batch.num_decodes, "a chain that decodes has no pages"
        k, v, table = self.pool.k[layer], self.pool.v[layer], self._batch.page_table[b]
        return paged_tokens(k, table, first, last), paged_tokens(v, table, first, last)

    def _keep(self, layer: int, message: Message, places: Sequence[Place]) -> None:
        """Put what came into the seats that it is for."""
        _, counts, sizes, spots, k, v = (tensor.to(self.k.device) for tensor in message.tensors)
        ends = sizes.cumsum(0)
        num_kv = self.spec.num_kv_heads
        for place in places:
            end, size = int(ends[place.row]), int(sizes[place.row])
            part = slice(end - size, end)
            slot, head = spots[part].long() // num_kv, spots[part].long() % num_kv
            self.k[layer, place.seat, head, slot] = k[part]
            self.v[layer, place.seat, head, slot] = v[part]
            self.counts[layer, place.seat] = counts[place.row]

    def _attend_seats(self, layer: int, q: Tensor) -> Tensor:
        sets, wanted = self.sets, self._wanted
        sets.bring(layer, wanted, self._keep)
        ages = [sets.age(layer, seat, length) for seat, length in wanted]
        if max(ages) > sets.stale:
            why = self.link.why if not self.link.is_up else "it has no room for a request: give it more --kv-memory"
            raise RankLost(f"{self.link.name} sent no set for layer {layer}: {why}")
        seats, counts = self._seats, self.counts[layer].index_select(0, self._seats)
        for since in range(max(ages) + 1):  # 0 is the token that the set was made for
            rows = [i for i, age in enumerate(ages) if age >= since]
            seat = seats[rows]
            newer = torch.tensor([wanted[i][1] - 1 - ages[i] + since for i in rows], device=seat.device) % self._newer
            for store, own in ((self.k, self.own_k), (self.v, self.own_v)):
                store[layer][seat, :, counts[rows].long() + since] = own[layer][seat, :, newer]
        lengths = counts + torch.tensor(ages, dtype=torch.int32, device=counts.device) + 1
        table = seats.unsqueeze(1).int()
        return ops.decode_attention(q.contiguous(), self.k[layer], self.v[layer], table, lengths, self.spec.scale)

    def stats(self) -> Mapping[str, float]:
        """Those of :class:`RemoteSets`, and asyncspade_seat_bytes: memory of the seats."""
        size = sum(x.numel() * x.element_size() for x in (self.k, self.v, self.own_k, self.own_v))
        return {**self.dense.stats(), **self.sets.stats(), "asyncspade_seat_bytes": size}
