"""Which candidates find what current ones find? Accuracy and recall of AsyncTLS's modes, on the embedded target.

One engine for each length; its prompts are prefilled once, and then answered under full attention, under every mode of
``candidates`` (``current`` is two_level), and under union with a margin, so that all see the same keys. The question,
too, goes through decode steps (protocol B). The defaults would keep every block of these contexts; ``--geometry wide``
is them at 16k, scaled: blocks of 64, half of them, a 16th of the tokens. ``--geometry tight``: blocks of 16, an eighth
of them, a 16th of the tokens.

Recall: some problems are run again with their ideal answers forced, and at each step it is seen how much of the true
best tokens, and of the attention mass, a mode selects: at the *onset* of what must be looked up (the step whose query
draws the first token of a number, or of a variable's name), and at every fourth other step.

    PYTHONPATH=src python benchmarks/asynctls_accuracy.py --samples 8 --work runs/asynctls \\
        --json benchmarks/results/cpu/asynctls_accuracy.json
    PYTHONPATH=src python benchmarks/asynctls_accuracy.py --record benchmarks/traces/blocks.npz
    PYTHONPATH=src python benchmarks/asynctls_accuracy.py --locality benchmarks/traces/blocks.npz --json ...

What is in ``--work`` is not done again; ``--shard 0/8`` to ``7/8`` share it. The last to end makes the result of all.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Report

from slipstream import LLM, SamplingParams, tasks
from slipstream.asynctls.config import CANDIDATES
from slipstream.attention.probe import Probe
from slipstream.evaluation import Cell, parse_cell, split_prompt
from slipstream.kernels import sparse

TASKS = ("needle_multikey", "needle_multiquery", "variable_tracking")
LENGTHS = (2048, 4096, 8192, 16384)
# Tokens of a block; shares of the context: blocks, tokens; newest tokens that are always in.
GEOMETRIES = {"tight": (16, 8, 16, 16), "wide": (64, 2, 16, 64)}
GUARDED = "union, margin 0.5"  # the drift guard by scores
ARMS = ("full", *CANDIDATES, GUARDED)
FEWEST = 25  # problems from which on a cell says something of one point
COUNTED = ("turned", "returned", "compared", "drift_selections", "urgent")
HELD = "held"  # a folder of its own: until 2026-11-22 a union took what was resident, whoever had loaded it
ONSETS = {"needle": re.compile(r"\b\d{5}"), "variable": re.compile(r"@\w+")}


def make(args: argparse.Namespace, length: int) -> LLM:
    block, blocks_of, budget_of, recent = GEOMETRIES[args.geometry]
    attention = {
        "method": "asynctls", "candidates": "predicted", "budget": length // budget_of, "block": block,
        "blocks": length // block // blocks_of, "min_context": 0, "recent": recent,
    }  # fmt: skip
    room = length + 512
    return LLM(
        args.model, attention=attention, device=args.device, max_model_len=room, cuda_graphs=False,
        max_num_seqs=max(2, args.batch), kv_memory=args.kv_memory or (args.batch + 1) * room * 20_000,
    )  # fmt: skip


class Modes:
    """Switches one engine between full attention and the modes; it was made for ``predicted``, which has all parts."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self._backend = llm, llm.engine.backend
        self._selector, self._gate = self._backend.selector, self._backend.gate
        self._predictor = self._selector._predictor

    def choose(self, arm: str) -> None:
        self._backend.gate = self._llm.spec.max_position if arm == "full" else self._gate
        self._selector._predictor = self._predictor if arm == "predicted" else None
        self._selector._mode = {"full": "previous", "predicted": "previous", GUARDED: "union"}.get(arm, arm)
        self._selector._margin = 0.5 if arm == GUARDED else None
        self._selector.residency.clear()


class OnsetProbe(Probe):
    """Looks at one chain: at the steps whose positions are ``onsets``, and apart from them at every fourth other."""

    onsets: frozenset[int] = frozenset()

    def select(self, layer: int, query: torch.Tensor) -> Any:
        selection = self._inner.select(layer, query)
        position = int(self._lengths[0]) - 1
        if position in self.onsets or position % 4 == 0:
            self._sums = self.found["onset" if position in self.onsets else "other"]
            self._measure(layer, query, selection.indices)
        return selection

    def reset(self) -> None:
        super().reset()
        self.found: dict[str, dict[int, torch.Tensor]] = {"onset": {}, "other": {}}


def forced(llm: LLM, problem: tasks.Problem) -> tuple[dict[str, Any], frozenset[int]]:
    """The prompt with its ideal answer, whose tokens go through decode steps; and the positions of the onsets."""
    prompt = split_prompt(llm, problem)
    encoding = llm.codec.tokenizer(problem.completion, add_special_tokens=False, return_offsets_mapping=True)
    pattern = ONSETS[problem.task.split("_")[0]]
    starts = [found.start() for found in pattern.finditer(problem.completion)]
    places = [next(i for i, (_, end) in enumerate(encoding["offset_mapping"]) if end > start) for start in starts]
    first = len(prompt["prompt_token_ids"])
    ids = [*prompt["prompt_token_ids"], *encoding["input_ids"]]
    return prompt | {"prompt_token_ids": ids}, frozenset(first + place - 1 for place in places)


def measure(
    llm: LLM, modes: Modes, cell: Cell, indices: list[int], probed: int, arms: list[str]
) -> dict[str, Any]:  # fmt: skip
    """Answers to some problems of a cell under these arms; sums of recall, mass and rows of those below ``probed``."""
    problems = [cell.problem(index, 0) for index in indices]
    prompts = [split_prompt(llm, problem) for problem in problems]
    params = SamplingParams(temperature=0.0, max_tokens=160)
    line: dict[str, Any] = {"correct": {}, "counts": {}, "onset": {}, "other": {}}
    for arm in arms:
        modes.choose(arm)
        before = llm.stats()
        outputs = llm.generate(prompts, params)
        after = llm.stats()
        pairs = zip(problems, outputs, strict=True)
        line["correct"][arm] = [tasks.verify(problem, output.outputs[0].text) for problem, output in pairs]
        line["counts"][arm] = {name: after[f"asynctls_{name}"] - before[f"asynctls_{name}"] for name in COUNTED}
        rows = after["sparse_rows"] - before["sparse_rows"]
        line["counts"][arm]["selections"] = rows * llm.spec.num_layers * llm.spec.num_kv_heads
        assert (after["sparse_steps"] > before["sparse_steps"]) == (arm != "full"), f"{arm} was not what it says"
        assert (line["counts"][arm]["returned"] > 0) == arm.startswith("union"), f"{arm} was not what it says"
    config, backend = llm.engine.backend.selector._config, llm.engine.backend
    selector = backend.selector
    probe = OnsetProbe(selector, backend.pool, llm.spec, config.budget, config.sink, config.recent, 1)
    for arm in [arm for arm in arms if arm != "full"]:
        modes.choose(arm)
        probe.reset()
        backend.selector = probe
        probe.residency, probe.blocks = selector.residency, selector.blocks  # type: ignore[attr-defined]
        try:
            for problem in [problem for problem, index in zip(problems, indices, strict=True) if index < probed]:
                prompt, probe.onsets = forced(llm, problem)
                llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1))
        finally:
            backend.selector = selector
        for kind, sums in probe.found.items():
            line[kind][arm] = sum(sums.values(), torch.zeros(3, dtype=torch.float64)).tolist()
    return line


def work_of(args: argparse.Namespace) -> list[tuple[Cell, list[int]]]:
    """Chunks of problems; a few of every cell before the next of any, so that a run that is cut short is even."""
    found = []
    for first in range(0, args.samples, args.batch):
        for length in args.lengths:
            for task in TASKS:
                cell = parse_cell(task, length, args.samples, "B")
                found.append((cell, list(range(first, min(first + args.batch, args.samples)))))
    return found


def run(args: argparse.Namespace) -> None:
    began, engines = time.monotonic(), dict[int, tuple[LLM, Modes]]()
    shard, shards = (int(number) for number in args.shard.split("/"))
    folder = args.work / args.geometry / HELD
    folder.mkdir(parents=True, exist_ok=True)
    for number, (cell, indices) in enumerate(work_of(args)):
        path = folder / f"{cell.name.replace(' ', '_')}_{indices[0]}_{len(indices)}.json"
        if number % shards != shard or path.exists() or time.monotonic() - began > args.time_limit_s:
            continue
        length = dict(cell.parameters)["num_tokens"]
        if length not in engines:
            llm = make(args, length)
            engines[length] = llm, Modes(llm)
        start = time.monotonic()
        line = measure(*engines[length], cell, indices, args.probed, args.arms)
        line |= {"cell": cell.name, "indices": indices, "device": str(engines[length][0].device)}
        path.write_text(json.dumps(line) + "\n", encoding="utf-8")
        right = " ".join(f"{arm} {sum(values)}" for arm, values in line["correct"].items())
        print(f"{cell.name} {indices}: {right} ({time.monotonic() - start:.0f} s)", flush=True)


def result(args: argparse.Namespace) -> None:
    """Of all that is in the folder: a point for each cell and arm, and the bar of issue 5."""
    report = Report("asynctls_accuracy", notes={"model": args.model, "geometry": args.geometry, "protocol": "B"})
    report.notes["block, blocks and budget of context, recent"] = GEOMETRIES[args.geometry]
    lines = [json.loads(path.read_text()) for path in sorted((args.work / args.geometry / HELD).glob("*.json"))]
    for name in (*dict.fromkeys(line["cell"] for line in lines), "all"):
        own = [line for line in lines if name in (line["cell"], "all")]
        arms = [arm for arm in ARMS if all(arm in line["correct"] for line in own)]
        right = {arm: [float(x) for line in own for x in line["correct"][arm]] for arm in arms}
        for arm in arms:
            lost = [a - b for a, b in zip(right["current"], right[arm], strict=True)]
            point = {"cell": name, "candidates": arm, "problems": len(lost), "accuracy": statistics.fmean(right[arm])}
            point |= {
                "stderr": stderr(right[arm]),
                "below_current": statistics.fmean(lost),
                "below_stderr": stderr(lost),
            }
            if arm != "full":
                counts = {name: sum(line["counts"][arm][name] for line in own) for name in own[0]["counts"][arm]}
                point["turnover"] = counts["turned"] / max(1, counts["compared"])
                point["returned"] = counts["returned"] / max(1, counts["turned"])
                point["waited"] = counts["drift_selections"] / counts["selections"]
                for kind in ("onset", "other"):
                    sums = [sum(line[kind][arm][i] for line in own) for i in range(3)]
                    if sums[2]:
                        point |= {f"{kind}_recall": sums[0] / sums[2], f"{kind}_mass": sums[1] / sums[2]}
                        point[f"{kind}_rows"] = int(sums[2])
            report.point(**point)
        if len(right["union"]) >= FEWEST and name != "all":
            loss = statistics.fmean(right["current"]) - statistics.fmean(right["union"])
            report.bar(f"current minus union, {name}, {len(right['union'])} problems", loss, 0.01, "<=")
    report.finish(args.json)


def stderr(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


# -- what the target's blocks do, for offload.py


def record(args: argparse.Namespace) -> None:
    """Sets of 125 blocks, without the first and the newest two, of every layer and head at each step of a long answer.

    Blocks of 8 tokens of a context of 12,000: as many blocks as 96k tokens have blocks of 64.
    """
    block, num_tokens, kept = 8, 12_000, 125
    attention = {"method": "two_level", "budget": 1024, "block": block, "blocks": 128, "recent": 8, "min_context": 0}
    llm = LLM(
        args.model, attention=attention, device=args.device, max_model_len=num_tokens + 512, cuda_graphs=False,
        max_num_seqs=1, kv_memory="600MiB",
    )  # fmt: skip
    selector, steps = llm.engine.backend.selector, {}
    score = sparse.score_blocks

    def watched(*values: Any) -> torch.Tensor:
        scores = score(*values)
        lengths = selector._lengths
        newest = (int(lengths[0]) - 1) // block
        others = scores[0].clone()
        others[:, 0] = others[:, newest - 1 :] = -torch.inf
        steps.setdefault(int(lengths[0]), []).append(others.topk(kept, dim=1).indices.sort(dim=1).values.short().cpu())
        return scores

    cell = parse_cell("variable_tracking:hops=12", num_tokens, 1, "B")
    sparse.score_blocks = watched
    try:
        prompt, _ = forced(llm, cell.problem(0, 0))
        llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1))
    finally:
        sparse.score_blocks = score
    sets = np.stack([torch.stack(layers).numpy() for _, layers in sorted(steps.items())])
    args.record.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.record, sets=sets)
    print(f"{args.record}: {sets.shape} (steps, layers, heads, blocks)")


def locality(args: argparse.Namespace) -> None:
    """Of a recorded file: what two steps share, and what a hot buffer that drops the oldest misses, by its size."""
    sets = np.load(args.locality)["sets"].astype(int)
    report = Report("asynctls_locality", notes={"file": str(args.locality), "steps": len(sets)})
    for layer in range(sets.shape[1]):
        heads = sets[:, layer].swapaxes(0, 1)
        shared = [len(np.intersect1d(a, b)) / len(a) for one in heads for a, b in zip(one, one[1:], strict=False)]
        misses = {f"misses_{n}": statistics.fmean(missed(one, n * 128) for one in heads) for n in (1, 2, 3, 4)}
        report.point(layer=layer, overlap=statistics.fmean(shared), **misses)
    names = report.points[0].keys() - {"layer"}
    report.point(layer="mean", **{name: statistics.fmean(p[name] for p in report.points) for name in sorted(names)})
    report.finish(args.json)


def missed(sets: np.ndarray, size: int) -> float:
    """The share of the blocks of all steps but the first that are not among the ``size`` wanted last."""
    held: dict[int, None] = {}
    count = 0
    for step, blocks in enumerate(sets.tolist()):
        count += sum(block not in held for block in blocks) if step else 0
        held = {block: None for block in held if block not in blocks} | dict.fromkeys(blocks)
        held = dict(list(held.items())[-size:])
    return count / sets[1:].size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="slipstream-target")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--geometry", default="tight", choices=sorted(GEOMETRIES))
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in text.split(",")], default=list(LENGTHS))
    parser.add_argument("--samples", type=int, default=8, help="problems of a cell")
    parser.add_argument("--batch", type=int, default=1, help="problems answered together; more for a GPU")
    parser.add_argument("--probed", type=int, default=2, help="problems of a cell whose recall is measured")
    parser.add_argument("--arms", type=lambda text: text.split("|"), default=list(ARMS), help="split by |, current too")
    parser.add_argument("--kv-memory")
    parser.add_argument("--work", type=Path, default=Path("runs/asynctls"))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--time-limit-s", type=float, default=1e9, help="begin nothing after so long")
    parser.add_argument("--record", type=Path, help="record blocks for offload.py into this file, and stop")
    parser.add_argument("--locality", type=Path, help="say what is in such a file, and stop")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.record or args.locality:
        (record if args.record else locality)(args)
        return
    run(args)
    result(args)


if __name__ == "__main__":
    main()
