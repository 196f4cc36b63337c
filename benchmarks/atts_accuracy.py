"""Does score-driven take-over beat a coin at equal target tokens? The embedded pair on expressions that the draft alone
solves four times in ten.

    python benchmarks/atts_accuracy.py --workers 8 --samples 1 --work /tmp/accuracy --time-limit 540 --json F
    python benchmarks/atts_accuracy.py --problems 4 --seeds 1 --samples 1 --operations 4 --alphas 0.3 --device cpu

Arms: who takes over (``mode``), by which ``score``, how (``takeover``: ``continue`` after the rejected turn, as in
the paper, or ``replace`` it; then turns that end with an answer are tested, too). Every arm of a seed sees the same
problems and draws the same draft texts. One file per arm and seed under --work, so that an interrupted run goes on and
several processes share the work: --shard i/n does every n-th job, --merge only makes the table, --workers n starts n
shards and merges. The result is written after every arm.

A coin that spends as much: between the two coin arms (draft alone and target alone among them) whose target tokens
enclose the arm's, mixed so that their tokens are the arm's. Differences are paired by problem, over the seeds that all
arms involved have; standard errors are over problems. maj: the answer that most of a problem's chains gave, over
samples and seeds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from harness import Report, check

from slipstream import LLM, tasks
from slipstream.atts.answers import Tagged
from slipstream.atts.config import ATTS
from slipstream.atts.events import Ended
from slipstream.atts.pipeline.run import Run
from slipstream.atts.report import summary
from slipstream.scaling import local

Arm = tuple[str, str, str, float]  # takeover, mode, score, alpha
Done = dict[Arm, dict[int, dict[str, Any]]]  # arm -> seed -> what came of it
SHAPES = ("problems", "operations", "samples", "turns", "tokens", "temperature")
DRAFT: Arm = ("replace", "coin", "none", 0.0)
TARGET: Arm = ("replace", "coin", "none", 1.0)
FEW = 0.01  # of the scores may fail (a draft that wrote nothing, say) in an arm that the bars look at
ENOUGH = 100  # problems from which on the realised rate must be alpha


def arms_of(alphas: list[float], scores: list[str], takeovers: list[str], modes: list[str]) -> list[Arm]:
    """The references, the coins, then the scores, the likeliest first: what a time limit cuts off is the end."""
    found = [DRAFT, TARGET] + [(takeover, "coin", "none", alpha) for takeover in takeovers for alpha in alphas]
    for mode in modes:
        found += [(t, mode, score, alpha) for t in takeovers for alpha in alphas for score in scores]
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
        alpha=alpha, mode=mode, score="perplexity" if score == "none" else score, takeover=takeover, seed=seed,
        samples=args.samples, turns=args.turns, draft_tokens=args.tokens, target_tokens=args.tokens, settle=False,
        temperature=args.temperature, answers="tagged", chain_tokens=models[0].options.max_model_len,
        window=args.window, draft_concurrency=args.window, score_concurrency=args.window,
        target_concurrency=args.window,
    )  # fmt: skip
    began = time.perf_counter()
    outcome = asyncio.run(Run(problems, *map(local, models), config).run())
    result, certificate = summary(outcome), outcome.certificate
    check(result["chains"] == len(problems) * args.samples, f"{arm}: chains were lost")
    failed = sum(result["failures"].values())
    check(score == "grade" or failed <= FEW * certificate.tests, f"{arm}: {result['failures']}")
    if 0 < alpha < 1 and args.problems >= ENOUGH and mode in ("per-question", "marginal"):
        check(abs(certificate.rate - alpha) < 0.01 and certificate.holds, f"{arm}: rate {certificate.rate}")
    chains: dict[str, list[Ended]] = defaultdict(list)
    for event in outcome.events:
        if isinstance(event, Ended):
            chains[event.question].append(event)
    kept = ("pass@1", "draft_tokens", "target_tokens", "scored_tokens", "take_overs", "loops", "failures", "ends",
            "prefill")  # fmt: skip
    return {
        "arm": list(arm), "seed": seed, "wall_s": time.perf_counter() - began, "rate": certificate.rate,
        "tests": certificate.tests, **{name: result[name] for name in kept},
        "correct": [statistics.fmean(bool(e.correct) for e in chains[p["id"]]) for p in problems],
        "answers": [[(e.answer, bool(e.correct)) for e in chains[p["id"]]] for p in problems],
    }  # fmt: skip


# -- the table


def mean_of(runs: dict[int, dict], name: str) -> float:
    return statistics.fmean(run[name] for run in runs.values())


def by_problem(runs: dict[int, dict], seeds: list[int]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*(runs[seed]["correct"] for seed in seeds), strict=True)]


def difference(one: list[float], other: list[float]) -> tuple[float, float]:
    """Mean of the paired differences over problems, and its standard error."""
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    return statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0


def majority(runs: dict[int, dict]) -> float:
    """Share of problems whose most frequent answer, over samples and seeds, is right; the earlier wins ties."""
    right = []
    for chains in zip(*(run["answers"] for run in runs.values()), strict=True):
        votes = [answer for chain in chains for answer in chain if answer[0] is not None]
        best = Counter(text for text, _ in votes).most_common(1)
        right.append(bool(best) and dict(votes)[best[0][0]])
    return statistics.fmean(right)


def against_coin(arm: Arm, done: Done) -> dict[str, float]:
    """The arm less the coin that spends as many target tokens; empty where no two coins enclose it."""
    coins = [(a, r) for a, r in done.items() if a[1] == "coin" and (a[0] == arm[0] or a in (DRAFT, TARGET))]
    spent, coins = mean_of(done[arm], "target_tokens"), sorted(coins, key=lambda c: mean_of(c[1], "target_tokens"))
    for (_, low), (_, high) in zip(coins, coins[1:], strict=False):
        seeds = sorted(done[arm].keys() & low.keys() & high.keys())
        below, above = mean_of(low, "target_tokens"), mean_of(high, "target_tokens")
        if seeds and below <= spent <= above and above > below:
            share = (spent - below) / (above - below)
            pairs = zip(by_problem(low, seeds), by_problem(high, seeds), strict=True)
            coin = [(1 - share) * a + share * b for a, b in pairs]
            gain, error = difference(by_problem(done[arm], seeds), coin)
            return {"equal_coin": statistics.fmean(coin), "vs_coin": gain, "vs_coin_se": error}
    return {}


def row_of(arm: Arm, done: Done) -> dict[str, Any]:
    runs = done[arm]
    row: dict[str, Any] = {"takeover": arm[0], "mode": arm[1], "score": arm[2], "alpha": arm[3], "seeds": len(runs)}
    row |= {name: mean_of(runs, name) for name in ("rate", "tests", "pass@1")} | {"maj": majority(runs)}
    row |= {name: mean_of(runs, name) for name in ("target_tokens", "draft_tokens", "scored_tokens")}
    if any(run["failures"] for run in runs.values()):
        row["failed_scores"] = statistics.fmean(sum(run["failures"].values()) for run in runs.values())
    if arm[1] != "coin":
        row |= against_coin(arm, done)
    target = done.get(TARGET, {})
    seeds = sorted(runs.keys() & target.keys())
    if seeds and 0 < arm[3] < 1:
        gap, error = difference(by_problem(runs, seeds), by_problem(target, seeds))
        share = row["target_tokens"] / mean_of(target, "target_tokens")
        row |= {"vs_target": gap, "vs_target_se": error, "target_share": share}
    return row


def report_of(done: Done, settings: dict[str, Any], order: list[Arm]) -> Report:
    """Every arm's row, then the two bars: of the default settings, and (as points) of the best arm."""
    config = ATTS()
    default = (config.takeover, config.mode, config.score)
    report = Report("atts_accuracy", notes={"settings": settings, "default": default})
    rows = [row_of(arm, done) for arm in order if done.get(arm)]
    for row in rows:
        report.point(**row)
    scored = [row for row in rows if row["mode"] != "coin" and row.get("failed_scores", 0) <= FEW * row["tests"]]
    own = [row for row in scored if (row["takeover"], row["mode"], row["score"]) == default]
    for name, found in (("default", own), ("best of all arms", scored)):
        beats = [(r["vs_coin"] / max(r["vs_coin_se"], 1e-9), r) for r in found if r["alpha"] <= 0.3 and "vs_coin" in r]
        close = [(r["target_share"], r) for r in found if r.get("vs_target", -1.0) >= -0.01]
        if beats and any("vs_target" in r for r in found):
            z, share = max(beats, key=lambda b: b[0]), min(close, key=lambda b: b[0], default=(9.99, None))
            report.bar(
                f"{name}: over the coin of equal target tokens at alpha <= 0.3, in standard errors", z[0], 2, ">="
            )
            report.bar(f"{name}: target tokens of target-only within 1 point of it, least share", share[0], 0.6, "<=")
    return report


# -- the work


def key_of(arm: Arm, seed: int) -> str:
    return "_".join(map(str, arm)) + f"_{seed}.json"


def read_done(args: argparse.Namespace, jobs: list[tuple[Arm, int]], settings: dict[str, Any]) -> Done:
    done: Done = defaultdict(dict)
    for arm, seed in jobs:
        path = args.work / key_of(arm, seed) if args.work else None
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            check(found["settings"] == settings, f"{path} is from other settings: choose another --work")
            done[arm][seed] = found
    return done


def write_result(done: Done, settings: dict[str, Any], args: argparse.Namespace, quiet: bool) -> None:
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        arms = arms_of(args.alphas, args.scores, args.takeovers, args.modes)
        report_of(done, settings, arms).finish(args.json)


def run_jobs(jobs: list[tuple[Arm, int]], done: Done, settings: dict[str, Any], args: argparse.Namespace) -> None:
    """Do what is not done, one arm after the other, on models that are opened and warmed once."""
    began = time.perf_counter()
    options = {"max_model_len": 2048, "max_num_seqs": args.window, "device": args.device, "kv_memory": args.kv_memory}
    models = [LLM(name, **options) for name in ("slipstream-draft", "slipstream-target")]
    problems = make_problems(args)
    try:
        if models[0].device.type == "cuda":
            for model in models:
                model.engine.warmup()
            run_arm(("replace", "coin", "none", 0.5), 0, problems[:1], models, args)
        print(f"ready after {time.perf_counter() - began:.1f} s: {len(jobs)} arms to run", flush=True)
        for number, (arm, seed) in enumerate(jobs, 1):
            if time.perf_counter() - began >= args.time_limit:
                print(f"time is up: {len(jobs) - number + 1} arms left; the same command goes on", flush=True)
                break
            row = done[arm][seed] = run_arm(arm, seed, problems, models, args) | {"settings": settings}
            if args.work is not None:
                args.work.mkdir(parents=True, exist_ok=True)
                half = args.work / (key_of(arm, seed) + ".half")
                half.write_text(json.dumps(row))
                half.rename(args.work / key_of(arm, seed))
            found = f"pass@1 {row['pass@1']:.3f}, rate {row['rate']:.3f}, {row['target_tokens']} target tokens"
            print(
                f"{number}/{len(jobs)} seed {seed} {' '.join(map(str, arm))}: {found}, {row['wall_s']:.1f} s",
                flush=True,
            )
            if args.shard == (0, 1):
                write_result(done, settings, args, quiet=True)
    finally:
        for model in models:
            model.close()


def start_workers(args: argparse.Namespace) -> None:
    """This command once per shard; the result is written again whenever there is more of it."""
    again = [sys.executable, __file__, *sys.argv[1:], "--workers", "1"]  # the last word on workers counts
    shards = [subprocess.Popen([*again, "--shard", f"{i}/{args.workers}"]) for i in range(args.workers)]
    jobs, settings = jobs_of(args), settings_of(args)
    known = -1
    while any(shard.poll() is None for shard in shards):
        time.sleep(2)
        done = read_done(args, jobs, settings)
        if (count := sum(map(len, done.values()))) != known:
            known = count
            write_result(done, settings, args, quiet=True)
    check(all(shard.returncode == 0 for shard in shards), "a shard failed: see above")


def jobs_of(args: argparse.Namespace) -> list[tuple[Arm, int]]:
    arms = arms_of(args.alphas, args.scores, args.takeovers, args.modes)
    return [(arm, seed) for seed in range(args.seeds) for arm in arms]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SHAPES}


def shard_of(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not i/n with 0 <= i < n")
    return int(index), int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--operations", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--alphas", type=lambda text: [float(a) for a in words(text)], default="0.1,0.2,0.3,0.5")
    parser.add_argument("--scores", type=words, default="worst-token,log-ratio,perplexity,draft,entropy,grade")
    parser.add_argument("--takeovers", type=words, default="replace,continue")
    parser.add_argument("--modes", type=words, default="per-question,marginal,static")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--kv-memory", default="3GiB", help="of each model in each process")
    parser.add_argument("--device", default=None)
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds; no arm is begun after it")
    parser.add_argument("--work", type=Path, default=None, help="folder of finished arms; an interrupted run goes on")
    parser.add_argument(
        "--shard", type=shard_of, default=(0, 1), help="i/n: every n-th job, from the i-th on; no table"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work; needs --work")
    parser.add_argument("--merge", action="store_true", help="no work: the table of what --work holds")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    check(args.work is not None or (args.workers == 1 and not args.merge), "several processes meet in --work: name it")
    jobs, settings = jobs_of(args), settings_of(args)
    if args.workers > 1 and not args.merge:
        start_workers(args)
    done = read_done(args, jobs, settings)
    if args.workers == 1 and not args.merge:
        index, count = args.shard
        left = [(arm, seed) for arm, seed in jobs[index::count] if seed not in done.get(arm, ())]
        if left and args.time_limit > 0:
            run_jobs(left, done, settings, args)
    if args.shard == (0, 1):
        write_result(read_done(args, jobs, settings) if args.work else done, settings, args, quiet=False)


if __name__ == "__main__":
    main()
