"""Problems from JSON lines, checked before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slipstream.atts.answers import shuffled_choices

_KINDS = {"prompt": str, "messages": list, "prompt_token_ids": list}


def read_problems(path: str | Path, seed: int = 0) -> list[dict[str, Any]]:
    """One problem a line: ``id`` (default: its line), a prompt, and where known ``answer``.

    The prompt is ``prompt`` (text), ``messages`` (chat) or ``prompt_token_ids``. With ``choices`` (a list; ``answer``
    is then the index of the right one), they are put behind the text in an order drawn from the seed, and the answer
    is a letter. Raises ``ValueError`` that names the line that is wrong.
    """
    problems: list[dict[str, Any]] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            problem = _problem(json.loads(line), number, seed)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if problem["id"] in lines:
            raise ValueError(f"{path}, line {number}: id {problem['id']!r} is also that of line {lines[problem['id']]}")
        lines[problem["id"]] = number
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} holds no problems")
    return problems


def _problem(row: Any, number: int, seed: int) -> dict[str, Any]:
    found = [kind for kind in _KINDS if kind in row] if isinstance(row, dict) else []
    if len(found) != 1:
        raise ValueError(f"needs an object with exactly one of {', '.join(_KINDS)}")
    value, kind = row[found[0]], _KINDS[found[0]]
    if not isinstance(value, kind) or not value:
        raise ValueError(f"{found[0]} must be a non-empty {kind.__name__}")
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate is no text
    if found[0] == "messages" and not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise ValueError('messages are a list of {"role", "content"}')
    if found[0] == "prompt_token_ids" and not all(type(token) is int and token >= 0 for token in value):
        raise ValueError("prompt_token_ids are integers of at least 0")
    problem = {**row, "id": str(row.get("id", number))}
    if "choices" in row:
        if found[0] != "prompt" or not isinstance(row["choices"], list) or not isinstance(row.get("answer"), int):
            raise ValueError("choices need a prompt in text, a list, and the index of the right one as answer")
        problem["prompt"], problem["answer"] = shuffled_choices(
            value, row["choices"], row["answer"], seed, problem["id"]
        )
    return problem
