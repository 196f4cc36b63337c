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

import numpy as np

from slipstream.atts.conformal import Certificate, Conformal, Controller

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
    tests = _from_arrays(path, stream) if path.suffix == ".npz" else list(_from_lines(path))
    if not tests:
        raise ValueError(f"{path} holds no tests")
    return tests


def _from_arrays(path: Path, stream: str | None) -> list[Test]:
    try:
        opened = np.load(path)
    except (ValueError, BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz of arrays ({error})") from None
    with opened as arrays:
        prefix = f"{stream}__" if stream else ""
        missing = [n for n in ("problem", "sample", "turn", "ppl") if prefix + n not in arrays]
        if missing:
            streams = sorted({name.split("__")[0] for name in arrays.files if "__" in name})
            hint = f"; it has the streams {', '.join(streams)}: name one" if streams else ""
            raise ValueError(f"{path} lacks the arrays {', '.join(prefix + n for n in missing)}{hint}")
        columns = [arrays[prefix + name] for name in ("problem", "sample", "turn", "ppl")]
        found = arrays[prefix + "answer_found"] if prefix + "answer_found" in arrays else np.zeros(columns[0].shape)
    if columns[0].ndim != 1 or any(column.shape != found.shape for column in columns):
        raise ValueError(f"{path}: the arrays of {stream or 'the stream'} must be equally long lists")
    problem, sample, turn, ppl = (column[found == 0] for column in columns)
    bad = np.flatnonzero(~(np.asarray(ppl, float) > 0) | (np.asarray(turn) < 0))
    if bad.size:
        raise ValueError(f"{path}, row {bad[0]} of the tests: a perplexity must be above 0 and a turn at least 0")
    nll = np.log(ppl.astype(float))
    return [Test(*row) for row in zip(problem.tolist(), sample.tolist(), turn.tolist(), nll.tolist(), strict=True)]


def _from_lines(path: Path) -> Any:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row.get("kind", "decided") != "decided":
                continue
            test = Test(row["question"], index(row["sample"]), index(row["turn"]), float(row["nll"]))
            hash(test.question)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f'{path}, line {number}: not {{"question", "sample", "turn", "nll"}} ({type(error).__name__}: {error})'
            ) from None
        if math.isnan(test.nll) or test.turn < 0:
            raise ValueError(f"{path}, line {number}: nll is NaN or turn is negative")
        yield test


def replay(tests: Sequence[Test], config: Conformal) -> tuple[list[bool], Certificate]:
    """Decide every test in order: what was rejected, and the certificate."""
    controller = Controller(config)
    rejected = [controller.decide(t.question, t.turn, t.nll).rejected for t in tests]
    return rejected, controller.certificate()


def agreement(tests: Sequence[Test], rejected: Sequence[bool], alpha: float) -> float | None:
    """Share of decisions that a synchronous ranking would have taken too.

    It waits for all tests of a (question, turn) group and hands the round(alpha n) most doubtful to the target. Groups
    of fewer than five are left out; None when there are no others.
    """
    groups: dict[tuple[Hashable, int], list[tuple[float, bool]]] = defaultdict(list)
    for test, taken in zip(tests, rejected, strict=True):
        groups[test.question, test.turn].append((test.nll, taken))
    agreed = total = 0
    for group in groups.values():
        if len(group) >= _GROUP:
            ranked = sorted(group, key=lambda entry: -entry[0])
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
    deviations = [abs(rate - config.alpha) for rate in questions.values()]
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
