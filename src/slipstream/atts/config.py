"""The options of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slipstream.atts.answers import ANSWERS
from slipstream.atts.budget import Prices
from slipstream.atts.conformal import Conformal
from slipstream.atts.scores import Score, score_of
from slipstream.types import nearest, options


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@options
@dataclass(frozen=True)
class ATTS:
    """How problems are scaled: who writes, who verifies, how often, and what happens when something fails."""

    alpha: float = _help(0.3, "Share of tests that the target takes over; 0 is the draft alone, 1 the target alone.")
    mode: str = _help("marginal", "marginal, per-question, static (the paper's) or coin (control).")
    score: Any = _help("worst-token", "worst-token, perplexity, log-ratio, entropy, draft, grade; or any callable.")
    takeover: str = _help("replace", "replace: the target writes a rejected turn anew; continue: it goes on behind it.")
    samples: int = _help(16, "Chains per question.")
    turns: int = _help(15, "Most turns per chain.")
    draft_tokens: int = _help(500, "Most tokens of a draft's turn.")
    target_tokens: int = _help(500, "Most tokens of a take-over.")
    chain_tokens: int | None = _help(None, "Most tokens of a chain, prompt included; default: what the models hold.")
    temperature: float = _help(0.8, "Of both models.")
    top_p: float = _help(1.0, "Of both models.")
    token_budget: int | None = _help(None, "Most tokens that the target may write; replaces alpha.")
    cost_budget: float | None = _help(None, "Most that may be spent, in the unit of --prices; replaces alpha.")
    prices: str = _help("0,0,1", "Cost of a token: drafted, scored by the target, written by the target.")
    schedule: str = _help("async", "async: one live window; question, turn: the barriers of the synchronous twins.")
    window: int = _help(64, "Chains in flight.")
    draft_concurrency: int = _help(16, "Drafts at once.")
    score_concurrency: int = _help(16, "Scores at once.")
    target_concurrency: int = _help(4, "Take-overs at once.")
    gather: int = _help(
        16, "Scores, and take-overs, that begin together while all drafts' places are taken; 1: at once."
    )
    capacity: int | None = _help(None, "Hard limit: take-overs that may run or wait; beyond it a turn is kept.")
    on_failure: str = _help("takeover", "When a score fails: takeover, accept or drop (the chain).")
    timeout_s: float = _help(600.0, "Longest wait for one answer of a model.")
    answers: str = _help("boxed", "How answers are written: boxed, tagged (after </think>) or choice.")
    symbolic: bool = _help(False, "Compare boxed answers by math-verify where their spelling differs.")
    test_answers: bool | None = _help(None, "Test a turn of the draft that ends with an answer, too; default: replace.")
    min_turns: int = _help(1, "A chain does not stop at an answer before so many turns.")
    agreement: int = _help(1, "So many equal answers in a row end a chain.")
    nudge: str = _help("", "Text that is put behind an answer that does not end its chain.")
    settle: bool = _help(True, "Stop a question's other chains when they cannot change the majority any more.")
    loop_ngram: int = _help(8, "Loop guard: length of the n-grams that are counted; 0 is off.")
    loop_share: float = _help(0.5, "Loop guard: share of repeated n-grams from which on a turn is a loop.")
    gamma: float = _help(0.1, "Step of the integrator over all tests; (1 + 2 gamma) / (gamma w) is guaranteed.")
    gamma_turn: float = _help(0.01, "Step of the integrators per turn.")
    gamma_question: float = _help(0.075, "Step of the integrators per question.")
    seed: int = _help(0, "Of the texts and of the tests.")

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            value = str(getattr(self, name))
            if value not in valid:
                raise ValueError(f"{name} may not be {value!r}; {nearest(value, valid)}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.timeout_s > 0):
            raise ValueError("temperature must be at least 0, top_p in (0, 1], timeout_s above 0")
        if self.loop_ngram < 0 or not 0 < self.loop_share <= 1:
            raise ValueError("loop_ngram must be at least 0, loop_share in (0, 1]")
        if self.token_budget is not None and self.cost_budget is not None:
            raise ValueError("give token_budget or cost_budget, not both")
        self.conformal, self.scorer, self.price_list  # noqa: B018  raise what is wrong with them

    @property
    def conformal(self) -> Conformal:
        own = ("alpha", "mode", "gamma", "gamma_turn", "gamma_question", "seed")
        return Conformal(**{name: getattr(self, name) for name in own})

    @property
    def tests_answers(self) -> bool:
        """A wrong last turn can be written anew, but not continued."""
        return self.takeover == "replace" if self.test_answers is None else self.test_answers

    @property
    def scorer(self) -> Score:
        return score_of(self.score)

    @property
    def budget(self) -> float | None:
        return self.token_budget if self.cost_budget is None else self.cost_budget

    @property
    def price_list(self) -> Prices:
        """Of a token budget: only the target's tokens count."""
        try:
            draft, score, target = map(float, self.prices.split(","))
        except ValueError as error:
            raise ValueError(f"prices are three numbers (draft,score,target), got {self.prices!r}") from error
        if not all(0 <= price < math.inf for price in (draft, score, target)):
            raise ValueError(f"prices may not be negative, nor infinite or NaN, got {self.prices!r}")
        return Prices(draft, score, target) if self.cost_budget is not None else Prices()

    @property
    def role(self) -> str:
        """Who works: ``both``, ``draft`` alone (alpha 0) or ``target`` alone (alpha 1)."""
        if self.budget is not None or 0 < self.alpha < 1:
            return "both"
        return "target" if self.alpha else "draft"

    def header(self) -> Mapping[str, Any]:
        """What a resumed run must have in common with the run that it goes on with."""
        score = self.score if isinstance(self.score, str) else getattr(self.score, "__name__", "callable")
        free = (
            "window",
            "draft_concurrency",
            "score_concurrency",
            "target_concurrency",
            "gather",
            "capacity",
            "timeout_s",
        )
        plain = {**vars(self), "score": score}
        return {name: value for name, value in plain.items() if name not in free}


_CHOICES: dict[str, tuple[str, ...]] = {
    "takeover": ("continue", "replace"),
    "schedule": ("async", "question", "turn"),
    "on_failure": ("takeover", "accept", "drop"),
    "answers": tuple(ANSWERS),
}
_POSITIVE = (
    "samples", "turns", "draft_tokens", "target_tokens", "chain_tokens", "token_budget", "window",
    "draft_concurrency", "score_concurrency", "target_concurrency", "gather", "capacity", "min_turns", "agreement",
)  # fmt: skip
