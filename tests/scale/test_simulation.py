"""The simulated fleet of ``benchmarks/scale_simulated.py`` against arithmetic that can be done by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from scale_simulated import Chain, Costs, Replica, Work, measured, simulate  # noqa: E402

COSTS = Costs(base=5.0, row=1.0, token=0.001, prefill_s=1e-4, worst=0.0)


def test_one_chain_after_another_takes_what_its_parts_take():
    replica = Replica(COSTS, capacity=1e6, waiting=[Chain(0, 1000, 10.0, 0.0), Chain(0, 1000, 10.0, 0.0)])
    assert replica.admit(seats=1) == 0 and replica.now_s == pytest.approx(0.1)  # the prompt
    assert replica.end_s() == pytest.approx(0.1 + 10 * 0.007)  # 5 + 1 + 1000 tokens read
    replica.advance(replica.end_s())
    assert replica.chains.pop().left == pytest.approx(0)
    assert replica.admit(seats=1) == 1 and replica.now_s == pytest.approx(0.17)  # its prompt is there


def test_a_full_cache_forgets_the_oldest_prompt_and_admits_nobody_beyond():
    replica = Replica(COSTS, capacity=2500.0, waiting=[Chain(q, 1000, 10.0, 0.0) for q in range(3)])
    replica.admit(seats=8)
    assert len(replica.chains) == 3 and list(replica.cached) == [1, 2]
    replica.chains[0].made = 1000.0
    replica.waiting.append(Chain(7, 1000, 10.0, 0.0))
    replica.admit(seats=8)
    assert len(replica.chains) == 4 and list(replica.cached) == [7]
    replica.chains[0].made = 3000.0
    replica.waiting.append(Chain(8, 1000, 10.0, 0.0))
    replica.admit(seats=8)
    assert [chain.question for chain in replica.waiting] == [8] and 8 not in replica.cached


def test_ways_to_route_differ_as_they_should():
    work = Work(prompt=2000, generated=50.0, chains=4, pause_s=0.5)
    found = {way: simulate(COSTS, 6, way, 1.0, 60, work=work) for way in ("random", "least", "prefix")}
    assert found["prefix"]["prefix_hits"] > 0.7 > 0.4 > found["random"]["prefix_hits"]
    assert found["prefix"]["first_token_mean_s"] < found["random"]["first_token_mean_s"]
    assert found == {way: simulate(COSTS, 6, way, 1.0, 60, work=work) for way in found}


def test_costs_are_those_of_the_result_files():
    costs = measured("decode", None)
    assert costs.worst < 0.05 and 1e3 * costs.step_s(32, 32 * 16384) == pytest.approx(22.3449, rel=0.05)
