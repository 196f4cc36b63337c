"""Golden equality 5 for the engine: whatever comes, goes, and gives way, nothing leaks and every token is right."""

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import hash_of, logits_of, prompt, toy_engine, truth

from slipstream.engine.request import Request
from slipstream.types import SamplingParams

STEM = tuple(prompt(11, 40))  # prompts share its beginnings, so that prefixes meet

ACTION = st.one_of(
    st.tuples(
        st.just("generate"),
        st.integers(1, 26),
        st.integers(0, 2),
        st.integers(1, 14),
        st.integers(1, 3),
        st.none() | st.integers(1, 26),
    ),
    st.tuples(st.just("score"), st.integers(1, 18), st.integers(1, 8)),
    st.tuples(st.just("extend"), st.integers(0, 30), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("preempt"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.integers(1, 4)),
)


@cache
def expected_tokens(ids, params, index):
    return truth(ids, params, index)


@cache
def expected_score(ids, at):
    return logits_of(torch.tensor([hash_of(ids[:at])])).log_softmax(-1)[0, ids[at]].item()


class Session:
    def __init__(self, **config):
        self.engine = toy_engine(**config)
        self.requests, self.cancelled = [], set()

    def add(self, request):
        self.engine.add(request)
        self.requests.append(request)

    def act(self, kind, *args):
        if kind == "generate":
            length, tail, max_tokens, n, dense = args
            ids = list(STEM[:length]) + [tail] * tail
            params = SamplingParams(n=n, seed=length % 3, temperature=1.0, top_k=12, max_tokens=max_tokens)
            self.add(Request(ids, params, dense_tokens=dense and min(dense, len(ids))))
        elif kind == "score":
            split, more = args
            self.add(Request.to_score(STEM[:split], STEM[split : split + more]))
        elif kind == "extend":
            finished = [r for r in self.requests if r.metrics.finished_s and r.generate and len(r.prompt_ids) < 26]
            if finished:
                one = finished[args[0] % len(finished)]
                ids = [*one.prompt_ids, *one.completions[-1].token_ids]
                self.add(Request(ids[:30], SamplingParams(seed=1, max_tokens=args[1])))
        elif kind == "cancel" and self.requests:
            one = self.requests[args[0] % len(self.requests)]
            if self.engine.cancel(one.request_id):
                self.cancelled.add(one)
        elif kind == "preempt" and self.engine.scheduler.running:
            running = self.engine.scheduler.running
            self.engine.scheduler.preempt(running[args[0] % len(running)])
        elif kind == "step":
            for _ in range(args[0]):
                self.step()

    def step(self):
        self.engine.step()
        self.engine.table.check_integrity()

    def check(self):
        for one in self.requests:
            assert one.error is None and one.metrics.finished_s is not None
            ids = tuple(one.prompt_ids)
            for completion in one.completions:
                expected = expected_tokens(ids, one.params, completion.index)
                if completion.finish_reason == "abort":
                    assert one in self.cancelled
                    expected = expected[: len(completion.token_ids)]
                assert completion.token_ids == expected
            if not one.generate and one not in self.cancelled:
                wanted = [expected_score(ids, at) for at in range(one.logprobs_start, len(ids))]
                assert torch.allclose(torch.tensor(one.scores), torch.tensor(wanted), atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(ACTION, min_size=5, max_size=40),
    st.integers(12, 24),
    st.integers(3, 5),
    st.sampled_from([1, 3, 9, 64]),
    st.booleans(),
    st.booleans(),
)
def test_any_life_of_the_engine(actions, num_pages, seats, budget, overlap, reuse):
    session = Session(
        num_pages=num_pages, max_num_seqs=seats, max_batch_tokens=budget, overlap=overlap, prefix_cache=reuse
    )
    for kind, *args in actions:
        session.act(kind, *args)
        session.engine.table.check_integrity()
    left = 4000
    while session.engine.has_work():
        session.step()
        left -= 1
        assert left, "the engine does not come to an end"
    session.check()
    engine = session.engine
    assert engine.table.num_used == 0 and not engine.scheduler.running and not engine.scheduler.waiting
    assert sorted(engine.scheduler._seats) == list(range(1, seats + 1))
    assert engine.table.num_available == num_pages - 1
