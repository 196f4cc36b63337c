"""What do 8, 64 and 1000 GPUs need? Routing of questions over replicas, simulated event by event from measured costs.

A replica decodes B chains with C tokens of KV in all in ``a + b B + c C`` ms a step: fitted to the TPOT of an H200 in
``results/h200`` (the worst error of the fit is in the result), and its prefill runs at the measured rate, before
anything else, as in the engine. A question is a prompt that several chains share; they arrive one by one, as a
test-time-scaling run sends them, and leave their prompt's KV behind. Ways to route: ``random``; ``least``, where the
fewest tokens are left to decode; ``prefix``, where the prompt is, unless that replica is full or has ``--patience``
times the work of the idlest. Exact knowledge of the replicas, no failures: an upper bound of each way.

    PYTHONPATH=src python benchmarks/scale_simulated.py --json benchmarks/results/cpu/scale_simulated.json
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, check

RESULTS = Path(__file__).parent / "results" / "h200"
WAYS = ("random", "least", "prefix")
HBM_BYTES, WEIGHT_BYTES, KV_BYTES = 0.9 * 141e9, 16.4e9, 147_456  # an H200, Qwen3-8B in bf16 and a token's KV


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a step: ``base + row * B + token * C``; seconds of a prompt token; the fit's worst error."""

    base: float
    row: float
    token: float
    prefill_s: float
    worst: float

    def step_s(self, batch: int, tokens: float) -> float:
        return (self.base + self.row * batch + self.token * tokens) / 1e3


def measured(name: str, arm: str | None) -> Costs:
    """Costs fitted to the points of a result file, the nearest in relative error."""
    decode = json.loads((RESULTS / "decode.json").read_text(encoding="utf-8"))["points"]
    points = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["points"]
    points = [p for p in points if p.get("arm") == arm]
    rows = np.array([[1.0, p["batch"], p["batch"] * p["context"]] for p in points])
    times = np.array([p["tpot_ms"] for p in points])
    found = np.linalg.lstsq(rows / times[:, None], np.ones(len(times)), rcond=None)[0]
    worst = float(np.abs(rows @ found / times - 1).max())
    long = max((p for p in decode if "prefill_s" in p), key=lambda p: (p["batch"] * p["context"], p["context"]))
    return Costs(*found.tolist(), long["prefill_s"] / (long["batch"] * long["context"]), worst)


@dataclass
class Chain:
    question: int
    prompt: int
    left: float
    arrived_s: float
    first_s: float = 0.0
    made: float = 0.0


@dataclass
class Replica:
    """One engine. Between two events its chains all decode at the rate that their number and KV give."""

    costs: Costs
    capacity: float
    chains: list[Chain] = field(default_factory=list)
    waiting: list[Chain] = field(default_factory=list)
    cached: OrderedDict[int, int] = field(default_factory=OrderedDict)  # question -> tokens of its prompt's KV
    now_s: float = 0.0
    version: int = 0

    @property
    def kv(self) -> float:
        """Tokens that hold memory: prompts once, whoever shares them, and what was generated."""
        return sum(chain.made for chain in self.chains) + sum(self.cached.values())

    @property
    def step_s(self) -> float:
        read = sum(chain.made + chain.prompt for chain in self.chains)
        return self.costs.step_s(len(self.chains), read)

    @property
    def work(self) -> float:
        return sum(chain.left for chain in self.chains) + sum(chain.left for chain in self.waiting)

    def advance(self, to_s: float) -> None:
        """Decode up to a moment. While a prompt is prefilled (``now_s`` is ahead of it) nothing else runs."""
        span = to_s - self.now_s
        if span <= 0:
            return
        if self.chains:
            done = min(span / self.step_s, self.next_end())
            for chain in self.chains:
                chain.left -= done
                chain.made += done
        self.now_s = to_s

    def next_end(self) -> float:
        return min(chain.left for chain in self.chains)

    def end_s(self) -> float:
        """When the next chain ends, at the present rate."""
        return self.now_s + self.next_end() * self.step_s

    def admit(self, seats: int) -> int:
        """Prefill who waits while there is room; returns how many found their prompt's KV."""
        hits = 0
        while self.waiting and len(self.chains) < seats:
            chain = self.waiting[0]
            hit = chain.question in self.cached
            self.cached[chain.question] = chain.prompt
            self.cached.move_to_end(chain.question)
            while len(self.cached) > 1 and self.kv > self.capacity:
                self.cached.popitem(last=False)
            if self.kv > self.capacity and self.chains:
                if not hit:
                    del self.cached[chain.question]
                break
            self.waiting.pop(0)
            self.now_s += 0.0 if hit else chain.prompt * self.costs.prefill_s
            chain.first_s = self.now_s
            self.chains.append(chain)
            hits += hit
        return hits


@dataclass(frozen=True)
class Work:
    """Prompt tokens, generated tokens (mean of an exponential, at least one), chains of a question, their pause."""

    prompt: int = 8192
    generated: float = 4096.0
    chains: int = 8
    pause_s: float = 2.0


def simulate(
    costs: Costs, replicas: int, way: str, rate: float, questions: int, seats: int = 32, patience: float = 2.0,
    work: Work = Work(), seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """``rate`` questions a second over so many replicas, until all have ended; ``events`` counts what happened."""
    rng = random.Random(seed)
    capacity = (HBM_BYTES - WEIGHT_BYTES) / KV_BYTES
    fleet = [Replica(costs, capacity) for _ in range(replicas)]
    home: dict[int, int] = {}
    events: list[tuple[float, int, int, Any]] = []
    at_s, number = 0.0, 0
    for question in range(questions):
        at_s += rng.expovariate(rate)
        for index in range(work.chains):
            chain = Chain(question, work.prompt, 1 + rng.expovariate(1 / work.generated), at_s + index * work.pause_s)
            heapq.heappush(events, (chain.arrived_s, number, -1, chain))
            number += 1
    first_s: list[float] = []
    whole_s: list[float] = []
    hits = count = 0
    load = [0.0] * replicas
    while events:
        now_s, _, where, what = heapq.heappop(events)
        count += 1
        if where < 0:
            where = _route(way, fleet, load, home.get(what.question), rng, patience, seats)
            home[what.question] = where
            load[where] += what.left
            fleet[where].advance(now_s)
            fleet[where].waiting.append(what)
        elif what != fleet[where].version:
            continue  # an end that was foreseen before the replica's rate changed
        else:
            fleet[where].advance(now_s)
        replica = fleet[where]
        for chain in [c for c in replica.chains if c.left < 1e-6]:
            replica.chains.remove(chain)
            first_s.append(chain.first_s - chain.arrived_s)
            whole_s.append(now_s - chain.arrived_s)
        if replica.now_s <= now_s + 1e-12:
            hits += replica.admit(seats)
        load[where] = replica.work
        replica.version += 1
        if replica.chains or replica.waiting:
            is_late = replica.waiting and len(replica.chains) < seats and replica.now_s > now_s
            wake = replica.end_s() if replica.chains and not is_late else replica.now_s  # or when its prefill is over
            heapq.heappush(events, (wake, number, where, replica.version))
            number += 1
    ended = len(first_s)
    check(ended == questions * work.chains, f"{ended} of {questions * work.chains} chains ended")
    return {
        "prefix_hits": round(hits / ended, 4),
        "first_token_mean_s": round(statistics.mean(first_s), 3),
        "first_token_p99_s": round(sorted(first_s)[int(0.99 * (ended - 1))], 3),
        "chain_mean_s": round(statistics.mean(whole_s), 2),
        "events": count,
    }


def _route(
    way: str, fleet: list[Replica], load: list[float], home: int | None, rng: random.Random, patience: float, seats: int
) -> int:
    if way == "random":
        return rng.randrange(len(fleet))
    idlest = min(range(len(fleet)), key=load.__getitem__)
    if way == "prefix" and home is not None:
        is_full = len(fleet[home].chains) + len(fleet[home].waiting) >= seats
        if not is_full and load[home] <= patience * max(load[idlest], 8192.0):
            return home
    return idlest


def tell_bytes(report: Report) -> None:
    """What ranks of one model tell each other in a step: two sums a layer and one of the embedding, and the logits."""
    for name, layers, hidden in (("qwen3-8b", 36, 4096), ("qwen3-32b", 64, 5120)):
        sums = 2 * layers + 1
        report.point(
            part="tensor parallel", shape=name, sums=sums, bytes_per_token=sums * hidden * 2, logit_bytes=151_936 * 2
        )


def tell_entrance(report: Report) -> None:
    """What one core can route and stream: of the server on a CPU, whole answers against streamed ones."""
    points = json.loads((RESULTS.parent / "cpu" / "serve.json").read_text(encoding="utf-8"))["points"]
    rate = {p["arm"]: p.get("tokens_per_s") for p in points}
    per_token = 1 / rate["stream"] - 1 / rate["engine"]
    first_ms = next(p["overhead_ms"] for p in points if p["arm"] == "first token")
    report.point(
        part="entrance", us_per_streamed_token=round(1e6 * per_token, 1), tokens_per_s_and_core=round(1 / per_token),
        ms_per_request=round(first_ms, 3), requests_per_s_and_core=round(1e3 / first_ms),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="8,64,1000")
    parser.add_argument("--load", type=float, default=0.8, help="of what full replicas decode")
    parser.add_argument("--per-replica", type=int, default=0, help="questions; default: 24, and 6 for 1000 replicas")
    parser.add_argument("--patience", type=float, default=2.0)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    work = Work()
    report = Report("scale_simulated", notes={"load": args.load, "patience": args.patience, "work": vars(work)})
    arms = {
        "full": measured("decode", None),
        "asyncspade": measured("asyncspade_first", "asyncspade:predictor=residual"),
    }
    tell_bytes(report)
    tell_entrance(report)
    for arm, costs in arms.items():
        report.point(part="costs", arm=arm, **{k: float(f"{v:.4g}") for k, v in vars(costs).items()})
        full = 32 / costs.step_s(32, 32 * (work.prompt + work.generated))
        for replicas in map(int, args.replicas.split(",")):
            rate = args.load * full * replicas / (work.chains * work.generated)
            questions = replicas * (args.per_replica or (6 if replicas >= 1000 else 24))
            found = {}
            for way in WAYS:
                found[way] = simulate(costs, replicas, way, rate, questions, patience=args.patience, work=work)
                report.point(part="routing", arm=arm, replicas=replicas, way=way, **found[way])
            check(found["prefix"]["prefix_hits"] > found["random"]["prefix_hits"], "affinity found no more prefixes")
    report.finish(args.json)


if __name__ == "__main__":
    main()
