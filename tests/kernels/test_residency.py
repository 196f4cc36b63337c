"""Residency: kernel = reference = a model in plain Python, through fuzzed steps of chains that share pages."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.kernels import reference_residency as reference
from slipstream.kernels import triton_copies, triton_residency
from slipstream.kernels.reference_residency import CLOCK, COUNTERS, OLDEST, History, Slots

BLOCK, HEADS = 4, 2


class State:
    """One layer's residency with everything that a step needs; ``device`` decides which twin runs."""

    def __init__(self, device, twin, per_page=2, num_pages=40, num_slots=24, seats=4, most=5):
        self.device, self.twin, self.per_page, self.num_slots = device, twin, per_page, num_slots
        self.share = num_slots // (seats - 1)
        self.slots = Slots(
            torch.full((1, HEADS, num_pages * per_page), -1, dtype=torch.int32, device=device),
            torch.full((1, HEADS, num_slots), -1, dtype=torch.int32, device=device),
            torch.zeros((1, HEADS, num_slots), dtype=torch.int32, device=device),
        )
        self.history = History(
            torch.full((seats, HEADS, most), -1, dtype=torch.int32, device=device),
            torch.zeros((seats, HEADS), dtype=torch.int32, device=device),
            torch.zeros((seats, HEADS, num_pages * per_page), dtype=torch.int32, device=device),
        )
        self.tick = torch.zeros(1, dtype=torch.int32, device=device)
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)

    def step(self, table, seats, lengths, blocks, nexts, mode, drift, scores=None, margin=1.0):
        self.tick += 1
        own, on = Slots(*(x[0] for x in self.slots)), self.device
        table, lengths = (torch.tensor(x, dtype=torch.int32, device=on) for x in (table, lengths))
        blocks, nexts = (torch.tensor(x, dtype=torch.int32, device=on) for x in (blocks, nexts))
        seats, scores = torch.tensor(seats, device=on), None if scores is None else scores.to(on)
        start = torch.arange(len(lengths) + 1, dtype=torch.int32, device=on)
        self.twin.forget_pages(table, start, lengths, 1, self.slots, BLOCK * self.per_page, self.per_page)
        found = self.twin.find_blocks(
            blocks, nexts, table, seats, lengths, own, self.history, self.tick, self.counters, self.per_page, BLOCK,
            mode, drift, scores, margin, self.share,
        )  # fmt: skip
        out = list(found)
        for keys in found[1:]:
            loads, counts = self.twin.claim_slots(keys, own, self.tick, self.counter)
            out.append(counts)
            out += [loads[head, :count] for head, count in enumerate(counts.tolist())]
        for head, keys in enumerate(found[1].transpose(0, 1)):
            assert (own.slot_of[head, keys[keys >= 0].long()] >= 0).all(), "what is attended now has a slot"
        first = len(self.history.sets) * HEADS * self.per_page
        out.append(
            self.twin.block_rows(table, seats, lengths, own.slot_of, self.num_slots, first, BLOCK, self.per_page)
        )
        return [x.cpu() for x in (*out, *self.slots, *self.history, self.counters, self.counter)]


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
    st.data(), st.sampled_from(["previous", "union", "current"]), st.sampled_from([0.3, 0.7, 2.0]), st.integers(1, 2),
    st.sampled_from([None, 0.0, 0.5, 0.9]), st.sampled_from([30, 24, 18]),
)  # fmt: skip
def test_kernels_are_the_references(data, mode, drift, per_page, margin, num_slots):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = ((torch.device("cpu"), reference), (device, triton_residency))
    twins = [State(on, twin, per_page, num_slots=num_slots) for on, twin in kinds]
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
        scores = None if margin is None else _scores(data.draw(st.integers(0, 99)), shown, width, per_page)
        first, second = (twin.step(*step, mode, drift, scores, margin) for twin in twins)
        for x, y in zip(first, second, strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)


def _found(twin, on, seed):
    """What a step finds for a chain with a past, some of whose blocks are in slots; and all that it leaves behind."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    per_page, share, length = dice.choice([1, 2]), dice.choice([6, 8, 10]), dice.randint(40, 90)
    state, last = State(on, twin, per_page, num_slots=3 * share), (length - 1) // BLOCK
    table = torch.randperm(39, generator=generator)[: 24 // per_page].add(1).int().view(1, -1)
    wanted_at = length - torch.randint(1, dice.choice([8, 30]), (HEADS, last + 1), generator=generator)
    wanted_at[torch.rand(wanted_at.shape, generator=generator) < dice.choice([0.2, 0.6])] = 0
    wanted_at[:, -2:] = length - 1  # the newest always are
    past = [[*sorted(dice.sample(range(last), 4)), -1] for _ in range(HEADS)]
    state.history.sets[1], state.history.made_for[1] = torch.tensor(past), length
    state.history.wanted_at[1, :, : last + 1] = wanted_at
    for slot, block in enumerate(dice.sample(range(last), 10)):
        key = int(table[0, block // per_page]) * per_page + block % per_page
        for values, value in zip(state.slots, (slot, key, 1), strict=True):
            values[0, :, key if values is state.slots.slot_of else slot] = value
    chosen = [[sorted({0, last, *dice.sample(range(last), 3)}) for _ in range(HEADS)] for _ in range(2)]
    blocks, nexts = (torch.tensor([[row + [-1] * (5 - len(row)) for row in rows]]).int().to(on) for rows in chosen)
    own = Slots(*(x[0] for x in state.slots))
    out = twin.find_blocks(
        blocks, blocks if dice.random() < 0.5 else nexts, table.to(on), torch.tensor([1], device=on),
        torch.tensor([length], dtype=torch.int32, device=on), own, state.history, state.tick + 5, state.counters,
        per_page, BLOCK, "union", 2.0, None, 1.0, share,
    )  # fmt: skip
    return [x.cpu() for x in (*out, *own, *state.history, state.counters)]


def test_a_chain_with_a_past_finds_in_the_kernel_what_it_finds_in_the_reference(device):
    counts = torch.zeros(len(COUNTERS), dtype=torch.int64)
    for seed in range(24):
        first, second = _found(reference, torch.device("cpu"), seed), _found(triton_residency, device, seed)
        for x, y in zip(first, second, strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)
        counts += first[-1]
    assert min(counts[COUNTERS.index(name)] for name in ("returned", "lost")) > 24


def _scores(seed, lengths, width, per_page):
    """Of every block, NaN in pages that are not full: nobody may read those."""
    scores = torch.randn((len(lengths), HEADS, width * per_page), generator=torch.Generator().manual_seed(seed))
    for row, length in zip(scores, lengths, strict=True):
        row[:, max(length - 1, 0) // (BLOCK * per_page) * per_page :] = torch.nan
    return scores


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
        missing = missing[: sum(used < tick for used in self.used.values())]
        victims = sorted(sorted(self.used, key=lambda slot: (self.used[slot], slot))[: len(missing)])
        for key, slot in zip(missing, victims, strict=True):
            assert self.used[slot] < tick
            self.slot_of = {k: s for k, s in self.slot_of.items() if s != slot} | {key: slot}
            self.used[slot] = tick
            loads.append([key, slot])
        return loads


@pytest.mark.parametrize("twin", (reference, triton_residency), ids=("reference", "kernel"))
@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(-1, 30), min_size=12, max_size=12), min_size=1, max_size=8),
    size=st.sampled_from((17, 9)),
)
def test_slots_are_claimed_as_a_plain_model_does(twin, steps, size):
    """Where there are fewer than a step wants, the last go without."""
    device = torch.device("cuda" if torch.cuda.is_available() and twin is triton_residency else "cpu")
    state, model = State(device, twin, 1, num_slots=size), Model(size)
    own = Slots(*(x[0, :1].contiguous() for x in state.slots))
    for tick, keys in enumerate(steps, 1):
        asked = torch.tensor(keys, dtype=torch.int32, device=device).view(3, 1, 4)
        now = torch.tensor([tick], dtype=torch.int32, device=device)
        loads, counts = twin.claim_slots(asked, own, now, state.counter)
        assert loads[0, : int(counts)].tolist() == model.claim(keys, tick)
        held = {int(key): slot for slot, key in enumerate(own.key_of[0]) if key >= 0}
        assert held == model.slot_of and own.used[0].tolist() == [model.used[slot] for slot in range(size)]
        assert {key: int(own.slot_of[0, key]) for key in range(31) if own.slot_of[0, key] >= 0} == held


def keys_and_values(shape, latent, make=torch.zeros, **where):
    """A store of either kind: in a latent one values are columns of the keys."""
    k = make(shape, **where)
    return (k, k[..., :-3]) if latent else (k, make(shape, **where))


@pytest.mark.parametrize("latent", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("per_page, dim", ((1, 16), (2, 27)))
def test_blocks_and_pages_are_copied(dtype, per_page, dim, latent, device):
    generator = torch.Generator().manual_seed(1)
    shape = (9, HEADS, per_page * BLOCK, dim)
    pages = keys_and_values(shape, latent, torch.randn, generator=generator, dtype=dtype)
    loads = torch.tensor([[[3, 1], [17 % (9 * per_page), 0], [-1, -1]], [[8, 2], [-1, -1], [-1, -1]]]).int()
    counts = torch.tensor([2, 1]).int()
    results = []
    for twin, on in ((reference, torch.device("cpu")), (triton_copies, device)):
        store = keys_and_values((5 + HEADS * 3, BLOCK, dim), latent, dtype=dtype, device=on)
        near = tuple(x.to(on) for x in pages)
        twin.load_blocks(near, loads.to(on), counts.to(on), store, 3, 5)
        target = keys_and_values((4, *shape[1:]), latent, dtype=dtype, device=on)
        ids = (torch.tensor([8, -1, 2, 5]).to(on), torch.tensor([0, 1, -1, 3]).to(on))
        twin.copy_between(near, target, *ids)
        results.append([x.cpu() for x in (*store, *target)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    store, _, target, _ = results[0]
    assert torch.equal(store[5 + 1], pages[0].view(9, HEADS, per_page, BLOCK, dim)[3 // per_page, 0, 3 % per_page])
    assert torch.equal(store[5 + 3 + 2], pages[0].view(9, HEADS, per_page, BLOCK, dim)[8 // per_page, 1, 8 % per_page])
    assert torch.equal(target[3], pages[0][5]) and not target[1].any() and not target[2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("latent", (False, True))
def test_kernels_read_and_write_pinned_host_memory(latent, device):
    host = keys_and_values((9, HEADS, BLOCK, 64), latent, torch.randn, pin_memory=True)
    before = [x.clone() for x in host]
    near = keys_and_values((9, HEADS, BLOCK, 64), latent, device=device)
    ids = torch.arange(9, device=device)
    triton_copies.copy_between(host, near, ids, ids)
    for x in near[: 1 if latent else 2]:
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
        assert out[0][0, 0].tolist() == [0, 2, 5, 6] + [-1] * 4  # the chain never had block 3
        assert (out[1] == -1).all()
        out = state.step(table, [1], [28], later, later, "union", 2.0)  # the tail is full: it is to be loaded, too
        assert out[0][0, 0].tolist() == [0, 3, 5, 6] + [-1] * 4 and out[2][0, 0].tolist() == [1, 4, 6, 7]
        out = state.step(table, [1], [29], [[[0, 3, 6, 7]] * HEADS], [[[0, 3, 6, 7]] * HEADS], "previous", 2.0)
        assert out[0][0, 0].tolist() == [0, 3, 5, 6, 7]  # the newest block is a candidate though no set has it


def _walk(num_steps, start, churn, seed):
    """Blocks of a chain's steps, [steps, HEADS, 5], that change by so much and now and then come back."""
    dice, found, old = random.Random(seed), [], [[[1, 2, 3]] * HEADS]
    for length in range(start, start + num_steps):
        last = (length - 1) // BLOCK
        row = []
        for head in range(HEADS):
            kept = {b if dice.random() > churn else dice.randrange(1, last) for b in old[-1][head]}
            row.append(set(dice.choice(old[-6:])[head]) if dice.random() < churn else kept)
        old.append([sorted(blocks) for blocks in row])
        found.append([sorted({0, *blocks, last}) + [-1] * (3 - len(blocks)) for blocks in row])
    return found


def _union(steps, start, share, most, page):
    """Candidates of one head in plain Python: a chain that has nobody beside it."""
    found, wanted, before = [], {}, None
    for length, blocks in enumerate(steps, start):
        blocks, tail = [b for b in blocks if b >= 0], (length - 1) // page * (page // BLOCK)
        if before is not None:
            ages = {b: length - at for b, at in wanted.items() if b < tail}
            held = [b for b, age in ages.items() if sum(other <= age for other in ages.values()) <= share]
            more = [b for b in blocks if b < tail and b not in before and b in held and ages[b] <= OLDEST]
            candidates = {*before, *more[-(share - most) :], *(b for b in blocks if b >= tail)}
        else:
            candidates = blocks
        found.append(sorted(candidates))
        wanted |= dict.fromkeys([*candidates, *blocks], length)
        before = blocks
    return found


@pytest.mark.parametrize("twin", (reference, pytest.param(triton_residency, marks=pytest.mark.gpu)))
def test_candidates_are_the_chains_own_whoever_runs_beside_it(twin, device):
    """Slots 1.25 x the blocks of three chains. The others change all that they want, come and go."""
    start, steps, width, most, share = 129, 400, 140, 8, 10
    on, walk = device if twin is triton_residency else torch.device("cpu"), _walk(steps, start, 0.15, 1)
    walk = [[row + [-1] * (most - 5) for row in rows] for rows in walk]
    table = [[1 + chain * width + i for i in range(width)] for chain in range(3)]
    seen: list[list[torch.Tensor]] = []
    for crowd in (False, True):
        state = State(on, twin, 1, num_pages=430, num_slots=3 * share, most=most)
        dice, waited = random.Random(5), 0
        seen.append([])
        for length, blocks in enumerate(walk, start):
            members = [(table[0], 1, length, blocks)]
            for chain in (1, 2) if crowd else ():
                if length % 50 < 40 or chain == 1:
                    last = (length - 1) // BLOCK
                    other = [sorted({0, last, *(dice.randrange(last) for _ in range(most - 2))}) for _ in range(HEADS)]
                    members.append((table[chain], chain + 1, length, [b + [-1] * (most - len(b)) for b in other]))
                else:
                    for kept in state.history[1:]:
                        kept[chain + 1] = 0  # somebody else takes this seat
            dice.shuffle(members)
            tables, seats, lengths, chosen = map(list, zip(*members, strict=True))
            out = state.step(tables, seats, lengths, chosen, chosen, "union", 2.0)
            seen[-1].append(out[0][seats.index(1)])
            waited += length > start and bool((out[1][seats.index(1)] >= 0).any())
        assert waited > steps / 16 if crowd else waited == 0
        assert crowd or int(state.counters[COUNTERS.index("returned")]) > steps / 16
    for alone, beside in zip(*seen, strict=True):
        assert torch.equal(alone, beside)
    for head in range(HEADS):
        expected = _union([blocks[head] for blocks in walk], start, share, most, BLOCK)
        assert [[b for b in step[head].tolist() if b >= 0] for step in seen[0]] == expected


def test_a_chain_holds_no_more_than_its_share_and_nothing_for_ever(device):
    """Of ties all or none: two blocks were wanted at one length, and only one more would fit."""
    for twin in (reference, triton_residency):
        state = State(device if twin is triton_residency else torch.device("cpu"), twin, 1, num_slots=7, seats=2)
        table, at = [[*range(1, 40)]], 150
        state.step(table, [1], [at - 1], [[[0, 1, 2, 36, 37]] * HEADS], [[[0, 1, 2, 36, 37]] * HEADS], "union", 2.0)
        row = state.history.wanted_at[1]
        row[0, 5], row[0, 6], row[1, 5], row[1, 6] = at - OLDEST, at - OLDEST - 1, at - 9, at - 10
        row[1, 7] = row[1, 8] = at - 11
        chosen = [[[0, 5, 6, 8, 37]] * HEADS]
        out = state.step(table, [1], [at], chosen, chosen, "union", 2.0)
        assert out[0][0].tolist() == [[0, 1, 2, 5, 36, 37, -1, -1], [0, 1, 2, 5, 6, 36, 37, -1]]
        assert [sorted(keys) for keys in out[1][0].tolist()] == [[-1] * 6 + [6], [-1] * 5 + [6, 7]]
        assert state.counters[COUNTERS.index("returned")] == 3 and state.counters[COUNTERS.index("lost")] == HEADS


def test_what_finds_no_slot_is_fetched_when_it_is_wanted(device):
    """Six slots, four of them attended: of three new blocks two come in ahead, and the step that wants all waits."""
    for twin in (reference, triton_residency):
        state = State(device if twin is triton_residency else torch.device("cpu"), twin, 1, num_slots=6, seats=2)
        table, before, after = [[*range(1, 12)]], [[[0, 1, 2, 3, 9]] * HEADS], [[[0, 5, 6, 7, 9]] * HEADS]
        state.step(table, [1], [37], before, before, "previous", 2.0)
        out = state.step(table, [1], [38], before, after, "previous", 2.0)
        assert out[6].tolist() == [2] * HEADS and out[7][:, 0].tolist() == [6, 7]
        out = state.step(table, [1], [39], after, after, "previous", 2.0)
        assert out[3].tolist() == [1] * HEADS and out[4][:, 0].tolist() == [8]
        assert state.counters[COUNTERS.index("lost")] == HEADS
        assert out[0][0, 0].tolist() == [0, 5, 6, 7, 9, -1]


@pytest.mark.parametrize("margin, waits", ((0.4, True), (0.6, False)))
def test_a_missing_block_that_stands_out_is_waited_for(margin, waits, device):
    """One block of eight is new, and half way up: the margin decides. A new one that is resident is not missing."""
    for twin in (reference, triton_residency):
        state = State(device if twin is triton_residency else torch.device("cpu"), twin, 1, most=8)
        table, scores = [[*range(1, 12)]], torch.zeros((1, HEADS, 11))
        scores[..., 0], scores[..., 9] = 1.0, 0.5
        before, after = [[[0, 2, 3, 4, 5, 6, 8, 10]] * HEADS], [[[0, 2, 3, 4, 5, 6, 9, 10]] * HEADS]
        state.step(table, [1], [42], before, before, "union", 2.0, scores, margin)
        out = state.step(table, [1], [43], after, after, "union", 2.0, scores, margin)
        assert (10 in out[1][0, 0].tolist()) == (9 in out[0][0, 0].tolist()) == waits
        assert int(state.counters[COUNTERS.index("drifted")]) == HEADS * waits
        again = state.step(table, [1], [44], before, before, "union", 2.0, scores.flip(2), margin)
        assert (again[1] == -1).all(), "8 is in a slot still"


@pytest.mark.gpu
def test_a_device_takes_the_time_of_loads(device):
    """Of loads that load something; nothing to load adds nothing."""
    state, clock = State(device, triton_residency, 1, num_slots=8), torch.zeros(CLOCK, dtype=torch.int64, device=device)
    own, pages = (
        Slots(*(x[0] for x in state.slots)),
        [torch.ones((40, HEADS, BLOCK, 64)).pin_memory() for _ in range(2)],
    )
    store = [torch.zeros((HEADS * 8, BLOCK, 64), device=device) for _ in range(2)]
    total = torch.zeros(1, dtype=torch.int64, device=device)
    seen = []
    triton_copies.add_time(total, -1)
    for key in (3, 3, 5, -1, -1):
        state.tick += 1
        keys = torch.full((1, HEADS, 1), key, dtype=torch.int32, device=device)
        loads, counts = triton_residency.claim_slots(keys, own, state.tick, state.counter)
        triton_copies.load_blocks(pages, loads, counts, store, 8, 0, clock)
        seen.append(int(clock[2]))
    triton_copies.add_time(total, 1)
    assert 0 < seen[0] == seen[1] < seen[2] == seen[3] == seen[4] < int(total)
