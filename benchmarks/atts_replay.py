"""Does the controller hold its rate on real streams of scores, and does it choose the right turns?

    python benchmarks/atts_replay.py --json benchmarks/results/cpu/atts_replay.json

Replays published traces (rows with ``answer_found`` dropped; array order is arrival order) at four rates, in three
orders: as they came, with the questions shuffled, and with 64 samples interleaved at random. Bars are about the
worst of all streams and orders. Tuned on stream ``pair`` alone: gamma_turn, gamma_question, turn_bins.
Also what the other modes make of the same streams, and the time of one decision with 200,000 scores.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Report, check

from slipstream.atts.conformal import MODES, Conformal, Controller
from slipstream.atts.replay import Test, read_tests, summary

ALPHAS = (0.1, 0.2, 0.4, 0.6)
LIMITS = {"deviation": 0.002, "worst_window": 0.07, "question_deviation": 0.06}
MEASURES = ("rate", *LIMITS, "agreement", "window_bound")


def shuffled(tests: list[Test], seed: int = 1) -> list[Test]:
    """Questions in another order, each question's tests in their own."""
    places = {question: place for place, question in enumerate(dict.fromkeys(t.question for t in tests))}
    order = random.Random(seed).sample(range(len(places)), len(places))
    return sorted(tests, key=lambda t: order[places[t.question]])


def interleaved(tests: list[Test], width: int = 64, seed: int = 0) -> list[Test]:
    """``width`` samples of any questions at once, each in its own order, whose turn it is drawn at random."""
    draw, chains = random.Random(seed), {}
    for test in tests:
        chains.setdefault((test.question, test.sample), []).append(test)
    waiting, live, found = list(chains.values()), [], []
    draw.shuffle(waiting)
    while live or waiting:
        while waiting and len(live) < width:
            live.append(iter(waiting.pop()))
        chain = draw.choice(live)
        test = next(chain, None)
        if test is None:
            live.remove(chain)
        else:
            found.append(test)
    return found


ORDERS: dict[str, Callable[[list[Test]], list[Test]]] = {
    "arrival": lambda tests: tests,
    "shuffled": shuffled,
    "interleaved": interleaved,
}


def decision_time(report: Report, count: int) -> None:
    """Microseconds of processor time per decision with one pool, over the whole run and over its last tenth."""
    scores = np.random.default_rng(0).normal(size=count).tolist()
    for name, stream in {"random": scores, "constant": [1.0] * count, "sorted": sorted(scores)}.items():
        controller, tail = Controller(Conformal(turn_bins=1)), count - count // 10
        began = time.process_time()
        for i, score in enumerate(stream):
            if i == tail:
                middle = time.process_time()
            controller.decide(i % 500, i % 15, score)
        ended = time.process_time()
        report.point(
            stream=name, scores=count, us_per_decision=1e6 * (ended - began) / count,
            us_last_tenth=1e6 * (ended - middle) / (count - tail),
        )  # fmt: skip
    slowest = max(p["us_last_tenth"] for p in report.points if p.get("scores") == count)
    report.bar(f"processor microseconds per decision with {count} scores", slowest, 50, "<=")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", default="../shared/data/atts_traces_dev.npz")
    parser.add_argument("--streams", default="pair,pair_olympiad,self_opt")
    parser.add_argument("--scores", type=int, default=200_000)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    check(Path(args.traces).exists(), f"{args.traces} is not here: name the traces with --traces")
    report = Report("atts_replay", notes={"tuned_on": "pair"})
    for stream in args.streams.split(","):
        tests = read_tests(args.traces, stream)
        for order, reorder in ORDERS.items():
            reordered = reorder(tests)
            check(sorted(map(repr, reordered)) == sorted(map(repr, tests)), f"{order} lost tests")
            for mode in MODES:
                for alpha in ALPHAS:
                    found = summary(reordered, Conformal(alpha=alpha, mode=mode))
                    check(found["certificate"]["holds"], f"{stream} {order} {mode} {alpha}: the guarantee is broken")
                    own = {name: found[name] for name in MEASURES}
                    martingale = found["certificate"]["log_martingale"]
                    report.point(stream=stream, order=order, mode=mode, alpha=alpha, tests=len(tests), **own,
                                 log_martingale=martingale)  # fmt: skip
    ours = [p for p in report.points if p["mode"] == "per-question"]
    for name, limit in LIMITS.items():
        report.bar(f"per-question, worst {name.replace('_', ' ')}", max(p[name] for p in ours), limit, "<=")
    at_forty = [p["agreement"] for p in ours if p["alpha"] == 0.4]
    report.bar("per-question, least agreement with the synchronous ranking at 0.4", min(at_forty), 0.77, ">=")
    report.notes["agreement_at_0.4"] = {
        mode: statistics.fmean(p["agreement"] for p in report.points if p["mode"] == mode and p["alpha"] == 0.4)
        for mode in MODES
    }
    decision_time(report, args.scores)
    report.finish(args.json)


if __name__ == "__main__":
    main()
