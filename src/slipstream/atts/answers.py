"""Answers in text: find them, bring them to one spelling, tell whether two are the same.

What the published code gets wrong and this must not: braces inside a box are balanced, an answer that does not parse is
none, and two spellings of one answer vote together.
"""

from __future__ import annotations

import logging
import random
import re
import string
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LETTER = re.compile(r"(?:answer|option|choice)\W*(?:is|:)?\W*\(?([A-Z])\)?(?![A-Za-z])", re.IGNORECASE)
_SPACES = ("\\!", "\\,", "\\;", "\\:", "\\ ", "\\quad", "\\left", "\\right", "$", "\\%", "%")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class Answers(Protocol):
    """How a kind of problem is answered."""

    symbolic: bool  # is there more to compare than spelling?

    def find(self, text: str, finished: bool) -> list[str]:
        """All complete answers of a chain's text, in order. finished: its model ended it (else it may go on)."""
        ...

    def same(self, one: str, other: str) -> bool:
        """Do two answers say the same? They then vote together."""
        ...

    def correct(self, answer: str, expected: Any) -> bool: ...


def boxes(text: str) -> list[str]:
    """The contents of every ``\\boxed{...}`` with balanced braces, in order; an empty or unclosed box is none."""
    found = []
    for match in _BOX.finditer(text):
        depth, at = 1, match.end()
        while depth and at < len(text):
            escaped = text[at - 1] == "\\"
            depth += 0 if escaped else (text[at] == "{") - (text[at] == "}")
            at += 1
        content = text[match.end() : at - 1].strip()
        if depth == 0 and content:
            found.append(content)
    return found


def normal(answer: str) -> str:
    """One spelling for answers that differ in layout only: spaces, units of text, fractions, thousands, zeros."""
    text = answer.strip().rstrip(".").strip()
    for piece in _SPACES:
        text = text.replace(piece, " " if piece == "\\ " else "")
    text = _TEXT.sub(r"\1", text)
    text = _FRACTION.sub(lambda m: f"({m[1] or m[2]})/({m[3] or m[4]})", text)
    text = re.sub(r"\((\w+)\)/\((\w+)\)", r"\1/\2", _THOUSANDS.sub("", text))
    text = re.sub(r"\s+", "", text).lower()
    text = text.rpartition("=")[2] if re.fullmatch(r"[a-z]=.+", text) else text
    if re.fullmatch(r"[+-]?\d+(\.\d*)?", text):
        sign, digits = ("-" if text[0] == "-" else ""), text.lstrip("+-")
        whole, _, part = digits.partition(".")
        part = part.rstrip("0")
        text = sign + (whole.lstrip("0") or "0") + (f".{part}" if part else "")
        text = "0" if text == "-0" else text
    return text


def math_equal(one: str, other: str) -> bool:
    """math-verify's verdict. Run it in another process: it may take seconds, and its own alarms need a main thread."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of each time-out that is off
    first, second = (parse(f"${text}$", parsing_timeout=None) for text in (one, other))
    return bool(first and second and verify(first, second, timeout_seconds=None))


class Boxed:
    """Mathematics in ``\\boxed{}``; where spellings differ, :func:`math_equal` may know more."""

    symbolic = True

    def find(self, text: str, finished: bool) -> list[str]:
        return boxes(text)

    def same(self, one: str, other: str) -> bool:
        return normal(one) == normal(other)

    def correct(self, answer: str, expected: Any) -> bool:
        return self.same(answer, str(expected))


class Tagged:
    """The text after ``</think>``, once the chain is finished; what the embedded models are trained on."""

    symbolic = False

    def find(self, text: str, finished: bool) -> list[str]:
        _, closed, rest = text.rpartition("</think>")
        return [rest.strip()] if finished and closed and rest.strip() else []

    def same(self, one: str, other: str) -> bool:
        return normal(one) == normal(other)

    def correct(self, answer: str, expected: Any) -> bool:
        return self.same(answer, str(expected))


class Choice:
    """A letter: in a box, or after "answer is", "option", "choice"."""

    symbolic = False

    def find(self, text: str, finished: bool) -> list[str]:
        inside = [normal(box).strip("()").upper() for box in boxes(text)]
        letters = [letter for letter in inside if len(letter) == 1 and letter in string.ascii_uppercase]
        return letters or ([m[1].upper() for m in _LETTER.finditer(text)] if finished else [])

    def same(self, one: str, other: str) -> bool:
        return one == other

    def correct(self, answer: str, expected: Any) -> bool:
        return answer == str(expected).strip().upper()


def shuffled_choices(question: str, choices: Sequence[str], right: int, seed: int, key: Hashable) -> tuple[str, str]:
    """A multiple-choice prompt with its choices in an order drawn from (seed, key), and the letter of the right one."""
    if not 2 <= len(choices) <= 26 or not 0 <= right < len(choices):
        raise ValueError(f"need 2 to 26 choices and the index of the right one, got {len(choices)} and {right}")
    order = list(range(len(choices)))
    random.Random(f"{seed} {key}").shuffle(order)
    lines = [f"{string.ascii_uppercase[place]}) {choices[index]}" for place, index in enumerate(order)]
    return "\n".join([question, *lines]), string.ascii_uppercase[order.index(right)]


def clusters(answers: Sequence[str], equal: Mapping[tuple[str, str], bool]) -> list[list[int]]:
    """Indices of equivalent answers, the largest cluster first (the earlier on ties).

    equal: verdicts on pairs of different spellings; a pair that is not in it is different.
    """
    found: list[list[int]] = []
    for index, answer in enumerate(answers):
        for cluster in found:
            first = answers[cluster[0]]
            if first == answer or equal.get((first, answer), False):
                cluster.append(index)
                break
        else:
            found.append([index])
    return sorted(found, key=lambda cluster: -len(cluster))


ANSWERS: dict[str, type] = {"boxed": Boxed, "tagged": Tagged, "choice": Choice}
