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
    drafted: dict[tuple[str, int], int] = defaultdict(int)
    busy: dict[type[Event], float] = defaultdict(float)
    for event in events:
        busy[type(event)] += getattr(event, "busy_s", 0.0)
    for event in events:
        if not isinstance(event, (Drafted, Decided, TakenOver)):
            continue
        cost, tokens = (draft if isinstance(event, Drafted) else target), _tokens(event)
        chain, steps = (event.question, event.sample), min(tokens, 1) if isinstance(event, Decided) else tokens
        if isinstance(event, Drafted):
            drafted[chain] = tokens
        elif isinstance(event, TakenOver) and outcome.config.takeover == "replace":  # what is written anew is forgotten
            context[chain] -= drafted.pop(chain, 0)
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
    any chain's. Prefill counts are this session's. untested: turns whose score failed, by policy; they are outside the
    certificate, so ``rate_with_untested`` says what share of turns was to be taken over with them.
    """
    events, config = outcome.events, outcome.config
    questions: dict[str, list[Ended]] = defaultdict(list)
    for end in _of(events, Ended):
        questions[end.question].append(end)
    judged = [[bool(e.correct) for e in ends if e.reason != "settled"] for ends in questions.values()
              if any(e.correct is not None for e in ends)]  # fmt: skip
    majority = [right for _, right in outcome.majority.values() if right is not None]
    overs, decided, failed = _of(events, TakenOver), _of(events, Decided), _of(events, Failed)
    untested = Counter(e.policy for e in failed if e.stage == "score")
    tests = len(decided) + sum(untested.values())
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
        "failures": dict(Counter(f"{e.stage}: {e.what.split(':')[0]} -> {e.policy}" for e in failed)),
        "untested": dict(untested),
        "rate_with_untested": (sum(e.rejected for e in decided) + untested["takeover"]) / tests if untested else None,
        "ends": dict(Counter(e.reason for e in _of(events, Ended))),
        "prefill": outcome.counters,
        "certificate": outcome.certificate.as_dict(),
    }


def picture(outcome: Outcome, path: str | Path) -> None:
    """Running rate with its guaranteed corridor, rate per turn and per question, tokens per question."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    certificate, found = outcome.certificate, summary(outcome)
    style: Any = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "axes.titlelocation": "left",
        "text.parse_math": False,  # a question's id may hold dollars
    }
    with plt.rc_context(style):
        figure, ((running, turns), (questions, tokens)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
        figure.suptitle(_headline(outcome, found), x=0.01, ha="left", fontsize=10)
        decided = _of(outcome.events, Decided)
        if decided:
            _running(running, decided, certificate)
        running.set(title="Share so far", xlabel="tests")
        _rates(turns, {str(k): g.rate for k, g in certificate.turns.items()}, certificate.alpha)
        turns.set(title="Share taken over per turn", xlabel="turn (late ones together)")
        asked = [name for name in outcome.majority if name in certificate.questions]
        _rates(questions, {name: certificate.questions[name].rate for name in asked}, certificate.alpha)
        questions.set(title="Share taken over per question", xlabel="question")
        written: dict[str, Counter[str]] = {name: Counter() for name in outcome.majority}
        for event in outcome.events:
            if isinstance(event, (Drafted, TakenOver)):
                written[event.question]["draft" if isinstance(event, Drafted) else "target"] += event.tokens
        drafted = [count["draft"] for count in written.values()]
        tokens.bar(range(len(written)), drafted, color="#9db8d2", label="draft")
        tokens.bar(range(len(written)), [c["target"] for c in written.values()], bottom=drafted, color="#d1603d",
                   label="target")  # fmt: skip
        _names(tokens, list(written))
        tokens.set(title="Tokens written per question", xlabel="question")
        tokens.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        figure.savefig(path, dpi=130)
    plt.close(figure)


def _headline(outcome: Outcome, found: dict[str, Any]) -> str:
    certificate = outcome.certificate
    words = [
        f"{certificate.mode}: {certificate.rate:.3f} of {certificate.tests} tests for alpha {certificate.alpha:.3f}"
    ]
    words += [f"{name} {value:.3f}" for name, value in found.items() if "@" in name and value is not None]
    return ", ".join([*words, f"tokens: {found['target_tokens']:,} target, {found['draft_tokens']:,} draft"])


def _running(axis: Any, decided: Sequence[Decided], certificate: Any) -> None:
    count = np.arange(1, len(decided) + 1)
    alphas = np.array([e.alpha for e in decided]).cumsum() / count
    rates = np.array([e.rejected for e in decided], float).cumsum() / count
    if certificate.window_bound is not None:
        half = certificate.window_bound * certificate.window / count
        axis.fill_between(count, alphas - half, alphas + half, color="#9db8d2", alpha=0.4, lw=0, label="guaranteed")
    axis.plot(count, rates, color="#d1603d", label="share")
    axis.plot(count, alphas, "k--", lw=1, label="alpha")
    axis.set(ylim=(0, min(1.0, 2 * max(alphas.max(), rates[len(rates) // 10 :].max()))), xlim=(1, max(2, len(count))))
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _rates(axis: Any, rates: dict[str, float], alpha: float) -> None:
    axis.bar(range(len(rates)), list(rates.values()), color="#9db8d2")
    axis.axhline(alpha, color="k", ls="--", lw=1)
    axis.set_ylim(0, min(1.0, max([2 * alpha, *(1.1 * rate for rate in rates.values()), 0.05])))
    _names(axis, list(rates))


def _names(axis: Any, names: Sequence[str]) -> None:
    """Names below bars: all that have room, else about twelve."""
    places = range(0, len(names), max(1, -(-len(names) // 12)))
    slanted = {"rotation": 30, "ha": "right"} if any(len(name) > 6 for name in names) else {}
    axis.set_xticks(list(places), [names[place][:16] for place in places], **slanted)
