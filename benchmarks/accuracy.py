"""Which selection finds what full attention finds? The table that the defaults are chosen from, on the embedded target.

Arms (a method at one budget, all its cells in one batch) run cheapest first; the result is written after each of them,
and nothing is begun that would end after ``--time-limit-s``. Quest and Double Sparsity run with ``dense_layers=0`` like
the others: their own default keeps two of this model's eight layers dense. Part ``papers`` has them as in their papers.

    PYTHONPATH=src python benchmarks/accuracy.py --dry-run
    PYTHONPATH=src python benchmarks/accuracy.py --json benchmarks/results/h200/accuracy.json --log runs/accuracy.jsonl

The model is so small that steps wait for the host: several processes on one GPU are faster than one. ``--shard 0/8`` to
``7/8`` share the work, ``--merge A.json B.json ...`` makes one result of theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from harness import Report, check

from slipstream import compare
from slipstream.compare import Arm, Budget, Method, Row, context_of
from slipstream.evaluation import Cell, parse_cell

NEEDLES = ("needle_single", "needle_multikey", "needle_multivalue", "needle_multiquery", "variable_tracking")
PROGRAMS = ("program:steps=50", "program:steps=100", "program:steps=200", "program_shuffled:steps=100")
QUEST, DOUBLE = "quest:dense_layers=0", "double_sparsity:dense_layers=0"
OTHERS = ("two_level:aggregate=sum", "two_level:block_score=minmax4x16")  # than the defaults of two_level
RIVALS = ("two_level", *OTHERS, QUEST, "oracle", DOUBLE)
DEAF = ("window", "tova")  # they do not look at the query again, so two budgets show enough
SCORES = [
    f"two_level:block_score={score}:block_aggregate={aggregate}"
    for score in ("mean", "minmax", "meanstd", "minmax4x16")
    for aggregate in ("max", "sum")
]
EDGES = [
    f"two_level:{text}"
    for text in ("aggregate=max", "aggregate=sum", "recent=16", "recent=32", "recent=128", "sink=1", "sink=16")
]
SPADE = "asyncspade"  # in depth; the others predict in time, with a gate and without
SPADES = (
    SPADE, *(f"{SPADE}:predictor={name}{gate}" for gate in (":confidence=0.8", "") for name in ("ridge", "last")),
)  # fmt: skip
# What a H200 is assumed to do. Arms: load, compile, capture. Prefill and encoding of texts: tokens per second.
ARM_S, STEP_S, EAGER_S, PREFILL, ENCODE = 2.5, 1.5e-3, 6e-3, 1.5e6, 5e5


def arms_of(methods: Sequence[str], budgets: Sequence[str], cells: Sequence[Cell], skipped: list[Row]) -> list[Arm]:
    parsed: list[Budget] = [compare.parse_budget(text) for text in budgets]
    arms, notes = compare.plan([Method.parse(text) for text in methods], parsed, cells)
    skipped += notes
    return arms


def cells(tasks: Sequence[str], lengths: Sequence[int], samples: int, protocols: str) -> list[Cell]:
    return compare.cells_of(",".join(tasks), lengths, list(protocols), samples)


def retrieval(samples: int, skipped: list[Row]) -> list[Arm]:
    every = cells(NEEDLES, (2048, 4096, 8192), samples, "AB")
    once = [cell for cell in every if cell.protocol == "A"]  # full attention is the same by both protocols
    return [
        *arms_of(["full"], ["1"], once, skipped),
        *arms_of(RIVALS, ["1/4", "1/8", "1/16", "1/32"], every, skipped),
        *arms_of(DEAF, ["1/4", "1/16"], [cell for cell in every if "4096" in cell.name], skipped),
    ]


def programs(samples: int, skipped: list[Row]) -> list[Arm]:
    every = [parse_cell(text, None, samples) for text in PROGRAMS]
    return [*arms_of(["full"], ["1"], every, skipped), *arms_of((*RIVALS, "window", "tova"), ["256"], every, skipped)]


def variants(samples: int, skipped: list[Row]) -> list[Arm]:
    every = cells(("needle_multikey", "variable_tracking"), (8192,), samples, "B")
    return [*arms_of(SCORES, ["1/16", "1/32"], every, skipped), *arms_of(EDGES, ["1/32"], every, skipped)]


def long(samples: int, skipped: list[Row]) -> list[Arm]:
    every = cells(("needle_multikey", "variable_tracking"), (16384,), samples, "AB")
    once = [cell for cell in every if cell.protocol == "A"]
    return [*arms_of(["full"], ["1"], once, skipped), *arms_of(RIVALS, ["1/8", "1/32"], every, skipped)]


def probe(samples: int, skipped: list[Row]) -> list[Arm]:
    """What each method selects, layer by layer. TOVA cannot be looked at: its keys are gone."""
    needles = cells(NEEDLES, (2048, 4096, 8192), samples, "B")
    return arms_of(("window", *RIVALS), ["1/8", "1/32"], needles, skipped)


def probe_programs(samples: int, skipped: list[Row]) -> list[Arm]:
    chains = [parse_cell(text, None, samples) for text in PROGRAMS]
    return arms_of(("window", *RIVALS), ["256"], chains, skipped)


def papers(samples: int, skipped: list[Row]) -> list[Arm]:
    every = cells(("needle_multikey", "variable_tracking"), (4096, 8192), samples, "AB")
    return arms_of(("quest", "double_sparsity"), ["1/16", "1/32"], every, skipped)


def asyncspade(samples: int, skipped: list[Row]) -> list[Arm]:
    known = [task for task in NEEDLES if task != "needle_multivalue"]  # full attention does not solve that either
    needles = cells(known, (2048, 4096, 8192), samples, "B")
    chains = [
        parse_cell(f"{name}:steps={n}", None, samples) for n in (50, 100) for name in ("program", "program_shuffled")
    ]
    every = [*needles, *chains]
    return [
        *arms_of(["full"], ["1"], every, skipped),
        *arms_of((*SPADES, "two_level", QUEST, "tova"), ["1/8"], every, skipped),
    ]


PARTS: dict[str, Callable[[int, list[Row]], list[Arm]]] = {
    "retrieval": retrieval, "programs": programs, "variants": variants, "probe": probe, "long": long, "papers": papers,
    "probe_programs": probe_programs, "asyncspade": asyncspade,
}  # fmt: skip
DEFAULT = "retrieval,programs,variants,probe"
SHOWN = ("retrieval", "programs", "long", "asyncspade")  # in the picture


def estimate(arm: Arm, seats: int, probed: bool) -> float:
    """Seconds on a H200: prompts of protocol B find theirs cached if A's are in the arm, steps are shared by all."""
    own = list(dict.fromkeys(cell for cell, _ in arm.cells))
    seen: set[Cell] = set()
    prefill = steps = longest = 0
    for cell in own:
        problem = cell.problem(0, 0)
        prompt, chain = (compare.tasks.count_tokens(text) for text in (problem.prompt, problem.completion))
        chain += 16 if cell.protocol == "B" else 0
        prefill += 0 if replace(cell, protocol="A") in seen else cell.samples * prompt
        seen.add(replace(cell, protocol="A"))
        steps += cell.samples * chain
        longest = max(longest, chain)
    return (
        ARM_S
        + prefill / PREFILL
        + max(longest, steps / seats) * STEP_S
        + probed * (ARM_S + len(own) * longest * EAGER_S)
    )


def plan(parts: Sequence[str], args: argparse.Namespace, report: Report) -> list[tuple[str, Arm, float]]:
    """(part, arm, seconds), part after part, full attention first and then the cheapest."""
    found = []
    for part in parts:
        skipped: list[Row] = []
        arms = [
            (part, arm, estimate(arm, args.max_num_seqs, part.startswith("probe")))
            for arm in PARTS[part](args.samples, skipped)
        ]
        found += sorted(arms, key=lambda item: (not item[1].method.is_dense, item[2]))
        report.notes.setdefault("skipped", []).extend(skipped)
    return found


def measure(report: Report, args: argparse.Namespace, work: Sequence[tuple[str, Arm, float]]) -> None:
    began, slower = time.monotonic(), 1.0  # how much longer the last arm took than was estimated
    rows: list[Row] = []
    for done, (part, arm, seconds) in enumerate(work):
        spent = time.monotonic() - began
        if spent + slower * seconds > args.time_limit_s:
            report.notes["left_out"] = [f"{p}: {a.name}" for p, a, _ in work[done:]]
            print(f"time limit: {len(work) - done} arms are left out", flush=True)
            break
        rows += measure_arm(report, args, part, arm)
        slower = min(3.0, max(0.5, (time.monotonic() - began - spent) / seconds))
        report.keep(args.json)
    report.notes["wall_s"] = round(time.monotonic() - began, 1)
    shown = [row for row in rows if row["part"] in SHOWN]
    if args.picture and shown:
        compare.draw(shown, Path(args.picture), f"{args.model}, greedy, {args.samples} problems a cell")
    bars(report, rows)


def merge(report: Report, args: argparse.Namespace) -> None:
    """One result of what the shards measured; what they left out is left out of it too."""
    parts = [json.loads(Path(name).read_text(encoding="utf-8")) for name in args.merge]
    report.points = [point | {"task": point["cell"].split()[0]} for part in parts for point in part["points"]]
    report.notes["wall_s"] = max(part.get("wall_s", 0.0) for part in parts)
    report.notes |= {name: parts[0][name] for name in ("device", "versions", "commit")}  # where it was measured
    report.notes["left_out"] = [arm for part in parts for arm in part.get("left_out", [])]
    report.notes["shards"] = len(parts)
    shown = [row for row in report.points if row["part"] in SHOWN]
    if args.picture and shown:
        compare.draw(shown, Path(args.picture), f"{args.model}, greedy, {args.samples} problems a cell")
    bars(report, report.points)
    report.finish(args.json)


def measure_arm(report: Report, args: argparse.Namespace, part: str, arm: Arm) -> list[Row]:
    """One arm's rows; each becomes a point. An arm that was never sparse proves nothing and ends the run."""
    start = time.monotonic()
    engine = {"max_num_seqs": args.max_num_seqs, "max_batch_tokens": args.max_batch_tokens, "device": args.device}
    if args.kv_memory:
        engine["kv_memory"] = args.kv_memory
    rows = compare.run_arm(
        args.model, arm, engine=engine, log=args.log, probe=args.samples if part.startswith("probe") else 0
    )
    stats = rows[0]["stats"]
    if stats["decode_tokens"] and "sparse_steps" in stats:
        check(stats["sparse_steps"] > 0, f"{arm.name} was never sparse")
    wall = round(time.monotonic() - start, 2)
    print(f"-- {part}: {arm.name}, {wall} s", flush=True)
    for row in rows:
        row |= {"part": part, "density": stats.get("density", 1.0)}
        kept = {name: value for name, value in row.items() if name not in ("stats", "task")}
        report.points.append(kept | {"arm_s": wall})
        print(f"{row['accuracy']:.3f}  {row['budget']:>5}  {arm.name}  {row['cell']}", flush=True)
    return rows


def bars(report: Report, rows: Sequence[Row]) -> None:
    """Two-level near full attention at 1/8, and Quest below two-level at the small budgets, on retrieval up to 8k;
    AsyncSpade within two points of full attention at 1/8, in the mean of its cells."""
    spade = [row for row in rows if row["part"] == "asyncspade"]
    exact = {row["cell"]: row["accuracy"] for row in spade if row["method"] == "full"}
    for method in [name for name in SPADES if any(row["method"] == name for row in spade)]:
        gaps = [exact[r["cell"]] - r["accuracy"] for r in spade if r["method"] == method and r["cell"] in exact]
        if gaps:
            report.bar(f"full minus {method} at 1/8, mean of {len(gaps)} cells", statistics.fmean(gaps), 0.02, "<=")
            report.bar(f"full minus {method} at 1/8, worst of {len(gaps)} cells", max(gaps), 0.02, "<=")
    own = [row for row in rows if row["part"] == "retrieval"]
    full = {row["cell"]: row["accuracy"] for row in own if row["method"] == "full"}
    lost = [
        full[row["cell"].removesuffix(" protocol=B")] - row["accuracy"]
        for row in own
        if (row["method"], row["budget"]) == ("two_level", "1/8") and row["cell"].removesuffix(" protocol=B") in full
    ]
    if lost:
        report.bar(f"full minus two_level at 1/8, worst of {len(lost)} retrieval cells", max(lost), 0.01, "<=")
    for budget in ("1/16", "1/32"):
        by_method = {
            method: {row["cell"]: row["accuracy"] for row in own if (row["method"], row["budget"]) == (method, budget)}
            for method in ("two_level", QUEST)
        }
        shared = by_method["two_level"].keys() & by_method[QUEST].keys()
        if shared:
            ahead = statistics.fmean(by_method["two_level"][cell] - by_method[QUEST][cell] for cell in shared)
            report.bar(f"two_level minus quest at {budget}, mean of {len(shared)} retrieval cells", ahead, 0.02, ">=")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=DEFAULT, help="comma-separated, of " + ", ".join(PARTS) + "; or all")
    parser.add_argument("--samples", type=int, default=100, help="problems per cell")
    parser.add_argument("--model", default="slipstream-target", help="an embedded model")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-batch-tokens", type=int, default=16384)
    parser.add_argument("--kv-memory", help="default: what is free")
    parser.add_argument("--time-limit-s", type=float, default=420.0, help="begin no arm that would end after this")
    parser.add_argument("--shard", default="0/1", help="do only every n-th arm, e.g. 2/8: the third of every eight")
    parser.add_argument("--only", default="", help="do only arms whose name begins so")
    parser.add_argument("--merge", nargs="+", help="results of shards to make one of, instead of measuring")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its estimated time, and stop")
    parser.add_argument("--log", type=Path, help="JSON lines of answers; a rerun goes on from there")
    parser.add_argument("--picture", help="draw the parts retrieval, programs and long here")
    parser.add_argument("--json", help="write the result here, after every arm")
    args = parser.parse_args()
    parts = list(PARTS) if args.part == "all" else args.part.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"--part takes {', '.join(PARTS)} or all, got {part!r}")
    report = Report("accuracy", notes={"model": args.model, "samples": args.samples})
    if args.merge:
        merge(report, args)
        return
    work = plan(parts, args, report)
    shard, shards = (int(number) for number in args.shard.split("/"))
    work = [item for item in work if item[1].name.startswith(args.only)][shard::shards]
    for part in parts:
        own = [(arm, seconds) for of, arm, seconds in work if of == part]
        print(f"plan: {part}, {len(own)} arms, about {sum(s for _, s in own):.0f} s", flush=True)
        for arm, seconds in own if args.dry_run else ():
            print(f"  {seconds:5.1f} s  {arm.name}: {len({cell for cell, _ in arm.cells})} cells")
    unique = {(c.task, c.parameters, c.protocol): context_of(c) * c.samples for _, arm, _ in work for c, _ in arm.cells}
    encoding = sum(unique.values()) / ENCODE
    print(f"plan: texts, about {encoding:.0f} s; in all {encoding + sum(s for _, _, s in work):.0f} s", flush=True)
    if not args.dry_run:
        measure(report, args, work)
        report.finish(args.json)


if __name__ == "__main__":
    main()
