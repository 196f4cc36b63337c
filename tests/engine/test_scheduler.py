"""The scheduler alone: who runs, who waits, who gives way. Nothing here computes."""

import ast
from pathlib import Path

import pytest

import slipstream.engine.scheduler as scheduler_module
from slipstream.engine.chain import Chain
from slipstream.engine.scheduler import Scheduler
from slipstream.kvcache.table import PageTable


def make(num_pages=17, page_size=4, seats=4, budget=64, **more):
    return Scheduler(PageTable(num_pages, page_size), max_num_seqs=seats, token_budget=budget, **more)


def chain(arrival, num_prompt, max_tokens=8, index=0, **more):
    ids = [arrival * 100 + t for t in range(num_prompt)]
    return Chain(None, index, (arrival, index), ids, num_prompt + max_tokens, **more)


def land(plan):
    """What the engine does when a step's tokens arrive."""
    for chain, epoch in [*zip(plan.decodes, plan.epochs, strict=True), *(s for c in plan.chunks for s in c.samplers)]:
        if chain.epoch == epoch:
            chain.ids.append(7)


def step(scheduler):
    plan = scheduler.schedule()
    scheduler.table.check_integrity()
    if plan is not None:
        land(plan)
        for done in [c for c in scheduler.running if len(c.ids) >= c.limit]:
            scheduler.finish(done)
    return plan


def shape(plan):
    """(decoding chains, chunks as (arrival, start, count))"""
    return [c.order[0] for c in plan.decodes], [(k.chain.order[0], k.start, k.count) for k in plan.chunks]


def test_the_scheduler_knows_no_torch():
    for name in ("scheduler.py", "chain.py"):
        tree = ast.parse((Path(scheduler_module.__file__).parent / name).read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {a.name for node in top for a in node.names} | {getattr(node, "module", None) for node in top}
        assert not {n for n in names if n and (n.startswith("torch") or n == "slipstream.types")}


def test_prompts_are_cut_to_the_budget_that_decodes_leave():
    scheduler = make(budget=10)
    scheduler.add(chain(0, 3))
    scheduler.add(chain(1, 25))
    assert shape(step(scheduler)) == ([], [(0, 0, 3), (1, 0, 7)])
    assert shape(step(scheduler)) == ([0], [(1, 7, 9)])
    assert shape(step(scheduler)) == ([0], [(1, 16, 9)])
    assert shape(step(scheduler)) == ([0, 1], [])


def test_a_prompt_gets_a_token_even_when_decodes_use_the_budget_up():
    scheduler = make(budget=1)
    scheduler.add(chain(0, 1))
    scheduler.add(chain(1, 2))
    assert [shape(step(scheduler)) for _ in range(3)] == [
        ([], [(0, 0, 1)]),
        ([0], [(1, 0, 1)]),
        ([0], [(1, 1, 1)]),
    ]


def test_seats_bound_who_runs_and_are_never_the_null_seat():
    scheduler = make(seats=2)
    chains = [chain(i, 3, max_tokens=2) for i in range(3)]
    for one in chains:
        scheduler.add(one)
    step(scheduler)
    assert sorted(c.seat for c in chains) == [0, 1, 2] and len(scheduler.waiting) == 1
    step(scheduler)
    assert not scheduler.running
    step(scheduler)
    assert scheduler.running == [chains[2]] and chains[2].seat in (1, 2)


def test_counting_ends_are_exact_with_tokens_in_flight():
    """Tokens that were launched but not read count: no step is launched beyond the limit."""
    scheduler = make()
    one = chain(0, 3, max_tokens=3)
    scheduler.add(one)
    plans = [scheduler.schedule() for _ in range(4)]
    assert [p is not None for p in plans] == [True, True, True, False]
    assert one.total == one.limit == 6 and one.lease.length == 5


def test_latest_gives_way_and_comes_back_first():
    scheduler = make(num_pages=6, page_size=4)  # 5 pages: 20 tokens
    early, late = chain(0, 7, max_tokens=12), chain(1, 7, max_tokens=12)
    scheduler.add(early)
    scheduler.add(late)
    scheduler.add(chain(2, 3, max_tokens=12))
    while not scheduler.num_preemptions:
        step(scheduler)
    assert late.lease is None and late.seat == 0 and early.lease is not None
    assert [c.order[0] for c in scheduler.waiting] == [1, 2]
    while len(early.ids) < early.limit:
        step(scheduler)
    step(scheduler)
    assert late in scheduler.running


def test_two_that_do_not_fit_together_take_turns():
    scheduler = make(num_pages=4, page_size=4)
    chains = [chain(i, 5, max_tokens=7) for i in range(2)]
    for one in chains:
        scheduler.add(one)
    for _ in range(60):
        step(scheduler)
    assert [len(c.ids) for c in chains] == [12, 12]
    assert scheduler.table.num_used == 0 and not scheduler.running and not scheduler.waiting


def test_what_can_never_fit_is_refused_with_numbers():
    scheduler = make(num_pages=4, page_size=4, seats=2)
    with pytest.raises(ValueError, match="13 tokens.*12"):
        scheduler.add(chain(0, 5, max_tokens=9))
    scheduler.add(chain(0, 5, max_tokens=8))
    crowd = chain(1, 2)
    crowd.siblings = [chain(1, 2, index=i) for i in (1, 2)]
    with pytest.raises(ValueError, match="3 chains.*2"):
        scheduler.add(crowd)
    with pytest.raises(ValueError, match="token_budget"):
        make(budget=0)


def test_siblings_start_from_one_prompt_and_copy_when_they_write():
    scheduler = make(budget=6)
    leader = chain(0, 10, max_tokens=4)
    leader.siblings = siblings = [chain(0, 10, max_tokens=4, index=i) for i in (1, 2)]
    scheduler.add(leader)
    assert shape(step(scheduler)) == ([], [(0, 0, 6)])
    plan = step(scheduler)
    assert shape(plan) == ([], [(0, 6, 4)])
    assert [c for c, _ in plan.chunks[0].samplers] == [leader, *siblings]
    assert scheduler.table.num_used == 3 and not plan.copies
    plan = step(scheduler)
    assert plan.decodes == [leader, *siblings] and len(plan.copies) == 2
    assert scheduler.table.num_used == 5
    assert [c.lease.pages[:2] for c in siblings] == [leader.lease.pages[:2]] * 2


def test_siblings_wait_for_seats_of_all():
    scheduler = make(seats=2)
    scheduler.add(chain(0, 3, max_tokens=3))
    leader = chain(1, 3)
    leader.siblings = [chain(1, 3, index=1)]
    scheduler.add(leader)
    assert shape(step(scheduler)) == ([], [(0, 0, 3)])
    step(scheduler)
    step(scheduler)
    assert shape(step(scheduler)) == ([], [(1, 0, 3)])


def test_finished_prefix_is_reused_at_admission():
    scheduler = make()
    first = chain(0, 9, max_tokens=2)
    scheduler.add(first)
    step(scheduler)
    scheduler.table.commit(first.lease, first.ids, 9)
    scheduler.finish(first)
    again = chain(0, 9, max_tokens=2)
    scheduler.add(again)
    assert shape(step(scheduler)) == ([], [(0, 8, 1)])
    assert again.num_cached == 8 == scheduler.num_cached_tokens


def test_wanted_logprobs_limit_the_reuse():
    scheduler = make()
    scheduler.table.free(_filled(scheduler.table, list(range(12))))
    scores = Chain(None, 0, (0, 0), list(range(12)), 12, samples=False, wanted_from=6)
    scheduler.add(scores)
    plan = step(scheduler)
    assert shape(plan) == ([], [(0, 5, 7)]) and plan.chunks[0].samplers == []
    assert scheduler.schedule() is None


def _filled(table, ids):
    lease = table.allocate()
    table.append(lease, len(ids))
    table.commit(lease, ids, len(ids))
    return lease


def test_finish_from_anywhere_gives_everything_back():
    scheduler = make(seats=3)
    leader = chain(0, 30)
    leader.siblings = siblings = [chain(0, 30, index=1)]
    scheduler.token_budget = 10
    scheduler.add(leader)
    scheduler.add(chain(1, 3))
    step(scheduler)
    assert leader.seat and siblings[0].seat
    waiting = scheduler.waiting[0]
    for one in (leader, *siblings, waiting):
        scheduler.finish(one)
    assert not scheduler.waiting and not scheduler.running and scheduler.table.num_used == 0
    assert sorted(scheduler._seats) == [1, 2, 3]


def test_an_earlier_prompt_does_not_take_pages_from_a_chain_of_the_same_step():
    scheduler = make(num_pages=7, page_size=4, budget=2)
    early, late = chain(0, 12, max_tokens=4), chain(1, 4, max_tokens=13)
    scheduler.add(late)
    while not late.decoding:
        step(scheduler)
    scheduler.add(early)
    plans = []
    while len(late.ids) < late.limit:
        plans.append(shape(step(scheduler)))
    assert plans[:8] == [([1], [(0, t, 1)]) for t in range(8)]
    assert plans[8:] == [([1], [])] * 4  # the last page is late's: early waits for it, and nobody is thrown out
    assert scheduler.num_preemptions == 0
    while scheduler.running:
        step(scheduler)
    assert len(early.ids) == early.limit


def test_chains_that_moved_into_their_seats_need_no_pages():
    scheduler = make(num_pages=4, page_size=4, kv_in_seats=True)  # 12 tokens
    first, sibling = chain(0, 10, max_tokens=2), chain(0, 10, max_tokens=2, index=1)
    first.siblings = [sibling]
    scheduler.add(first)
    plan = scheduler.schedule()
    (chunk,) = plan.chunks
    assert chunk.heirs == [first, sibling] and first.in_seat and sibling.in_seat and sibling.lease is None
    assert scheduler.table.num_used == 3  # the step still reads them
    late = chain(1, 10, max_tokens=2)
    scheduler.add(late)
    plan = scheduler.schedule()
    assert (shape(plan), plan.lengths) == (([0, 0], []), [11, 11]) and late in scheduler.waiting
    scheduler.leave_pages(first)
    scheduler.table.check_integrity()
    assert scheduler.table.num_used == 0 and scheduler.num_pages_left == 3
    assert shape(scheduler.schedule()) == ([], [(1, 0, 10)]) and scheduler.num_preemptions == 0
    for one in (first, sibling, late):
        scheduler.finish(one)
    scheduler.table.check_integrity()
    assert len(scheduler._seats) == 4 and not first.in_seat


def test_forced_tokens_are_single_come_first_and_count_against_the_budget():
    scheduler = make(budget=8)
    scheduler.add(chain(0, 12))
    scheduler.add(chain(1, 6, num_dense=3))
    assert shape(step(scheduler)) == ([], [(0, 0, 8)])
    assert shape(step(scheduler)) == ([], [(0, 8, 4), (1, 0, 3)])
    scheduler.add(chain(2, 9))
    plan = step(scheduler)
    assert shape(plan) == ([0], [(1, 3, 1), (2, 0, 6)]) and [k.forced for k in plan.chunks] == [True, False]
    assert shape(step(scheduler)) == ([0], [(1, 4, 1), (2, 6, 3)])
    plan = step(scheduler)
    assert shape(plan) == ([0, 2], [(1, 5, 1)]) and [c for c, _ in plan.chunks[0].samplers] == [plan.chunks[0].chain]


def test_behind_the_gate_a_preempted_chain_runs_its_tokens_one_by_one_and_they_have_their_room():
    scheduler = make(num_pages=13, budget=64, gate=10)
    first, second = chain(0, 6, max_tokens=30), chain(1, 8, max_tokens=20)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(9):
        step(scheduler)
    scheduler.preempt(second)
    assert (len(second.ids), second.num_dense) == (17, 10)
    plan = step(scheduler)
    assert shape(plan) == ([0], [(1, 0, 10)]) and not plan.is_decode
    third = chain(2, 10)
    scheduler.add(third)  # three pages: as many as are free, but those are for what the second had
    for at in range(10, 17):
        plan = step(scheduler)
        assert shape(plan) == ([0], [(1, at, 1)]) and plan.is_decode and third in scheduler.waiting
    assert [c for c, _ in plan.chunks[0].samplers] == [second]
    assert shape(step(scheduler)) == ([0, 1], [])


def test_prompts_of_a_step_fit_the_stage_together():
    """With a bound on their pages, prompts wait for each other; the first always runs, however long it is."""
    scheduler = make(num_pages=60, prefill_pages=5)
    for arrival, length in enumerate((9, 8, 30, 4)):  # 3, 2, 8 and 1 pages
        scheduler.add(chain(arrival, length))
    assert [[c.count for c in step(scheduler).chunks] for _ in range(3)] == [[9, 8], [30], [4]]


def test_a_prompt_that_is_being_read_is_read_once():
    """Requests that start alike and come together: the first reads, the others take it from the cache a step later."""
    scheduler = make(num_pages=65, budget=12)
    alike = [chain(0, 10), chain(0, 10), chain(0, 10)]
    other = chain(3, 6)
    alike[2].ids[7] = 99  # the same first page only
    for arrival, one in enumerate([*alike, other]):
        one.order = (arrival, 0)
        scheduler.add(one)

    def read():
        plan = step(scheduler)
        for chunk in plan.chunks:
            scheduler.table.commit(chunk.chain.lease, chunk.chain.ids, chunk.end)
        return shape(plan)

    assert read() == ([], [(0, 0, 10)])  # alone, though there is budget for more
    assert read() == ([0], [(1, 8, 2), (2, 4, 6), (3, 0, 3)])
    assert read() == ([0, 1, 2], [(3, 3, 3)])
    assert alike[0].num_cached == 0 and alike[1].num_cached == 8 and alike[2].num_cached == 4


@pytest.mark.parametrize("why", ["salt", "scores from the start", "no cache", "not the same", "too short"])
def test_who_gains_nothing_from_the_cache_does_not_wait_for_it(why):
    scheduler = make()
    scheduler.table.reuse = why != "no cache"
    length = 4 if why == "too short" else 10
    first, second = chain(0, length), chain(0, length)
    if why == "salt":
        second.salt = "another adapter"
    elif why == "scores from the start":
        second.wanted_from = 1
    elif why == "not the same":
        second.ids[3] = 99
    scheduler.add(first)
    scheduler.add(second)
    assert len(step(scheduler).chunks) == 2


def test_of_prompts_in_pieces_only_the_first_is_read_and_the_second_follows_behind_it():
    scheduler = make(num_pages=65, budget=8)
    first, second = chain(0, 40), chain(0, 40)
    second.order = (1, 0)
    scheduler.add(first)
    scheduler.add(second)
    tokens = 0
    for _ in range(10):
        plan = step(scheduler)
        tokens += sum(chunk.count for chunk in plan.chunks)
        for chunk in plan.chunks:
            scheduler.table.commit(chunk.chain.lease, chunk.chain.ids, chunk.end)
    assert tokens == 40 + 1 and second.num_cached == 39  # the last token must run: its logits are wanted
