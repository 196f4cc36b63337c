"""What a run was worth: accuracy, tokens, rates, and what its time went into; as plain values and as a picture."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from slipstream.atts.events import Decided, Drafted, Ended, Event, Failed, Limited, Looped, TakenOver
from slipstream.atts.pipeline.run import Outcome

E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class Machine:
    """Peak of arithmetic in FLOP/s, and of memory in bytes/s."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls) -> Machine:
        """This host's, from one product of matrices and one copy (about 0.1 s)."""
        a = np.ones((768, 768), np.float32)
        b = np.ones(1 << 24, np.float32)
        return cls(2 * 768**3 / _best(lambda: a @ a), 2 * b.nbytes / _best(b.copy))


def _best(work: Any) -> float:
    times = []
    for _ in range(4):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


@dataclass(frozen=True)
class Cost:
    """A model: parameters read per step, bytes of them, bytes of KV per token."""

    parameters: float
    weight_bytes: float
    kv_bytes: float


def intensity(outcome: Outcome, draft: Cost, target: Cost, machine: Machine) -> dict[str, float]:
    """Asynchronous arithmetic intensity r = T_c / (T_m + T_s) of a run (section 4), in seconds of the whole run.

    T_c: two FLOP per parameter and token at the machine's peak. T_m: weights read once per step of as many chains as
    the stage had at once on average, and the KV of every token before. T_s: the time that the busier of draft and
    target stood partly idle (places not taken, of as many as there are): waiting for each other, or at barriers.
    """
    events = outcome.events
    wall = max((event.at_s for event in events), default=0.0) or 1e-9
    compute = memory = 0.0
    context: dict[tuple[str, int], int] = defaultdict(int)
    busy: dict[type[Event], float] = defaultdict(float)
    for event in events:
        busy[type(event)] += getattr(event, "busy_s", 0.0)
    for event in events:
        if not isinstance(event, (Drafted, Decided, TakenOver)):
            continue
        cost, tokens = (draft if isinstance(event, Drafted) else target), _tokens(event)
        chain, steps = (event.question, event.sample), 1 if isinstance(event, Decided) else tokens
        together = max(1.0, busy[type(event)] / wall)
        compute += 2 * cost.parameters * tokens / machine.flops
        memory += steps * (cost.weight_bytes / together + cost.kv_bytes * context[chain]) / machine.bandwidth
        context[chain] += 0 if isinstance(event, Decided) else tokens
    places = {Drafted: outcome.config.draft_concurrency, TakenOver: outcome.config.target_concurrency}
    sync = max(0.0, wall - max(busy[kind] / number for kind, number in places.items()))
    return {"compute_s": compute, "memory_s": memory, "sync_s": sync, "r": compute / max(memory + sync, 1e-12)}


def _tokens(event: Event) -> int:
    return event.scored if isinstance(event, Decided) else getattr(event, "tokens", 0)


def _of(events: Sequence[Event], kind: type[E]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


def summary(outcome: Outcome) -> dict[str, Any]:
    """Accuracy (None where answers are not known), tokens, times and the certificate; plain values for JSON.

    pass@1: mean over chains that were not cancelled, then over questions; maj: the largest cluster's answer; pass@k:
    any chain's. Prefill counts are this session's.
    """
    events, config = outcome.events, outcome.config
    questions: dict[str, list[Ended]] = defaultdict(list)
    for end in _of(events, Ended):
        questions[end.question].append(end)
    judged = [[bool(e.correct) for e in ends if e.reason != "settled"] for ends in questions.values()
              if any(e.correct is not None for e in ends)]  # fmt: skip
    majority = [right for _, right in outcome.majority.values() if right is not None]
    overs, decided = _of(events, TakenOver), _of(events, Decided)
    return {
        "questions": len(questions),
        "chains": sum(map(len, questions.values())),
        "pass@1": statistics.fmean(map(statistics.fmean, filter(None, judged))) if judged else None,
        f"maj@{config.samples}": statistics.fmean(majority) if majority else None,
        f"pass@{config.samples}": statistics.fmean(map(any, judged)) if judged else None,
        "draft_tokens": sum(e.tokens for e in _of(events, Drafted)),
        "target_tokens": sum(e.tokens for e in overs),
        "scored_tokens": sum(e.scored for e in decided),
        "wall_s": max((e.at_s for e in events), default=0.0),
        "take_overs": len(overs),
        "empty_take_overs": sum(not e.tokens for e in overs),
        "retried_take_overs": sum(e.retried for e in overs),
        "loops": len(_of(events, Looped)),
        "limited": dict(Counter(e.reason for e in _of(events, Limited))),
        "failures": dict(Counter(f"{e.stage}: {e.what.split(':')[0]} -> {e.policy}" for e in _of(events, Failed))),
        "ends": dict(Counter(e.reason for e in _of(events, Ended))),
        "prefill": outcome.counters,
        "certificate": outcome.certificate.as_dict(),
    }


def picture(outcome: Outcome, path: str | Path) -> None:
    """Running rate with its guaranteed corridor, rate per turn and per question, tokens per question."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    certificate, decided = outcome.certificate, _of(outcome.events, Decided)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    if decided:
        taken = np.array([e.rejected for e in decided], float)
        alphas = np.array([e.alpha for e in decided])
        count = np.arange(1, len(taken) + 1)
        axes[0, 0].plot(count, taken.cumsum() / count, label="rate so far")
        axes[0, 0].plot(count, alphas.cumsum() / count, "k--", label="alpha so far")
        if certificate.window_bound is not None:
            half = certificate.window_bound * certificate.window / count
            low, high = alphas.cumsum() / count - half, alphas.cumsum() / count + half
            axes[0, 0].fill_between(count, low, high, alpha=0.15, label="guaranteed")
        axes[0, 0].set(ylim=(0, 1), xlabel="tests", title="Share of turns taken over")
        axes[0, 0].legend()
    for axis, groups, name in (
        (axes[0, 1], certificate.turns, "turn"),
        (axes[1, 0], certificate.questions, "question"),
    ):
        axis.bar(range(len(groups)), [g.rate for g in groups.values()])
        axis.axhline(certificate.alpha, color="k", ls="--")
        axis.set(ylim=(0, 1), xlabel=name, title=f"Rate per {name}")
    tokens: dict[str, Counter[str]] = defaultdict(Counter)
    for event in outcome.events:
        if isinstance(event, (Drafted, TakenOver)):
            tokens[event.question]["draft" if isinstance(event, Drafted) else "target"] += event.tokens
    places, drafted = range(len(tokens)), [t["draft"] for t in tokens.values()]
    axes[1, 1].bar(places, drafted, label="draft")
    axes[1, 1].bar(places, [t["target"] for t in tokens.values()], bottom=drafted, label="target")
    axes[1, 1].set(xlabel="question", title="Tokens written")
    axes[1, 1].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
