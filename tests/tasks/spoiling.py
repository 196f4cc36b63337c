"""Right completions made wrong, one way each."""

from __future__ import annotations

import re
from collections.abc import Iterator

from slipstream.tasks import Problem
from slipstream.tasks.lexicon import FILLER, KEYS

SMALL: dict[str, dict[str, int]] = {  # parameters under which a problem of the task is made in no time
    "needle_single": {"num_tokens": 512},
    "needle_multikey": {"num_tokens": 512},
    "needle_multivalue": {"num_tokens": 512},
    "needle_multiquery": {"num_tokens": 512},
    "variable_tracking": {"num_tokens": 512},
    "common_words": {"num_tokens": 512},
    "frequent_words": {"num_tokens": 512},
    "program": {"steps": 12, "asked": 2},
    "program_shuffled": {"steps": 12, "asked": 2},
    "program_spread": {"steps": 12, "asked": 2, "num_tokens": 512},
    "recall": {"pairs": 6},
    "expression": {"operations": 5},
    "search": {"size": 6, "tries": 9},
}


def chain_of(problem: Problem) -> str:
    """The completion up to and with ``</think>``."""
    return problem.completion[: len(problem.completion) - len(problem.answer)]


def wrong_values(problem: Problem) -> Iterator[str]:
    """The answer with its last digit changed, with each digit of its last number changed, or with another last word."""
    answer = problem.answer
    if not answer[-1].isdigit():
        last = re.findall(r"[a-z]+", answer)[-1]
        yield answer.removesuffix(last) + next(
            word for word in (KEYS if "@" in answer else FILLER) if word not in answer
        )
        return
    at = len(answer)
    while at and answer[at - 1].isdigit():
        at -= 1
        for digit in {(int(answer[at]) + 1) % 10, (int(answer[at]) + 5) % 10}:
            yield f"{answer[:at]}{digit}{answer[at + 1 :]}"


def shortened(answer: str) -> str:
    """The answer without its last item."""
    for mark in ("\n", "+", " "):
        if mark in answer:
            return answer[: answer.rindex(mark)]
    return ""


def spoiled(problem: Problem) -> Iterator[tuple[str, str]]:
    """(what is wrong, the completion)."""
    chain = chain_of(problem)
    for answer in wrong_values(problem):
        yield f"wrong value {answer!r}", chain + answer
    yield "an item is missing", chain + shortened(problem.answer)
    yield "the answer is empty", chain
    yield "the chain is never closed", problem.completion.replace("</think>", "")
    yield "the chain is cut off", chain.replace("</think>\n", "")
    yield "the answer is in the chain only", f"<think>\n{problem.answer}\n</think>\n"
    yield "nothing at all", ""
