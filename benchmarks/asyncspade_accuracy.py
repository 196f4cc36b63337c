"""What does a predicted selection cost in answers, over long chains, and where a chain changes its subject?

Three parts, on the embedded target, each with a picture:

``accuracy``      problems solved by ``asyncspade`` with several predictors, with and without the confidence gate,
                  against ``full``, ``two_level``, ``quest`` and ``tova`` at equal budgets: needles by protocol B,
                  programs by A.
``accumulation``  a session of programs, one after the other, that is forced through decode steps: what is lost in
                  log-probability and in agreement of the greedy token as decoded tokens add up to 1k, 4k and 16k.
                  States of earlier sparse steps are what later ones read, so errors could pile up.
``locality``      a chain that is interrupted by text of another kind, half way (a tool's output, then another problem):
                  attention mass and overlap with the true sets, and the share of repaired KV heads, around the switch.

    PYTHONPATH=src python benchmarks/asyncspade_accuracy.py --dry-run
    PYTHONPATH=src python benchmarks/asyncspade_accuracy.py --part accuracy --json runs/a.json --picture runs/a.png

``--shard 0/8`` to ``7/8`` share the work between processes, ``--merge A.json B.json ...`` makes one result of theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy import NEEDLES, arms_of, cells, keep, measure_arm
from harness import Report, check

from slipstream import LLM, SamplingParams, compare, tasks
from slipstream.attention.probe import _members
from slipstream.compare import Method
from slipstream.evaluation import parse_cell, prompt_ids
from slipstream.kernels import sparse

PREDICTORS = ("ridge", "analog", "last")
GATE = "confidence=0.3"
PAPER = "scoring=keys:aggregate=sum"  # every key is scored
ASYNC = tuple(f"asyncspade:predictor={name}" for name in PREDICTORS)
RIVALS = ("two_level", "quest:dense_layers=0", "tova")
EDGES = (256, 512, 1024, 2048, 4096, 8192, 16384)  # of decoded tokens, in the part accumulation
AROUND = 64  # tokens before and after a switch that the part locality looks at
Item = tuple[str, str, Callable[[], list[dict[str, Any]]]]  # part, name, work


# -- accuracy: the machinery of accuracy.py


def accuracy_items(report: Report, args: argparse.Namespace) -> list[Item]:
    skipped: list[dict[str, Any]] = []
    retrieval = cells(NEEDLES, [int(n) for n in args.lengths.split(",")], args.samples, "B")
    programs = [parse_cell(f"{name}:steps={n}", None, args.samples) for n in args.steps for name in args.programs]
    every = [*retrieval, *programs]
    methods = [*ASYNC, *(f"{name}:{GATE}" for name in ASYNC), f"{ASYNC[0]}:{PAPER}", *RIVALS]
    arms = [*arms_of(["full"], ["1"], every, skipped), *arms_of(methods, args.budgets.split(","), every, skipped)]
    report.notes.setdefault("skipped", []).extend(skipped)

    def work(arm: compare.Arm) -> list[dict[str, Any]]:
        kept = len(report.points)
        measure_arm(report, args, "accuracy", arm)
        rows = report.points[kept:]
        del report.points[kept:]
        return rows

    return [("accuracy", arm.name, lambda arm=arm: work(arm)) for arm in arms]


# -- what both other parts need


def attention(label: str, budget: int) -> Any:
    return Method.parse(label).attention(budget)


def load(args: argparse.Namespace, label: str, longest: int, **more: Any) -> LLM:
    options = {"device": args.device, "kv_memory": args.kv_memory, "max_num_seqs": 16, "max_batch_tokens": 4096}
    return LLM(args.model, attention=attention(label, args.budget), max_model_len=longest, **options, **more)


def turn(llm: LLM, task: str, seed: int, **parameters: Any) -> tuple[list[int], list[int]]:
    """Ids of a problem's prompt and of its ideal chain."""
    problem = tasks.make(task, seed, **parameters)
    return prompt_ids(llm, problem), llm.codec.tokenizer.encode(problem.completion, add_special_tokens=False)


def forced(llm: LLM, sequences: Sequence[tuple[list[int], int]], dense: bool) -> list[list[tuple[float, bool]]]:
    """(log-probability, is the greedy token) of every token after the first ``start`` of each sequence.

    dense: by one prefill, which is full attention; else every token by a decode step of its own.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    prompts = [
        {"prompt_token_ids": ids} if dense else {"prompt_token_ids": ids, "dense_tokens": start}
        for ids, start in sequences
    ]
    found = []
    for output, (ids, start) in zip(llm.generate(prompts, params), sequences, strict=True):
        entries = [next(iter(entry.values())) for entry in (output.prompt_logprobs or [])[start:] if entry]
        check(len(entries) == len(ids) - start, "a token has no log-probability")
        found.append([(entry.logprob, entry.rank == 1) for entry in entries])
    return found


# -- accumulation


def session(llm: LLM, seed: int, decoded: int, steps: int) -> tuple[list[int], int, list[bool]]:
    """Ids of programs and their chains, one turn after the other, up to ``decoded`` tokens after the first prompt.

    Returns them, where the first chain begins, and for every later token whether it is a chain's: what comes with a
    next prompt cannot be known and is not judged.
    """
    ids, judged, start = [], [], 0
    for number in range(1 + decoded // (10 * steps)):
        prompt, chain = turn(llm, "program_shuffled", seed * 1000 + number, steps=steps)
        start = start or len(prompt)
        ids += prompt + chain
        judged += [False] * len(prompt) + [True] * len(chain)
    return ids[: start + decoded], start, judged[start : start + decoded]


def accumulation_items(report: Report, args: argparse.Namespace) -> list[Item]:
    methods = ["two_level", "quest:dense_layers=0", "oracle", *ASYNC, f"{ASYNC[0]}:{GATE}", f"{ASYNC[1]}:{GATE}"]
    return [("accumulation", label, lambda label=label: accumulate(args, label)) for label in methods]


def accumulate(args: argparse.Namespace, label: str) -> list[dict[str, Any]]:
    """Rows by decoded tokens: mean log-probability of chains' tokens, what full attention gave them, and agreement."""
    longest = args.decoded + 4096
    llm = load(args, "full", longest)
    work = [session(llm, seed, args.decoded, args.turn) for seed in range(args.chains)]
    sequences = [(ids, start) for ids, start, _ in work]
    full = forced(llm, sequences, dense=True)
    llm.close()
    del llm
    llm = load(args, label, longest)
    own = forced(llm, sequences, dense=False)
    stats = llm.stats()
    check(stats["sparse_rows"] > 0, f"{label} was never sparse")
    llm.close()
    rows = []
    for low, high in zip((0, *EDGES), EDGES, strict=False):
        kept = [
            (mine, theirs)
            for mine_of, theirs_of, (_, _, judged) in zip(own, full, work, strict=True)
            for mine, theirs, is_chain in list(zip(mine_of, theirs_of, judged, strict=True))[low:high]
            if is_chain
        ]
        if kept and low < args.decoded:
            greedy = [mine[1] for mine, theirs in kept if theirs[1]]
            rows.append(
                {"part": "accumulation", "method": label, "budget": args.budget, "decoded": high, "tokens": len(kept),
                 "logprob": round(statistics.fmean(mine[0] for mine, _ in kept), 5),
                 "full_logprob": round(statistics.fmean(theirs[0] for _, theirs in kept), 5),
                 "agreement": round(statistics.fmean(greedy), 5),
                 "repaired": share_repaired(llm, stats), "density": round(stats["density"], 4)}
            )  # fmt: skip
    return rows


def share_repaired(llm: LLM, stats: dict[str, Any]) -> float:
    heads = stats["sparse_rows"] * llm.spec.num_layers * llm.spec.num_kv_heads
    return round(stats.get("asyncspade_repaired", 0) / heads, 5)


# -- locality


class Watch:
    """A ``Selector`` in front of a backend's own: per sparse step, overlap with the true set and attention mass.

    One request at a time, eager steps. Heads that the gate repairs have all of both. steps: [overlap, mass, repaired]
    of each step, the means over layers and KV heads.
    """

    def __init__(self, llm: LLM) -> None:
        backend, self.pool, self.spec = llm.engine.backend, llm.engine.backend.pool, llm.spec
        self.inner, self.backend, self.steps = backend.selector, backend, []
        backend.selector = self
        if getattr(backend, "_threshold", None) is not None:
            self._repair, backend._repair = backend._repair, self._watch_repair

    def plan(self, batch: Any, lengths: torch.Tensor) -> None:
        self.table, self.lengths, self.rows = batch.page_table, lengths, []
        self.steps.append(self.rows)
        self.inner.plan(batch, lengths)

    def attended(self, length: int) -> int:
        return int(self.inner.attended(length))

    def select(self, layer: int, query: torch.Tensor) -> Any:
        selection, config = self.inner.select(layer, query), self.backend.config
        check(len(query) == 1, "one request at a time")
        rows = getattr(selection, "rows", None)
        indices = selection.indices if rows is None else selection.indices[rows]
        logits = sparse.key_logits(query, self.pool.k[layer], self.table, self.lengths, self.spec.scale)
        tokens = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(tokens >= self.lengths.view(-1, 1, 1), -torch.inf)
        num_kv = self.spec.num_kv_heads
        rule = (config.budget, config.sink, config.recent, "sum")
        best, _ = sparse.top_tokens(logits, None, self.lengths, num_kv, 1, *rule)
        chosen, wanted = (_members(x, logits.shape[-1]) for x in (indices, best))
        overlap = (chosen & wanted).sum(-1) / wanted.sum(-1)
        mass = (logits.softmax(-1).unflatten(1, (num_kv, -1)) * chosen.unsqueeze(2)).sum(-1).mean(-1)
        self.rows.append(torch.stack((overlap[0], mass[0], torch.zeros_like(mass[0]))))
        return selection

    def _watch_repair(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        self._repair(layer, q, out)
        self.rows[-1][:, self.backend._flagged > 0] = 1.0

    def means(self) -> list[list[float]]:
        """Of the steps that had something to select."""
        return [torch.stack(rows).mean((0, 2)).tolist() for rows in self.steps if rows]


def locality_items(report: Report, args: argparse.Namespace) -> list[Item]:
    methods = [*ASYNC, *(f"{name}:{GATE}" for name in ASYNC), "oracle"]
    return [("locality", label, lambda label=label: locality(args, label)) for label in methods]


def locality(args: argparse.Namespace, label: str) -> list[dict[str, Any]]:
    """Rows by place relative to the switch: overlap, mass and repaired share, and the loss against full attention.

    A program's chain is cut half way by the prompt of a tracking problem; its chain follows. So there are two switches:
    where the text of another kind begins (``switch``), and where the model writes again (``resume``).
    """
    llm = load(args, "full", 8192)
    work = []
    for seed in range(args.chains):
        prompt, chain = turn(llm, "program", seed, steps=args.turn)
        other, answer = turn(llm, "variable_tracking", seed, num_tokens=512)
        half = len(prompt) + len(chain) // 2
        ids = [*prompt, *chain[: len(chain) // 2], *other, *answer]
        work.append((ids, half - min(256, half - len(prompt)), half, half + len(other)))
    full = forced(llm, [(ids, start) for ids, start, _, _ in work], dense=True)
    llm.close()
    del llm
    llm = load(args, label, 8192, cuda_graphs=False)
    watch = Watch(llm)
    places: dict[tuple[str, int], list[Any]] = {}
    for (ids, start, switch, resume), theirs in zip(work, full, strict=True):
        watch.steps.clear()
        (mine,) = forced(llm, [(ids, start)], dense=False)
        seen = watch.means()[-len(mine) :]  # the last step of all decodes the one token that is generated
        check(len(seen) >= len(mine) - 1, f"{label}: {len(seen)} sparse steps for {len(mine)} tokens")
        for i, (values, a, b) in enumerate(zip(seen, mine, theirs, strict=False), start):
            for name, at in (("switch", switch), ("resume", resume)):
                if -AROUND <= i - at < AROUND:
                    gap = [] if switch <= i < resume else [b[0] - a[0]]  # what is not the model's own is not judged
                    places.setdefault((name, (i - at) // 8 * 8), []).append((values, gap))
    rows = []
    for (name, place), found in sorted(places.items()):
        columns = zip(*(values for values, _ in found), strict=True)
        overlap, mass, repaired = (round(statistics.fmean(column), 5) for column in columns)
        gaps = [gap for _, own in found for gap in own]
        gap = round(statistics.fmean(gaps), 5) if gaps else None
        rows.append({"part": "locality", "method": label, "budget": args.budget, "at": name, "place": place,
                     "overlap": overlap, "mass": mass, "repaired": repaired, "logprob_gap": gap})  # fmt: skip
    llm.close()
    return rows


# -- results


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    part = rows[0]["part"]
    if part == "accuracy":
        compare.draw(rows, path, title)
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if part == "accumulation":
        panels = [("gap to full attention, nats", "decoded", lambda r: r["full_logprob"] - r["logprob"], None),
                  ("same greedy token as full attention", "decoded", lambda r: r["agreement"], None)]  # fmt: skip
    else:
        panels = [(f"{what}, tokens from the {at}", "place", lambda r, what=what: r[what], at)
                  for at in ("switch", "resume") for what in ("overlap", "mass", "repaired")]  # fmt: skip
    columns = min(3, len(panels))
    shape = (-(-len(panels) // columns), columns)
    figure, axes = plt.subplots(
        *shape, figsize=(4.6 * columns, 3.4 * shape[0] + 1), squeeze=False, layout="constrained"
    )
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axis, (name, x, y, at) in zip(axes.flat, panels, strict=False):
        for i, method in enumerate(methods):
            own = [row for row in rows if row["method"] == method and (at is None or row["at"] == at)]
            style = "--" if "confidence" in method else "-"
            axis.plot([row[x] for row in own], [y(row) for row in own], style, marker="osD^vPX*"[i % 8], label=method,
                      color=f"C{i % 10}", markersize=4, alpha=0.85)  # fmt: skip
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if part == "accumulation":
            axis.set_xscale("log", base=2)
            axis.set_xlabel("tokens decoded", fontsize=8)
        else:
            axis.axvline(0, color="0.4", linewidth=1)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bars(report: Report) -> None:
    """Within two points of full attention at 1/8 with the gate on, on retrieval to 8k and programs to 100 steps."""
    own = [row for row in report.points if row["part"] == "accuracy"]
    full = {row["cell"]: row["accuracy"] for row in own if row["method"] == "full"}
    for method in dict.fromkeys(row["method"] for row in own if "confidence" in row["method"]):
        lost = [
            full[row["cell"]] - row["accuracy"]
            for row in own
            if (row["method"], row["budget"]) == (method, "1/8") and row["cell"] in full
        ]
        if lost:
            report.bar(f"full minus {method} at 1/8, worst of {len(lost)} cells", max(lost), 0.02, "<=")


def finish(report: Report, args: argparse.Namespace) -> None:
    for part in dict.fromkeys(row["part"] for row in report.points):
        if args.picture:
            path = Path(args.picture)
            rows = [row for row in report.points if row["part"] == part]
            draw(rows, path.with_name(f"{path.stem}_{part}{path.suffix}"), f"{args.model}, {part}")
    bars(report)
    report.finish(args.json)


PARTS = {"accuracy": accuracy_items, "accumulation": accumulation_items, "locality": locality_items}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    parser.add_argument("--samples", type=int, default=100, help="accuracy: problems per cell")
    parser.add_argument("--budgets", default="1/8,1/16", help="accuracy: of the context")
    parser.add_argument("--lengths", default="2048,4096,8192", help="accuracy: of the needles' prompts")
    parser.add_argument("--steps", type=int, nargs="*", default=[50, 100], help="accuracy: of the programs")
    parser.add_argument("--programs", nargs="*", default=["program", "program_shuffled"])
    parser.add_argument("--chains", type=int, default=8, help="accumulation, locality: sequences")
    parser.add_argument("--budget", type=int, default=512, help="accumulation, locality: tokens")
    parser.add_argument("--decoded", type=int, default=16384, help="accumulation: tokens of each sequence")
    parser.add_argument("--turn", type=int, default=100, help="accumulation, locality: steps of a program")
    parser.add_argument("--model", default="slipstream-target", help="an embedded model")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-batch-tokens", type=int, default=16384)
    parser.add_argument("--kv-memory", help="default: what is free")
    parser.add_argument("--time-limit-s", type=float, default=540.0, help="begin nothing after this")
    parser.add_argument("--shard", default="0/1", help="do only every n-th item, e.g. 2/8: the third of every eight")
    parser.add_argument("--only", default="", help="do only items whose name begins so")
    parser.add_argument("--merge", nargs="+", help="results of shards to make one of, instead of measuring")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--log", type=Path, help="accuracy: JSON lines of answers; a rerun goes on from there")
    parser.add_argument("--picture", help="draw each part here, with its name added")
    parser.add_argument("--json", help="write the result here, after every item")
    args = parser.parse_args()
    for part in args.part.split(","):
        if part not in PARTS:
            parser.error(f"--part takes {', '.join(PARTS)}, got {part!r}")
    return args


def main() -> None:
    args = parse()
    report = Report("asyncspade_accuracy", notes={"model": args.model, "samples": args.samples, "chains": args.chains})
    if args.merge:
        for name in args.merge:
            report.points += json.loads(Path(name).read_text(encoding="utf-8"))["points"]
        for row in report.points:
            if row["part"] == "accuracy":
                row["task"] = row["cell"].split()[0]
        report.notes["shards"] = len(args.merge)
        finish(report, args)
        return
    items = [item for part in args.part.split(",") for item in PARTS[part](report, args)]
    shard, shards = (int(number) for number in args.shard.split("/"))
    items = [item for item in items if item[1].startswith(args.only)][shard::shards]
    began = time.monotonic()
    for part, name, work in items:
        if args.dry_run or time.monotonic() - began > args.time_limit_s:
            print(f"{'plan' if args.dry_run else 'time limit, left out'}: {part}: {name}", flush=True)
            if not args.dry_run:
                report.notes.setdefault("left_out", []).append(f"{part}: {name}")
            continue
        start = time.monotonic()
        rows = work()
        report.points += rows
        print(f"-- {part}: {name}, {time.monotonic() - start:.1f} s", flush=True)
        for row in rows if part != "accuracy" else ():
            print(
                "  ".join(f"{key}={value}" for key, value in row.items() if key not in ("part", "method")), flush=True
            )
        keep(report, args.json)
    if not args.dry_run:
        for row in report.points:
            row.setdefault("task", row.get("cell", "").split(" ")[0])
        finish(report, args)


if __name__ == "__main__":
    main()
