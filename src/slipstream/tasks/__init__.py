"""Synthetic reasoning and retrieval tasks, text in and text out, each with a verifier. See ``docs/tasks.md``."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np

from slipstream.tasks import counting, expression, needles, programs, recall, search
from slipstream.tasks.lexicon import count_tokens
from slipstream.tasks.problem import Problem, final_answer, require

_Entry = tuple[Callable[..., Problem], Callable[[Problem, str], bool], dict[str, Any]]

_TASKS: dict[str, _Entry] = {
    "needle_single": (needles.needles, needles.check_needles, {"keys": 1}),
    "needle_multikey": (needles.needles, needles.check_needles, {"keys": 16}),
    "needle_multivalue": (needles.needles, needles.check_needles, {"keys": 4, "values": 4}),
    "needle_multiquery": (needles.needles, needles.check_needles, {"keys": 8, "queries": 4}),
    "variable_tracking": (needles.tracking, needles.check_tracking, {}),
    "common_words": (counting.common_words, counting.check_words, {}),
    "frequent_words": (counting.frequent_words, counting.check_words, {}),
    "program": (programs.program, programs.check_program, {}),
    "program_shuffled": (programs.program, programs.check_program, {"order": "random"}),
    "program_spread": (programs.program, programs.check_program, {"num_tokens": 8192}),
    "recall": (recall.recall, recall.check_recall, {}),
    "expression": (expression.expression, expression.check_expression, {}),
    "search": (search.search, search.check_search, {}),
}
TASKS = tuple(_TASKS)  # a task's place is part of its seed: new ones go to the end

__all__ = ["TASKS", "Problem", "count_tokens", "final_answer", "generate", "make", "parameters_of", "verify"]


def _entry(task: str) -> _Entry:
    if task not in _TASKS:
        near = difflib.get_close_matches(task, TASKS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known tasks: {', '.join(TASKS)}"
        raise ValueError(f"unknown task {task!r}: {hint}")
    return _TASKS[task]


def generate(task: str, rng: np.random.Generator, **parameters: Any) -> Problem:
    """One problem drawn from ``rng``; ``parameters`` are those of the task's generator."""
    build, _, defaults = _entry(task)
    known = parameters_of(task)
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"task {task!r} has no parameter {name!r}; it takes {', '.join(sorted(known))}")
        _check_kind(name, value, known[name])
    return build(rng, task=task, **{**defaults, **parameters})


def parameters_of(task: str) -> dict[str, Any]:
    """The parameters of a task and their defaults."""
    build, _, defaults = _entry(task)
    return {**{k: v for k, v in (build.__kwdefaults__ or {}).items() if k != "task"}, **defaults}


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Refuse a value of another kind than the default's; ranges are the generators' own business."""
    if callable(default):
        require(callable(value), f"{name} must be a function from text to a number of tokens, got {value!r}")
    elif isinstance(default, int):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        require(whole, f"{name} must be an integer, got {value!r}")
        require(name != "num_tokens" or value >= 0, f"num_tokens must be at least 0, got {value}")
    elif isinstance(default, float):
        require(isinstance(value, Real) and isfinite(value), f"{name} must be a number, got {value!r}")


def make(task: str, seed: int, **parameters: Any) -> Problem:
    """One problem; the same task, seed (0 and up) and parameters give the same problem."""
    _entry(task)
    require(isinstance(seed, Integral) and seed >= 0, f"seed must be an integer, at least 0, got {seed!r}")
    return generate(task, np.random.default_rng([seed, TASKS.index(task)]), **parameters)


def verify(problem: Problem, text: str) -> bool:
    """Is the final answer of ``text`` (what follows ``</think>``) right? The chain itself is not judged."""
    _, check, _ = _entry(problem.task)
    return check(problem, final_answer(text))
