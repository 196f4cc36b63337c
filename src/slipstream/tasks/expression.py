"""Arithmetic expressions (mod 100), reduced one innermost bracket at a time."""

from __future__ import annotations

import re

import numpy as np

from slipstream.tasks.problem import Problem, chain_text, require
from slipstream.tasks.reading import NUMBER, plain

_INSTRUCTIONS = "Reduce the leftmost innermost bracket until one number is left. Every result is taken mod 100.\n"
_INNERMOST = re.compile(r"\((\d\d)([+\-*])(\d\d?)\)")


def _tree(splits: list[float], numbers: list[int], operations: int) -> str:
    """A fully bracketed expression of ``operations`` operators; consumes the random numbers from the lists' ends."""
    if operations == 0:
        return f"{numbers.pop():02d}"
    kind = splits.pop()
    if kind < 0.25:  # times a digit
        return f"({_tree(splits, numbers, operations - 1)}*{2 + numbers.pop() % 8})"
    left = int(splits.pop() * operations)
    sign = "+" if kind < 0.65 else "-"
    first = _tree(splits, numbers, left)
    return f"({first}{sign}{_tree(splits, numbers, operations - 1 - left)})"


def _reduce(match: re.Match[str]) -> int:
    left, sign, right = int(match[1]), match[2], int(match[3])
    if sign == "+":
        return (left + right) % 100
    return (left - right if sign == "-" else left * right) % 100


def expression(rng: np.random.Generator, *, operations: int = 8, task: str = "expression") -> Problem:
    """A random expression with ``operations`` operators (1 to 64): + and - of two-digit numbers, * by a digit."""
    require(1 <= operations <= 64, f"operations must be in 1..64, got {operations}")
    text = _tree(rng.random(2 * operations).tolist(), rng.integers(0, 100, 2 * operations + 1).tolist(), operations)
    context = _INSTRUCTIONS
    question = text
    lines = []
    while match := _INNERMOST.search(text):
        value = f"{_reduce(match):02d}"
        lines.append(f"{match[0]}={value}")
        text = text[: match.start()] + value + text[match.end() :]
        if len(text) > 2:
            lines.append(text)
    return Problem(task, context, question, text, chain_text(lines, text), {"expected": int(text)})


def check_expression(problem: Problem, answer: str) -> bool:
    """The last one- or two-digit number of the answer is the value."""
    found = NUMBER.findall(plain(answer))
    return bool(found) and int(found[-1]) == problem.meta["expected"]
