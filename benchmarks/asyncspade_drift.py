"""Do errors of predicted selections add up, and what happens where a chain changes its subject?

Sequences that are known are forced through decode steps, token by token, one request at a time. Measured against full
attention over the same tokens: log-probability, and whether the greedy token is the same; and on every ``--every``-th
step, against the true query's set: its share that was there (overlap), and the attention on what was there (mass), both
before the gate repairs anything.

``accumulation``  a session of programs, one after the other, up to 16k decoded tokens. What sparse steps left in the
                  cache is what later ones read, so errors could pile up.
``locality``      a program's chain that is interrupted half way by the prompt of another problem (a tool's output),
                  whose chain then follows: around the switch, and around where the model writes again.

    PYTHONPATH=src python benchmarks/asyncspade_drift.py --part locality --json runs/d.json --picture runs/d.png

A method that is in ``--json`` already is not measured again. ``--shard 0/8`` to ``7/8`` share the methods between
processes (each with its own ``--json``), ``--merge A.json B.json ...`` makes one result of theirs.
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
from harness import Report, check

from slipstream import LLM, SamplingParams, tasks
from slipstream.attention.probe import _members
from slipstream.attention.sparse import SparseBackend
from slipstream.build import parse_attention
from slipstream.compare import Method
from slipstream.evaluation import prompt_ids
from slipstream.kernels import sparse

IN_TIME = tuple(f"asyncspade:predictor={name}{gate}" for name in ("ridge", "last") for gate in ("", ":confidence=0.8"))
METHODS = {
    "accumulation": ("asyncspade", "two_level", *IN_TIME, "quest:dense_layers=0", "tova"),
    "locality": ("asyncspade", "two_level", *IN_TIME),
}
EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384)  # decoded tokens
AROUND, GRAIN = 64, 8  # tokens before and after a switch, and of one point
Row = dict[str, Any]


class Watch:
    """A ``Selector`` in front of a backend's own. steps: (overlap, mass, KV heads repaired so far) of each sparse step.

    The first two are means over layers and KV heads, and NaN in steps that are not looked at.
    """

    def __init__(self, llm: LLM, config: Any, every: int) -> None:
        self.backend, self.spec = llm.engine.backend, llm.spec
        self.inner, self.rule, self.every = self.backend.selector, (config.budget, config.sink, config.recent), every
        self.steps: list[tuple[float, float, int]] = []
        self._found: list[torch.Tensor] = []
        self.backend.selector = self

    def plan(self, batch: Any, lengths: torch.Tensor) -> None:
        check(batch.num_requests == 1, "one request at a time")
        self._close()
        self.table, self.lengths = batch.page_table, lengths
        self._looks, self._open = len(self.steps) % self.every == 0, True
        self.inner.plan(batch, lengths)

    _open = False

    def _close(self) -> None:
        if self._open:
            means = torch.stack(self._found).mean(0).tolist() if self._found else [float("nan")] * 2
            self.steps.append((*means, self.backend.stats().get("asyncspade_repaired", 0)))
        self._found, self._open = [], False

    def attended(self, length: int) -> int:
        return int(self.inner.attended(length))

    def select(self, layer: int, query: torch.Tensor) -> Any:
        selection = self.inner.select(layer, query)
        if self._looks:
            rows = selection.indices if selection.rows is None else selection.indices[selection.rows]
            self._found.append(self._look(layer, query, rows))
        return selection

    def _look(self, layer: int, query: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        keys, num_kv = self.backend.pool.k[layer], self.spec.num_kv_heads
        logits = sparse.key_logits(query, keys, self.table, self.lengths, self.spec.scale)
        tokens = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(tokens >= self.lengths.view(-1, 1, 1), -torch.inf)
        best, _ = sparse.top_tokens(logits, None, self.lengths, num_kv, 1, *self.rule, "sum")
        chosen, wanted = (_members(x, logits.shape[-1]) for x in (indices, best))
        overlap = (chosen & wanted).sum(-1) / wanted.sum(-1)
        mass = (logits.softmax(-1).unflatten(1, (num_kv, -1)) * chosen.unsqueeze(2)).sum(-1)
        return torch.stack((overlap.mean(), mass.mean()))

    def take(self) -> list[tuple[float, float, int]]:
        self._close()
        found, self.steps = self.steps, []
        return found


def load(args: argparse.Namespace, label: str, longest: int, every: int = 1) -> tuple[LLM, Watch | None]:
    options = {"device": args.device, "kv_memory": args.kv_memory, "max_num_seqs": 1, "max_batch_tokens": 4096}
    attention = Method.parse(label).attention(args.budget)
    llm = LLM(args.model, attention=attention, max_model_len=longest, cuda_graphs=False, **options)
    watches = isinstance(llm.engine.backend, SparseBackend)  # what TOVA dropped cannot be looked at
    return llm, Watch(llm, parse_attention(attention), every) if watches else None


def turn(llm: LLM, task: str, seed: int, **parameters: Any) -> tuple[list[int], list[int]]:
    """Ids of a problem's prompt and of its ideal chain."""
    problem = tasks.make(task, seed, **parameters)
    return prompt_ids(llm, problem), llm.codec.tokenizer.encode(problem.completion, add_special_tokens=False)


def forced(llm: LLM, ids: list[int], start: int, dense: bool) -> list[tuple[float, bool]]:
    """(log-probability, is the greedy token) of every token from ``start`` on.

    dense: by one prefill, which is full attention; else every token by a decode step of its own.
    """
    prompt = {"prompt_token_ids": ids} | ({} if dense else {"dense_tokens": start})
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([prompt], params)
    entries = [next(iter(entry.values())) for entry in (output.prompt_logprobs or [])[start:] if entry]
    check(len(entries) == len(ids) - start, "a token has no log-probability")
    return [(entry.logprob, entry.rank == 1) for entry in entries]


def by_full(args: argparse.Namespace, longest: int, make: Callable[[LLM, int], Any]) -> list[tuple[Any, Any]]:
    """Every chain's work, ``make(llm, seed)`` with ids and start in front, and what full attention says of it."""
    llm, _ = load(args, "full", longest)
    work = [make(llm, seed) for seed in range(args.chains)]
    found = [(one, forced(llm, one[0], one[1], dense=True)) for one in work]
    llm.close()
    return found


def measured(llm: LLM, watch: Watch | None, ids: list[int], start: int) -> list[tuple[float, ...]]:
    """(log-probability, is greedy, overlap, mass, share of KV heads repaired) of every token from ``start`` on."""
    before = llm.stats().get("asyncspade_repaired", 0)
    own = forced(llm, ids, start, dense=False)
    steps = watch.take() if watch else [(float("nan"), float("nan"), 0)] * len(own)
    # The first token's own step is the prompt's; short contexts are dense; the last step decodes what is generated.
    missing = len(own) - len(steps)
    steps = [(float("nan"), float("nan"), before)] * max(missing, 0) + steps[max(-missing, 0) :]
    heads, rows = llm.spec.num_layers * llm.spec.num_kv_heads, []
    for (logprob, greedy), (overlap, mass, repaired) in zip(own, steps, strict=True):
        rows.append((logprob, greedy, overlap, mass, (repaired - before) / heads))
        before = repaired
    return rows


def mean(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean of what is a number, and its standard error as if all were independent."""
    known = [value for value in values if value == value]
    spread = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return (round(statistics.fmean(known), 5) if known else None), (None if spread is None else round(spread, 5))


def row_of(part: str, label: str, budget: int, own: Sequence[Any], full: Sequence[Any], **where: Any) -> Row:
    """own: as :func:`measured`; full: as :func:`forced`, None for tokens that are not the model's to know."""
    judged = [(a, b) for a, b in zip(own, full, strict=True) if b is not None]
    gap, gap_stderr = mean([b[0] - a[0] for a, b in judged])
    agreement, agreement_stderr = mean([float(a[1]) for a, b in judged if b[1]])
    overlap, mass, repaired = (mean([a[i] for a in own])[0] for i in (2, 3, 4))
    return {
        "part": part, "method": label, "budget": budget, **where, "tokens": len(own), "judged": len(judged),
        "gap": gap, "gap_stderr": gap_stderr, "agreement": agreement, "agreement_stderr": agreement_stderr,
        "overlap": overlap, "mass": mass, "repaired": repaired,
    }  # fmt: skip


def session(llm: LLM, seed: int, decoded: int, steps: int) -> tuple[list[int], int, list[bool]]:
    """Ids of programs and their chains up to ``decoded`` tokens after the first prompt, where the first chain begins,
    and for every later token whether it is a chain's: what comes with a next prompt is not judged."""
    ids, judged, start = [], [], 0
    for number in range(1 + decoded // (10 * steps)):
        prompt, chain = turn(llm, "program_shuffled", seed * 1000 + number, steps=steps)
        start = start or len(prompt)
        ids += prompt + chain
        judged += [False] * len(prompt) + [True] * len(chain)
    return ids[: start + decoded], start, judged[start : start + decoded]


def accumulate(args: argparse.Namespace, label: str) -> list[Row]:
    longest = args.decoded + 4096
    work = by_full(args, longest, lambda llm, seed: session(llm, seed, args.decoded, args.turn))
    llm, watch = load(args, label, longest, args.every)
    found = []
    for (ids, start, judged), full in work:
        theirs = [b if is_chain else None for b, is_chain in zip(full, judged, strict=True)]
        found.append((measured(llm, watch, ids, start), theirs))
    stats = llm.stats()
    check(stats.get("sparse_rows", 1) > 0, f"{label} was never sparse")
    llm.close()
    rows = []
    for low, high in zip(EDGES, EDGES[1:], strict=False):
        own, full = ([x for pair in found for x in pair[i][low:high]] for i in (0, 1))
        if own:
            rows.append(row_of("accumulation", label, args.budget, own, full, decoded=high))
            rows[-1]["density"] = round(stats.get("density", 1.0), 4)
    return rows


def interrupted(llm: LLM, seed: int, steps: int) -> tuple[list[int], int, int, int]:
    """Ids of a chain cut half way by another problem and its chain; from where on they are decoded; both switches."""
    prompt, chain = turn(llm, "program", seed, steps=steps)
    other, answer = turn(llm, "variable_tracking", seed, num_tokens=512)
    half = len(prompt) + len(chain) // 2
    ids = [*prompt, *chain[: len(chain) // 2], *other, *answer]
    return ids, half - min(256, half - len(prompt)), half, half + len(other)


def locality(args: argparse.Namespace, label: str) -> list[Row]:
    """By place relative to the switch to another text, and to where the model writes again (``resume``)."""
    work = by_full(args, 8192, lambda llm, seed: interrupted(llm, seed, args.turn))
    llm, watch = load(args, label, 8192)
    places: dict[tuple[str, int], tuple[list[Any], list[Any]]] = {}
    for (ids, start, switch, resume), full in work:
        for i, (own, theirs) in enumerate(zip(measured(llm, watch, ids, start), full, strict=True), start):
            for name, at in (("switch", switch), ("resume", resume)):
                if -AROUND <= i - at < AROUND:
                    kept = places.setdefault((name, (i - at) // GRAIN * GRAIN), ([], []))
                    kept[0].append(own)
                    kept[1].append(None if switch <= i < resume else theirs)
    llm.close()
    return [
        row_of("locality", label, args.budget, *kept, at=name, place=place)
        for (name, place), kept in sorted(places.items())
    ]


PARTS = {"accumulation": accumulate, "locality": locality}


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"gap": "gap to full attention, nats", "agreement": "same greedy token as full", "overlap": "overlap",
             "mass": "attention mass", "repaired": "KV heads repaired"}  # fmt: skip
    is_sum = rows[0]["part"] == "accumulation"
    x, sides = ("decoded", [None]) if is_sum else ("place", ["switch", "resume"])
    figure, axes = plt.subplots(
        len(sides), len(names), figsize=(3.6 * len(names), 3 * len(sides) + 1), squeeze=False, layout="constrained"
    )
    for line, at in zip(axes, sides, strict=True):
        for axis, (what, name) in zip(line, names.items(), strict=True):
            for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
                own = [r for r in rows if r["method"] == method and r.get("at") == at and r[what] is not None]
                style = "--" if "confidence" in method else "-"
                axis.plot([r[x] for r in own], [r[what] for r in own], style, marker="osD^vPX*"[i % 8], label=method,
                          color=f"C{i % 10}", markersize=4, alpha=0.85)  # fmt: skip
            axis.set_title(name if is_sum else f"{name}, from the {at}", fontsize=9)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if is_sum:
                axis.set_xscale("log", base=2)
                axis.set_xlabel("tokens decoded", fontsize=8)
            else:
                axis.axvline(0, color="0.4", linewidth=1)
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def finish(report: Report, args: argparse.Namespace) -> None:
    for part in dict.fromkeys(row["part"] for row in report.points) if args.picture else ():
        path, rows = Path(args.picture), [row for row in report.points if row["part"] == part]
        title = f"{part}: {args.model}, budget {rows[0]['budget']}, sequences: {rows[0]['chains']}"
        draw(rows, path.with_name(f"{path.stem}_{part}{path.suffix}"), title)
    report.finish(args.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    parser.add_argument("--methods", help="comma-separated; default: those of the part")
    parser.add_argument("--chains", type=int, default=8, help="sequences")
    parser.add_argument("--budget", type=int, default=512, help="tokens")
    parser.add_argument("--decoded", type=int, default=16384, help="accumulation: tokens of each sequence")
    parser.add_argument("--turn", type=int, default=100, help="steps of a program")
    parser.add_argument("--every", type=int, default=16, help="accumulation: look at the sets of every so many steps")
    parser.add_argument("--model", default="slipstream-target", help="an embedded model")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--kv-memory", default="1GiB")
    parser.add_argument("--time-limit-s", type=float, default=540.0, help="begin nothing after this")
    parser.add_argument("--shard", default="0/1", help="do only every n-th method, e.g. 2/8: the third of every eight")
    parser.add_argument("--merge", nargs="+", help="results of shards to make one of, instead of measuring")
    parser.add_argument("--picture", help="draw each part here, with its name added")
    parser.add_argument("--json", help="write the result here, after every method")
    args = parser.parse_args()
    for part in args.part.split(","):
        if part not in PARTS:
            parser.error(f"--part takes {', '.join(PARTS)}, got {part!r}")
    return args


def main() -> None:
    args = parse()
    notes = {"model": args.model, "every": args.every}
    report = Report("asyncspade_drift", notes=notes)
    for name in args.merge or ([args.json] if args.json and Path(args.json).exists() else []):
        known = json.loads(Path(name).read_text(encoding="utf-8"))
        report.points += known["points"]
        where = ("device", "versions", "commit") if args.merge else ()
        report.notes |= {name: known[name] for name in (*notes, *where)}
    done = {(row["part"], row["method"]) for row in report.points}
    items = [(p, m) for p in args.part.split(",") for m in (args.methods or ",".join(METHODS[p])).split(",")]
    shard, shards = (int(number) for number in args.shard.split("/"))
    began = time.monotonic()
    for part, label in [] if args.merge else items[shard::shards]:
        if (part, label) in done:
            continue
        start = time.monotonic()
        if start - began > args.time_limit_s:
            print(f"time limit, left for another run: {part}: {label}", flush=True)
            continue
        rows = [row | {"chains": args.chains} for row in PARTS[part](args, label)]
        print(f"-- {part}: {label}, {time.monotonic() - start:.1f} s", flush=True)
        for row in rows:
            report.point(**row)
        report.keep(args.json)
    finish(report, args)


if __name__ == "__main__":
    main()
