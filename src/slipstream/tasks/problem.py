"""A problem: text in, text out, and a check that needs only the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


@dataclass(frozen=True)
class Problem:
    """One task instance.

    context / question: ``prompt = context + question``. Protocol A prefills the prompt densely and generates sparsely;
    protocol B prefills only the context densely, so that question and generation are sparse.
    answer: the expected final answer, in its canonical spelling (of search tasks: one of the right ones).
    completion: the ideal chain ``<think>...</think>`` and the answer, exactly as the embedded models are trained on it.
    meta: what the checker needs (plain values, JSON-serialisable).
    """

    task: str
    context: str
    question: str
    answer: str
    completion: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return self.context + self.question


def chain_text(lines: list[str], answer: str) -> str:
    """``<think>``, one line per reasoning step, ``</think>``, the answer."""
    return f"{THINK_OPEN}\n{''.join(line + chr(10) for line in lines)}{THINK_CLOSE}\n{answer}"


def final_answer(text: str) -> str:
    """The text after the last ``</think>``, up to a chain that is opened anew.

    A chain that was opened but never closed has no answer (empty text); text without any tag is all answer.
    """
    _, closed, rest = text.rpartition(THINK_CLOSE)
    if not closed and THINK_OPEN in text:
        return ""
    return rest.partition(THINK_OPEN)[0].strip()


def require(ok: bool, message: str) -> None:
    """Raise ``ValueError`` with what to do when a generator's parameter makes no sense."""
    if not ok:
        raise ValueError(message)
