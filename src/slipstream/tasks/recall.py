"""Pairs to repeat: lookup by content in its purest form. A training aid, and the cheapest probe of retrieval."""

from __future__ import annotations

import re

import numpy as np

from slipstream.tasks.filler import SPACED
from slipstream.tasks.lexicon import KEYS, LABELS
from slipstream.tasks.problem import Problem, require
from slipstream.tasks.reading import plain

_INSTRUCTIONS = "Repeat every pair, in any order."
_ALL_KEYS = KEYS + LABELS
_KNOWN = frozenset(_ALL_KEYS)
_PAIR = re.compile(r"(?=\b(\w+)[ \t]*(?:=|:|->|→)[ \t]*([a-z]+)\b)")


def recall(rng: np.random.Generator, *, pairs: int = 32, draws: int = 0, task: str = "recall") -> Problem:
    """``pairs`` lines ``key = word``; wanted: the same lines in any order, or ``draws`` of them, with repetition."""
    require(1 <= pairs <= len(_ALL_KEYS), f"pairs must be in 1..{len(_ALL_KEYS)}, got {pairs}")
    keys = rng.permutation(len(_ALL_KEYS))[:pairs].tolist()
    words = rng.integers(0, len(SPACED), pairs).tolist()
    lines = [f"{_ALL_KEYS[k]} ={SPACED[w]}" for k, w in zip(keys, words, strict=True)]
    require(draws >= 0, f"draws must be at least 0, got {draws}")
    order = rng.integers(0, pairs, draws) if draws else rng.permutation(pairs)
    shuffled = [lines[i] for i in order.tolist()]
    answer = "\n".join(shuffled)
    context = "".join(line + "\n" for line in lines)
    question = f"Repeat any {draws} pairs." if draws else _INSTRUCTIONS
    meta = {"expected": sorted(lines), "draws": draws}
    return Problem(task, context, question, answer, "<think>\n</think>\n" + answer, meta)


def check_recall(problem: Problem, answer: str) -> bool:
    """Every pair is there, each exactly once; or as many as were to be drawn, all of them right."""
    found = sorted(f"{key} = {word}" for key, word in _PAIR.findall(plain(answer)) if key in _KNOWN)
    expected, draws = problem.meta["expected"], problem.meta["draws"]
    return len(found) == draws and set(found) <= set(expected) if draws else found == expected
