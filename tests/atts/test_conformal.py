"""The controller against its definitions, two independent libraries, and streams made to break it."""

import math
import random
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.atts.conformal import MODES, Conformal, Controller, Martingale, SortedPool, p_value

ADAPTIVE = ("per-question", "marginal")
STREAMS = {
    "constant": lambda n, r: [1.0] * n,
    "rising": lambda n, r: [float(i) for i in range(n)],
    "falling": lambda n, r: [-float(i) for i in range(n)],
    "alternating": lambda n, r: [float(i % 2) for i in range(n)],
    "random": lambda n, r: [r.random() for _ in range(n)],
    "steps": lambda n, r: [float(i // 97) * (-1) ** (i // 97) for i in range(n)],
    "infinite": lambda n, r: [math.inf if r.random() < 0.7 else r.random() for _ in range(n)],
}


def decide_all(config, scores, questions=5, turns=12):
    controller = Controller(config)
    made = [controller.decide(f"q{i % questions}", i // questions % turns, x) for i, x in enumerate(scores)]
    return made, controller


def worst_of_all_windows(rejected, alpha):
    """max over all windows of w tests of |rate - alpha| * w, for every w: it may never pass (1 + 2 gamma) / gamma."""
    walk = np.concatenate([[0.0], np.cumsum(np.array(rejected, float) - alpha)])
    return walk.max() - walk.min()


@pytest.mark.parametrize("mode", ADAPTIVE)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.9])
def test_the_bound_holds_in_every_window_of_every_length(stream, mode, alpha):
    scores = STREAMS[stream](1500, random.Random(3))
    for gamma, gamma_question in ((0.1, 0.07), (0.02, 0.5), (1.0, 1.0)):
        config = Conformal(alpha=alpha, mode=mode, gamma=gamma, gamma_question=gamma_question, window=50)
        made, controller = decide_all(config, scores)
        assert worst_of_all_windows([d.rejected for d in made], alpha) <= (1 + 2 * gamma) / gamma + 1e-9
        certificate = controller.certificate()
        assert certificate.holds and certificate.worst_window <= certificate.window_bound


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.floats(allow_nan=False)), max_size=200))
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_for_any_stream(tests):
    controller = Controller(Conformal(alpha=0.25, gamma=0.2, gamma_turn=0.3, gamma_question=0.4))
    rejected = [controller.decide(question, turn, score).rejected for question, turn, score in tests]
    assert worst_of_all_windows(rejected, 0.25) <= 1.4 / 0.2 + 1e-9


def test_an_adversary_that_sees_every_decision_does_not_break_the_bound():
    """It feeds the highest score after an acceptance and the lowest after a rejection, and the other way round."""
    for sign in (1, -1):
        controller, score, rejected = Controller(Conformal(alpha=0.4)), 0.0, []
        for i in range(3000):
            taken = controller.decide(i % 3, i % 9, score).rejected
            rejected.append(taken)
            score = sign * (-1.0 if taken else 1.0) * i
        assert worst_of_all_windows(rejected, 0.4) <= 12 + 1e-9


@pytest.mark.parametrize("mode", ADAPTIVE)
def test_the_integrator_is_the_certificate(mode):
    """n (alpha - rate) = a / gamma, overall and in every group, to 1e-9."""
    config = Conformal(alpha=0.37, mode=mode)
    made, controller = decide_all(config, STREAMS["random"](5000, random.Random(0)))
    found = controller.certificate()
    assert found.tests * (0.37 - found.rate) == pytest.approx(found.integrator / config.gamma, abs=1e-9)
    for groups, key in ((found.turns, lambda i: min(i // 5 % 12, 7)), (found.questions, lambda i: f"q{i % 5}")):
        for name, group in groups.items():
            own = [d.rejected for i, d in enumerate(made) if key(i) == name]
            assert (group.tests, group.rejected) == (len(own), sum(own))
            assert group.debt == pytest.approx(0.37 * len(own) - sum(own), abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_alpha_zero_and_one_are_draft_only_and_target_only(mode):
    scores = STREAMS["random"](300, random.Random(1))
    assert not any(d.rejected for d in decide_all(Conformal(alpha=0, mode=mode), scores)[0])
    assert all(d.rejected for d in decide_all(Conformal(alpha=1, mode=mode), scores)[0])


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, 1e-12]), st.floats(allow_nan=False)), max_size=300))
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_however_alpha_moves(tests):
    controller, walk = Controller(Conformal(window=10, gamma=0.2, gamma_turn=0.3)), [0.0]
    for alpha, score in tests:
        walk.append(walk[-1] + controller.decide(0, 0, score, alpha).rejected - alpha)
    found = controller.certificate()
    assert max(walk) - min(walk) <= 1.4 / 0.2 + 1e-9
    assert found.holds and found.window_bound == pytest.approx(1.4 / (0.2 * 10))


def test_one_rejection_does_not_let_the_next_doubtful_turn_pass():
    """At a small alpha, a run of doubtful turns among ordinary ones: nearly all are found, as a ranking would."""
    draw, found = random.Random(0), {}
    stream = [(i % 50, i // 50 % 8, (5.0 if draw.random() < 0.05 else 0.0) + draw.random()) for i in range(8000)]
    for mode in ADAPTIVE:
        controller = Controller(Conformal(alpha=0.1, mode=mode))
        rejected = [controller.decide(*test).rejected for test in stream]
        found[mode] = sum(r for r, (*_, x) in zip(rejected, stream, strict=True) if x > 2) / sum(
            x > 2 for *_, x in stream
        )
        assert abs(sum(rejected) / len(rejected) - 0.1) < 0.002
    assert found["marginal"] > 0.85 and found["per-question"] > 0.75, found


def test_p_values_are_those_of_crepes(monkeypatch):
    if find_spec("sklearn") is None:  # crepes imports it, but not for p-values
        for name, needed in (("sklearn", ""), ("sklearn.neighbors", "NearestNeighbors"),
                             ("sklearn.preprocessing", "MinMaxScaler")):  # fmt: skip
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
            setattr(sys.modules[name], needed, object)
    crepes = pytest.importorskip("crepes.base")
    draw = np.random.default_rng(0)
    calibration, tests = draw.integers(0, 40, 700) / 4.0, draw.integers(-2, 44, 300) / 4.0  # ties, and beyond both ends
    expected = crepes.p_values_batch(calibration, tests, smoothing=True, seed=11)
    us = np.random.RandomState(11).rand(len(tests))
    pool = SortedPool(calibration.tolist())
    ours = [p_value(pool, score, u) for score, u in zip(tests.tolist(), us.tolist(), strict=True)]
    assert np.abs(np.array(ours) - expected).max() < 1e-12


def test_the_martingale_is_that_of_online_cp():
    jumper = pytest.importorskip("online_cp").SimpleJumper(J=0.01)
    ours, draw = Martingale(), random.Random(2)
    for i in range(600):
        p = draw.random() ** (1 if i < 300 else 3)
        jumper.update(p)
        ours.update(p)
        assert ours.log_wealth == pytest.approx(jumper.logM, abs=1e-9)
    assert ours.log_peak > math.log(100)


def test_p_is_uniform_under_permutation():
    """Exchangeable scores with many ties: the online p-values are independent and uniform; a test would see 0.02."""
    draw = random.Random(4)
    scores = [draw.randrange(7) / 2 for _ in range(20000)]
    pool, found = SortedPool(), []
    for score in scores:
        found.append(p_value(pool, score, draw.random()))
        pool.add(score)
    found.sort()
    assert max(abs((i + 0.5) / len(found) - p) for i, p in enumerate(found)) < 1.63 / len(found) ** 0.5
    martingale = Martingale()
    draw.shuffle(found)
    for p in found:
        martingale.update(p)
    assert martingale.log_peak < math.log(100)


@given(st.lists(st.floats(-5, 5).map(lambda x: round(x, 1)), max_size=300), st.floats(-6, 6).map(lambda x: round(x, 1)))
@settings(max_examples=100, deadline=None)
def test_the_pool_ranks_as_a_list_does(scores, asked):
    pool = SortedPool(scores[: len(scores) // 2])
    pool._BLOCK = 4  # many blocks, splits on the way
    for score in scores[len(scores) // 2 :]:
        pool.add(score)
    assert pool.rank(asked) == (sum(s > asked for s in scores), sum(s == asked for s in scores))
    assert len(pool) == len(scores)


def test_the_same_tests_give_the_same_decisions_and_other_seeds_others():
    scores = STREAMS["random"](400, random.Random(9))
    assert decide_all(Conformal(seed=1), scores)[0] == decide_all(Conformal(seed=1), scores)[0]
    assert decide_all(Conformal(seed=1), scores)[0] != decide_all(Conformal(seed=2), scores)[0]


def test_static_is_the_papers_and_says_when_it_does_not_hold():
    """Later turns are more doubtful than first turns: the static rate drifts off, the martingale sees it."""
    draw = random.Random(0)
    controller = Controller(Conformal(alpha=0.2, mode="static"), [draw.gauss(0, 1) for _ in range(500)])
    rejected = [controller.decide(0, i // 200, draw.gauss(i // 200, 1)).rejected for i in range(800)]
    found = controller.certificate()
    assert sum(rejected[:200]) / 200 == pytest.approx(0.2, abs=0.08) and sum(rejected[600:]) / 200 > 0.8
    assert found.window_bound is None and not found.exchangeable
    same = Controller(Conformal(alpha=0.2, mode="static"))  # without an offline pass: against the first turns so far
    assert same.decide(0, 0, 1.0).p <= 1 and same.certificate().exchangeable


def test_the_coin_does_not_look():
    draws = [decide_all(Conformal(mode="coin"), [x] * 500)[0] for x in (0.0, 5.0)]
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.01}, "alpha must be a share in"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": True}, "alpha"),
        ({"mode": "per-qestion"}, "did you mean 'per-question'"),
        ({"gamma": 0}, "gamma"),
        ({"gamma": 1e-320}, "gamma"),  # its bound would be infinite, which no JSON says
        ({"gamma_turn": float("nan")}, "gamma_turn"),
        ({"gamma_question": float("inf")}, "gamma_question"),
        ({"turn_bins": 0}, "turn_bins"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Conformal(**options)


def test_nan_is_no_score():
    with pytest.raises(ValueError, match="NaN"):
        Controller(Conformal()).decide(0, 0, math.nan)
