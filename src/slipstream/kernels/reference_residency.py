"""Which blocks of KV are in the slots of a hot buffer, and which come next: the definition, the oracle, the CPU path.

AsyncTLS (arXiv 2604.07815) keeps the blocks that a step selects on the device and moves only what changed. All tensors
are of one layer. A block of ``block`` tokens is known by its *key*: page * per_page + place in the page, so that chains
which share a page share its slots. B requests with one query token each; ``lengths`` [B] int32 count this step's token,
0 skips the row. The page of a request's newest token is its *tail*: it is read from the request's seat, never from a
slot, until it is full. Like the rest of the references this reads lengths on the host.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.kernels.reference import stored

LAST = torch.iinfo(torch.int32).max  # sorts behind every block
MOST_SLOTS = 1 << 15
"""Slots of one layer and head, and keys that are claimed at once: what one program of a device can hold."""
CLOCK = 3  # numbers of a clock: when a load began, how many programs of it are over, nanoseconds of all before
COUNTERS = ("wanted", "compared", "turned", "returned", "first", "drifted", "lost")
OLDEST = 127
"""Tokens after which a chain holds a block no more, however few it has wanted since."""


class Slots(NamedTuple):
    """slot_of: [Hk, P * per_page] int32, the slot of every key, -1 for none. key_of: [Hk, C] int32, its inverse.

    used: [Hk, C] int32, the tick at which a slot was last wanted, 0 for a slot that holds nothing.
    """

    slot_of: Tensor
    key_of: Tensor
    used: Tensor


class History(NamedTuple):
    """What each seat's chain has wanted. sets: [seats, Hk, most] int32, what its next step was expected to want.

    made_for: [seats, Hk] int32, the length that this was said for, 0 for none. wanted_at: [seats, Hk, N] int32, the
    length at which a block was last a candidate or expected, 0 for never; kept in mode "union" only.
    """

    sets: Tensor
    made_for: Tensor
    wanted_at: Tensor


def _keys(blocks: Tensor, page_table: Tensor, end: Tensor, per_page: int) -> Tensor:
    """blocks: [B, Hk, M]; end: [B, 1, 1] -> [B, Hk, M] int32 keys of the blocks in 0 .. end - 1, -1 for the others."""
    there = (blocks >= 0) & (blocks < end)
    known = blocks.masked_fill(~there, 0).long()
    table = page_table.long().unsqueeze(1).expand(-1, blocks.shape[1], -1)
    pages = table.gather(2, known // per_page)
    return (pages * per_page + known % per_page).masked_fill(~there | (pages == 0), -1).int()


def _slots_of(keys: Tensor, slot_of: Tensor) -> Tensor:
    """keys: [B, Hk, M] -> [B, Hk, M] int32 slots, -1 where there is none."""
    found = slot_of.expand(len(keys), -1, -1).gather(2, keys.clamp(min=0).long())
    return found.masked_fill(keys < 0, -1)


def find_blocks(
    blocks: Tensor, nexts: Tensor, page_table: Tensor, seats: Tensor, lengths: Tensor, slots: Slots, history: History,
    tick: Tensor, counters: Tensor, per_page: int, block_size: int, mode: str, drift: float,
    scores: Tensor | None = None, margin: float = 1.0, share: int = LAST,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Level 2's candidates, the keys that must be in slots now and are not, and those that the next step will want.

    blocks: [B, Hk, M] int32, ascending, then -1: what the query of this step selects. nexts: the same of the query that
    the next step is expected to have. history: what each seat's last steps have left there; the seat's set becomes
    ``nexts``. tick: [1] int32. share: slots of each chain, more than ``most``.

    A row is *synchronous*, head by head, when ``mode`` is "current", when it has no set for this length, when more than
    ``drift`` of ``blocks`` are not in its set, or when, by ``scores`` [B, Hk, N] fp32 of all blocks, one of ``blocks``
    that would be no candidate stands more than ``margin`` of the way from the worst of them to the best (in full
    pages). Then its candidates are ``blocks``. Else: "previous": its set and the newest block; "union": its set and
    what of ``blocks`` its chain *holds*, in full pages the newest ``share - most`` of it. A chain holds the blocks, in
    full pages, that it has wanted in its last so many tokens: as many tokens as make no more than ``share`` blocks, and
    at most :data:`OLDEST`. That is what ``share`` slots would hold were they its own, so candidates depend on the chain
    and on nobody else; where its blocks had to give way to others', it waits for them. Slots of candidates are wanted
    at this tick. counters: [7] int64, see :data:`COUNTERS`; seat 0 does not count.

    Returns candidates [B, Hk, M'] int32, ascending, then -1, where M' is M + 1 for "previous", M + min(M, share - most
    + per_page) for "union", M for "current"; urgent [B, Hk, M''] int32: keys of candidates that are in no slot: those
    of the set or of a synchronous row's ``blocks``, in "union" then those of up to min(M, share - most) others, newest
    first; later [B, Hk, M] int32: keys of ``nexts``, those of a tail that this step has filled among them. -1 stands
    for no key.
    """
    (sets, made_for, wanted_at), union = history, mode == "union"
    width, length, extra = blocks.shape[2], lengths.view(-1, 1, 1), share - sets.shape[2]
    live, page_size = length > 0, per_page * block_size
    tail = (length - 1).clamp(min=0) // page_size * per_page
    matches = live[..., 0] & (made_for[seats] == lengths.unsqueeze(1))
    known = sets[seats][..., :width].masked_fill(~matches.unsqueeze(2), -1)
    present = blocks >= 0
    fresh = present & ~(blocks.unsqueeze(3) == known.unsqueeze(2)).any(-1)
    turned, num = fresh.sum(-1), present.sum(-1)
    drifted = turned.float() > drift * num.float()
    more = torch.zeros_like(fresh)
    if union:
        more = fresh & _held(blocks, wanted_at[seats][..., : page_table.shape[1] * per_page], length, tail, share)
    order = more.flip(2).cumsum(2).flip(2) - 1  # the newest is 0
    more &= order < extra
    if scores is not None:
        missing = fresh & (blocks < tail) & ~more
        drifted |= _stands_out(scores, blocks, present & (blocks < tail), missing, margin)
    drifted &= matches
    sync = live[..., 0] & (~matches | drifted | (mode == "current"))
    more &= ~sync.unsqueeze(2)
    candidates, room = blocks, min(width, extra + per_page) if union else 1
    if mode != "current":
        newest = ((length - 1) // block_size).int().expand(-1, blocks.shape[1], 1)
        added = blocks.masked_fill(~(more | (blocks >= tail)), -1) if union else newest
        own = torch.nn.functional.pad(blocks, (0, room), value=-1)
        candidates = torch.where(sync.unsqueeze(2), own, _merged(known, added)[..., : width + room])
    candidates = candidates.masked_fill(~live, -1)
    keys, room = _keys(blocks, page_table, tail, per_page), min(width, extra)
    needed = torch.where(sync.unsqueeze(2), keys, _keys(known, page_table, tail, per_page))
    if union:
        others = keys.new_full((*keys.shape[:2], room + 1), -1)
        others.scatter_(2, order.masked_fill(~more, room), keys.masked_fill(~more, -1))
        needed = torch.cat((needed, others[..., :room]), dim=2)
    slot = _slots_of(needed, slots.slot_of)
    head = torch.arange(blocks.shape[1], device=blocks.device).view(1, -1, 1).expand_as(slot)
    slots.used[head[slot >= 0], slot[slot >= 0].long()] = tick
    urgent = needed.masked_fill(slot >= 0, -1)
    lost = matches & ~sync & (urgent >= 0).any(-1)
    end = torch.where(length % page_size == 0, torch.full_like(tail, LAST), tail)
    later = _keys(nexts.masked_fill(~live, -1), page_table, end, per_page)
    rows = live.view(-1).nonzero().squeeze(1)
    sets[seats[rows]] = torch.nn.functional.pad(nexts[rows], (0, sets.shape[2] - width), value=-1)
    made_for[seats[rows]] = (lengths[rows] + 1).unsqueeze(1).expand(-1, blocks.shape[1])
    if union:
        wanted = torch.cat((candidates, nexts), dim=2)[rows]
        row, head, place = (wanted >= 0).nonzero(as_tuple=True)
        wanted_at[seats[rows][row], head, wanted[row, head, place].long()] = lengths[rows][row]
    real = live[..., 0] & (seats > 0).unsqueeze(1)
    counted = ((nexts >= 0).sum(-1), num * matches, turned * matches, more.sum(-1), ~matches, drifted, lost)
    counters += torch.stack([(x * real).sum() for x in counted])
    return candidates, urgent, later


def _held(blocks: Tensor, wanted_at: Tensor, length: Tensor, tail: Tensor, share: int) -> Tensor:
    """[B, Hk, M] bool: whether the chain holds a block. wanted_at: [B, Hk, N], of each row's seat."""
    place = torch.arange(wanted_at.shape[2], device=blocks.device)
    ages = (length - wanted_at).masked_fill((wanted_at == 0) | (place >= tail), LAST)
    held = ages <= OLDEST
    if share < ages.shape[2]:
        held &= ages < ages.kthvalue(share + 1, dim=2, keepdim=True).values
    return held.gather(2, blocks.clamp(min=0).long()) & (blocks >= 0)


def _stands_out(scores: Tensor, blocks: Tensor, scored: Tensor, missing: Tensor, margin: float) -> Tensor:
    """[B, Hk] bool: whether the best of the missing blocks is more than ``margin`` of the way up."""
    found = scores.gather(2, blocks.clamp(0, scores.shape[2] - 1).long())
    low, high = found.masked_fill(~scored, torch.inf).amin(-1), found.masked_fill(~scored, -torch.inf).amax(-1)
    return found.masked_fill(~missing, -torch.inf).amax(-1) - low > margin * (high - low)


def _merged(first: Tensor, second: Tensor) -> Tensor:
    """Two lists of blocks, -1 for none, to one without repetitions: ascending, then -1."""
    both = torch.cat((first, second), dim=2)
    both = both.masked_fill(both < 0, LAST).sort(dim=2).values
    again = torch.zeros_like(both, dtype=torch.bool)
    again[..., 1:] = both[..., 1:] == both[..., :-1]
    both = both.masked_fill(again, LAST).sort(dim=2).values
    return both.masked_fill(both == LAST, -1)


def claim_slots(keys: Tensor, slots: Slots, tick: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """Give every key a slot: hits stay, misses take the slots that were wanted longest ago, the lowest on ties.

    keys: [B, Hk, M] int32, -1 for none; one key may stand more than once. Slots that are wanted at this tick, all hits
    among them, are no victims: where others are too few, the last of the misses go without. Returns loads [Hk, B * M,
    2] int32: (key, slot) of each miss, in the order of its first place in ``keys`` and of ascending slots; and counts
    [Hk] int32 of them, which are added to ``counter`` [1] int64, too.
    """
    num_kv, now = keys.shape[1], int(tick)
    loads = torch.full((num_kv, keys.shape[0] * keys.shape[2], 2), -1, dtype=torch.int32, device=keys.device)
    counts = torch.zeros(num_kv, dtype=torch.int32, device=keys.device)
    held = _slots_of(keys, slots.slot_of)
    heads = torch.arange(num_kv, device=keys.device).view(-1, 1).expand_as(held)
    slots.used[heads[held >= 0], held[held >= 0].long()] = now
    absent = keys.masked_fill(held >= 0, -1)
    for head in (absent >= 0).any(2).any(0).nonzero().squeeze(1).tolist():
        given = dict.fromkeys(absent[:, head].flatten().tolist())
        slot_of, key_of, used = slots.slot_of[head], slots.key_of[head], slots.used[head]
        order = used.sort(stable=True)
        missing = torch.tensor([key for key in given if key >= 0], dtype=torch.int64, device=keys.device)
        missing = missing[: int((used < now).sum())]
        num = len(missing)
        victims = order.indices[:num].sort().values
        old = key_of[victims]
        slot_of[old[old >= 0].long()] = -1
        slot_of[missing], key_of[victims], used[victims] = victims.int(), missing.int(), now
        loads[head, :num], counts[head] = torch.stack((missing, victims), dim=1).int(), num
        counter += num
    return loads, counts


def forget_pages(
    page_table: Tensor, query_start: Tensor, lengths: Tensor, max_query: int, slots: Slots, page_size: int,
    per_page: int,
) -> None:  # fmt: skip
    """The pages that this step's tokens are written to are in no slot any more. slots: with [L, ...] in front.

    page_table: [B, N] int32.  query_start: [B + 1] int32.  lengths: [B] int32.  max_query: most tokens of one request.
    """
    last = lengths.long().unsqueeze(1) - 1
    first = (lengths.long() - query_start.diff()).clamp(min=0).unsqueeze(1) // page_size
    columns = first + torch.arange((max_query - 1) // page_size + 2, device=lengths.device)
    pages = page_table.long().gather(1, columns.clamp(max=page_table.shape[1] - 1))
    pages = pages[(columns <= last // page_size) & (last >= 0) & (pages > 0)]
    keys = (pages.unsqueeze(1) * per_page + torch.arange(per_page, device=pages.device)).view(-1)
    layer, head, slot = _filled(slots.slot_of[:, :, keys])
    slots.key_of[layer, head, slot], slots.used[layer, head, slot] = -1, 0
    slots.slot_of[:, :, keys] = -1


def _filled(slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layer, head, place = (slots >= 0).nonzero(as_tuple=True)
    return layer, head, slots[layer, head, place].long()


def block_rows(
    page_table: Tensor, seats: Tensor, lengths: Tensor, slot_of: Tensor, num_slots: int, first: int, block_size: int,
    per_page: int,
) -> Tensor:  # fmt: skip
    """Where the blocks of each request and KV head are in a store of rows of ``block_size`` tokens.

    page_table: [B, N] int32.  slot_of: [Hk, P * per_page] int32.  The store holds the seats' tails, [seats, Hk,
    per_page] rows, and from row ``first`` on the slots, [Hk, num_slots] rows.  -> [B * Hk, N * per_page] int32 rows; 0,
    which is of the null seat, for blocks that are in no slot and for those of rows of length 0.
    """
    num_kv, columns = len(slot_of), page_table.shape[1] * per_page
    blocks = torch.arange(columns, device=lengths.device, dtype=torch.int32).expand(len(lengths), num_kv, -1)
    length = lengths.view(-1, 1, 1)
    head = torch.arange(num_kv, device=lengths.device).view(1, -1, 1)
    tail = (length - 1).clamp(min=0) // (block_size * per_page) * per_page
    slot = _slots_of(_keys(blocks, page_table, tail, per_page), slot_of)
    rows = torch.where(slot >= 0, first + head * num_slots + slot, 0)
    own = (seats.view(-1, 1, 1) * num_kv + head) * per_page + blocks - tail
    in_tail = (blocks >= tail) & (blocks * block_size < length)
    return torch.where(in_tail, own, rows).flatten(0, 1).int()


def load_blocks(
    pages: tuple[Tensor, Tensor], loads: Tensor, counts: Tensor, store: tuple[Tensor, Tensor], num_slots: int,
    first: int, clock: Tensor | None = None,
) -> None:  # fmt: skip
    """Copy the blocks of ``loads`` [Hk, n, 2] (key, slot), ``counts`` [Hk] of them, from pages to slots.

    pages: K and V, each [P, Hk, S, D]; they may be in (pinned) host memory. store: K and V, each [X, block, D], of
    which row ``first + head * num_slots + slot`` is a slot. In a latent cache V is a view of K in both.
    """
    num_kv, block = pages[0].shape[1], store[0].shape[1]
    per_page = pages[0].shape[2] // block
    sources, rows = [], []
    if not counts.any():
        return
    for head, count in enumerate(counts.tolist()):
        key, slot = loads[head, :count].long().unbind(1)
        sources.append((key // per_page * num_kv + head) * per_page + key % per_page)
        rows.append(first + head * num_slots + slot)
    source, row = torch.cat(sources), torch.cat(rows)
    for origin, target in zip(stored(*pages), stored(*store), strict=True):
        target[row] = origin.view(-1, block, origin.shape[3])[source.to(origin.device)].to(target.device)


def copy_between(
    source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], source_pages: Tensor, target_pages: Tensor
) -> None:
    """Page ``target_pages[i]`` of K and V becomes page ``source_pages[i]``; a pair with a number below 0 is skipped.

    source, target: each [P, Hk, S, D], on the device or in (pinned) host memory; in a latent cache V is a view of K in
    both.  Pages: [n] int64.
    """
    there = (source_pages >= 0) & (target_pages >= 0)
    sources, targets = source_pages[there], target_pages[there]
    for origin, copy in zip(stored(*source), stored(*target), strict=True):
        copy[targets.to(copy.device)] = origin[sources.to(origin.device)].to(copy.device)


def add_time(total: Tensor, sign: int) -> None:
    """Add now, in nanoseconds, to ``total`` [1] int64, or take it away."""
    total += sign * time.perf_counter_ns()
