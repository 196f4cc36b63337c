"""How doubtful is a turn of the draft? Pluggable: higher is more doubtful, infinite is allowed, NaN is a failure."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from slipstream.atts.backends import Ask, Backend, BackendError, Turn
from slipstream.types import nearest

GRADE_PROMPT = "\nOn a scale from 0 (wrong) to 9 (right), the reasoning so far deserves the grade "
_DIGITS = set("0123456789")


@dataclass(frozen=True)
class View:
    """What a score may look at.

    ids: the target's token ids of prompt, earlier turns and this turn, which begins at ``start``. turn: as the draft
    wrote it. target: for calls of its own. place: question, sample, number of the turn.
    """

    ids: Sequence[int]
    start: int
    turn: Turn
    target: Backend
    place: tuple[str, int, int] = ("", 0, 0)


Function = Callable[[View], "float | Awaitable[float]"]


@dataclass(frozen=True)
class Score:
    """A score and what it needs: the target's log-probabilities of given text, and the draft's own.

    tops: alternatives to ask of the draft beside each token; 0 for its own log-probability, None for nothing.
    """

    function: Function
    reads_target: bool = True
    tops: int | None = None

    async def __call__(self, view: View) -> float:
        value = self.function(view)
        value = await value if inspect.isawaitable(value) else value
        if math.isnan(value):
            raise BackendError("nan", "the score is not a number")
        return float(value)


async def _target_logprobs(view: View) -> list[float]:
    logprobs = await view.target.score(view.ids, view.start)
    if not logprobs:
        raise BackendError("empty", "the target gave no log-probabilities of the turn")
    if any(math.isnan(value) for value in logprobs):
        raise BackendError("nan", "a log-probability of the target is not a number")
    return logprobs


def _own(view: View) -> float:
    if view.turn.logprob is None or not view.turn.tokens:
        raise BackendError("empty", "the draft gave no log-probabilities of its turn")
    return view.turn.logprob


async def perplexity(view: View) -> float:
    """The target's log-perplexity of the turn (the paper's score, its sign turned)."""
    logprobs = await _target_logprobs(view)
    return -sum(logprobs) / len(logprobs)


async def worst_token(view: View) -> float:
    """Minus the target's log-probability of the token that it likes least: one wrong digit is one token of a turn."""
    return -min(await _target_logprobs(view))


async def log_ratio(view: View) -> float:
    """log(draft / target) per token of the draft: what is hard for both is no news. Tokenizers may differ."""
    return (_own(view) - sum(await _target_logprobs(view))) / view.turn.tokens


def entropy(view: View) -> float:
    """Mean entropy of the draft's next-token distribution (from its 20 likeliest tokens); no work for the target."""
    if view.turn.entropy is None:
        raise BackendError("empty", "the draft gave no distribution of its tokens")
    return view.turn.entropy


def draft_perplexity(view: View) -> float:
    """The draft's own log-perplexity; no work for the target."""
    return -_own(view) / view.turn.tokens


async def grade(view: View) -> float:
    """Minus the target's expected one-token grade, 0 to 9."""
    asked = [*view.ids, *await view.target.encode(GRADE_PROMPT)]
    turn = await view.target.extend(asked, Ask(1, tops=20))
    weights = {int(text): math.exp(value) for text, value in turn.first_tops.items() if text.strip() in _DIGITS}
    if not weights:
        raise BackendError("empty", "no digit is among the 20 likeliest tokens where a grade should be")
    return -sum(digit * weight for digit, weight in weights.items()) / sum(weights.values())


SCORES: dict[str, Score] = {
    "perplexity": Score(perplexity),
    "log-ratio": Score(log_ratio, tops=0),
    "worst-token": Score(worst_token),
    "entropy": Score(entropy, reads_target=False, tops=20),
    "draft": Score(draft_perplexity, reads_target=False, tops=0),
    "grade": Score(grade, reads_target=False),
}


def score_of(score: str | Score | Function) -> Score:
    """A score by name, or any callable as one. Raises ``ValueError`` for an unknown name."""
    if isinstance(score, Score):
        return score
    if callable(score):
        return Score(score, tops=0)
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; {nearest(str(score), SCORES)}")
    return SCORES[score]
