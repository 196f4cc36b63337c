"""Alpha from what may be spent: a budget of target tokens, or of cost, turned into a rate before every test."""

from __future__ import annotations

from typing import NamedTuple


class Prices(NamedTuple):
    """What a token costs: written by the draft, read by the target when it scores, written by the target."""

    draft: float = 0.0
    score: float = 0.0
    target: float = 1.0


class Allowance:
    """What is left of a budget, and the rate at which the tests that are still expected may be taken over.

    budget: in the unit of ``prices``. turn_tokens: most tokens of a take-over, what one is reserved at.
    chains, turns: how many chains there are, and most tests of each. Raises ``ValueError`` when the budget does not
    pay for one take-over.
    """

    def __init__(self, budget: float, prices: Prices, turn_tokens: int, chains: int, turns: int) -> None:
        self._turn_cost = turn_tokens * prices.target
        if not budget >= self._turn_cost > 0:
            raise ValueError(
                f"a budget of {budget:g} does not pay for one take-over of {turn_tokens} tokens ({self._turn_cost:g}): "
                "raise the budget or lower target_tokens"
            )
        self.budget, self.prices = budget, prices
        self._chains, self._turns = chains, turns
        self._drafting = self._taking = self._reserved = 0.0
        self._tests = self._taken = self._ended = self._ended_tests = 0

    @property
    def spent(self) -> float:
        return self._drafting + self._taking

    def charge_draft(self, draft: int, scored: int) -> None:
        self._drafting += draft * self.prices.draft + scored * self.prices.score

    def charge_take_over(self, tokens: int) -> None:
        self._taking += tokens * self.prices.target
        self._taken += 1

    def reserve(self) -> None:
        """A take-over begins; :meth:`release` when it is over, however it ended."""
        self._reserved += self._turn_cost

    def release(self) -> None:
        self._reserved -= self._turn_cost

    def affords(self) -> bool:
        """Would one more take-over, at its longest, stay within the budget?"""
        return self.spent + self._reserved + self._turn_cost <= self.budget

    def tested(self) -> None:
        self._tests += 1

    def ended(self, tests: int) -> None:
        """A chain is over after so many tests."""
        self._ended += 1
        self._ended_tests += tests

    def alpha(self) -> float:
        """The rate for the next test, in [0, 1]: what is left, over what taking all expected tests over would cost."""
        per_chain = (self._turns + self._ended_tests) / (1 + self._ended)
        expected = max(1.0, self._chains * per_chain - self._tests)
        overhead = self._drafting / self._tests if self._tests else 0.0
        cost = self._taking / self._taken if self._taken else self._turn_cost
        left = self.budget - self.spent - self._reserved - expected * overhead
        return min(1.0, max(0.0, left / (expected * max(cost, 1e-12))))
