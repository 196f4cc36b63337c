"""What the scores compute, on a model with known numbers."""

import asyncio
import math

import pytest
from simulated import scale

from slipstream.atts.backends import BackendError, Turn, entropy_of
from slipstream.atts.config import ATTS
from slipstream.atts.events import Decided, Drafted
from slipstream.atts.scores import GRADE_PROMPT, SCORES, Score, View, score_of

TURN = Turn([5, 6, 7], 3, "length", logprob=-0.6, entropy=0.25)


class Known:
    name, vocabulary, can_score = "known", "v", True

    def __init__(self, logprobs=(), tops=None):
        self.logprobs, self.tops, self.asked = list(logprobs), tops or {}, None

    async def score(self, ids, start):
        self.asked = (list(ids), start)
        return self.logprobs

    async def encode(self, text):
        return list(text.encode())

    async def extend(self, ids, ask):
        self.asked = (list(ids), ask)
        return Turn([1], 1, "length", first_tops=self.tops)


def value(name, target, turn=TURN):
    return asyncio.run(score_of(name)(View([1, 2, 5, 6, 7], 2, turn, target)))


def test_perplexity_is_the_mean_over_the_whole_turn():
    target = Known([-1.0, -2.0, -6.0])
    assert value("perplexity", target) == 3.0 and target.asked == ([1, 2, 5, 6, 7], 2)


def test_the_worst_token_is_not_diluted_by_its_turn():
    assert value("worst-token", Known([-0.1, -6.0, -0.2])) == 6.0


def test_the_ratio_removes_what_is_hard_for_both():
    assert value("log-ratio", Known([-1.0, -2.0, -6.0])) == pytest.approx((-0.6 + 9.0) / 3)
    assert value("log-ratio", Known([-0.2, -0.2, -0.2])) == pytest.approx(0.0)
    assert value("log-ratio", Known([-4.5, -4.5])) == pytest.approx((-0.6 + 9.0) / 3)  # two tokens of its own


def test_scores_that_cost_the_target_nothing():
    target = Known()
    assert value("entropy", target) == 0.25 and value("draft", target) == pytest.approx(0.2) and target.asked is None
    assert not SCORES["entropy"].reads_target and not SCORES["draft"].reads_target


def test_the_grade_is_an_expectation_over_digits():
    target = Known(tops={"9": math.log(0.6), " 3": math.log(0.2), "x": math.log(0.2)})
    assert value("grade", target) == pytest.approx(-(9 * 0.6 + 3 * 0.2) / 0.8)
    ids, ask = target.asked
    assert bytes(ids[5:]).decode() == GRADE_PROMPT and (ask.max_tokens, ask.tops) == (1, 20)
    with pytest.raises(BackendError, match="no digit"):
        value("grade", Known(tops={"x": 0.0}))


@pytest.mark.parametrize("name", ["perplexity", "worst-token", "log-ratio"])
def test_no_log_probabilities_is_a_failure_never_a_zero(name):
    with pytest.raises(BackendError) as caught:
        value(name, Known([]))
    assert caught.value.kind == "empty"


@pytest.mark.parametrize("name", ["log-ratio", "entropy", "draft"])
def test_a_draft_without_its_own_is_a_failure(name):
    with pytest.raises(BackendError) as caught:
        value(name, Known([-1.0]), Turn([5], 1, "length"))
    assert caught.value.kind == "empty"


@pytest.mark.parametrize("name", ["perplexity", "worst-token"])
def test_nan_is_a_failure(name):
    with pytest.raises(BackendError) as caught:
        value(name, Known([-1.0, math.nan]))
    assert caught.value.kind == "nan"
    assert value(name, Known([-1.0, -math.inf])) == math.inf


def test_any_callable_is_a_score():
    async def slow(view):
        return len(view.ids) - view.start

    assert value(slow, Known()) == 3.0 and value(lambda view: view.turn.tokens, Known()) == 3.0
    assert score_of(own := Score(slow, reads_target=False)) is own
    outcome, *_ = scale(ATTS(score=slow, samples=2, turns=3, draft_tokens=9, takeover="continue"))
    assert {e.nll for e in outcome.events if isinstance(e, Decided)} == {9.0}
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        score_of("entropie")


def test_the_draft_is_asked_for_no_more_than_the_score_needs():
    for score, needed in (("perplexity", None), ("log-ratio", 0), ("entropy", 20)):
        asked = []
        from simulated import Model

        class Watched(Model):
            async def extend(self, ids, ask, asked=asked):
                asked.append(ask.tops)
                return await super().extend(ids, ask)

        outcome, *_ = scale(ATTS(score=score, samples=2, turns=3, draft_tokens=9), draft=Watched("draft"))
        assert set(asked) == {needed} and any(isinstance(e, Drafted) for e in outcome.events)


def test_entropy_of_a_distribution_that_is_known_in_part():
    assert entropy_of([math.log(0.5), math.log(0.5)]) == pytest.approx(math.log(2))
    assert entropy_of([math.log(0.5)]) == pytest.approx(math.log(2))  # the rest counts as one token
    assert entropy_of([0.0, -math.inf]) == 0.0
