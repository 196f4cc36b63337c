"""AsyncTLS as an ``AttentionBackend``: with all KV on the device, and with KV on the host."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slipstream.asynctls.offload import HostPool, HotBuffer, Stage, load_pooled, to_device
from slipstream.asynctls.selector import AsyncTLSSelector
from slipstream.attention.backend import AttentionBackend, KVView, move_tokens, prefill_part
from slipstream.attention.sparse import DENSE, MIXED, SPARSE, SparseBackend, decode_part
from slipstream.kernels import ops, residency, sparse
from slipstream.kvcache.table import NULL_PAGE
from slipstream.overlap import Lane, StreamLane, ThreadLane, Ticket
from slipstream.types import Batch


class AsyncTLSBackend(SparseBackend):
    """:class:`SparseBackend` whose selector keeps sets by seat and a residency by page. All KV is in the pool."""

    selector: AsyncTLSSelector

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.residency, self._reset = self.selector.residency, self.selector.reset  # a probe may take its place

    def plan(self, batch: Batch) -> None:
        self._reset(batch.seated)
        super().plan(batch)

    def view(self, layer: int) -> KVView:
        if layer == 0:
            assert self._batch is not None, "plan(batch) comes before view(layer)"
            self.residency.begin(self._batch)
        return super().view(layer)

    def finish(self) -> None:
        self.residency.finish()

    def stats(self) -> dict[str, float]:
        return {**super().stats(), **self.residency.stats()}


class StagedPrompts(AttentionBackend):
    """``dense`` over the stage's pages: attends to the prompts of a step, whose whole context is there, and to no more.

    table: [B, N] int32, the prompts' pages in the stage. slots: [T] int64, their tokens' places. history: (host, stage)
    pages of what earlier steps have stored. news: (stage, host) pages that hold tokens of this step. tails: (stage
    page, seat) for those who go on from a prompt.
    """

    def __init__(self, dense: AttentionBackend, stage: Stage) -> None:
        self._dense, self._stage = dense, stage

    def plan(self, batch: Batch) -> None:
        if batch.is_decode:
            return
        prompts, size = prefill_part(batch), self._stage.page_size
        tables, at = [], 0
        for length in prompts.lengths_host:
            tables.append(range(at, at + -(-length // size)))
            at += len(tables[-1])
        assert at <= self._stage.num_pages, "the scheduler admits no more prompts to a step than the stage holds"
        width = batch.page_table.shape[1]
        slots: list[int] = []
        history: tuple[list[int], list[int]] = ([], [])
        news: tuple[list[int], list[int]] = ([], [])
        for b, (length, pages) in enumerate(zip(prompts.lengths_host, prompts.pages_host, strict=True)):
            start = length - (prompts.query_start_host[b + 1] - prompts.query_start_host[b])
            stored, first = -(-start // size), start // size
            history[0].extend(pages[:stored])
            history[1].extend(tables[b][:stored])
            news[0].extend(tables[b][first:])
            news[1].extend(pages[first : len(tables[b])])
            slots.extend(range(tables[b][0] * size + start, tables[b][0] * size + length))
        last = [tables[b][-1] for b, _ in prompts.heirs]
        padded = [page for table in tables for page in (*table, *[0] * (width - len(table)))]
        flat, self.slots, *pairs = to_device(
            [padded, slots, *history, *news, last, [seat for _, seat in prompts.heirs]], batch.lengths.device
        )
        self.table = flat.view(-1, width).int()
        self.history, self.news, self.tails = (tuple(pairs[i : i + 2]) for i in (0, 2, 4))
        self.num_pages = (len(history[0]), len(news[0]))
        self._dense.plan(dataclasses.replace(prompts, page_table=self.table, slots=self.slots, pages_host=tables))

    def view(self, layer: int) -> KVView:
        return self._dense.view(layer)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        return self._dense.attend(layer, q)


class OffloadBackend(AsyncTLSBackend):
    """KV on the host: ``pool``. Decode steps attend in ``hot``, prompts in ``stage``, over which ``dense`` must be.

    A decoded token goes to its seat's tail. A full tail goes to the host and, where it is selected, comes back into a
    slot, like every block that the next step is expected to want: both on ``lane``, which is joined when the step
    ends. A prompt's layer is attended with the whole context in the stage, loaded while the layer before is computed,
    and goes to the host while the next one is. Requests within the gate have all their blocks in slots.

    This is its selector's mover.
    """

    uses_seats = True
    pool: HostPool
    dense: StagedPrompts

    def __init__(self, *args: Any, hot: HotBuffer, stage: Stage, lane: Lane, transfer: str, **named: Any) -> None:
        super().__init__(*args, **named)
        assert self.gate <= self.residency.most * self.residency.block, "what is dense must fit in slots"
        self.dense, self.selector.mover = StagedPrompts(self.dense, stage), self
        self.hot, self.stage, self._lane, self.prefill_pages = hot, stage, lane, stage.num_pages
        # A device gives slots away beside the choice of tokens, and the lane is kept busy by nothing but copies.
        self._claims = StreamLane(self.pool.device, priority=-1) if isinstance(lane, StreamLane) else lane
        self._load = load_pooled if transfer == "pooled" else residency.load_blocks
        self._tickets: list[Ticket[Any]] = []
        self._held: list[Any] = []  # what the lane still reads: no allocator may give it away
        self._buffers: list[Ticket[Any] | None] = [None, None]  # who was last to use each half of the stage
        self._is_whole = True  # whatever was to be copied was
        self._pages_moved = [0, 0]
        self._times = [0.0, 0.0]
        if isinstance(lane, ThreadLane):
            weakref.finalize(self, lane.close)

    # -- once per step

    def plan(self, batch: Batch) -> None:
        if self._tickets or not self._is_whole:
            self._recover()
        if batch.num_decodes:
            # New channels relabel all tokens so far, and a tail is not where those are: from now on they stay.
            self._online = None
        super().plan(batch)
        if self._form == DENSE and batch.num_decodes:
            self._decodes = batch if batch.is_decode else decode_part(batch)
            self._lengths = batch.lengths[: batch.num_decodes].unsqueeze(0)
        size, layers = self.pool.page_size, self.spec.num_layers
        rows = zip(batch.lengths_host[: batch.num_decodes], batch.pages_host, strict=False)
        self._pages_moved[1] += layers * sum(length % size == 0 and pages[0] != NULL_PAGE for length, pages in rows)
        if not batch.is_decode:
            self._pages_moved[0] += layers * self.dense.num_pages[0]
            self._pages_moved[1] += layers * self.dense.num_pages[1]

    def _find_tails(self, batch: Batch) -> None:
        """Where decode rows store their tokens, and which of their pages this step fills; on the device."""
        count, size = batch.num_decodes, self.pool.page_size
        self._seats, last = batch.seats[:count], batch.lengths[:count].long() - 1
        self._slots = self._seats * size + last % size
        table = batch.page_table[:count]
        page = table.gather(1, (last // size).unsqueeze(1)).squeeze(1).long()
        self._full = torch.where((last % size == size - 1) & (page != NULL_PAGE), page, -1)
        self._tail_table = self._seats.int().unsqueeze(1).expand(-1, table.shape[1]).contiguous()
        if self._form == MIXED:
            torch.mul(batch.lengths[:count], batch.lengths[:count] > self.gate, out=self._lengths[0])
            torch.sub(batch.lengths[:count], self._lengths[0], out=self._lengths[1])

    def finish(self) -> None:
        """Join the lane: the next step finds all that was prefetched, and may write to tails and stage."""
        tickets, self._tickets, self._buffers, self._is_whole = self._tickets, [], [None, None], False
        if self.residency.joined is not None:
            residency.add_time(self.residency.joined, -1)
        for ticket in tickets:
            self._wait(ticket)
        if self.residency.joined is not None:
            residency.add_time(self.residency.joined, 1)
        self._held.clear()
        self._is_whole = True
        super().finish()

    def _recover(self) -> None:
        """A step died, and with it its requests. What it was to load may not be there: the others load theirs anew."""
        for lane in (self._claims, self._lane):
            lane.submit(_nothing).wait()
        self._tickets, self._buffers, self._is_whole = [], [None, None], True
        self._held.clear()
        self.residency.clear()

    def _submit(self, work: Callable[..., Any], *args: Any, lane: Lane | None = None) -> Ticket[Any]:
        began = time.perf_counter()
        ticket = (lane or self._lane).submit(self._timed, work, *args)
        self._times[1] += time.perf_counter() - began  # all of it on the inline lane, nothing on another
        self._tickets.append(ticket)
        self._held.append(args)
        return ticket

    @torch.inference_mode()
    def _timed(self, work: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        result = work(*args)
        self._times[0] += time.perf_counter() - began
        return result

    def _wait(self, ticket: Ticket[Any]) -> Any:
        began = time.perf_counter()
        result = ticket.wait()
        self._times[1] += time.perf_counter() - began
        return result

    # -- once per layer

    def view(self, layer: int) -> KVView:
        batch = self._batch
        assert batch is not None, "plan(batch) comes before view(layer)"
        if layer == 0:
            self.residency.begin(batch)
            if batch.num_decodes:
                self._find_tails(batch)
        if batch.is_decode:
            return KVView(*self.hot.tails(layer), self._slots)
        self._stage_history(layer)
        self.dense.view(layer)
        # Two stores, but the model writes to one: decode rows get blank places behind the prompts' pages.
        blank = self.stage.num_pages * self.pool.page_size + torch.arange(batch.num_decodes, device=self.stage.device)
        return KVView(*self.stage.layer(layer), torch.cat((blank, self.dense.slots)))

    def _stage_history(self, layer: int) -> None:
        """The stage holds this layer's history, and the next one's is on its way."""
        if self.dense.num_pages[0]:
            for upcoming in (0, 1) if layer == 0 else (layer + 1,):
                if upcoming < self.spec.num_layers:
                    self._buffers[upcoming % 2] = self._submit(
                        residency.copy_between, self.pool.layer(upcoming), self.stage.layer(upcoming),
                        *self.dense.history,
                    )  # fmt: skip
        ticket = self._buffers[layer % 2]
        if ticket is not None:
            self._wait(ticket)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q: [T, Hq, D] -> [T, Hq, D]."""
        batch = self._batch
        assert batch is not None, "plan(batch) comes before attend(layer, q)"
        count = batch.num_decodes
        if not batch.is_decode:
            self._store_prompts(layer, batch)
            self._calibrate(layer, q, batch)
        self._inherit(layer, batch)
        if self._indexes:
            self._extend(layer, batch)
        if batch.is_decode:
            return self._attend_hot(layer, q.contiguous())
        out = self.dense.attend(layer, q[count:])
        if not count:
            return out
        return torch.cat((self._attend_hot(layer, q[:count].contiguous()), out))

    def _store_prompts(self, layer: int, batch: Batch) -> None:
        """Move what the model wrote to the stage to where it belongs: decoded tokens to tails, prompts to the host."""
        count, (k, v), tails = batch.num_decodes, self.stage.layer(layer), self.hot.tails(layer)
        if count:
            blank = self.stage.num_pages * self.pool.page_size + torch.arange(count, device=self.stage.device)
            move_tokens(KVView(k, v, blank), slice(None), KVView(*tails, self._slots))
        residency.copy_between((k, v), tails, *self.dense.tails)
        self._buffers[layer % 2] = self._submit(
            residency.copy_between, (k, v), self.pool.layer(layer), *self.dense.news
        )

    def _inherit(self, layer: int, batch: Batch) -> None:
        """Chains that go on from a decode row get a copy of its tail."""
        heirs = [(b, seat) for b, seat in batch.heirs if b < batch.num_decodes]
        if heirs:
            rows, seats = to_device([[b for b, _ in heirs], [seat for _, seat in heirs]], self.stage.device)
            tails = self.hot.tails(layer)
            residency.copy_between(tails, tails, self._seats[rows], seats)

    def _extend(self, layer: int, batch: Batch) -> None:
        assert self.index is not None, "an index is what level 1 reads"
        if layer == 0 and self._query_start is not batch.query_start:
            self._find_pages(batch)
        count, starts = batch.num_decodes, self._query_start
        if count:
            most = self.pool.page_size if self._by_page else 1
            self.index.extend(
                layer, self.hot.tails(layer)[0], batch.page_table[:count], starts[: count + 1], batch.lengths[:count],
                most, self._tail_table,
            )  # fmt: skip
        if not batch.is_decode:
            self.index.extend(
                layer, self.stage.layer(layer)[0], batch.page_table[count:], starts[count:], batch.lengths[count:],
                self._max_query, self.dense.table,
            )  # fmt: skip

    def _attend_hot(self, layer: int, q: Tensor) -> Tensor:
        """The decode rows, over tails and slots. q: [B, Hq, D] -> [B, Hq, Dv]."""
        batch, scale, num_kv = self._decodes, self.spec.scale, self.spec.num_kv_heads
        assert batch is not None
        if self._indexes:  # nothing is indexed where no page is full, unless every step indexes
            self._submit(residency.copy_between, self.hot.tails(layer), self.pool.layer(layer), self._seats, self._full)
        # Every KV head of a request is a request of its own: its blocks are elsewhere than those of the others.
        k, v = (store.unsqueeze(1) for store in self.hot.layer(layer))
        own = self.spec.own(q)
        heads = own.view(len(q) * num_kv, -1, q.shape[-1])
        out = q.new_empty((*own.shape[:2], v.shape[-1]))
        if self._form != SPARSE:
            lengths = self._lengths[-1]
            self.fetch(layer, self.residency.find_all(layer, batch, lengths))
            rows = self._wait(self._find_rows(layer, lengths))
            out = ops.decode_attention(heads, k, v, rows, lengths.repeat_interleave(num_kv), scale).view_as(out)
        if self._form != DENSE:
            indices, counts, _ = self.selector.select(layer, q)
            sparse.sparse_attention(
                heads, k, v, self._wait(self._rows), indices.flatten(0, 1).unsqueeze(1), counts.view(-1, 1), scale,
                out.view(*heads.shape[:2], -1),
            )  # fmt: skip
        return out

    # -- the mover

    def fetch(self, layer: int, keys: Tensor) -> None:
        claimed = self._submit(self.residency.claim, layer, keys, True, lane=self._claims)
        self._submit(lambda: self._load_claimed(layer, claimed.wait(), True), lane=self._claims)

    def _find_rows(self, layer: int, lengths: Tensor) -> Ticket[Tensor]:
        """Who has waited for this finds what was fetched, too."""
        return self._submit(self.residency.rows, layer, self._decodes, lengths, self.hot.first, lane=self._claims)

    def prefetch(self, layer: int, keys: Tensor) -> None:
        # Before slots are given away: those that are taken are none that this step attends.
        self._rows = self._find_rows(layer, self._lengths[0])
        claimed = self._submit(self.residency.claim, layer, keys, False, lane=self._claims)
        self._submit(lambda: self._load_claimed(layer, claimed.wait(), False))

    def _load_claimed(self, layer: int, claimed: tuple[Tensor, Tensor], urgent: bool) -> None:
        self._load(
            self.pool.layer(layer), *claimed, self.hot.layer(layer), self.residency.num_slots, self.hot.first,
            self.residency.clocks[urgent],
        )  # fmt: skip

    # -- calibration

    def _calibrate(self, layer: int, q: Tensor, batch: Batch) -> None:
        """As of :class:`SparseBackend`, from the stage; what is relabelled comes from the host."""
        row, size = batch.query_start_host[batch.num_decodes], self.pool.page_size
        for calibration in (self._recorder, self._online):
            if calibration is not None:
                slots = self.dense.slots
                calibration.observe(layer, q[row:], self.stage.k[layer][slots // size, :, slots % size])
        if self._online is not None:
            ticket = self._buffers[layer % 2]
            if ticket is not None:
                self._wait(ticket)
            self._relabel(layer, self._online)

    # -- numbers

    def stats(self) -> dict[str, float]:
        """Bytes of K and V in both directions; seconds of transfers, and of steps that waited for them."""
        found = super().stats()
        page_bytes = self.pool.bytes // (self.pool.num_layers * self.pool.num_pages)
        block_bytes = page_bytes // (self.spec.num_kv_heads * self.residency.per_page)
        found["asynctls_bytes_in"] = found["asynctls_misses"] * block_bytes + self._pages_moved[0] * page_bytes
        found["asynctls_bytes_out"] = self._pages_moved[1] * page_bytes
        found["asynctls_hot_bytes"] = self.hot.bytes
        # A GPU's copies are launched in our times, not made.
        times = self._times if self.residency.joined is None else self.residency.seconds()
        found["asynctls_transfer_s"], found["asynctls_exposed_s"] = times
        return found


def _nothing() -> None:
    """What is submitted behind all else, to wait for all else."""
