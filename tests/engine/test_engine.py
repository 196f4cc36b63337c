"""The engine end to end on the toy model: right tokens, right ends, shared prompts, scores, failures."""

import itertools
import random
import time

import pytest
import torch
from toy_engine import EOS, SPEC, VOCAB, greedy, hash_of, logits_of, prompt, request, run, tokens_of, toy_engine, truth

from slipstream.engine.engine import EngineConfig
from slipstream.engine.request import Request
from slipstream.overlap import InlineLane, ThreadLane
from slipstream.types import SamplingParams

BOTH = pytest.mark.parametrize("overlap", [False, True])


def sampled(seed, max_tokens=20, **more):
    return SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=seed, max_tokens=max_tokens, **more)


# -- tokens


@BOTH
@pytest.mark.parametrize("budget", [1, 7, 64])
def test_tokens_are_those_of_a_plain_loop_whatever_the_chunks_and_the_batch(overlap, budget):
    engine = toy_engine(overlap=overlap, max_batch_tokens=budget, max_num_seqs=4)
    params = [greedy(9), sampled(1), sampled(2), sampled(3, min_p=0.05), greedy(5), sampled(4)]
    requests = [request(prompt(i, 3 + 6 * i), p) for i, p in enumerate(params)]
    run(engine, *requests)
    for one in requests:
        assert tokens_of(one) == [truth(one.prompt_ids, one.params)]
    assert engine.table.num_used == 0 and engine.stats()["eager_steps"] > 0


class JitterLane(ThreadLane):
    """A thread that takes its time, now more, now less."""

    def submit(self, work, *args):
        return super().submit(lambda: (time.sleep(random.random() * 0.002), work(*args))[1])


@pytest.mark.parametrize("lane", [InlineLane, ThreadLane, JitterLane])
def test_any_lane_brings_back_the_same_tokens(lane):
    """Golden equality 4: results may take any time to come back while the next step runs."""
    engine = toy_engine(num_pages=24, overlap=True, max_batch_tokens=9)
    engine.runner._back = lane()
    requests = [request(prompt(i, 2 + 5 * i), sampled(i, 15, n=1 + i % 2, logprobs=1)) for i in range(6)]
    run(engine, *requests)
    for one in requests:
        assert tokens_of(one) == [truth(one.prompt_ids, one.params, i) for i in range(one.params.n)]
    engine.runner._back.close()


@BOTH
def test_padding_rows_disturb_nobody(overlap):
    """Captured steps come in a few sizes and are padded with the null seat; here they are padded but not captured."""
    engine = toy_engine(overlap=overlap, max_num_seqs=8)
    engine.runner._buckets = [3, 8]
    requests = [request(prompt(i, 2 + 3 * i), sampled(i, 6 + 2 * i)) for i in range(8)]
    run(engine, *requests)
    assert set(engine.runner._steps) == {3, 8}
    for one in requests:
        assert tokens_of(one) == [truth(one.prompt_ids, one.params)]
    seats = engine.runner.seats
    assert seats.length[0] == 0 and seats.last_token[0] == 0 and not seats.table[0].any()


@BOTH
def test_n_chains_equal_single_requests_with_their_seeds_and_share_the_prompt(overlap):
    engine = toy_engine(overlap=overlap)
    one = request(prompt(0, 18), sampled(40, n=4, ignore_eos=True))
    engine.add(one)
    engine.step()
    # 18 tokens are 5 pages, held once by all four chains
    assert engine.table.num_used == 5 and len(engine.scheduler.running) == 4
    run(engine)
    assert tokens_of(one) == [truth(one.prompt_ids, one.params, i) for i in range(4)]
    assert len({tuple(t) for t in tokens_of(one)}) > 1
    assert engine.stats()["copied_pages"] == 3 and engine.stats()["prefill_tokens"] == 18
    engine = toy_engine(overlap=overlap)
    for i in range(4):
        (alone,) = run(engine, request(one.prompt_ids, sampled(40 + i, ignore_eos=True)))
        assert tokens_of(alone) == [tokens_of(one)[i]]


@BOTH
def test_two_requests_that_do_not_fit_take_turns_and_finish(overlap):
    engine = toy_engine(num_pages=8, overlap=overlap)
    requests = run(engine, *(request(prompt(i, 12), greedy(16)) for i in range(2)))
    for one in requests:
        assert tokens_of(one) == [truth(one.prompt_ids, one.params)]
        assert one.completions[0].finish_reason == "length"


@BOTH
def test_prefix_is_reused_and_changes_nothing(overlap):
    engine = toy_engine(overlap=overlap)
    first, second = request(prompt(0, 21), greedy(6)), request(prompt(0, 21) + [3, 4], greedy(6))
    run(engine, first)
    run(engine, second)
    assert first.metrics.num_cached_tokens == 0 and second.metrics.num_cached_tokens == 20
    assert tokens_of(second) == [truth(second.prompt_ids, second.params)]
    other = request(prompt(0, 21), greedy(6), salt="someone else")
    run(engine, other)
    assert other.metrics.num_cached_tokens == 0 and tokens_of(other) == tokens_of(first)


def test_whole_prompt_in_the_cache_still_samples_its_next_token():
    engine = toy_engine()
    for _ in range(2):
        (one,) = run(engine, request(prompt(1, 16), greedy(3)))
        assert tokens_of(one) == [truth(one.prompt_ids, one.params)]
    assert one.metrics.num_cached_tokens == 15


def test_seeds_drawn_by_the_engine_are_reproducible_and_differ():
    params = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True)
    runs = [
        [tokens_of(r) for r in run(toy_engine(seed=seed), *(request(prompt(0, 5), params) for _ in range(2)))]
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1] != runs[2] and runs[0][0] != runs[0][1]


# -- ends


@BOTH
def test_ends_by_eos_stop_id_stop_string_and_length(overlap):
    engine = toy_engine(overlap=overlap)
    ids = prompt(3, 7)
    free = truth(ids, greedy(30))
    stop = free[5]
    at = free.index(stop) + 1
    by_id = request(ids, greedy(30, stop_token_ids=(stop,)))
    by_text = request(ids, greedy(30), stop_check=lambda index, t: "xyz" if len(t) == 3 else False)
    by_length = request(ids, greedy(4))
    run(engine, by_id, by_text, by_length)
    assert (tokens_of(by_id), tokens_of(by_text), tokens_of(by_length)) == ([free[:at]], [free[:3]], [free[:4]])
    ends = [(r.completions[0].finish_reason, r.completions[0].stop_reason) for r in (by_id, by_text, by_length)]
    assert ends == [("stop", stop), ("stop", "xyz"), ("length", None)]


@BOTH
def test_eos_ends_unless_ignored(overlap):
    seeds = list(itertools.islice((s for s in range(60) if EOS in truth(prompt(0, 5), sampled(s, 40))), 3))
    engine = toy_engine(overlap=overlap)
    requests = run(engine, *(request(prompt(0, 5), sampled(s, 40)) for s in seeds))
    for one in requests:
        assert one.completions[0].token_ids[-1] == EOS and one.completions[0].finish_reason == "stop"
        assert one.completions[0].stop_reason == EOS
    (on,) = run(engine, request(prompt(0, 5), sampled(seeds[0], 40, ignore_eos=True)))
    assert len(on.completions[0].token_ids) == 40


@BOTH
def test_length_of_model_and_cache_clip_what_is_open_ended(overlap):
    engine = toy_engine(overlap=overlap)
    (one,) = run(engine, request(prompt(0, 90), greedy(50)))
    assert len(one.completions[0].token_ids) == 6 and one.completions[0].finish_reason == "length"
    (one,) = run(engine, request(prompt(0, 90), greedy(None)))
    assert len(one.completions[0].token_ids) == 6
    small = toy_engine(num_pages=6, overlap=overlap)  # 20 tokens
    (one,) = run(small, request(prompt(0, 15), greedy(None)))
    assert len(one.completions[0].token_ids) == 6 and tokens_of(one) == [truth(one.prompt_ids, greedy(6))]
    (one,) = run(small, request(prompt(0, 20), greedy(1)))
    assert len(one.completions[0].token_ids) == 1


def test_deltas_add_up_to_the_completions():
    engine = toy_engine(overlap=True)
    one = request(prompt(0, 9), sampled(3, n=3, logprobs=0))
    engine.add(one)
    seen, ended = [[], [], []], []
    while engine.has_work():
        for event in engine.step():
            assert event.request is one and not ended
            seen[event.delta.index] += event.delta.token_ids
            assert event.delta.logprobs[0].keys() == set(event.delta.token_ids)
            ended += [event] if event.finished else []
    assert seen == tokens_of(one) and len(ended) == 1
    metrics = one.metrics
    assert metrics.arrival_s <= metrics.first_token_s <= metrics.finished_s
    assert metrics.num_generated == max(map(len, tokens_of(one)))


# -- log-probabilities


def log_softmax(ids):
    return logits_of(torch.tensor([hash_of(ids)])).log_softmax(-1)[0]


@BOTH
def test_logprobs_values_and_ranks(overlap):
    engine = toy_engine(overlap=overlap)
    plain, some, many = (request(prompt(5, 6), sampled(9, 7, logprobs=k)) for k in (0, 3, 20))
    silent = request(prompt(5, 6), sampled(9, 7))
    run(engine, plain, some, many, silent)
    assert silent.completions[0].logprobs is None
    for one, top in ((plain, 0), (some, 3), (many, 20)):
        completion = one.completions[0]
        assert completion.token_ids == silent.completions[0].token_ids
        for step, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            expected = log_softmax(one.prompt_ids + completion.token_ids[:step])
            best = expected.topk(top).indices.tolist()
            assert set(entry) == {token, *best}
            for candidate, found in entry.items():
                assert found.logprob == pytest.approx(expected[candidate].item(), abs=1e-5)
                assert found.rank == 1 + int((expected > expected[candidate]).sum())


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_prompt_logprobs_of_every_token_but_the_first(budget):
    engine = toy_engine(max_batch_tokens=budget)
    ids = prompt(2, 23)
    for _ in range(2):  # the second time the prompt is in the cache, and must run all the same
        (one,) = run(engine, request(ids, greedy(2, prompt_logprobs=2)))
        assert one.prompt_logprobs[0] is None and len(one.prompt_logprobs) == 23
        for at in range(1, 23):
            expected = log_softmax(ids[:at])
            assert one.prompt_logprobs[at][ids[at]].logprob == pytest.approx(expected[ids[at]].item(), abs=1e-5)
            assert set(one.prompt_logprobs[at]) == {ids[at], *expected.topk(2).indices.tolist()}


@BOTH
@pytest.mark.parametrize("split", [1, 8, 13, 16])
def test_score_is_brute_force_and_reuses_the_prefix(overlap, split):
    engine = toy_engine(overlap=overlap, max_batch_tokens=5)
    ids = prompt(7, 21)
    expected = [log_softmax(ids[:at])[ids[at]].item() for at in range(split, 21)]
    for again in range(2):
        one = Request.to_score(ids[:split], ids[split:])
        run(engine, one)
        assert one.scores == pytest.approx(expected, abs=1e-5) and one.completions == []
        assert one.metrics.num_cached_tokens == (split - 1 if again else 0)
    before = engine.stats()["prefill_tokens"]
    (one,) = run(engine, request(ids, greedy(4)))
    assert engine.stats()["prefill_tokens"] - before < 4  # less than a page
    assert tokens_of(one) == [truth(ids, greedy(4))]


def test_many_scored_rows_are_computed_in_parts(monkeypatch):
    monkeypatch.setattr("slipstream.engine.runner._MAX_LOGIT_ROWS", 4)
    engine, ids, rows = toy_engine(), prompt(7, 21), []
    whole = engine.runner._model.logits
    monkeypatch.setattr(engine.runner._model, "logits", lambda hidden: (rows.append(len(hidden)), whole(hidden))[1])
    one = Request.to_score(ids[:2], ids[2:])
    run(engine, one)
    assert rows == [4, 4, 4, 4, 3]
    assert one.scores == pytest.approx([log_softmax(ids[:at])[ids[at]].item() for at in range(2, 21)], abs=1e-5)


# -- cancelling and failing


@BOTH
def test_cancel_waiting_running_and_preempted(overlap):
    engine = toy_engine(num_pages=10, overlap=overlap)
    requests = [request(prompt(i, 9), greedy(20)) for i in range(4)]
    for one in requests:
        engine.add(one)
    while not engine.scheduler.num_preemptions:
        engine.step()
    preempted = engine.scheduler.waiting[0].request
    waiting, running = engine.scheduler.waiting[-1].request, engine.scheduler.running[0].request
    for one in (preempted, running):
        assert engine.cancel(one.request_id) and not engine.cancel(one.request_id)
        engine.table.check_integrity()
    assert waiting is not preempted and engine.cancel(waiting.request_id)
    over = [e for e in engine.step() if e.finished]
    assert {e.request for e in over} >= {preempted, running, waiting}
    run(engine)
    for one in requests:
        reason = "abort" if one in (preempted, running, waiting) else "length"
        assert one.completions[0].finish_reason == reason
        expected = truth(one.prompt_ids, one.params)
        assert one.completions[0].token_ids == expected[: len(one.completions[0].token_ids)]
    assert engine.table.num_used == 0 and not engine.cancel("unknown")


@BOTH
def test_engine_survives_a_step_that_dies(overlap):
    engine = toy_engine(overlap=overlap, fail_on=27, max_batch_tokens=12)
    well = request([t % 27 for t in prompt(0, 6)], greedy(3))
    run(engine, well)
    before, doomed, after = request([1, 2, 3], greedy(1)), request([27, 4], sampled(0, n=2)), request([5], greedy(1))
    engine.add(before)
    events = engine.step()
    engine.add(doomed)
    events += engine.step()
    assert "out of memory" in str(doomed.error) and {e.request for e in events if e.finished} == {before, doomed}
    engine.table.check_integrity()
    run(engine, after)
    assert before.error is after.error is None and tokens_of(after) == [truth([5], greedy(1))]
    assert engine.table.num_used == 0


def test_a_broken_invariant_is_not_survived(monkeypatch):
    engine = toy_engine()
    monkeypatch.setattr(engine.runner, "launch", lambda plan: [][0])
    engine.add(request([1, 2]))
    with pytest.raises(IndexError):
        engine.step()


# -- what is refused


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: request([]), "empty"),
        (lambda: request([1, VOCAB]), f"id {VOCAB} .* vocabulary of {VOCAB}"),
        (lambda: request([-1]), "id -1"),
        (lambda: request([1.5]), "integers"),
        (lambda: request("text"), "integers"),
        (lambda: request(prompt(0, 96)), "96 tokens.*95.*max_model_len = 96"),
        (lambda: request(prompt(0, 41), greedy(1)), "41 tokens.*cache holds 40"),
        (lambda: request(prompt(0, 30), greedy(12)), "41 tokens.*40.*max_tokens"),
        (lambda: request([1], greedy(n=5)), "n = 5.*4"),
        (lambda: request([1], greedy(stop="x")), "stop_token_ids"),
        (lambda: request([1, 2], logprobs_start=2), "logprobs_start = 2"),
        (lambda: Request.to_score([], [1]), "at least one"),
        (lambda: Request.to_score([1], []), "at least one"),
        (lambda: Request.to_score(prompt(0, 90), prompt(0, 7)), "97 tokens.*96"),
    ],
)
def test_bad_requests_are_refused_before_any_work(bad, message):
    engine = toy_engine(num_pages=11, max_num_seqs=4)
    with pytest.raises(ValueError, match=message):
        engine.add(bad())
    assert not engine.has_work() and engine.scheduler.table.num_used == 0


def test_an_id_is_used_once_at_a_time_and_config_is_checked():
    engine = toy_engine()
    engine.add(request([1], request_id="a"))
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add(request([2], request_id="a"))
    run(engine)
    engine.add(request([2], request_id="a"))
    for name in ("max_num_seqs", "max_model_len", "max_batch_tokens"):
        with pytest.raises(ValueError, match=name):
            EngineConfig(**{name: 0})
    assert toy_engine(max_model_len=10**6).limits.max_model_len == SPEC.max_position


def test_stats_count():
    engine = toy_engine(overlap=True)
    engine.add(request(prompt(0, 10), greedy(3)))
    engine.add(request(prompt(1, 10), greedy(3)))
    engine.step()
    stats = engine.stats()
    assert stats["running"] == 2 and stats["pages_used"] == 6 and stats["waiting"] == 0
    run(engine)
    stats = engine.stats()
    assert stats["steps"] == 3 and stats["prefill_tokens"] == 20 and stats["decode_tokens"] == 4
    assert stats["finished_requests"] == 2 and stats["pages_used"] == 0 and stats["pages_cached"] == 6
    assert stats["pages_free"] == 63 - 6 and stats["graph_replays"] == 0 and stats["eager_steps"] == 3
    assert 0 < stats["host_ms_last"] and 0 < stats["host_ms_mean"] < 1000
    assert len(engine.runner._model.steps) == 3
    engine.add(request(prompt(2, 10), greedy(3, n=2)))
    assert engine.stats()["waiting"] == 2  # chains, not requests
