"""Prompts that are dense only up to a point (protocol B): the rest runs token by token as decode steps do."""

import pytest
import torch
from tiny_decoder import make_engine, params, prompts, serve, tiny_model
from toy_engine import SPEC, ToyBackend, ToyModel, greedy, prompt, request, run, tokens_of, toy_engine, truth

from slipstream.engine.engine import Engine, EngineConfig
from slipstream.engine.request import Request
from slipstream.kvcache.pool import KVPool
from slipstream.types import SamplingParams

BOTH = pytest.mark.parametrize("overlap", [False, True])


class Noting(ToyBackend):
    """Notes of each step the (seat, position) of its decode rows, and of the others."""

    def __init__(self, pool):
        super().__init__(pool)
        self.steps = []

    def plan(self, batch):
        super().plan(batch)
        seats, starts, count = batch.seats.tolist(), batch.query_start_host, batch.num_decodes
        positions = batch.positions.tolist()
        rows = [(seats[b], at) for b in range(batch.num_requests) for at in positions[starts[b] : starts[b + 1]]]
        assert starts[count] == count, "decode rows have one token each and come first"
        self.steps.append((rows[:count], rows[count:]))


def noting_engine(num_pages=64, **config):
    pool = KVPool(1, num_pages, 1, 4, 2, torch.float32)
    return Engine(ToyModel(), SPEC, pool, Noting(pool), EngineConfig(**config))


@BOTH
@pytest.mark.parametrize("budget", [1, 7, 64])
@pytest.mark.parametrize("dense", [1, 7, 8, 15, 16])
def test_the_rest_of_the_prompt_runs_one_token_a_step_among_the_decode_rows(overlap, budget, dense):
    engine = noting_engine(overlap=overlap, max_batch_tokens=budget)
    ids = prompt(0, 16)
    (one,) = run(engine, request(ids, greedy(5), dense_tokens=dense))
    assert tokens_of(one) == [truth(ids, one.params)]
    steps = [s for s in engine.backend.steps if s[0] or s[1]]
    prefilled = [at for decodes, rest in steps for _, at in rest]
    decoded = [[at for _, at in decodes] for decodes, _ in steps if decodes]
    assert prefilled == list(range(dense)) and decoded == [[at] for at in range(dense, 16 + 4)]


@BOTH
def test_siblings_fork_where_the_prompt_ends(overlap):
    engine = noting_engine(overlap=overlap)
    ids, own = prompt(1, 13), SamplingParams(temperature=0.9, seed=5, n=3, max_tokens=7, ignore_eos=True)
    (one,) = run(engine, request(ids, own, dense_tokens=10))
    assert tokens_of(one) == [truth(ids, own, i) for i in range(3)]
    assert [len(decodes) for decodes, _ in engine.backend.steps if decodes] == [1] * 3 + [3] * 6
    assert engine.table.num_used == 0


@BOTH
def test_prompts_in_their_forced_part_run_together_and_hold_nobody_up(overlap):
    engine = noting_engine(overlap=overlap, max_batch_tokens=40)
    work = [request(prompt(i, 20), greedy(12), dense_tokens=6 + i) for i in range(3)]
    for one in work:
        engine.add(one)
    for _ in range(3):
        engine.step()
    late = request(prompt(9, 9), greedy(12))
    run(engine, late)
    widths = [(len(decodes), len(rest)) for decodes, rest in engine.backend.steps]
    assert widths[:5] == [(0, 6 + 7 + 8), (3, 0), (3, 0), (3, 9), (4, 0)]  # the late prompt did not wait for the others
    for one in (*work, late):
        assert tokens_of(one) == [truth(one.prompt_ids, one.params)]


@BOTH
def test_prefixes_are_shared_up_to_the_dense_tokens_only(overlap):
    engine = toy_engine(overlap=overlap)
    ids = prompt(2, 24)
    (first,) = run(engine, request(ids, greedy(9), dense_tokens=10))
    assert engine.table.num_cached == 2  # pages of 4: what ran as decode steps is nobody else's
    (plain,) = run(engine, request(ids, greedy(9)))
    assert plain.metrics.num_cached_tokens == 8 and engine.table.num_cached > 5
    (again,) = run(engine, request(ids, greedy(9), dense_tokens=10))
    assert again.metrics.num_cached_tokens == 9  # all but the last dense token, whatever else the cache has
    assert tokens_of(first) == tokens_of(plain) == tokens_of(again) == [truth(ids, greedy(9))]


@BOTH
def test_a_preempted_chain_runs_its_tokens_as_decode_steps_again(overlap):
    engine = noting_engine(overlap=overlap)
    ids = prompt(3, 12)
    one = request(ids, greedy(20), dense_tokens=9)
    engine.add(one)
    while len(one.completions[0].token_ids) < 6:
        engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    before = len(engine.backend.steps)
    run(engine)
    assert tokens_of(one) == [truth(ids, one.params)]
    assert all(at < 9 for _, rest in engine.backend.steps[before:] for _, at in rest)


@BOTH
@pytest.mark.parametrize("n", [1, 2])
def test_known_tokens_that_only_one_chain_goes_on_from_run_through_decode_steps(overlap, n):
    """With n = 2 the last of them does not: two chains draw from it."""
    engine = noting_engine(overlap=overlap)
    engine.runner._buckets = [3, 8]  # padded as captured steps are
    mixed, launch = [], engine.runner._launch_mixed
    engine.runner._launch_mixed = lambda plan: (mixed.append([(k.start, k.count) for k in plan.chunks]), launch(plan))[
        1
    ]
    own = SamplingParams(temperature=0.9, seed=5, n=n, max_tokens=7, ignore_eos=True, logprobs=1)
    one, other = request(prompt(1, 13), own, dense_tokens=10), request(prompt(2, 4), greedy(9))
    run(engine, one, other)
    assert mixed == [[(0, 10), (0, 4)]] + [[(12, 1)]] * (n - 1)
    assert tokens_of(one) == [truth(one.prompt_ids, own, i) for i in range(n)]
    assert tokens_of(other) == [truth(other.prompt_ids, other.params)]
    for completion in one.completions:
        assert [token in entry for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)] == [
            True
        ] * 7


def test_scores_are_the_same():
    engine, ids = toy_engine(max_batch_tokens=6), prompt(4, 21)
    plain, forced = Request.to_score(ids[:8], ids[8:]), Request.to_score(ids[:8], ids[8:])
    forced.dense_tokens = 11
    run(engine, plain)
    engine.table.forget()
    run(engine, forced)
    assert forced.scores == pytest.approx(plain.scores, abs=1e-6)


@BOTH
def test_full_attention_gives_a_real_decoder_the_same_tokens(overlap):
    model = tiny_model()
    plain = serve(make_engine(model), *(Request(ids, params(i)) for i, ids in enumerate(prompts(6))))
    engine = make_engine(model, overlap=overlap, max_batch_tokens=24, max_num_seqs=4)
    work = [Request(ids, params(i), dense_tokens=1 + len(ids) // 2) for i, ids in enumerate(prompts(6))]
    assert serve(engine, *work) == plain


@pytest.mark.parametrize("dense", [0, 6, -1, 2.0, True, "3"])
def test_dense_tokens_lie_in_the_prompt(dense):
    with pytest.raises(ValueError, match=r"dense_tokens = .* 1\.\.5, for a prompt of 5 tokens"):
        toy_engine().add(request(prompt(0, 5), dense_tokens=dense))
