"""RULER-style needles: five-digit numbers of keys among random words, and chains of variables."""

from __future__ import annotations

import re

import numpy as np

from slipstream.tasks.filler import Count, lines_that_fit, scatter
from slipstream.tasks.lexicon import KEYS, count_tokens
from slipstream.tasks.problem import Problem, chain_text, require
from slipstream.tasks.reading import plain

_INSTRUCTIONS = "Some numbers are hidden among the comments. Remember them, they will be asked for.\n"
_NUMBER = re.compile(r"(?<!\d)\d{5}(?!\d)")
_COMMA = re.compile(r"(?<![\d,])(\d{2}),(\d{3})(?![\d,])")  # 12,345
_KEY = re.compile(r"(@?)\b([A-Za-z]+)\b")
_KNOWN = frozenset(KEYS)


def _numbers(rng: np.random.Generator, count: int) -> list[str]:
    return [f"{n:05d}" for n in rng.choice(100_000, count, replace=False).tolist()]


def _keys(rng: np.random.Generator, count: int) -> list[str]:
    return [KEYS[i] for i in rng.permutation(len(KEYS))[:count].tolist()]


def needles(
    rng: np.random.Generator,
    *,
    keys: int = 1,
    queries: int = 1,
    values: int = 1,
    num_tokens: int = 1024,
    count: Count = count_tokens,
    task: str = "needle_single",
) -> Problem:
    """``keys`` hidden keys, ``values`` numbers for each asked key, ``queries`` keys asked for (RULER's four kinds).

    num_tokens: aim for a prompt of this length. Fewer tokens than the needles need gives a prompt without filler.
    """
    require(1 <= keys <= len(KEYS), f"keys must be in 1..{len(KEYS)}, got {keys}")
    require(1 <= queries <= keys, f"queries must be in 1..{keys} (the number of keys), got {queries}")
    require(1 <= values <= 8, f"values must be in 1..8, got {values}")
    names = _keys(rng, keys)
    numbers = _numbers(rng, keys + queries * (values - 1))
    hidden = [(name, numbers[i]) for i, name in enumerate(names)]
    hidden += [(names[i % queries], number) for i, number in enumerate(numbers[keys:])]
    hidden = [hidden[i] for i in rng.permutation(len(hidden)).tolist()]
    lines = [f"Remember that @{name} is {number}.\n" for name, number in hidden]
    wanted = "all numbers" if values > 1 else "the number"
    question = f"Give {wanted} of {' '.join('@' + name for name in names[:queries])}."
    used = count(_INSTRUCTIONS + "".join(lines) + question)
    text = scatter(rng, lines, lines_that_fit(rng, num_tokens - used, count))
    found = [f"@{name} is {number}" for asked in names[:queries] for name, number in hidden if name == asked]
    answer = "\n".join(found)
    expected = {name: [number for other, number in hidden if other == name] for name in names[:queries]}
    return Problem(task, _INSTRUCTIONS + text, question, answer, chain_text(found, answer), {"expected": expected})


def check_needles(problem: Problem, answer: str) -> bool:
    """Exactly the expected numbers are named, in any order."""
    expected = {number for numbers in problem.meta["expected"].values() for number in numbers}
    return set(_NUMBER.findall(_COMMA.sub(r"\1\2", plain(answer)))) == expected


def tracking(
    rng: np.random.Generator,
    *,
    chains: int = 2,
    hops: int = 4,
    num_tokens: int = 1024,
    count: Count = count_tokens,
    task: str = "variable_tracking",
) -> Problem:
    """``chains`` chains of copies, ``hops`` long; asked: every variable that holds one given number."""
    require(1 <= hops <= 16, f"hops must be in 1..16, got {hops}")
    most = len(KEYS) // (hops + 1)
    require(1 <= chains <= most, f"chains must be in 1..{most} with {hops} hops, got {chains}")
    names = _keys(rng, chains * (hops + 1))
    numbers = _numbers(rng, chains)
    groups = [names[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(chains)]
    told = [_assignments(group, number) for group, number in zip(groups, numbers, strict=True)]
    turns = rng.permutation(np.repeat(np.arange(chains), hops + 1)).tolist()
    queues = [iter(lines) for lines in told]
    lines = [next(queues[i]) + "\n" for i in turns]
    question = f"Which {hops + 1} variables hold {numbers[0]}?"
    head = "Variables are set among the comments.\n"
    used = count(head + "".join(lines) + question)
    text = scatter(rng, lines, lines_that_fit(rng, num_tokens - used, count))
    answer = "\n".join("@" + name for name in groups[0])
    meta = {"expected": groups[0]}
    return Problem(task, head + text, question, answer, chain_text(told[0], answer), meta)


def _assignments(group: list[str], number: str) -> list[str]:
    lines = [f"Store {number} in @{group[0]}."]
    return lines + [f"Copy @{old} into @{new}." for old, new in zip(group, group[1:], strict=False)]


def check_tracking(problem: Problem, answer: str) -> bool:
    """Exactly the expected variables are named, in any order.

    Words that are no key are ignored, and so are words without ``@`` if any has one.
    """
    named = [(at, name.lower()) for at, name in _KEY.findall(plain(answer)) if name.lower() in _KNOWN]
    marked = {name for at, name in named if at}
    return (marked or {name for _, name in named}) == set(problem.meta["expected"])
