"""Does selection leave the critical path? TPOT of AsyncSpade against its rivals and against selection for free.

Random weights and remembered contexts of random KV (``contexts.py``), one GPU, one engine per arm and budget, all
decode steps replayed graphs. Arms: ``full`` (FlashInfer), ``quest``, ``double_sparsity``, ``two_level`` (which selects
before it attends), ``asyncspade`` (with any of its options, as in ``asyncspade:predictor=ridge``) and, in the same
engine right after it, its ``floor``: the same step with sets of the same size that stay as they are, nothing ahead.

    PYTHONPATH=src python benchmarks/asyncspade.py --json benchmarks/results/h200/asyncspade.json
    PYTHONPATH=src python benchmarks/asyncspade.py --shape qwen3-32b --json benchmarks/results/h200/asyncspade_32b.json

With a cache rank on a second GPU (``asyncspade:scoring=keys:cache_device=cuda:1``) a point also has ``far_ms``: how
long that device works on a step, by itself; where this is less than the floor, the work can be hidden. ``far_mb``: what
travels in a decode step, both ways. Every key scored as in the paper, whose predictor is ``ridge``, then the index:

    PYTHONPATH=src python benchmarks/asyncspade.py --budgets 1024 --workloads 8x32768 --arms \\
        asyncspade:predictor=ridge:window=64:scoring=keys:cache_device=cuda:1,asyncspade:cache_device=cuda:1

Locality: queries of random weights have none, and keys of random numbers are scattered. On one device neither the work
ahead nor attention to the sets depends on how much of a set is new, so TPOT cannot depend on the overlap of predicted
and true sets; what does is how many KV heads the confidence gate sends back to all their keys. ``--repairs`` drives
that share in arms with a confidence (``asyncspade:confidence=-1``): a threshold is searched for with which so many are
repaired, by the counters. What share goes with an overlap of 0.95, 0.8 or 0.6 on a model with locality is measured by
``asyncspade_drift.py --part locality``.

The JSON is written after every point; a run goes on from the ``--json`` of an earlier one with the points it lacks, so
that a long measurement can be cut into several commands. The pool is as large as the largest workload: so Qwen3-32B
fits one H200 (65.5 GB of weights; 16 x 16k are 73 GB with their index, and windows for 17 chains 2.3).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from contexts import fill_pool, remember
from decode import TOLERANCE_NATS, check_method, nats_apart, points_of
from harness import Report, Timing, check
from shapes import SHAPES

from slipstream import LLM, SamplingParams
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.foresight import ForesightBackend
from slipstream.asyncspade.two_devices import TwoDeviceBackend
from slipstream.attention.sparse import SparseBackend
from slipstream.benchmark import decode_times, random_prompts
from slipstream.build import parse_attention
from slipstream.evaluation import parse_name

ARMS = "full,asyncspade:predictor=last,asyncspade,quest,two_level,double_sparsity"
WORKLOADS = {"qwen3-8b": "8x32768,32x16384,8x65536", "qwen3-32b": "16x16384", "glm-4.7-flash": "8x65536"}
TINY: dict[str, Any] = SHAPES["qwen3-8b"] | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "vocab_size": 512, "eos_token_id": 511,
}  # fmt: skip
TINY_LATENT: dict[str, Any] = SHAPES["glm-4.7-flash"] | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 512,
    "eos_token_id": 511,
}  # fmt: skip
TINIES = {"tiny": TINY, "tiny-latent": TINY_LATENT}
SEEDS = itertools.count(100)
WARMUP = 72  # steps before the timed ones: the windows are full


def attention_of(arm: str, budget: int) -> Any:
    """``"asyncspade:predictor=ridge"`` to what ``LLM(attention=...)`` takes."""
    method, given = parse_name(arm, "method:option=value")
    return "full" if method == "full" else {"method": method, "budget": budget, "min_context": budget, **given}


def kv_bytes(args: argparse.Namespace, arm: str) -> int | None:
    """Memory for the largest workload: keys, values, no more than 7 % of index, and windows in seats. None: latent."""
    shape: dict[str, Any] = (SHAPES | TINIES)[args.shape]
    if shape.get("kv_lora_rank") is not None:
        return None
    points, width = points_of(args.workloads), shape["num_hidden_layers"] * shape["head_dim"]
    width *= 2 if torch.cuda.is_available() else 4  # bytes of a number
    tokens = max(batch * (context + args.steps + 192) for batch, context in points)
    seats = (1 + max(batch for batch, _ in points)) * arm.startswith("asyncspade:")
    window = AsyncSpade().window * shape["num_attention_heads"] + 2 * 2048 * shape["num_key_value_heads"] // 128
    return int(tokens * shape["num_key_value_heads"] * width * 2 * 1.07) + seats * width * window


def make(args: argparse.Namespace, arm: str, budget: int) -> LLM:
    points = points_of(args.workloads)
    llm = LLM(
        (SHAPES | TINIES)[args.shape],
        load_format="dummy",
        attention=attention_of(arm, budget),
        max_model_len=max(context for _, context in points) + 2048,
        max_num_seqs=max(batch for batch, _ in points),
        max_batch_tokens=8192,
        kv_memory=args.kv_memory or kv_bytes(args, arm),
        seed=0,
    )
    fill_pool(llm)  # never time on zeros
    return llm


def measure(
    report: Report, args: argparse.Namespace, llm: LLM, arm: str, budget: int, batch: int, context: int,
    seed: int | None = None,
) -> None:  # fmt: skip
    """One point: remembered contexts, then decode steps, all of them graph replays, sparse, and with sets in time.

    seed: of contexts that are there already; by default new ones, which may take the place of any before them.
    """
    if is_done(report, arm, budget, batch, context):
        return
    began, warmup = time.perf_counter(), WARMUP if arm != "full" else 8
    if seed is None:
        seed = next(SEEDS)
        remember(llm, random_prompts(llm.spec.vocab_size, batch, context - warmup - 1, seed))
    before = llm.stats()
    times = decode_times(llm, batch, context, args.steps, warmup=warmup, seed=seed)
    after = llm.stats()
    fresh = (after["prefill_tokens"] - before["prefill_tokens"]) / batch
    check(fresh <= 1024, f"{arm}: {fresh:.0f} tokens of a remembered context were prefilled")
    print(f"   {time.perf_counter() - began:.1f} s for the point below, {times.prefill_s:.1f} s of prefill", flush=True)
    if llm.device.type == "cuda":
        check(times.graph_replays >= args.steps, f"{arm}: the timed steps were not graph replays")
    moved = {name: after[name] - before[name] for name in after if isinstance(after[name], int) and name in before}
    extra: dict[str, Any] = {}
    if arm != "full":
        rows = moved["sparse_rows"]
        check(rows >= args.steps * batch, f"{arm}: {rows} sparse rows in {args.steps} steps of {batch}")
        extra = {"density": round(after["density"], 5), "index_bytes": after["index_bytes"]}
    if "asyncspade_predictions" in after and not arm.endswith("floor"):
        foresees = isinstance(llm.engine.backend, ForesightBackend)  # all layers but the first
        wanted = args.steps * batch * (llm.spec.num_layers - foresees)
        made, late = moved["asyncspade_predictions"], moved.get("asyncspade_late", 0)
        check(made >= wanted, f"{arm}: {made} predictions, not {wanted}")
        check(late == 0, f"{arm}: {late} sets were not for the step that read them")
        heads = moved["sparse_rows"] * llm.spec.num_layers * llm.spec.num_kv_heads
        extra["repaired"] = round(moved.get("asyncspade_repaired", 0) / heads, 4)
        if isinstance(llm.engine.backend, TwoDeviceBackend):
            extra |= far_side(llm.engine.backend, batch)
    peak = torch.cuda.max_memory_allocated() if llm.device.type == "cuda" else 0
    where = {"arm": arm, "budget": budget * (arm != "full"), "batch": batch, "context": context}
    report.point(
        **where, **Timing.of(times.steps_s).fields("tpot"),
        host_ms=round(sorted(times.host_ms)[args.steps // 2], 4), peak_bytes=peak,
        kv_bytes=batch * context * llm.pool.bytes // llm.pool.num_tokens, **extra,
    )  # fmt: skip
    report.keep(args.json)


def far_side(backend: TwoDeviceBackend, rows: int, rounds: int = 20) -> dict[str, Any]:
    """Of the last step: milliseconds of the cache rank's work alone (median), megabytes that a step moves, its peak."""
    spec, batch, device = backend.spec, backend._batch, backend.far.device
    out = (spec.num_heads + spec.num_kv_heads) * spec.head_dim * spec.dtype.itemsize
    back = 4 * spec.num_kv_heads * (backend.config.budget + 1)
    found: dict[str, Any] = {"far_mb": round(rows * spec.num_layers * (out + back) / 1e6, 3)}
    assert batch is not None
    works = [backend.far._recorded._records.get((batch.graph_key, part)) for part in range(len(backend._parts))]
    if None in works:  # not captured: a CPU
        return found
    times = []
    for _ in range(rounds):
        began = now_on(device)
        for work in works:
            work()
        times.append(now_on(device) - began)
    if device.type == "cuda":
        found["far_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return found | {"far_ms": round(sorted(times)[rounds // 2] * 1e3, 4)}


def now_on(device: torch.device) -> float:
    """Seconds, when all that was launched there is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def is_done(report: Report, arm: str, budget: int, batch: int, context: int) -> bool:
    wanted = {"arm": arm, "budget": budget * (arm != "full"), "batch": batch, "context": context}
    return any(wanted.items() <= point.items() for point in report.points)


def freeze(llm: LLM) -> None:
    """From now on every set stays as it is, and nothing runs ahead. Steps are captured anew."""
    backend = llm.engine.backend
    backend.attend = lambda layer, q: SparseBackend.attend(backend, layer, q)
    backend.sets.reset = backend.predictor.reset = lambda seats: None
    backend._plan_ahead = lambda batch: None
    recapture(llm)


def recapture(llm: LLM) -> None:
    """Forget the captured steps. The memory of their graphs goes with the last of them, and cannot be captured into."""
    is_captured = llm.device.type == "cuda"
    if is_captured:
        torch.cuda.synchronize()  # the last of them may still run
    llm.engine.runner._steps.clear()
    if is_captured:
        llm.engine.runner._graph_pool = torch.cuda.graph_pool_handle()


def fill_sets(llm: LLM, context: int) -> None:
    """Sets as a selection makes them over random keys: sinks, recent tokens, and the others spread over the context."""
    sets, own = llm.engine.backend.sets, llm.engine.backend.config
    end, free = context - WARMUP - 1, own.budget - own.sink - own.recent
    for layer in sets.indices:
        shape = (*layer.shape[:2], free)
        jitter = torch.arange(free, device=layer.device) + torch.rand(shape, device=layer.device)
        layer[..., own.sink : own.sink + free] = own.sink + (jitter * ((end - own.sink - own.recent) / free)).int()
        layer[..., : own.sink] = torch.arange(own.sink, device=layer.device)
        layer[..., own.sink + free :] = torch.arange(end - own.recent, end, device=layer.device)
    sets.counts.fill_(own.budget)


def check_capture(llm: LLM, budget: int) -> None:
    """Captured decode steps, selecting, give the log-probabilities of the same tokens forced through eager steps."""
    prompt = random_prompts(llm.spec.vocab_size, 1, 2 * budget, seed=11)[0]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
    before = llm.stats()["graph_replays"]
    (chain,) = llm.generate([prompt], params)[0].outputs
    check(llm.device.type != "cuda" or llm.stats()["graph_replays"] > before, "no step was replayed as a graph")
    own = [entry[token].logprob for token, entry in zip(chain.token_ids, chain.logprobs or (), strict=True)]
    request = {"prompt_token_ids": [*prompt, *chain.token_ids], "dense_tokens": len(prompt)}
    forced = llm.generate(request, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))[0]
    eager = [next(iter(entry.values())).logprob for entry in (forced.prompt_logprobs or ())[-12:] if entry]
    apart = nats_apart(llm, own, eager)
    check(apart < TOLERANCE_NATS, f"captured and eager steps differ by {apart:.3f} nats")


def names_of(args: argparse.Namespace, arm: str, budget: int) -> list[str]:
    """Of the points that an arm has at each workload. Sets are kept, and can be frozen, where prediction is in time."""
    if "confidence" in arm:
        return [f"{arm} repairs {float(wanted):g}" for wanted in args.repairs.split(",")]
    config = parse_attention(attention_of(arm, budget))
    return [arm, f"{arm} floor"] if isinstance(config, AsyncSpade) and config.is_ahead else [arm]


def run_arm(report: Report, args: argparse.Namespace, arm: str, budget: int) -> None:
    """All workloads of an arm at a budget; of asyncspade also its floor, and with a threshold the shares repaired."""
    scores = report.notes["scores"]  # of the first arm, by budget: within it all arms attend to everything
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    llm = make(args, arm, budget)
    for within in map(int, args.budgets.split(",")) if arm == "full" else (budget,):
        scores[str(within)] = check_method(llm, arm, within, scores.get(str(within)))
    is_ahead = arm.startswith("asyncspade")
    if is_ahead:
        check_capture(llm, budget)
    print(f"-- {arm} {budget}: loaded and checked, {time.perf_counter() - began:.1f} s", flush=True)
    for batch, context in points_of(args.workloads):
        if "confidence" in arm:
            repair(report, args, llm, arm, budget, batch, context)
        else:
            measure(report, args, llm, arm, budget, batch, context)
    if f"{arm} floor" in names_of(args, arm, budget):
        freeze(llm)
        for batch, context in points_of(args.workloads):
            fill_sets(llm, context)
            measure(report, args, llm, f"{arm} floor", budget, batch, context)


def repair(report: Report, args: argparse.Namespace, llm: LLM, arm: str, budget: int, batch: int, context: int) -> None:
    """The point at each wanted share of repaired head rows; the threshold is bisected, the share counted."""
    threshold = llm.engine.backend._threshold
    seed = next(SEEDS)
    remember(llm, random_prompts(llm.spec.vocab_size, batch, context - WARMUP - 1, seed))

    def share(value: float) -> float:
        threshold.fill_(value)
        before = llm.stats()
        decode_times(llm, batch, context, 8, warmup=WARMUP, seed=seed)
        after = llm.stats()
        names = ("asyncspade_repaired", "sparse_rows")
        repaired, rows = (after[name] - before[name] for name in names)
        return repaired / (rows * llm.spec.num_layers * llm.spec.num_kv_heads)

    for wanted in map(float, args.repairs.split(",")):
        if is_done(report, f"{arm} repairs {wanted:g}", budget, batch, context):
            continue
        low, high = -1.0, 1.0
        for _ in range(9 if wanted else 0):
            middle = (low + high) / 2
            low, high = (low, middle) if share(middle) > wanted else (middle, high)
        threshold.fill_(low)
        measure(report, args, llm, f"{arm} repairs {wanted:g}", budget, batch, context, seed)


def bars(report: Report, budget: int = 1024) -> None:
    """What issue 4 asks of one GPU, and issue 8 of a model with latent attention, of every asyncspade arm."""
    is_latent = SHAPES.get(report.notes["shape"], TINY_LATENT).get("kv_lora_rank") is not None
    at = {(p["arm"], p["batch"], p["context"]): p["tpot_ms"] for p in report.points if p["budget"] in (budget, 0)}
    names = [arm for arm, _, _ in at if arm.startswith("asyncspade") and "confidence" not in arm]
    for arm in dict.fromkeys(name for name in names if not name.endswith("floor")):
        for batch, context in dict.fromkeys((b, c) for name, b, c in at if name == arm):
            ours, where = at[arm, batch, context], f"{batch} x {context}"
            long = (batch, context) == (8, 65536)
            # Frozen sets are the floor of every arm; prediction in depth has none of its own to freeze.
            floors = [name for name, b, c in at if name.endswith("floor") and (b, c) == (batch, context)]
            floor = f"{arm} floor" if f"{arm} floor" in floors else "".join(floors[:1])
            if "cache_device" in arm:
                if "scoring=keys" in arm and (batch, context) == (8, 32768):
                    report.bar(f"{arm} / floor, {where}", ours / at[floor, batch, context], 1.05, "<=")
                else:
                    print(f"{arm} / floor, {where}: {ours / at[floor, batch, context]:.3f}", flush=True)
                continue
            limits = {floor: 1.10 if long else 1.15}
            if not is_latent:
                limits["quest"] = 0.75 if long else 0.80
            if (batch, context) == (32, 16384):
                limits["full"] = 0.33
            for rival, limit in limits.items():
                if (rival, batch, context) in at:
                    name = f"{arm} / {rival.removeprefix(arm).strip()}, {where}"
                    report.bar(name, ours / at[rival, batch, context], limit, "<=")
    for batch, context in dict.fromkeys((b, c) for name, b, c in at if is_latent and name == "two_level"):
        if ("full", batch, context) in at:
            ratio = at["two_level", batch, context] / at["full", batch, context]
            report.bar(f"two_level / full, {batch} x {context}", ratio, 0.65, "<=")


def load_report(args: argparse.Namespace) -> Report:
    notes: dict[str, Any] = {"shape": args.shape, "steps": args.steps, "contexts": "random KV", "scores": {}}
    report = Report("asyncspade", notes=notes)
    if args.json and Path(args.json).exists():
        known = json.loads(Path(args.json).read_text(encoding="utf-8"))
        check(known["shape"] == args.shape, f"{args.json} is of {known['shape']}: give another --json")
        report.points, report.notes["scores"] = known["points"], known["scores"]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(SHAPES | TINIES))
    parser.add_argument("--workloads", default=None, help="e.g. 8x32768,32x16384; default: those of the shape")
    parser.add_argument("--arms", default=ARMS)
    parser.add_argument("--budgets", default="1024,2048")
    parser.add_argument(
        "--repairs", default="0,0.02,0.05,0.1", help="of arms with confidence, e.g. asyncspade:confidence=-1"
    )
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--time-limit-s", type=float, default=540.0, help="begin no arm that would end after this")
    parser.add_argument("--kv-memory", default=None)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    args.workloads = args.workloads or WORKLOADS.get(args.shape, "2x512,4x256")
    report, began, longest = load_report(args), time.perf_counter(), 0.0
    for budget in map(int, args.budgets.split(",")):
        for arm in args.arms.split(","):
            points = [
                (name, budget, *point) for name in names_of(args, arm, budget) for point in points_of(args.workloads)
            ]
            if all(is_done(report, *point) for point in points):
                continue
            start = time.perf_counter()
            if start - began + longest > args.time_limit_s:
                print(f"time limit: {arm} {budget} is left for another run", flush=True)
                continue
            run_arm(report, args, arm, budget)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            longest = max(longest, time.perf_counter() - start)
    bars(report)
    report.finish(args.json)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
