"""Three numbers with a given sum: a search by trial, on which more samples help (pass@k).

The chain tries pairs; each pair needs one third number, which is on the list or not. Which pair to try next is a real
choice, and the number of tries is limited, so that one chain may fail where another one succeeds.
"""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np

from slipstream.tasks.problem import Problem, chain_text, require
from slipstream.tasks.reading import NUMBER, plain

_RUN = re.compile(rf"{NUMBER.pattern}(?:(?:[\s,;+&()\[\]{{}}]|and)+{NUMBER.pattern})+")
GIVE_UP = "none"


def _solves(pair: tuple[int, int], numbers: list[int], target: int) -> bool:
    need = (target - pair[0] - pair[1]) % 100
    return need in numbers and need not in pair


def search(rng: np.random.Generator, *, size: int = 8, tries: int = 8, task: str = "search") -> Problem:
    """``size`` distinct numbers (4 to 16), three of which have the wanted sum mod 100; ``tries`` (1 to 9) at most."""
    require(4 <= size <= 16, f"size must be in 4..16, got {size}")
    require(1 <= tries <= 9, f"tries must be in 1..9, got {tries}")
    numbers = rng.permutation(100)[:size].tolist()
    target = sum(numbers[i] for i in rng.permutation(size)[:3].tolist()) % 100
    pairs = list(combinations(numbers, 2))
    lines: list[str] = []
    answer = GIVE_UP
    for _ in range(2):  # a failed search is drawn once again, so that most chains end in a solution
        lines, answer = _attempt([pairs[i] for i in rng.permutation(len(pairs)).tolist()], numbers, target, tries)
        if answer != GIVE_UP:
            break
    listed = " ".join(f"{n:02d}" for n in numbers)
    context = f"Numbers: {listed}\n"
    question = f"Find three of them with the sum {target:02d} mod 100. Use at most {tries} tries."
    meta = {"numbers": numbers, "target": target}
    return Problem(task, context, question, answer, chain_text(lines, answer), meta)


def _attempt(order: list[tuple[int, int]], numbers: list[int], target: int, tries: int) -> tuple[list[str], str]:
    lines = []
    for a, b in order[:tries]:
        need = (target - a - b) % 100
        good = _solves((a, b), numbers, target)
        lines.append(f"try {a:02d}+{b:02d}={(a + b) % 100:02d} need {need:02d} {'yes' if good else 'no'}")
        if good:
            return lines, f"{a:02d}+{b:02d}+{need:02d}"
    return lines, GIVE_UP


def check_search(problem: Problem, answer: str) -> bool:
    """The answer's last enumeration is three different numbers of the list with the wanted sum; any solution counts.

    An enumeration is numbers with nothing but ``+``, commas, ``and`` or white space between them: the sum itself
    (``12+30+61 = 3 mod 100``) is no part of it.
    """
    runs = _RUN.findall(plain(answer))
    found = [int(n) for n in NUMBER.findall(runs[-1])] if runs else []
    right_sum = sum(found) % 100 == problem.meta["target"]
    return len(found) == len(set(found)) == 3 and set(found) <= set(problem.meta["numbers"]) and right_sum
