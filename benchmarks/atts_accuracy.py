"""Does score-driven take-over beat a coin at equal target tokens? The embedded pair on expressions that the draft alone
solves half of the time.

    python benchmarks/atts_accuracy.py --json benchmarks/results/h200/atts_accuracy.json --work /tmp/accuracy
    python benchmarks/atts_accuracy.py --problems 4 --seeds 1 --samples 1 --operations 4 --alphas 0.3 --device cpu

Arms: who takes over (``mode``), by which ``score``, how (``takeover``: ``continue`` after the rejected turn, as in
the paper, or ``replace`` it; then turns that end with an answer are tested, too). Every arm of a seed sees the same
problems and draws the same draft texts. One file per arm and seed under --work: an interrupted benchmark goes on.
Differences are paired by problem, over the seeds that both arms have; standard errors are over problems.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

from harness import Report, check

from slipstream import LLM, tasks
from slipstream.atts.answers import Tagged
from slipstream.atts.config import ATTS
from slipstream.atts.events import Ended
from slipstream.atts.pipeline.run import Run
from slipstream.atts.report import summary
from slipstream.scaling import local

Arm = tuple[str, str, str, float]  # takeover, mode, score, alpha


def arms_of(alphas: list[float], scores: list[str], takeovers: list[str]) -> list[Arm]:
    """The coin and the reference arms first: what a time limit cuts off is the end."""
    found: list[Arm] = [("continue", "coin", "none", 0.0), ("replace", "coin", "none", 1.0)]
    for takeover in takeovers:
        for alpha in alphas:
            found += [(takeover, "coin", "none", alpha)]
            found += [(takeover, mode, scores[0], alpha) for mode in ("per-question", "marginal", "static")]
            found += [(takeover, "per-question", score, alpha) for score in scores[1:]]
    return found


def make_problems(args: argparse.Namespace) -> list[dict]:
    made = [tasks.make("expression", 7_000_000 + i, operations=args.operations) for i in range(args.problems)]
    found = []
    for i, problem in enumerate(made):
        verify = lambda answer, problem=problem: tasks.verify(problem, f"</think>\n{answer}")  # noqa: E731
        check(Tagged().find(problem.completion, True) != [], "the ideal completion holds no answer")
        found.append({"id": f"p{i}", "prompt": problem.prompt, "answer": problem.answer, "check": verify})
    return found


def run_arm(arm: Arm, seed: int, problems: list[dict], models: list[LLM], args: argparse.Namespace) -> dict:
    takeover, mode, score, alpha = arm
    config = ATTS(
        test_answers=takeover == "replace",  # a wrong last turn can be written anew, but not continued
        alpha=alpha, mode=mode, score="perplexity" if score == "none" else score, takeover=takeover, seed=seed,
        samples=args.samples, turns=args.turns, draft_tokens=args.tokens, target_tokens=args.tokens, settle=False,
        temperature=args.temperature, answers="tagged", chain_tokens=models[0].options.max_model_len,
        window=args.window, draft_concurrency=args.window, score_concurrency=args.window,
        target_concurrency=args.window,
    )  # fmt: skip
    began = time.perf_counter()
    outcome = asyncio.run(Run(problems, *map(local, models), config).run())
    result = summary(outcome)
    check(result["chains"] == len(problems) * args.samples, f"{arm}: chains were lost")
    check(not result["failures"], f"{arm}: {result['failures']}")
    if 0 < alpha < 1 and args.problems >= 100:
        check(abs(result["certificate"]["rate"] - alpha) < 0.05, f"{arm}: rate {result['certificate']['rate']}")
    correct: dict[str, list[bool]] = defaultdict(list)
    for event in outcome.events:
        if isinstance(event, Ended):
            correct[event.question].append(bool(event.correct))
    kept = ("pass@1", f"maj@{args.samples}", f"pass@{args.samples}", "draft_tokens", "target_tokens", "scored_tokens",
            "take_overs", "loops", "ends", "prefill")  # fmt: skip
    return {
        "arm": list(arm), "seed": seed, "wall_s": time.perf_counter() - began,
        "rate": result["certificate"]["rate"], **{name: result[name] for name in kept},
        "correct": [statistics.fmean(correct[p["id"]]) for p in problems],
    }  # fmt: skip


def paired(one: dict[int, dict], other: dict[int, dict]) -> tuple[float, float, int]:
    """Mean difference of accuracy over problems, its standard error, and over how many seeds."""
    seeds = sorted(one.keys() & other.keys())
    columns = [
        [one[s]["correct"][i] - other[s]["correct"][i] for s in seeds] for i in range(len(one[seeds[0]]["correct"]))
    ]
    means = [statistics.fmean(column) for column in columns]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return statistics.fmean(means), error, len(seeds)


def tabulate(report: Report, done: dict[Arm, dict[int, dict]]) -> None:
    target = next((runs for arm, runs in done.items() if arm[3] == 1.0), None)
    best: dict[str, float] = {"z": float("-inf"), "tokens": float("inf")}
    for arm, runs in done.items():
        row = {"takeover": arm[0], "mode": arm[1], "score": arm[2], "alpha": arm[3], "seeds": len(runs)}
        for name in ("rate", "pass@1", *[n for n in next(iter(runs.values())) if n.startswith(("maj@", "pass@1"))]):
            row[name] = statistics.fmean(run[name] for run in runs.values())
        row["target_tokens"] = statistics.fmean(run["target_tokens"] for run in runs.values())
        row["scored_tokens"] = statistics.fmean(run["scored_tokens"] for run in runs.values())
        coin = done.get((arm[0], "coin", "none", arm[3]))
        if coin and arm[1] != "coin" and coin.keys() & runs.keys():
            difference, error, seeds = paired(runs, coin)
            coin_tokens = statistics.fmean(run["target_tokens"] for run in coin.values())
            row |= {"vs_coin": difference, "stderr": error, "token_ratio": row["target_tokens"] / max(1, coin_tokens)}
            if arm[3] <= 0.3 and row["token_ratio"] <= 1.05:
                best["z"] = max(best["z"], difference / max(error, 1e-9))
        if target and 0 < arm[3] < 1 and arm[1] != "coin" and target.keys() & runs.keys():
            difference, error, _ = paired(runs, target)
            tokens = row["target_tokens"] / statistics.fmean(run["target_tokens"] for run in target.values())
            row |= {"vs_target": difference, "vs_target_stderr": error, "target_share": tokens}
            if difference >= -0.01:
                best["tokens"] = min(best["tokens"], tokens)
        report.point(**row)
    if best["z"] > float("-inf"):
        report.bar(
            "best arm over the coin at alpha <= 0.3 and equal target tokens, in standard errors", best["z"], 2, ">="
        )
        tokens = best["tokens"] if best["tokens"] < float("inf") else 9.99
        report.bar("target tokens of the cheapest arm within 1 point of target-only, as a share", tokens, 0.6, "<=")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--operations", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--alphas", default="0.1,0.2,0.3,0.5")
    parser.add_argument("--scores", default="log-ratio,perplexity,entropy,draft")
    parser.add_argument("--takeovers", default="replace,continue")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--kv-memory", default="8GiB", help="of each model")
    parser.add_argument("--device", default=None)
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds; no arm is begun after it")
    parser.add_argument("--work", type=Path, default=None, help="folder of finished arms; an interrupted run goes on")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    began = time.perf_counter()
    options = {"max_model_len": 2048, "max_num_seqs": args.window, "device": args.device, "kv_memory": args.kv_memory}
    models = [LLM(name, **options) for name in ("slipstream-draft", "slipstream-target")]
    problems, split = make_problems(args), lambda text: [part for part in text.split(",") if part]
    arms = arms_of([float(a) for a in split(args.alphas)], split(args.scores), split(args.takeovers))
    settings = {
        k: v
        for k, v in vars(args).items()
        if k in ("problems", "operations", "samples", "turns", "tokens", "temperature")
    }
    report, done = Report("atts_accuracy", notes={"settings": settings}), defaultdict(dict)
    try:
        for seed in range(args.seeds):
            for arm in arms:
                where = args.work / ("_".join(map(str, arm)) + f"_{seed}.json") if args.work else None
                if where is not None and where.exists():
                    found = json.loads(where.read_text())
                    check(found["settings"] == settings, f"{where} is from other settings: choose another --work")
                    done[arm][seed] = found
                elif time.perf_counter() - began < args.time_limit:
                    done[arm][seed] = run_arm(arm, seed, problems, models, args) | {"settings": settings}
                    if where is not None:
                        where.parent.mkdir(parents=True, exist_ok=True)
                        where.write_text(json.dumps(done[arm][seed]))
                    row = done[arm][seed]
                    print(f"seed {seed} {arm}: pass@1 {row['pass@1']:.3f}, rate {row['rate']:.3f}, "
                          f"{row['target_tokens']} target tokens, {row['wall_s']:.1f} s", flush=True)  # fmt: skip
    finally:
        for model in models:
            model.close()
    tabulate(report, done)
    report.finish(args.json)


if __name__ == "__main__":
    main()
