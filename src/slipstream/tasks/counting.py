"""RULER's aggregation: the most common words of a list. The small models need not master it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from slipstream.tasks.filler import SPACED, WORDS_PER_LINE, Count
from slipstream.tasks.lexicon import FILLER, count_tokens
from slipstream.tasks.problem import Problem, chain_text, require
from slipstream.tasks.reading import list_readings

_KNOWN = frozenset(FILLER)


def _problem(task: str, order: list[int], top: list[int], wanted: str) -> Problem:
    words = [SPACED[i] for i in order]
    starts = range(0, len(words), WORDS_PER_LINE)
    rows = ["#" + "".join(words[i : i + WORDS_PER_LINE]) + "\n" for i in starts]
    answer = "#" + "".join(SPACED[i] for i in top)  # a line like those of the list
    return Problem(
        task,
        "Count the words of this list.\n" + "".join(rows),
        f"Which {len(top)} words {wanted}?",
        answer,
        chain_text([], answer),
        {"expected": [FILLER[i] for i in top]},
    )


def _budget(num_tokens: int, count: Count, leading: Sequence[int], share: Sequence[float]) -> int:
    """Words that make up about ``num_tokens`` tokens, line marks included.

    leading: the words that occur often; share: how much of the list each of them is. Their own length counts, of the
    others it is the lexicon's mean.
    """
    per_word, per_line = 1.0, 2.0
    if count is not count_tokens:
        repeat = 64  # of many: a tokenizer may count a single word differently from a word of a line
        sizes = [count(SPACED[i] * repeat) / repeat for i in leading]
        per_line = count("#\n" * repeat) / repeat
        rest = count("".join(SPACED)) / len(SPACED) * (1 - sum(share))
        per_word = rest + sum(size * part for size, part in zip(sizes, share, strict=True))
    return max(int((num_tokens - 24) / (per_word + per_line / WORDS_PER_LINE)), 16)


def common_words(
    rng: np.random.Generator,
    *,
    top: int = 4,
    ratio: int = 8,
    num_tokens: int = 1024,
    count: Count = count_tokens,
    task: str = "common_words",
) -> Problem:
    """``top`` words occur ``ratio`` times as often as each of the others (RULER's CWE)."""
    require(1 <= top <= 8, f"top must be in 1..8, got {top}")
    require(2 <= ratio <= 64, f"ratio must be in 2..64, got {ratio}")
    shuffled = rng.permutation(len(FILLER))
    words = _budget(num_tokens, count, shuffled[:top].tolist(), [0.1] * top)
    rare = max(words // (10 * ratio), 1)  # occurrences of a rare word
    kinds = min(max((words - top * ratio * rare) // rare, 1), len(FILLER) - top)
    chosen = shuffled[: top + kinds]
    repeats = np.full(top + kinds, rare)
    repeats[:top] = ratio * rare
    order = rng.permutation(np.repeat(chosen, repeats)).tolist()
    return _problem(task, order, chosen[:top].tolist(), "occur most often")


def frequent_words(
    rng: np.random.Generator,
    *,
    top: int = 3,
    alpha: float = 2.0,
    num_tokens: int = 1024,
    count: Count = count_tokens,
    task: str = "frequent_words",
) -> Problem:
    """Word frequencies follow a power law with exponent ``alpha``; asked: the ``top`` most frequent (RULER's FWE)."""
    require(1 <= top <= 8, f"top must be in 1..8, got {top}")
    require(1 < alpha <= 4, f"alpha must be above 1 and at most 4, got {alpha}")
    chosen = rng.permutation(len(FILLER))[:200]
    share = np.arange(1, len(chosen) + 1, dtype=np.float64) ** -alpha
    words = _budget(num_tokens, count, chosen.tolist(), (share / share.sum()).tolist())
    repeats = (words * share / share.sum()).astype(np.int64)
    require(
        repeats[top - 1] > repeats[top],
        f"the {top} most frequent of {words} words are not unique with alpha {alpha}: ask for fewer (top), "
        "lengthen the list (num_tokens), or bring alpha near 2",
    )
    order = rng.permutation(np.repeat(chosen, repeats)).tolist()
    return _problem(task, order, chosen[:top].tolist(), "are the most frequent")


def check_words(problem: Problem, answer: str) -> bool:
    """Exactly the expected words, in any order; words that no list contains are ignored."""
    expected = set(problem.meta["expected"])
    readings = list_readings(answer.lower())
    return any({word for word in re.findall(r"[a-z]+", text) if word in _KNOWN} == expected for text in readings)
