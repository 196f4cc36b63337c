"""What is a second GPU worth? One model split over two, two replicas of it, and a cache rank beside it, against one.

Random weights and contexts of random KV on every rank, one engine at a time, all decode steps replayed graphs. Ways:
``one`` GPU; ``tensor`` parallel over two; ``replicas``, one in this process and one in another, begun together; and for
asyncspade ``cache``: selection on the second GPU (``cache_device``). Before any ratio: within the budget every engine
gives the log-probabilities of the first (bf16 noise), and by the counters every timed step was what its arm says.

    PYTHONPATH=src python benchmarks/tensor_parallel.py --json benchmarks/results/h200/tensor_parallel.json

All arms go one way before any goes the next. The JSON is written after every point, and a run goes on from it; an
engine that fails is noted there and does not stop the others. On a CPU, with ``--shape tiny`` (or ``tiny-latent``),
processes take the place of GPUs; what that measures is nothing but this file.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from asyncspade import TINIES, attention_of
from contexts import remember
from decode import check_method, points_of
from harness import Report, Timing, check, time_host
from shapes import SHAPES

from slipstream import LLM, rank, split
from slipstream.benchmark import decoding, random_prompts

ONE, TENSOR, REPLICAS, CACHE = WAYS = ("one", "tensor", "replicas", "cache")
WARMUP = 72  # steps before the timed ones: windows of queries are full
REPLICA_S = 400.0  # most that a replica takes to be ready
INDEXED_AT_ONCE = 4096  # pages


def fill(parts: Any, seed: int) -> None:
    """Random keys and values in every page of this rank, and the method's index over them. parts: of an ``LLM``."""
    backend = parts.engine.backend
    for pool in (parts.pool, getattr(backend, "replica", None)):
        if pool is not None:
            generator = torch.Generator(pool.device).manual_seed(seed)
            for layer in (*pool.k, *pool.v):
                layer.normal_(generator=generator)
    index = getattr(backend, "index", None)
    if index is None:
        return
    keys, size = getattr(backend, "replica", parts.pool).k, parts.pool.page_size
    for pages in torch.arange(1, parts.pool.num_pages, dtype=torch.int32).split(INDEXED_AT_ONCE):
        length = len(pages) * size
        start, lengths = (torch.tensor(x, dtype=torch.int32, device=keys.device) for x in ([0, length], [length]))
        for layer in range(parts.spec.num_layers):
            index.extend(layer, keys[layer], pages[None].to(keys.device), start, lengths, length)


def sum_us(ranks: Any, parts: Any, rows: int) -> float:
    """Microseconds of one sum over the ranks as a step has it, [rows, H], in a graph of a step's number of them.

    Every rank calls this at the same time, and none runs anything else.
    """
    spec, count = parts.spec, 2 * parts.spec.num_layers + 1
    x = torch.zeros((rows, spec.hidden_size), dtype=spec.dtype, device=parts.pool.device)

    def work() -> None:
        for _ in range(count):
            ranks.sum(x)

    work()
    if not x.is_cuda:
        return time_host(work, 3).median_ms * 1e3 / count
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.device(x.device):
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        for _ in range(10):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return statistics.median(times) * 1e3 / count


def prepare(parts: Any) -> None:
    """What another rank does before its first step, as rank 0 does in :func:`run_engine`."""
    fill(parts, seed=parts.ranks.index)
    sum_us(parts.ranks, parts, parts.engine.config.max_num_seqs)


def make(args: argparse.Namespace, arm: str, way: str) -> LLM:
    attention = attention_of(arm, args.budget)
    if way == CACHE:
        attention["cache_device"] = "cuda:1" if torch.cuda.is_available() else "cpu"
    points = points_of(args.workloads)
    llm = LLM(
        (SHAPES | TINIES)[args.shape],
        load_format="dummy",
        attention=attention,
        max_model_len=max(context for _, context in points) + 1024,
        max_num_seqs=max(batch for batch, _ in points),
        kv_memory=args.kv_memory,
        tensor_parallel_size=2 if way == TENSOR else 1,
        seed=0,
    )
    fill(llm, seed=0)
    return llm


def measure(
    args: argparse.Namespace, llm: LLM, arm: str, batch: int, context: int, begin: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Times of decode steps, in seconds, and what the counters say. begin: called when the first is about to run."""
    seed = 100 + context
    prompts = random_prompts(llm.spec.vocab_size, batch, context - WARMUP - 1, seed)
    remember(llm, prompts, index=False)
    times, host = [], []
    with decoding(llm, batch, context, args.steps, seed=seed, warmup=WARMUP, prompts=prompts):
        before = llm.stats()
        begin()
        last = time.perf_counter()
        for _ in range(args.steps):
            news = llm.engine.step()
            now = time.perf_counter()
            check(sum(event.delta is not None for event in news) == batch, "a chain did not decode in a timed step")
            times.append(now - last)
            host.append(llm.engine.stats()["host_ms_last"])
            last = now
        after = llm.stats()
    moved = {name: after[name] - before[name] for name in after if isinstance(after[name], int) and name in before}
    if llm.device.type == "cuda":
        is_remote = getattr(llm.engine.backend, "replica", None) is not None  # which may not be captured
        check(is_remote or moved["graph_replays"] >= args.steps, f"{arm}: the timed steps were not graph replays")
    if arm != "full":
        check(moved["sparse_rows"] >= args.steps * batch, f"{arm}: a timed step was dense")
    if "asyncspade_predictions" in moved:
        check(moved["asyncspade_predictions"] > 0, f"{arm}: nothing was predicted")
        check(moved.get("asyncspade_late", 0) == 0, f"{arm}: sets were not for the step that read them")
    return {"times_s": times, "host_ms": statistics.median(host), "graph_replays": moved["graph_replays"]}


@contextmanager
def replica(args: argparse.Namespace, arm: str) -> Iterator[subprocess.Popen[str]]:
    """The same work on the second GPU, up to where it says that it is ready."""
    own = ["--shape", args.shape, "--workloads", args.workloads, "--budget", str(args.budget)]
    own += ["--steps", str(args.steps), *(["--kv-memory", args.kv_memory] if args.kv_memory else [])]
    command = [sys.executable, __file__, "--replica", arm, *own]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "1"},
    )
    late = threading.Timer(REPLICA_S, process.kill)
    late.start()
    try:
        yield process
        check(process.wait(60) == 0, "the replica failed")
    finally:
        late.cancel()
        process.kill()


def read(process: subprocess.Popen[str]) -> Any:
    """The next line of JSON that the replica writes, whatever else it prints before."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError(f"the replica ended: exit code {process.wait(60)}")


def run_replica(args: argparse.Namespace, arm: str) -> None:
    llm = make(args, arm, ONE)

    def ready() -> None:
        print(json.dumps({"ready": True}), flush=True)
        check(sys.stdin.readline() != "", "nobody is left to say go")

    for batch, context in points_of(args.workloads):
        print(json.dumps(measure(args, llm, arm, batch, context, ready)), flush=True)


def run_replicas(report: Report, args: argparse.Namespace, arm: str) -> None:
    """All points of one arm on two GPUs at the same time."""
    with replica(args, arm) as process, make(args, arm, ONE) as llm:

        def go() -> None:
            assert process.stdin is not None
            check(read(process) == {"ready": True}, "the replica said something else")
            process.stdin.write("go\n")
            process.stdin.flush()

        for batch, context in points_of(args.workloads):
            point(
                report,
                args,
                arm,
                REPLICAS,
                batch,
                context,
                [measure(args, llm, arm, batch, context, go), read(process)],
            )


def run_engine(report: Report, args: argparse.Namespace, arm: str, way: str) -> None:
    """All points of one arm spent another way."""
    with make(args, arm, way) as llm:
        if way == TENSOR:
            with llm._ranks.company.waiting():
                report.notes["sum_us"] = round(sum_us(llm._ranks, llm, llm.engine.config.max_num_seqs), 2)
        if way != CACHE:  # far from its keys a sparse step needs more context than a budget
            scores = report.notes["scores"]
            scores.setdefault("all", check_method(llm, arm, args.budget, scores.get("all")))
        for batch, context in points_of(args.workloads):
            point(report, args, arm, way, batch, context, [measure(args, llm, arm, batch, context)])


def point(
    report: Report, args: argparse.Namespace, arm: str, way: str, batch: int, context: int, found: list[dict[str, Any]]
) -> None:
    """found: of each replica. Their tokens add up; TPOT is that of the slower."""
    times = max((one["times_s"] for one in found), key=statistics.median)
    rate = sum(batch * len(one["times_s"]) / sum(one["times_s"]) for one in found)
    gpus = 1 if way == ONE else 2
    report.point(
        arm=arm, way=way, batch=batch, context=context, gpus=gpus, **Timing.of(times).fields("tpot"),
        host_ms=round(found[0]["host_ms"], 4), graph_replays=found[0]["graph_replays"], tokens_per_s=round(rate, 2),
        tokens_per_s_per_gpu=round(rate / gpus, 2),
    )  # fmt: skip
    report.keep(args.json)


def bars(report: Report) -> None:
    """What issue 9 asks of two H200s."""
    at = {(p["arm"], p["batch"], p["context"], p["way"]): p for p in report.points}
    for arm, batch, context in dict.fromkeys(key[:3] for key in at):
        ways = {way: at[arm, batch, context, way] for way in WAYS if (arm, batch, context, way) in at}
        if ONE in ways and TENSOR in ways:
            ratio = ways[TENSOR]["tpot_ms"] / ways[ONE]["tpot_ms"]
            report.bar(f"{arm}, {batch} x {context}: TPOT of tensor parallel 2 / 1", ratio, 0.62, "<=")
        if ONE in ways and REPLICAS in ways:
            ratio = ways[REPLICAS]["tokens_per_s"] / ways[ONE]["tokens_per_s"]
            report.bar(f"{arm}, {batch} x {context}: tokens/s of two replicas / one", ratio, 1.95, ">=")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-32b", choices=[*sorted(SHAPES), *TINIES])
    parser.add_argument("--workloads", default=None, help="default: 8x32768; 2x512,1x256 for tiny ones")
    parser.add_argument("--arms", default="full,asyncspade")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--kv-memory", default=None, help="of each GPU; default: what is free")
    parser.add_argument("--time-limit-s", type=float, default=540.0, help="begin no engine that would end after this")
    parser.add_argument("--json", default=None)
    parser.add_argument("--replica", default=None, help="the arm, in the second process of the way 'replicas'")
    args = parser.parse_args()
    args.workloads = args.workloads or ("2x512,1x256" if args.shape in TINIES else "8x32768")
    check(set(args.ways.split(",")) <= set(WAYS), f"--ways are of {WAYS}")
    return args


def load_report(args: argparse.Namespace) -> Report:
    facts = {"shape": args.shape, "budget": args.budget, "steps": args.steps}
    report = Report("tensor_parallel", notes=facts | {"contexts": "random KV", "scores": {}})
    if args.json and Path(args.json).exists():
        known = json.loads(Path(args.json).read_text(encoding="utf-8"))
        check({name: known[name] for name in facts} == facts, f"{args.json} is of other work: give another --json")
        report.points = known["points"]
        report.notes |= {name: known[name] for name in ("scores", "sum_us") if name in known}
    return report


def main() -> None:
    args = parse()
    split.COMMAND = [sys.executable, __file__, "--rank"]
    if args.replica:
        run_replica(args, args.replica)
        return
    report, began, longest = load_report(args), time.perf_counter(), 0.0
    done = {(p["arm"], p["way"], f"{p['batch']}x{p['context']}") for p in report.points}
    for way, arm in itertools.product(args.ways.split(","), args.arms.split(",")):
        left = [name for name in args.workloads.split(",") if (arm, way, name) not in done]
        if not left or (way == CACHE and not arm.startswith("asyncspade")):
            continue
        start = time.perf_counter()
        if start - began + longest > args.time_limit_s:
            print(f"time limit: {arm}, {way} is left for another run", flush=True)
            continue
        own = argparse.Namespace(**vars(args) | {"workloads": ",".join(left)})
        try:
            run_replicas(report, own, arm) if way == REPLICAS else run_engine(report, own, arm, way)
        except Exception:  # noqa: BLE001 - the others are worth having; this one is in the result and the exit status
            report.notes.setdefault("failed", {})[f"{arm}, {way}"] = traceback.format_exc()
            print(traceback.format_exc(), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest = max(longest, time.perf_counter() - start)
        print(f"-- {arm}, {way}: {time.perf_counter() - start:.0f} s", flush=True)
        report.keep(args.json)
    bars(report)
    report.finish(args.json)
    check("failed" not in report.notes, "not every engine ran to its end: see 'failed'")


if __name__ == "__main__":
    with torch.inference_mode():
        if sys.argv[1:2] == ["--rank"]:
            rank.main(prepare)
        else:
            main()
