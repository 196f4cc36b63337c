"""Comment lines of random words: the haystack of every long task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from slipstream.tasks.lexicon import FILLER, count_tokens

WORDS_PER_LINE = 14
SPACED = tuple(" " + word for word in FILLER)  # a filler word as it occurs in a line: one token
TOKENS_PER_LINE = WORDS_PER_LINE + 2  # "#", the words, the newline

Count = Callable[[str], int]


def comment_lines(rng: np.random.Generator, count: int) -> list[str]:
    """``count`` lines ``# word word ...`` with their newline."""
    if count <= 0:
        return []
    picks = rng.integers(0, len(SPACED), (count, WORDS_PER_LINE)).tolist()
    return ["#" + "".join([SPACED[i] for i in row]) + "\n" for row in picks]


def lines_that_fit(rng: np.random.Generator, tokens: int, count: Count) -> int:
    """How many comment lines make up about ``tokens`` tokens of the counting tokenizer."""
    if count is count_tokens:
        return max(tokens, 0) // TOKENS_PER_LINE
    sample = 32
    per_line = count("".join(comment_lines(rng, sample))) / sample
    return int(max(tokens, 0) / per_line)


def scatter(rng: np.random.Generator, lines: Sequence[str], num_comments: int) -> str:
    """The lines, in their order, at random places among ``num_comments`` comment lines."""
    comments = comment_lines(rng, num_comments)
    places = np.sort(rng.integers(0, num_comments + 1, len(lines))).tolist()
    out: list[str] = []
    start = 0
    for line, place in zip(lines, places, strict=True):
        out.extend(comments[start:place])
        out.append(line)
        start = place
    out.extend(comments[start:])
    return "".join(out)
