"""How a final answer is read: Markdown, LaTeX and the words around a value do not matter."""

from __future__ import annotations

import re

_WRAPPED = re.compile(r"\\(?:boxed|text|textbf|mathbf|mathrm|texttt)\s*\{([^{}]*)\}")
_MARKS = re.compile(r"\*\*|__|[`$\\]")
_BULLET = re.compile(r"(?m)^[ \t]*(?:\d+[.)](?=[ \t])|[-*•](?=[ \t]))[ \t]*")
# One or two digits that are no part of a longer, fractional or negative number.
NUMBER = re.compile(r"(?<![\d.\-−])\d{1,2}(?!\d|\.\d|,\d{3})")


def plain(answer: str) -> str:
    """The answer without emphasis, code marks, LaTeX wrappers and the marks of list items."""
    unwrapped = _WRAPPED.sub(r"\1", answer)
    return _BULLET.sub("", _MARKS.sub("", unwrapped))


def list_readings(answer: str) -> list[str]:
    """The parts of an answer that may be the list that was asked for.

    All of it, what follows the last colon, the marked words (bold, code or quoted), the first word of every list item,
    and the last line. A check accepts a list if one of these readings is exactly right.
    """
    marked = re.findall(r"""(?:\*\*|`|["“'])([^*`"“”']+)(?:\*\*|`|["”'])""", answer)
    items = re.findall(r"(?m)^[ \t]*(?:\d+[.)]|[-*•])[ \t]*\W*(\w+)", answer)
    lines = answer.strip().splitlines()
    return [answer, answer.rpartition(":")[2], " ".join(marked), " ".join(items), lines[-1] if lines else ""]
