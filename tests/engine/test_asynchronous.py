"""The asynchronous face: the Generator protocol, many waiters, cancellation, several event loops, sudden death."""

import asyncio
import threading
import time

import pytest
import torch
from toy_engine import greedy, hash_of, logits_of, prompt, request, toy_engine, truth

from slipstream.engine.asynchronous import AsyncEngine, _Listener
from slipstream.types import Generator, SamplingParams


def make(make_stop_check=None, delay=0.0, **config):
    engine = toy_engine(**config)
    model = engine.runner._model
    if delay:
        forward = model.forward
        model.forward = lambda *args: (time.sleep(delay), forward(*args))[1]
    return AsyncEngine(engine, make_stop_check)


async def until(true):
    for _ in range(5000):
        if true():
            return
        await asyncio.sleep(0.002)
    raise TimeoutError


def at_rest(generator):
    """Wait until the worker has nothing to do; then everything must be given back."""
    end = time.monotonic() + 10
    while generator._engine.has_work() and time.monotonic() < end:
        time.sleep(0.002)
    assert generator.stats()["pages_used"] == 0 and not generator._listeners


def test_it_is_a_generator():
    generator = make()
    assert isinstance(generator, Generator)
    generator.close()
    generator.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_many_at_once_get_their_own_tokens(overlap):
    async def main():
        params = [SamplingParams(seed=i, n=1 + i % 3, max_tokens=5 + i) for i in range(12)]
        prompts = [prompt(i, 3 + 2 * i) for i in range(12)]
        results = await asyncio.gather(*map(generator.generate, prompts, params))
        for ids, own, chains in zip(prompts, params, results, strict=True):
            assert [c.token_ids for c in chains] == [truth(ids, own, i) for i in range(own.n)]

    generator = make(overlap=overlap, max_num_seqs=5)
    asyncio.run(main())
    at_rest(generator)
    generator.close()


def test_stream_interleaves_chains_and_ends_each_once():
    async def main():
        seen, ends = [[], []], [None, None]
        async for delta in generator.stream(prompt(0, 6), SamplingParams(n=2, seed=3, max_tokens=9, ignore_eos=True)):
            assert ends[delta.index] is None
            seen[delta.index] += delta.token_ids
            ends[delta.index] = delta.finish_reason
        assert seen == [truth(prompt(0, 6), SamplingParams(seed=3, max_tokens=9, ignore_eos=True), i) for i in range(2)]
        assert ends == ["length", "length"]

    generator = make()
    asyncio.run(main())
    generator.close()


def test_score_then_extend_reuses_the_cache():
    async def main():
        ids = prompt(4, 22)
        states = torch.tensor([hash_of(ids[:at]) for at in range(9, 22)])
        expected = logits_of(states).log_softmax(-1)[range(13), ids[9:]].tolist()
        assert await generator.score(ids[:9], ids[9:]) == pytest.approx(expected, abs=1e-5)
        before = generator.stats()["prefill_tokens"]
        completion = await generator.extend(ids, greedy(5))
        assert completion.token_ids == truth(ids, greedy(5))
        assert generator.stats()["prefill_tokens"] - before < 4
        with pytest.raises(ValueError, match="n = 2"):
            await generator.extend(ids, greedy(5, n=2))

    generator = make()
    asyncio.run(main())
    generator.close()


def test_cancelling_the_task_or_leaving_the_stream_cancels_the_request():
    async def main():
        task = asyncio.create_task(generator.generate(prompt(0, 5), greedy(80)))
        await until(lambda: generator.stats()["decode_tokens"] > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = generator.stream(prompt(1, 5), greedy(80))
        async for _ in stream:
            break
        await stream.aclose()

    generator = make(delay=0.002)
    asyncio.run(main())
    at_rest(generator)
    assert generator.stats()["decode_tokens"] < 100
    generator.close()


def test_cancel_by_id_hands_out_what_there_is():
    async def main():
        task = asyncio.create_task(generator.generate(prompt(0, 5), greedy(80, n=2), request_id="mine"))
        await until(lambda: generator.stats()["decode_tokens"] > 0)
        with pytest.raises(ValueError, match="in use"):
            await generator.generate(prompt(0, 5), greedy(1), request_id="mine")
        assert generator.cancel("mine") is True
        chains = await task
        assert [c.finish_reason for c in chains] == ["abort", "abort"]
        assert 0 < len(chains[0].token_ids) < 80
        assert chains[0].token_ids == truth(prompt(0, 5), greedy(80))[: len(chains[0].token_ids)]
        assert generator.cancel("mine") is False and generator.cancel("unknown") is False

    generator = make(delay=0.002)
    asyncio.run(main())
    at_rest(generator)
    generator.close()


def test_several_event_loops_share_one_engine():
    generator, results = make(max_num_seqs=3), {}

    def serve(i):
        results[i] = asyncio.run(generator.generate(prompt(i, 6), greedy(12)))[0].token_ids

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {i: truth(prompt(i, 6), greedy(12)) for i in range(5)}
    at_rest(generator)
    generator.close()


def test_a_loop_that_closes_with_requests_open_leaves_nothing_behind():
    generator, loop = make(delay=0.002), asyncio.new_event_loop()
    generator._submit(request(prompt(0, 5), greedy(80)), _Listener(loop, wants_all=True))
    loop.close()
    (other,) = asyncio.run(generator.generate(prompt(1, 4), greedy(30)))
    assert other.token_ids == truth(prompt(1, 4), greedy(30))
    at_rest(generator)
    assert generator.stats()["decode_tokens"] < 40
    generator.close()


def test_bad_requests_raise_before_any_work():
    async def main():
        with pytest.raises(ValueError, match="empty"):
            generator.stream([], greedy(1))
        with pytest.raises(ValueError, match="vocabulary"):
            await generator.generate([10**6], greedy(1))
        with pytest.raises(ValueError, match="at least one"):
            await generator.score([], [1])
        with pytest.raises(ValueError, match="make_stop_check"):
            await generator.generate([1], greedy(1, stop="x"))
        with pytest.raises(ValueError, match="make_stop_check"):
            generator.events(request([1], greedy(1, stop="x")))

    generator = make()
    asyncio.run(main())
    assert generator.stats()["steps"] == 0 and not generator._listeners
    generator.close()


def test_stop_strings_through_the_check_that_was_given():
    def stop_after_three(params):
        return lambda index, ids: params.stop[0] if len(ids) == 3 else None

    generator = make(stop_after_three)
    (completion,) = asyncio.run(generator.generate(prompt(0, 5), greedy(20, stop="xy")))
    assert len(completion.token_ids) == 3 and completion.stop_reason == "xy"
    generator.close()


def test_a_step_that_dies_is_reported_to_its_requests_only():
    async def main():
        bad, good = await asyncio.gather(
            generator.generate([27, 1], greedy(1)), generator.generate([3, 4], greedy(1)), return_exceptions=True
        )
        assert isinstance(bad, RuntimeError) and "out of memory" in str(bad)
        if isinstance(good, RuntimeError):  # it happened to share the step
            good = await generator.generate([3, 4], greedy(1))
        assert good[0].token_ids == truth([3, 4], greedy(1))

    generator = make(fail_on=27)
    asyncio.run(main())
    at_rest(generator)
    generator.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_death_of_the_engine_reaches_everybody():
    async def main():
        with pytest.raises(RuntimeError, match="lost: index out of range in the scheduler"):
            await generator.generate([1, 2], greedy(5))
        with pytest.raises(RuntimeError, match="not running"):
            await generator.generate([1, 2], greedy(5))

    generator = make()

    def broken():
        raise IndexError("index out of range in the scheduler")

    generator._engine.scheduler.schedule = broken
    asyncio.run(main())
    generator.close()


def test_close_tells_who_waits_and_frees_the_engine_for_others():
    async def main():
        task = asyncio.create_task(generator.generate(prompt(0, 5), greedy(80)))
        await until(lambda: generator.stats()["decode_tokens"] > 0)
        await asyncio.to_thread(generator.close)
        with pytest.raises(RuntimeError, match="closed"):
            await task

    generator = make(delay=0.002, overlap=True)
    asyncio.run(main())
    engine = generator._engine
    assert not engine.has_work() and engine.table.num_used == 0
