"""A step as integers: a runner that is told steps does what the one does that has the scheduler, whatever happens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuzz import ACTION, Session
from toy_engine import greedy, request, run, toy_engine

from slipstream.engine.request import Request
from slipstream.scale.wire import Mirror, write_plan
from slipstream.types import SamplingParams


class Twins:
    """Two runners with a model, a pool and seats each; the second knows only what crossed the wire."""

    def __init__(self, engine, other):
        self.engine, self.runner, self.other, self.mirror = engine, engine.runner, other, Mirror()

    def launch(self, plan):
        numbers = write_plan(plan)
        assert all(type(number) in (int, bool) for number in numbers)
        pending = self.runner.launch(plan)
        twin = self.other.runner.launch(self.mirror.read_plan(np.array(numbers, dtype=np.int64).tolist()))
        assert twin.read().tokens == pending.read().tokens
        self.check()
        return pending

    def check(self):
        ours, theirs = self.runner.seats, self.other.runner.seats
        assert torch.equal(ours.last_token, theirs.last_token) and torch.equal(ours.length, theirs.length)
        assert torch.equal(ours.table, theirs.table)
        for own, other in zip(ours.sampling, theirs.sampling, strict=True):
            assert torch.equal(own, other)
        for own, other in ((self.engine.pool.k, self.other.pool.k), (self.engine.pool.v, self.other.pool.v)):
            assert torch.equal(own.nan_to_num(-1.0), other.nan_to_num(-1.0))

    def __getattr__(self, name):
        return getattr(self.runner, name)


def twins(**config):
    engine = toy_engine(**config)
    engine.runner = Twins(engine, toy_engine(**config))
    return engine


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTION, min_size=5, max_size=30), st.integers(12, 24), st.integers(3, 5), st.sampled_from([1, 9, 64]))
def test_any_life_of_the_engine_on_two_ranks(actions, num_pages, seats, budget):
    session = Session(num_pages=num_pages, max_num_seqs=seats, max_batch_tokens=budget, overlap=True)
    config = {"num_pages": num_pages, "max_num_seqs": seats, "max_batch_tokens": budget}
    session.engine.runner = Twins(session.engine, toy_engine(**config))
    for kind, *args in actions:
        session.act(kind, *args)
    while session.engine.has_work():
        session.step()
    session.check()


def test_sampling_parameters_arrive_to_the_bit():
    engine = twins()
    for seed, more in enumerate(({"temperature": 0.3}, {"top_p": 0.1 + 0.2}, {"min_p": 1e-300}, {"top_k": -1})):
        params = SamplingParams(n=2, seed=2**62 + seed, min_tokens=3, stop_token_ids=(5, 7), max_tokens=9, **more)
        run(engine, Request([1, 2, 3 + seed], params))
    assert engine.stats()["steps"] > 8


def test_prompt_scores_are_computed_on_both_ranks():
    """They take the projection to the vocabulary, which ranks do together: the second must know which rows."""
    engine = twins(max_batch_tokens=4)
    calls = {engine: 0, engine.runner.other: 0}
    for one in calls:
        model = one.runner._model if one is not engine else engine.runner.runner._model

        def counted(hidden, one=one, logits=model.logits):
            calls[one] += hidden.shape[0]
            return logits(hidden)

        model.logits = counted
    run(engine, Request.to_score([1, 2, 3, 4, 5], [6, 7, 8]), request([3, 1], greedy(prompt_logprobs=2)))
    assert len(set(calls.values())) == 1 and calls[engine] >= 4
