"""Which turns does the target take over? Randomised conformal p-values, and integrators that hold the rate.

A test's score is high when the draft's turn is doubtful (its log-perplexity under the target, say). The p-value is the
share of earlier scores at least as doubtful (A1 / ATTS, arXiv 2509.15148, section 3), so a small one is handed to the
target. Ranks alone hold no rate once scores drift, so the threshold moves: every group that a test belongs to (all
tests, its turn, its question) owns an integrator ``a += gamma * (alpha - rejected)``, an update of adaptive conformal
inference, and a test is rejected when ``p`` is at most alpha moved by the sum of its integrators. They move its
log-odds: added to alpha itself, one rejection too many would bring a small alpha to zero, and the next doubtful turn
would pass because of its neighbour. Pure Python, no device, no clock.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from slipstream.types import nearest, options

MODES = ("per-question", "marginal", "static", "coin")


class SortedPool:
    """Scores in order, in blocks of a bounded size: adding one and ranking one cost microseconds at any length."""

    _BLOCK = 512

    def __init__(self, scores: Iterable[float] = ()) -> None:
        ordered = sorted(scores)
        self._blocks = [ordered[i : i + self._BLOCK] for i in range(0, len(ordered), self._BLOCK)] or [[]]
        self._lasts = [block[-1] for block in self._blocks if block]
        self._sizes = [len(block) for block in self._blocks]
        self._length = len(ordered)

    def __len__(self) -> int:
        return self._length

    def add(self, score: float) -> None:
        at = min(bisect_right(self._lasts, score), len(self._blocks) - 1)
        block = self._blocks[at]
        insort(block, score)
        self._length += 1
        if len(block) > 2 * self._BLOCK:
            self._blocks[at : at + 1] = block, upper = block[: self._BLOCK], block[self._BLOCK :]
            self._lasts[at : at + 1] = [block[-1], upper[-1]]
            self._sizes[at : at + 1] = [len(block), len(upper)]
        else:
            self._lasts[at : at + 1] = [block[-1]]
            self._sizes[at] = len(block)

    def rank(self, score: float) -> tuple[int, int]:
        """How many scores are greater, and how many are equal."""
        below = self._before(score, bisect_left)
        through = self._before(score, bisect_right)
        return self._length - through, through - below

    def _before(self, score: float, bisect: Any) -> int:
        at = bisect(self._lasts, score)
        return sum(self._sizes[:at]) + (bisect(self._blocks[at], score) if at < len(self._blocks) else 0)


def p_value(pool: SortedPool, score: float, u: float) -> float:
    """(#greater + u (#equal + 1)) / (n + 1): uniform on [0, 1] when score and pool are exchangeable, ties included."""
    greater, equal = pool.rank(score)
    return (greater + u * (equal + 1)) / (len(pool) + 1)


class Centre:
    """Takes from a score what scores of its group are like; what a group is like, is no news about one of its tests.

    That is the group's median so far, moved towards the median of all by as much as groups resemble each other: the
    mean distances of scores from both medians tell (empirical Bayes), so that nothing has to be tuned to a stream's
    scale, and a few scores far out move nothing. Medians are of the ``_KEPT`` latest or so: a list at its length loses
    one drawn at random.
    """

    _KEPT = 512
    _FAR = 1e100  # as good as infinite: neither centred nor counted, so that no sum overflows

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._all: list[float] = []
        self._groups: dict[Hashable, list[float]] = defaultdict(list)
        self._own = self._common = 0.0  # distances from the group's median and from that of all, summed
        self._compared = 0

    def __call__(self, group: Hashable, score: float) -> float:
        if abs(score) >= self._FAR:
            return score
        members, common = self._groups[group], _median(self._all, score)
        count, own = len(members), _median(members, common)
        ratio = min(0.99, self._own / self._common) if self._compared >= 20 and self._common else 0.8
        weight = ratio**2 / (1 - ratio**2)
        if count:
            self._own += abs(score - own) * math.sqrt(count / (count + 1))
            self._common += abs(score - common)
            self._compared += 1
        for kept in (self._all, members):
            insort(kept, score)
            if len(kept) > self._KEPT:
                del kept[self._random.randrange(len(kept))]
        return score - (count * own + weight * common) / (count + weight) if count else score - common


def _median(ordered: list[float], otherwise: float) -> float:
    count = len(ordered)
    return (ordered[count // 2] + ordered[(count - 1) // 2]) / 2 if count else otherwise


class Martingale:
    """The Simple Jumper (Vovk, Gammerman, Shafer 2022, algorithm 8.1): wealth of bets against uniform p-values.

    While the scores are exchangeable, it ever reaches 100 with a probability of at most 1 in 100 (Ville).
    """

    _BETS = (-1.0, -0.5, 0.0, 0.5, 1.0)

    def __init__(self, jump: float = 0.01) -> None:
        self._jump = jump
        self._shares = [1 / len(self._BETS)] * len(self._BETS)
        self.log_wealth = self.log_peak = 0.0

    def update(self, p: float) -> None:
        stay, mixed = 1 - self._jump, self._jump / len(self._BETS)
        shares = [
            (stay * share + mixed) * (1 + bet * (p - 0.5)) for share, bet in zip(self._shares, self._BETS, strict=True)
        ]
        total = sum(shares)
        self._shares = [share / total for share in shares]
        self.log_wealth += math.log(total)
        self.log_peak = max(self.log_peak, self.log_wealth)


@options
@dataclass(frozen=True)
class Conformal:
    """How turns are chosen.

    alpha: share of tests that the target takes over, in [0, 1]. mode: ``per-question`` (score centred by
    question, then by the question's turn; integrators all, turn, question), ``marginal`` (raw score; all, turn),
    ``static`` (the paper's: ``p <= alpha`` against frozen scores, no integrator), ``coin`` (the score is not looked at:
    the control arm).
    gamma, gamma_turn, gamma_question: step of each integrator; their sum x moves the threshold by
    ``x / (alpha (1 - alpha))`` of log-odds, which is x near alpha. turn_bins: turns from the last bin on share one
    pool. window: tests per window in the certificate. seed: of the randomised p-values.

    Tuned on stream ``pair`` of the published traces: gamma_turn, gamma_question, turn_bins. gamma is set so that the
    guarantee itself is 0.06 in every window of 200.
    """

    alpha: float = 0.3
    mode: str = "per-question"
    gamma: float = 0.1
    gamma_turn: float = 0.01
    gamma_question: float = 0.075
    turn_bins: int = 8
    window: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be a share in [0, 1], got {self.alpha!r}")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; {nearest(str(self.mode), MODES)}")
        if not (1e-6 <= self.gamma <= 1 and 0 <= self.gamma_turn <= 1 and 0 <= self.gamma_question <= 1):
            raise ValueError("gamma must be in [1e-6, 1], gamma_turn and gamma_question in [0, 1]")
        if self.turn_bins < 1 or self.window < 1:
            raise ValueError("turn_bins and window must be at least 1")

    @property
    def adapts(self) -> bool:
        return self.mode in ("per-question", "marginal")


class Decision(NamedTuple):
    """One test: its number from 0, the alpha asked for, p-value, threshold it was held against, taken over or not."""

    number: int
    alpha: float
    p: float
    threshold: float
    rejected: bool


@dataclass
class Group:
    """The tests of one group, counted. ``debt``: sum of (alpha - rejected); gamma * debt is the integrator."""

    tests: int = 0
    rejected: int = 0
    debt: float = 0.0

    def add(self, alpha: float, rejected: bool) -> None:
        self.tests += 1
        self.rejected += rejected
        self.debt += alpha - rejected

    @property
    def rate(self) -> float:
        return self.rejected / self.tests if self.tests else 0.0


@dataclass
class Certificate:
    """What was realised, and what is guaranteed whatever the scores were. worst_window: None for fewer tests than that.

    For an adaptive mode the rate differs from alpha by exactly ``integrator / (gamma * tests)``, overall and (with
    their own gammas) in each group, and in no window of w = ``window`` tests by more than ``window_bound`` =
    (1 + 2 gamma) / (gamma w), whatever alpha was asked for from test to test. None: the mode promises nothing.
    ``log_martingale``: natural log of the highest wealth bet against exchangeable scores; above log(100) they are not.
    """

    mode: str
    alpha: float
    tests: int
    rejected: int
    rate: float
    deviation: float
    integrator: float
    window: int
    worst_window: float | None
    window_bound: float | None
    log_martingale: float
    turns: dict[int, Group] = field(default_factory=dict)
    questions: dict[Hashable, Group] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """The worst window is inside its bound (vacuous without one)."""
        if self.window_bound is None or self.worst_window is None:
            return True
        return self.worst_window <= self.window_bound + 1e-9

    @property
    def exchangeable(self) -> bool:
        return self.log_martingale < math.log(100)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("turns", "questions")}
        groups = {
            name: {
                str(key): {"tests": g.tests, "rate": g.rate, "debt": g.debt} for key, g in getattr(self, name).items()
            }
            for name in ("turns", "questions")
        }
        return plain | {"holds": self.holds, "exchangeable": self.exchangeable} | groups


class Controller:
    """Decides one test after the other, in the order in which they come.

    calibration: scores of an offline pass, for ``static``; without them its pool is the first turns seen so far.
    The same tests in the same order with the same seed give the same decisions.
    """

    def __init__(self, config: Conformal, calibration: Iterable[float] = ()) -> None:
        self.config = config
        self._random = random.Random(config.seed)
        self._frozen = SortedPool(calibration)
        self._given = len(self._frozen) > 0
        self._pools: dict[int, SortedPool] = defaultdict(SortedPool)
        self._by_question, self._by_turn = Centre(), Centre()
        self._everything = Group()
        self._turns: dict[int, Group] = defaultdict(Group)
        self._questions: dict[Hashable, Group] = defaultdict(Group)
        self._recent: deque[float] = deque()
        self._in_window, self._worst = 0.0, -1.0
        self._martingale = Martingale()

    def decide(self, question: Hashable, turn: int, score: float, alpha: float | None = None) -> Decision:
        """Test a score (higher is more doubtful; infinite is allowed). alpha: this test's, where it is not fixed."""
        config = self.config
        if math.isnan(score):
            raise ValueError("a score may not be NaN: a failed score is for the caller's policy to handle")
        alpha = config.alpha if alpha is None else alpha
        u = self._random.random()
        p = u if config.mode == "coin" else self._p_value(question, turn, score, u)
        threshold = self._threshold(question, turn, alpha) if config.adapts else alpha
        decision = Decision(self._everything.tests, alpha, p, threshold, p <= threshold and alpha > 0)
        self._record(question, turn, decision)
        return decision

    def _threshold(self, question: Hashable, turn: int, alpha: float) -> float:
        config, everything = self.config, self.config.gamma * self._everything.debt
        # `all` has the last word: whatever the others ask for, this stays within [-gamma, 1 + gamma]
        if not 0 < 0.5 + everything < 1:
            return 0.5 + everything
        moved = everything + config.gamma_turn * self._turns[self._bin(turn)].debt
        if config.mode == "per-question":
            moved += config.gamma_question * self._questions[question].debt
        if not 0 < alpha < 1:
            return alpha
        odds = math.log(alpha / (1 - alpha)) + moved / (alpha * (1 - alpha))
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, odds))))

    def _bin(self, turn: int) -> int:
        return min(turn, self.config.turn_bins - 1)

    def _p_value(self, question: Hashable, turn: int, score: float, u: float) -> float:
        if self.config.mode == "static":
            p = p_value(self._frozen, score, u)
            if not self._given and turn == 0:
                self._frozen.add(score)
            return p
        pool = self._pools[self._bin(turn)]
        if self.config.mode == "per-question":
            score = self._by_turn((question, turn), self._by_question(question, score))
        p = p_value(pool, score, u)
        pool.add(score)
        return p

    def _record(self, question: Hashable, turn: int, decision: Decision) -> None:
        alpha, rejected = decision.alpha, decision.rejected
        for group in (self._everything, self._turns[self._bin(turn)], self._questions[question]):
            group.add(alpha, rejected)
        self._martingale.update(decision.p)
        self._recent.append(alpha - rejected)
        self._in_window += alpha - rejected
        if len(self._recent) > self.config.window:
            self._in_window -= self._recent.popleft()
        if len(self._recent) == self.config.window:
            self._worst = max(self._worst, abs(self._in_window) / self.config.window)

    def certificate(self) -> Certificate:
        config, whole = self.config, self._everything
        bound = None
        if config.adapts:
            bound = (1 + 2 * config.gamma) / (config.gamma * config.window)
        return Certificate(
            mode=config.mode,
            alpha=whole.rate + whole.debt / whole.tests if whole.tests else config.alpha,
            tests=whole.tests,
            rejected=whole.rejected,
            rate=whole.rate,
            deviation=abs(whole.debt) / whole.tests if whole.tests else 0.0,
            integrator=config.gamma * whole.debt,
            window=config.window,
            worst_window=self._worst if self._worst >= 0 else None,
            window_bound=bound,
            log_martingale=self._martingale.log_peak,
            turns=dict(sorted(self._turns.items())),
            questions=dict(self._questions),
        )
