"""Residency on the device: what is in slots, what is wanted, and who gives way.

:func:`find_blocks` is on the critical path of a step and runs one program per request and head; :func:`claim_slots`,
which must see all requests of a head at once, is one program per head and belongs beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size as power_of_two
from slipstream.kernels.launch import launch_options
from slipstream.kernels.reference_residency import OLDEST, History, Slots
from slipstream.kernels.triton_choose import ABSENT, choose, num_warps

LAST = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-0x80000000)
OLDEST_HALF = tl.constexpr((OLDEST + 1) // 2)
ROUNDS = tl.constexpr(OLDEST.bit_length())
CHUNK = 32
"""Blocks of a set that are compared with all others at once."""


@triton.jit
def _keys(blocks, end, table_ptr, PER_PAGE: tl.constexpr):
    there = (blocks >= 0) & (blocks < end)
    pages = tl.load(table_ptr + blocks // PER_PAGE, mask=there, other=0)
    return tl.where(there & (pages > 0), pages * PER_PAGE + blocks % PER_PAGE, -1)


@triton.jit
def _slots(keys, slot_of_ptr):
    return tl.load(slot_of_ptr + keys, mask=keys >= 0, other=-1)


@triton.jit
def _count(these):
    return tl.sum(these.to(tl.int32), axis=0)


@triton.jit
def _touch(used_ptr, slots, tick, these):
    """These slots are wanted at this tick."""
    tl.store(used_ptr + slots, tick + tl.zeros_like(slots), mask=these)


@triton.jit
def _shared(blocks, sets_ptr, width, matches, CHUNK: tl.constexpr):
    """How often each of the blocks is in the seat's set, where that ``matches``."""
    shared = tl.zeros((blocks.shape[0],), tl.int32)
    for start in range(0, width, CHUNK):
        at = start + tl.arange(0, CHUNK)
        some = tl.load(sets_ptr + at, mask=(at < width) & matches, other=-2)
        shared += tl.sum((blocks[:, None] == some[None, :]).to(tl.int32), axis=1)
    return shared


@triton.jit
def _held(blocks, missing, wanted_at_ptr, length, tail, num_blocks, share, BLOCK_N: tl.constexpr):
    """Which of the missing blocks the chain holds, by when it wanted each block before ``tail``."""
    every = tl.arange(0, BLOCK_N)
    wanted_at = tl.load(wanted_at_ptr + every, mask=every < tl.minimum(tail, num_blocks), other=0)
    ages = tl.where(wanted_at > 0, length - wanted_at, LAST)
    oldest = 0  # of the ages that at most ``share`` blocks have not passed, the largest; no age is below 1
    for turn in tl.static_range(ROUNDS):
        older = oldest + (OLDEST_HALF >> turn)
        oldest = tl.where(_count(ages <= older) <= share, older, oldest)
    since = tl.load(wanted_at_ptr + blocks, mask=missing, other=0)
    return missing & (since > 0) & (length - since <= oldest)


@triton.jit
def _stands_out(scores_ptr, blocks, scored, missing, margin):
    """Whether the best of the missing blocks is more than ``margin`` of the way up."""
    scores = tl.load(scores_ptr + blocks, mask=scored, other=0.0)
    low = tl.min(tl.where(scored, scores, float("inf")), axis=0)
    high = tl.max(tl.where(scored, scores, -float("inf")), axis=0)
    return tl.max(tl.where(missing, scores, -float("inf")), axis=0) - low > margin * (high - low)


@triton.jit
def _store_union(known, added, blocks, out_ptr, out_width, BLOCK_M: tl.constexpr):
    """The set and what is ``added`` of the blocks, ascending."""
    added = tl.where(added, blocks, LAST)
    both = tl.join(tl.where(known >= 0, known, LAST), added)
    both = tl.sort(tl.reshape(both, (2 * BLOCK_M,)))
    at = tl.arange(0, 2 * BLOCK_M)
    tl.store(out_ptr + at, tl.where(both == LAST, -1, both), mask=at < out_width)


@triton.jit
def _store_previous(known, newest, wide, sets_ptr, out_ptr, out_width):
    """The set and, at its end where it is not there yet, the newest block."""
    num_known = _count(known >= 0)
    at_end = (wide == num_known) & (tl.max(known, axis=0) < newest)
    out = tl.load(sets_ptr + wide, mask=wide < num_known, other=-1)
    tl.store(out_ptr + wide, tl.where(at_end, newest, out), mask=wide < out_width)


@triton.jit
def _store_returning(urgent_ptr, more, order, keys, slots, places, returned, first, end):
    """Keys of those of ``more`` that are in no slot, in their order from ``first`` on; then -1 up to ``end``."""
    tl.store(urgent_ptr + first + order, tl.where(slots < 0, keys, -1), mask=more)
    blank = (places >= returned) & (places < end - first)
    tl.store(urgent_ptr + first + places, tl.full(places.shape, -1, tl.int32), mask=blank)


@triton.jit
def _tally(counters_ptr, nexts, matches, num, turned, returned, drifted, sync, lost):
    """One row's share of ``COUNTERS``, in their order."""
    tl.atomic_add(counters_ptr, tl.sum((nexts >= 0).to(tl.int64), axis=0))
    tl.atomic_add(counters_ptr + 1, tl.where(matches, num, 0).to(tl.int64))
    tl.atomic_add(counters_ptr + 2, tl.where(matches, turned, 0).to(tl.int64))
    if returned is not None:
        tl.atomic_add(counters_ptr + 3, returned.to(tl.int64))
    tl.atomic_add(counters_ptr + 4, tl.where(matches, 0, 1).to(tl.int64))
    tl.atomic_add(counters_ptr + 5, drifted.to(tl.int64))
    tl.atomic_add(counters_ptr + 6, ((sync == 0) & (lost > 0)).to(tl.int64))


@triton.jit
def _find_kernel(
    blocks_ptr, nexts_ptr, table_ptr, seats_ptr, lengths_ptr, slot_of_ptr, used_ptr, sets_ptr, made_for_ptr,
    wanted_at_ptr, tick_ptr, counters_ptr, scores_ptr, out_ptr, urgent_ptr, later_ptr, table_stride, num_keys,
    num_slots, width, set_width, out_width, urgent_width, num_blocks, scores_width, drift, margin, share,
    MODE: tl.constexpr, PER_PAGE: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (Hk, B)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, request = tl.program_id(0), tl.program_id(1)
    row = request.to(tl.int64) * tl.num_programs(0) + head
    length = tl.load(lengths_ptr + request)
    seat = tl.load(seats_ptr + request)
    tick = tl.load(tick_ptr)
    table_ptr += request.to(tl.int64) * table_stride
    slot_of_ptr += head.to(tl.int64) * num_keys
    used_ptr += head * num_slots
    sets_ptr += (seat * tl.num_programs(0) + head) * set_width
    made_for_ptr += seat * tl.num_programs(0) + head
    wanted_at_ptr += (seat * tl.num_programs(0) + head) * num_blocks
    places = tl.arange(0, BLOCK_M)
    inside = places < width
    live = length > 0
    tail = tl.maximum(length - 1, 0) // (SIZE * PER_PAGE) * PER_PAGE
    blocks = tl.load(blocks_ptr + row * width + places, mask=inside & live, other=-1)
    nexts = tl.load(nexts_ptr + row * width + places, mask=inside & live, other=-1)
    matches = live & (tl.load(made_for_ptr) == length)
    known = tl.load(sets_ptr + places, mask=inside & matches, other=-1)
    known_keys = _keys(known, tail, table_ptr, PER_PAGE)
    known_slots = _slots(known_keys, slot_of_ptr)
    shared = _shared(blocks, sets_ptr, width, matches, CHUNK)
    present = blocks >= 0
    fresh = present & (shared == 0)
    num, turned = _count(present), _count(fresh)
    block_keys = _keys(blocks, tail, table_ptr, PER_PAGE)
    block_slots = _slots(block_keys, slot_of_ptr)
    drifted = turned.to(tl.float32) > drift * num.to(tl.float32)
    missing = fresh & (blocks < tail)
    returned = None
    if MODE == "union":
        held = _held(blocks, missing, wanted_at_ptr, length, tail, num_blocks, share, BLOCK_N)
        order = _count(held) - tl.cumsum(held.to(tl.int32), axis=0)  # the newest is 0
        more = held & (order < share - set_width)
        missing &= more == 0
    if scores_ptr is not None:
        scored = present & (blocks < tail)
        drifted |= _stands_out(scores_ptr + row * scores_width, blocks, scored, missing, margin)
    drifted &= matches
    sync = live & ((matches == 0) | drifted)
    if MODE == "current":
        sync = live
    keys, slots = tl.where(sync, block_keys, known_keys), tl.where(sync, block_slots, known_slots)
    _touch(used_ptr, slots, tick, slots >= 0)
    urgent_ptr += row * urgent_width
    tl.store(urgent_ptr + places, tl.where(slots < 0, keys, -1), mask=inside)
    lost = _count((keys >= 0) & (slots < 0))
    if MODE == "union":
        more &= sync == 0
        returned = _count(more)
        _touch(used_ptr, block_slots, tick, more & (block_slots >= 0))
        _store_returning(urgent_ptr, more, order, block_keys, block_slots, places, returned, width, urgent_width)
        lost += _count(more & (block_keys >= 0) & (block_slots < 0))
    end = tl.where(length % (SIZE * PER_PAGE) == 0, LAST, tail)
    tl.store(later_ptr + row * width + places, _keys(nexts, end, table_ptr, PER_PAGE), mask=inside)
    out_ptr += row * out_width
    wide = tl.arange(0, BLOCK_W)
    if sync | (live == 0):
        out = tl.load(blocks_ptr + row * width + wide, mask=(wide < width) & live, other=-1)
        tl.store(out_ptr + wide, out, mask=wide < out_width)
    elif MODE == "union":
        _store_union(known, more | (fresh & (blocks >= tail)), blocks, out_ptr, out_width, BLOCK_M)
    else:
        _store_previous(known, (length - 1) // SIZE, wide, sets_ptr, out_ptr, out_width)
    tl.debug_barrier()  # everybody has read the old set, and when blocks were wanted
    if live:
        for start in range(0, set_width, BLOCK_M):
            at = start + places
            value = tl.where(start == 0, nexts, -1)
            tl.store(sets_ptr + at, value, mask=at < set_width)
        tl.store(made_for_ptr, length + 1)
        if MODE == "union":
            now = length + tl.zeros_like(blocks)
            candidate = present & (sync | more | (blocks >= tail))
            tl.store(wanted_at_ptr + blocks, now, mask=candidate)
            tl.store(wanted_at_ptr + known, now, mask=(known >= 0) & (sync == 0))
            tl.store(wanted_at_ptr + nexts, now, mask=nexts >= 0)
    if live & (seat > 0):
        _tally(counters_ptr, nexts, matches, num, turned, returned, drifted, sync, lost)


def find_blocks(
    blocks: Tensor, nexts: Tensor, page_table: Tensor, seats: Tensor, lengths: Tensor, slots: Slots, history: History,
    tick: Tensor, counters: Tensor, per_page: int, block_size: int, mode: str, drift: float,
    scores: Tensor | None = None, margin: float = 1.0, share: int = LAST.value,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`slipstream.kernels.reference_residency.find_blocks`. Reads nothing back to the host."""
    (requests, num_kv, width), most = blocks.shape, history.sets.shape[2]
    assert blocks.is_contiguous() and nexts.is_contiguous() and nexts.shape == blocks.shape and width <= most
    assert scores is None or scores.is_contiguous()
    assert all(x.is_contiguous() for x in (*slots, *history))
    extra = min(share - most, width) if mode == "union" else 0
    out_width = width + {"previous": 1, "union": min(width, extra + per_page), "current": 0}[mode]
    out, urgent = (blocks.new_empty((requests, num_kv, size)) for size in (out_width, width + extra))
    later = torch.empty_like(blocks)
    if requests:
        num_blocks = history.wanted_at.shape[2]
        block_m = power_of_two(width, smallest=CHUNK)
        block_n = power_of_two(num_blocks) if mode == "union" else 1
        _find_kernel[(num_kv, requests)](
            blocks, nexts, page_table, seats, lengths, slots.slot_of, slots.used, *history, tick, counters,
            scores, out, urgent, later, page_table.stride(0), slots.slot_of.shape[1], slots.used.shape[1], width,
            most, out_width, width + extra, num_blocks, 0 if scores is None else scores.shape[2], drift, margin, share,
            MODE=mode, PER_PAGE=per_page, SIZE=block_size, BLOCK_M=block_m, BLOCK_W=power_of_two(out_width),
            BLOCK_N=block_n, CHUNK=CHUNK, **launch_options(blocks, num_warps=max(4, num_warps(block_n))),
        )  # fmt: skip
    return out, urgent, later


@triton.jit
def _claim_kernel(
    keys_ptr, slot_of_ptr, key_of_ptr, used_ptr, tick_ptr, counter_ptr, loads_ptr, counts_ptr, num_keys, num_slots,
    width, wanted,
    BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (Hk,): barriers order what the threads of the one program of a head tell each other through memory."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    tick = tl.load(tick_ptr)
    slot_of_ptr += head.to(tl.int64) * num_keys
    key_of_ptr += head * num_slots
    used_ptr += head * num_slots
    loads_ptr += head * wanted * 2
    ids = tl.arange(0, BLOCK_I)
    at = (ids // width * tl.num_programs(0) + head) * width + ids % width
    keys = tl.load(keys_ptr + at, mask=ids < wanted, other=-1)
    held = tl.load(slot_of_ptr + keys, mask=keys >= 0, other=0)
    _touch(used_ptr, held, tick, (keys >= 0) & (held >= 0))
    missing = (keys >= 0) & (held < 0)
    num = _count(missing)
    if num > 0:
        # The first of equal keys wins, and of many numbers below -1 the lowest stays.
        tl.debug_barrier()
        tl.atomic_min(slot_of_ptr + keys, LOWEST + ids, mask=missing)
        tl.debug_barrier()
        claim = tl.load(slot_of_ptr + keys, mask=missing, other=0, volatile=True)
        first = missing & (claim == LOWEST + ids)
        place = tl.cumsum(first.to(tl.int32), axis=0) - 1
        tl.store(loads_ptr + 2 * place, keys, mask=first)
        slots = tl.arange(0, BLOCK_C)
        used = tl.load(used_ptr + slots, mask=slots < num_slots, other=0, volatile=True)
        images = tl.where((slots < num_slots) & (used < tick), -used, ABSENT)
        asked = _count(first)
        kept, to, num = choose(images, asked, 0)
        tl.store(loads_ptr + 2 * to + 1, slots, mask=kept)
        old = tl.load(key_of_ptr + slots, mask=kept, other=-1)
        tl.store(slot_of_ptr + old, tl.full((BLOCK_C,), -1, tl.int32), mask=old >= 0)
        tl.debug_barrier()
        new = tl.load(loads_ptr + 2 * ids, mask=ids < asked, other=0, volatile=True)
        slot = tl.load(loads_ptr + 2 * ids + 1, mask=ids < num, other=-1, volatile=True)  # none for the last
        tl.store(slot_of_ptr + new, slot, mask=ids < asked)
        tl.store(key_of_ptr + slot, new, mask=ids < num)
        _touch(used_ptr, slot, tick, ids < num)
    tl.store(counts_ptr + head, num)
    tl.atomic_add(counter_ptr, num.to(tl.int64))


def claim_slots(keys: Tensor, slots: Slots, tick: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`slipstream.kernels.reference_residency.claim_slots`; what is behind the counts is undefined."""
    requests, num_kv, width = keys.shape
    assert keys.is_contiguous() and all(x.is_contiguous() for x in slots)
    loads = keys.new_empty((num_kv, requests * width, 2))
    counts = keys.new_empty(num_kv)
    if not requests * width:
        counts.zero_()
    else:
        block_c = power_of_two(slots.used.shape[1], smallest=16)
        block_i = power_of_two(requests * width, smallest=16)
        _claim_kernel[(num_kv,)](
            keys, *slots, tick, counter, loads, counts, slots.slot_of.shape[1], slots.used.shape[1], width,
            requests * width, BLOCK_I=block_i, BLOCK_C=block_c,
            **launch_options(keys, num_warps=max(num_warps(block_c), num_warps(block_i))),
        )  # fmt: skip
    return loads, counts


@triton.jit
def _forget_kernel(
    table_ptr, query_start_ptr, lengths_ptr, slot_of_ptr, key_of_ptr, used_ptr, table_stride, num_keys, num_slots,
    rows,
    PAGE: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (pages that the newest tokens may touch, tiles of the rows of all layers and heads, B)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    request = tl.program_id(2)
    length = tl.load(lengths_ptr + request)
    new = tl.load(query_start_ptr + request + 1) - tl.load(query_start_ptr + request)
    column = tl.maximum(length - new, 0) // PAGE + tl.program_id(0)
    if (length > 0) & (column * PAGE < length):
        page = tl.load(table_ptr + request.to(tl.int64) * table_stride + column).to(tl.int64)
        if page > 0:
            row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            for sub in range(PER_PAGE):
                at = slot_of_ptr + row.to(tl.int64) * num_keys + page * PER_PAGE + sub
                slot = tl.load(at, mask=row < rows, other=-1)
                held = (row < rows) & (slot >= 0)
                place = row.to(tl.int64) * num_slots + slot
                tl.store(key_of_ptr + place, tl.full((BLOCK,), -1, tl.int32), mask=held)
                tl.store(used_ptr + place, tl.zeros((BLOCK,), tl.int32), mask=held)
                tl.store(at, tl.full((BLOCK,), -1, tl.int32), mask=held)


def forget_pages(
    page_table: Tensor, query_start: Tensor, lengths: Tensor, max_query: int, slots: Slots, page_size: int,
    per_page: int,
) -> None:  # fmt: skip
    """See :func:`slipstream.kernels.reference_residency.forget_pages`. Reads nothing back to the host."""
    layers, num_kv, num_keys = slots.slot_of.shape
    requests, rows = lengths.shape[0], layers * num_kv
    if not requests or not max_query:
        return
    block = min(128, power_of_two(rows))
    grid = ((max_query - 1) // page_size + 1 + (max_query > 1), triton.cdiv(rows, block), requests)
    _forget_kernel[grid](
        page_table, query_start, lengths, *slots, page_table.stride(0), num_keys, slots.used.shape[2], rows,
        PAGE=page_size, PER_PAGE=per_page, BLOCK=block, **launch_options(lengths, num_warps=4),
    )  # fmt: skip


@triton.jit
def _rows_kernel(
    table_ptr, seats_ptr, lengths_ptr, slot_of_ptr, out_ptr, table_stride, num_keys, num_slots, first, width,
    PER_PAGE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of a row, Hk, B)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, request = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + request)
    seat = tl.load(seats_ptr + request)
    blocks = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tail = tl.maximum(length - 1, 0) // (SIZE * PER_PAGE) * PER_PAGE
    keys = _keys(tl.where(blocks < width, blocks, -1), tail, table_ptr + request.to(tl.int64) * table_stride, PER_PAGE)
    slot = _slots(keys, slot_of_ptr + head.to(tl.int64) * num_keys)
    rows = tl.where(slot >= 0, first + head * num_slots + slot, 0)
    own = (seat * tl.num_programs(1) + head) * PER_PAGE + blocks - tail
    rows = tl.where((blocks >= tail) & (blocks * SIZE < length), own.to(tl.int32), rows)
    out = (request.to(tl.int64) * tl.num_programs(1) + head) * width + blocks
    tl.store(out_ptr + out, rows, mask=blocks < width)


def block_rows(
    page_table: Tensor, seats: Tensor, lengths: Tensor, slot_of: Tensor, num_slots: int, first: int, block_size: int,
    per_page: int,
) -> Tensor:  # fmt: skip
    """See :func:`slipstream.kernels.reference_residency.block_rows`. Reads nothing back to the host."""
    requests, (num_kv, num_keys) = page_table.shape[0], slot_of.shape
    width = page_table.shape[1] * per_page
    out = page_table.new_empty((requests * num_kv, width))
    if requests:
        block = min(512, power_of_two(width))
        _rows_kernel[(triton.cdiv(width, block), num_kv, requests)](
            page_table, seats, lengths, slot_of, out, page_table.stride(0), num_keys, num_slots, first, width,
            PER_PAGE=per_page, SIZE=block_size, BLOCK=block, **launch_options(page_table, num_warps=4),
        )  # fmt: skip
    return out
