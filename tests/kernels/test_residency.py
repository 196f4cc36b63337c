"""Residency: kernel = reference = a model in plain Python, through fuzzed steps of chains that share pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.kernels import reference_residency as reference
from slipstream.kernels import triton_copies, triton_residency
from slipstream.kernels.reference_residency import COUNTERS, Slots

BLOCK, HEADS = 4, 2


class State:
    """One layer's residency with everything that a step needs; ``device`` decides which twin runs."""

    def __init__(self, device, twin, per_page=2, num_pages=40, num_slots=24, seats=4, most=5):
        self.device, self.twin, self.per_page, self.num_slots = device, twin, per_page, num_slots
        self.slots = Slots(
            torch.full((1, HEADS, num_pages * per_page), -1, dtype=torch.int32, device=device),
            torch.full((1, HEADS, num_slots), -1, dtype=torch.int32, device=device),
            torch.zeros((1, HEADS, num_slots), dtype=torch.int32, device=device),
        )
        self.sets = torch.full((seats, HEADS, most), -1, dtype=torch.int32, device=device)
        self.made_for = torch.zeros((seats, HEADS), dtype=torch.int32, device=device)
        self.tick = torch.zeros(1, dtype=torch.int32, device=device)
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)

    def step(self, table, seats, lengths, blocks, nexts, mode, drift):
        self.tick += 1
        own, on = Slots(*(x[0] for x in self.slots)), self.device
        table, lengths = (torch.tensor(x, dtype=torch.int32, device=on) for x in (table, lengths))
        blocks, nexts = (torch.tensor(x, dtype=torch.int32, device=on) for x in (blocks, nexts))
        seats = torch.tensor(seats, device=on)
        start = torch.arange(len(lengths) + 1, dtype=torch.int32, device=on)
        self.twin.forget_pages(table, start, lengths, 1, self.slots, BLOCK * self.per_page, self.per_page)
        found = self.twin.find_blocks(
            blocks, nexts, table, seats, lengths, own, self.sets, self.made_for, self.tick, self.counters,
            self.per_page, BLOCK, mode, drift,
        )  # fmt: skip
        out = list(found)
        for keys in found[1:]:
            loads, counts = self.twin.claim_slots(keys, own, self.tick, self.counter)
            out.append(counts)
            out += [loads[head, :count] for head, count in enumerate(counts.tolist())]
        first = self.sets.shape[0] * HEADS * self.per_page
        out.append(
            self.twin.block_rows(table, seats, lengths, own.slot_of, self.num_slots, first, BLOCK, self.per_page)
        )
        return [x.cpu() for x in (*out, *self.slots, self.sets, self.made_for, self.counters, self.counter)]


def _chosen(draw, length, most):
    """Ascending blocks of a context, block 0 and the newest among them, per head; padded."""
    last = (length - 1) // BLOCK
    rows = []
    for _ in range(HEADS):
        more = draw(st.sets(st.integers(0, last), max_size=most - 2)) if length else set()
        row = sorted(more | {0, last}) if length else []
        rows.append(row + [-1] * (most - len(row)))
    return rows


@settings(max_examples=25, deadline=None)
@given(
    st.data(), st.sampled_from(["previous", "union", "current"]), st.sampled_from([0.3, 0.7, 2.0]), st.integers(1, 2)
)
def test_kernels_are_the_references(data, mode, drift, per_page):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    twins = [State(torch.device("cpu"), reference, per_page), State(device, triton_residency, per_page)]
    page, width, most = BLOCK * per_page, 9, 5
    pages = data.draw(st.permutations(range(1, 28)))
    table = [pages[i * width : (i + 1) * width] for i in range(3)]
    table[1][:2] = table[0][:2]  # a shared prefix
    lengths = [data.draw(st.integers(2 * page, (width - 1) * page - 6)) for _ in table]
    for _ in range(data.draw(st.integers(1, 6))):
        members = data.draw(st.permutations(range(3)))[: data.draw(st.integers(1, 3))]
        for b in members:
            lengths[b] += 1
        # A row that is not asked, and a padding row.
        shown = [lengths[b] * data.draw(st.sampled_from([1, 1, 1, 0])) for b in members] + [1]
        blocks = [_chosen(data.draw, length, most) for length in shown]
        nexts = blocks if data.draw(st.booleans()) else [_chosen(data.draw, length, most) for length in shown]
        step = ([table[b] for b in members] + [[0] * width], [b + 1 for b in members] + [0], shown, blocks, nexts)
        first, second = (twin.step(*step, mode, drift) for twin in twins)
        for x, y in zip(first, second, strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)


class Model:
    """What the references promise, in dictionaries: one head."""

    def __init__(self, num_slots):
        self.slot_of, self.used, self.free = {}, dict.fromkeys(range(num_slots), 0), num_slots

    def claim(self, keys, tick):
        loads, keys = [], [key for key in dict.fromkeys(keys) if key >= 0]
        for key in keys:
            if key in self.slot_of:
                self.used[self.slot_of[key]] = tick
        missing = [key for key in keys if key not in self.slot_of]
        victims = sorted(sorted(self.used, key=lambda slot: (self.used[slot], slot))[: len(missing)])
        for key, slot in zip(missing, victims, strict=True):
            assert self.used[slot] < tick
            self.slot_of = {k: s for k, s in self.slot_of.items() if s != slot} | {key: slot}
            self.used[slot] = tick
            loads.append([key, slot])
        return loads


@pytest.mark.parametrize("twin", (reference, triton_residency), ids=("reference", "kernel"))
@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.lists(st.integers(-1, 30), min_size=12, max_size=12), min_size=1, max_size=8))
def test_slots_are_claimed_as_a_plain_model_does(twin, steps):
    device = torch.device("cuda" if torch.cuda.is_available() and twin is triton_residency else "cpu")
    state, model = State(device, twin, 1, num_slots=17), Model(17)
    own = Slots(*(x[0, :1].contiguous() for x in state.slots))
    for tick, keys in enumerate(steps, 1):
        asked = torch.tensor(keys, dtype=torch.int32, device=device).view(3, 1, 4)
        now = torch.tensor([tick], dtype=torch.int32, device=device)
        loads, counts = twin.claim_slots(asked, own, now, state.counter)
        assert loads[0, : int(counts)].tolist() == model.claim(keys, tick)
        held = {int(key): slot for slot, key in enumerate(own.key_of[0]) if key >= 0}
        assert held == model.slot_of and own.used[0].tolist() == [model.used[slot] for slot in range(17)]
        assert {key: int(own.slot_of[0, key]) for key in range(31) if own.slot_of[0, key] >= 0} == held


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("per_page, dim", ((1, 16), (2, 27)))
def test_blocks_and_pages_are_copied(dtype, per_page, dim, device):
    generator = torch.Generator().manual_seed(1)
    shape = (9, HEADS, per_page * BLOCK, dim)
    pages = tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    loads = torch.tensor([[[3, 1], [17 % (9 * per_page), 0], [-1, -1]], [[8, 2], [-1, -1], [-1, -1]]]).int()
    counts = torch.tensor([2, 1]).int()
    results = []
    for twin, on in ((reference, torch.device("cpu")), (triton_copies, device)):
        store = tuple(torch.zeros((5 + HEADS * 3, BLOCK, dim), dtype=dtype, device=on) for _ in range(2))
        twin.load_blocks(tuple(x.to(on) for x in pages), loads.to(on), counts.to(on), store, 3, 5)
        target = tuple(torch.zeros((4, *shape[1:]), dtype=dtype, device=on) for _ in range(2))
        ids = (torch.tensor([8, -1, 2, 5]).to(on), torch.tensor([0, 1, -1, 3]).to(on))
        twin.copy_between(tuple(x.to(on) for x in pages), target, *ids)
        results.append([x.cpu() for x in (*store, *target)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    store, _, target, _ = results[0]
    assert torch.equal(store[5 + 1], pages[0].view(9, HEADS, per_page, BLOCK, dim)[3 // per_page, 0, 3 % per_page])
    assert torch.equal(store[5 + 3 + 2], pages[0].view(9, HEADS, per_page, BLOCK, dim)[8 // per_page, 1, 8 % per_page])
    assert torch.equal(target[3], pages[0][5]) and not target[1].any() and not target[2].any()


@pytest.mark.gpu
def test_kernels_read_and_write_pinned_host_memory(device):
    host = tuple(torch.randn((9, HEADS, BLOCK, 64), dtype=torch.float32).pin_memory() for _ in range(2))
    before = [x.clone() for x in host]
    near = tuple(torch.zeros((9, HEADS, BLOCK, 64), device=device) for _ in range(2))
    ids = torch.arange(9, device=device)
    triton_copies.copy_between(host, near, ids, ids)
    for x in near:
        x.add_(1)
    triton_copies.copy_between(near, host, ids, ids)
    torch.cuda.synchronize()
    for x, y in zip(host, before, strict=True):
        assert torch.equal(x, y + 1)


def test_a_row_asked_for_the_first_time_is_synchronous_and_the_next_is_not(device):
    for twin in (reference, triton_residency):
        state = State(device if twin is triton_residency else torch.device("cpu"), twin, 1, most=4)
        blocks = [[[0, 2, 5, 6]] * HEADS]
        table = [[*range(1, 10)]]
        out = state.step(table, [1], [26], blocks, blocks, "previous", 2.0)
        assert out[0][0, 0].tolist() == [0, 2, 5, 6, -1] and out[1][0, 0].tolist() == [1, 3, 6, -1]
        later = [[[0, 3, 5, 6]] * HEADS]
        out = state.step(table, [1], [27], later, later, "union", 2.0)
        assert out[0][0, 0].tolist() == [0, 2, 5, 6] + [-1] * 4  # block 3 was not resident yet
        assert out[1][0, 0].tolist() == [-1] * 4
        out = state.step(table, [1], [28], later, later, "union", 2.0)  # the tail is full: it is to be loaded, too
        assert out[0][0, 0].tolist() == [0, 3, 5, 6] + [-1] * 4 and out[2][0, 0].tolist() == [1, 4, 6, 7]
        out = state.step(table, [1], [29], [[[0, 3, 6, 7]] * HEADS], [[[0, 3, 6, 7]] * HEADS], "previous", 2.0)
        assert out[0][0, 0].tolist() == [0, 3, 5, 6, 7]  # the newest block is a candidate though no set has it
