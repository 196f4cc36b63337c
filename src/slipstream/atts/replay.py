"""Any stream of scores through the controller, without a model: rates, windows, agreement with the barrier."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence
from operator import index
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile
from zlib import error as BadData

import numpy as np

from slipstream.atts.conformal import Certificate, Conformal, Controller
from slipstream.atts.events import KINDS

_COLUMNS = {"problem": "iufUS", "sample": "iuf", "turn": "iuf", "ppl": "iuf", "answer_found": "biuf"}  # kinds of arrays
_GROUP = 5  # smallest (question, turn) group whose synchronous ranking means anything


class Test(NamedTuple):
    """One test of a stream, in arrival order. nll: mean negative log-likelihood of the turn, in nats per token."""

    question: Hashable
    sample: int
    turn: int
    nll: float


def read_tests(path: str | Path, stream: str | None = None) -> list[Test]:
    """JSON lines of ``{"question", "sample", "turn", "nll"}``, the log of a run, or an ``.npz``.

    An ``.npz`` has arrays ``problem, sample, turn, ppl``, with the prefix ``stream__`` if ``stream`` is given; rows
    whose ``answer_found`` is set (where there is one) are no tests. Raises ``ValueError`` naming the wrong line.
    """
    path = Path(path)
    tests = _from_arrays(path, stream) if path.suffix.lower() == ".npz" else list(_from_lines(path))
    if not tests:
        raise ValueError(f"{path} holds no tests")
    return tests


def _from_arrays(path: Path, stream: str | None) -> list[Test]:
    prefix = f"{stream}__" if stream else ""
    try:
        with np.load(path) as opened:
            files = opened.files
            given = {name: np.asarray(opened[prefix + name]) for name in _COLUMNS if prefix + name in files}
    except (ValueError, TypeError, EOFError, BadZipFile, BadData) as error:
        raise ValueError(f"{path} is not an .npz of arrays ({error})") from None
    missing = [prefix + name for name in _COLUMNS if name not in given and name != "answer_found"]
    if missing:
        streams = sorted({name.split("__")[0] for name in files if "__" in name})
        hint = f"; it has the streams {', '.join(streams)}: name one" if streams else ""
        raise ValueError(f"{path} lacks the arrays {', '.join(missing)}{hint}")
    for name, column in given.items():
        if column.ndim != 1 or column.shape != given["problem"].shape:
            raise ValueError(f"{path}: the arrays of {stream or 'the stream'} must be equally long lists")
        if column.dtype.kind not in _COLUMNS[name]:
            raise ValueError(f"{path}: the array {prefix}{name} may not be of {column.dtype}")
    tested = given.pop("answer_found", np.zeros(given["problem"].shape)) == 0
    problem, sample, turn, ppl = (column[tested] for column in given.values())
    bad = np.flatnonzero(~(ppl > 0) | (problem != problem) | (sample % 1 != 0) | (turn % 1 != 0) | (turn < 0))
    if bad.size:
        raise ValueError(
            f"{path}, row {bad[0]} of the tests: a perplexity must be above 0, sample and turn whole, a turn at least 0"
        )
    nll = np.log(ppl.astype(float))
    rows = zip(problem.tolist(), sample.tolist(), turn.tolist(), nll.tolist(), strict=True)
    return [Test(question, int(sample), int(turn), nll) for question, sample, turn, nll in rows]


def _from_lines(path: Path) -> Any:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            kind = row.get("kind", "decided")
            if kind != "decided" and kind in (*KINDS, "run"):
                continue
            values = [row[name] for name in Test._fields]
            if kind != "decided" or None in values or any(isinstance(value, bool) for value in values):
                raise ValueError(f"no test is {line.decode()[:80]}")
            question, sample, turn, nll = values
            test = Test(question, index(sample), index(turn), nll + 0.0)
            hash(question)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f'{path}, line {number}: not {{"question", "sample", "turn", "nll"}} ({type(error).__name__}: {error})'
            ) from None
        if math.isnan(test.nll) or question != question or test.turn < 0:
            raise ValueError(f"{path}, line {number}: nll or question is NaN, or turn is negative")
        yield test


def replay(tests: Sequence[Test], config: Conformal) -> tuple[list[bool], Certificate]:
    """Decide every test in order: what was rejected, and the certificate."""
    controller = Controller(config)
    rejected = [controller.decide(t.question, t.turn, t.nll).rejected for t in tests]
    return rejected, controller.certificate()


def agreement(tests: Sequence[Test], rejected: Sequence[bool], alpha: float) -> float | None:
    """Share of decisions that a synchronous ranking would have taken too.

    It waits for all tests of a (question, turn) group and hands the round(alpha n) most doubtful to the target. Groups
    of fewer than five are left out; None when there are no others. Of equal scores it takes
    those that were taken, as far as it has room.
    """
    groups: dict[tuple[Hashable, int], list[tuple[float, bool]]] = defaultdict(list)
    for test, taken in zip(tests, rejected, strict=True):
        groups[test.question, test.turn].append((test.nll, taken))
    agreed = total = 0
    for group in groups.values():
        if len(group) >= _GROUP:
            ranked = sorted(group, key=lambda entry: (-entry[0], not entry[1]))
            most = round(alpha * len(group))
            agreed += sum((place < most) == taken for place, (_, taken) in enumerate(ranked))
            total += len(group)
    return agreed / total if total else None


def summary(tests: Sequence[Test], config: Conformal) -> dict[str, Any]:
    """Replay a stream and measure it; plain values for JSON.

    rate_per_turn counts each turn by itself, although the certificate pools late turns. question_deviation: mean
    over questions of |rate - alpha|.
    """
    rejected, certificate = replay(tests, config)
    turns: dict[int, list[bool]] = defaultdict(list)
    for test, taken in zip(tests, rejected, strict=True):
        turns[test.turn].append(taken)
    questions = {str(key): group.rate for key, group in certificate.questions.items()}
    deviations = [abs(group.rate - config.alpha) for group in certificate.questions.values()]
    return {
        "mode": config.mode,
        "alpha": config.alpha,
        "tests": len(tests),
        "rate": certificate.rate,
        "deviation": abs(certificate.rate - config.alpha),
        "worst_window": certificate.worst_window,
        "window": config.window,
        "window_bound": certificate.window_bound,
        "rate_per_turn": {str(turn): statistics.fmean(taken) for turn, taken in sorted(turns.items())},
        "rate_per_question": questions,
        "question_deviation": statistics.fmean(deviations),
        "question_deviation_max": max(deviations),
        "agreement": agreement(tests, rejected, config.alpha),
        "certificate": certificate.as_dict(),
    }
