"""Does a cache rank in a second process pay on a CPU? Decode steps of the embedded target at 8k tokens, against full.

The engine attends to sets that the other process (``slipstream cache-rank``) selects; full attention and synchronous
two-level selection run in the same process, in turns with it. ``one process`` is AsyncSpade with its work in line, ``in
depth`` the same with queries foreseen from the layer below. cpu_ms, rank_cpu_ms: processor time of a step here and in
the other process, which other load on the machine stretches less than it does the wall clock's.

    PYTHONPATH=src python benchmarks/asyncspade_cpu.py --json benchmarks/results/cpu/asyncspade_cpu.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import Report, Timing, check

from slipstream import LLM
from slipstream.benchmark import decoding, random_prompts

MODEL = "slipstream-target"


def start_rank(kv_memory: str) -> tuple[subprocess.Popen[str], str]:
    """A cache rank of its own process, and its address."""
    command = [sys.executable, "-m", "slipstream", "cache-rank", MODEL, "--listen", "127.0.0.1:0"]
    rank = subprocess.Popen([*command, "--kv-memory", kv_memory], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    line = rank.stdout.readline()
    check(line.startswith("READY "), f"the cache rank did not start: {line!r}")
    return rank, line.split()[1]


class Steps(NamedTuple):
    """Decode steps: wall time of each, and the mean processor time here and in the cache rank, ms."""

    times_s: list[float]
    cpu_ms: float
    rank_cpu_ms: float


def timed(
    llm: LLM, batch: int, context: int, steps: int, rank: subprocess.Popen[str] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
) -> Steps:  # fmt: skip
    times = []
    with decoding(llm, batch, context, steps, prompts=prompts):
        own, far = time.process_time(), _processor_s(rank)
        for _ in range(steps):
            start = time.perf_counter()
            llm.engine.step()
            times.append(time.perf_counter() - start)
        own, far = time.process_time() - own, _processor_s(rank) - far
    return Steps(times, 1e3 * own / steps, 1e3 * far / steps)


def _processor_s(process: subprocess.Popen[str] | None) -> float:
    if process is None:
        return 0.0
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=32, help="of 64 tokens, of all sparse arms: 128 are all of 8k")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--predictor", default="last", help="of both asyncspade arms")
    parser.add_argument("--transfer", default="indices")
    parser.add_argument("--kv-memory", default="768MiB")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    notes = {
        name: getattr(args, name) for name in ("context", "batch", "budget", "blocks", "steps", "predictor", "transfer")
    }
    report = Report("asyncspade_cpu", notes={"model": MODEL, **notes})
    rank, address = start_rank(args.kv_memory)
    try:
        measure(report, args, rank, address)
    finally:
        rank.terminate()
        rank.wait()
    report.finish(args.json)


def measure(report: Report, args: argparse.Namespace, rank: subprocess.Popen[str], address: str) -> None:
    sparse: dict[str, Any] = {"budget": args.budget, "min_context": args.budget, "blocks": args.blocks}
    ahead = {"method": "asyncspade", "predictor": args.predictor, **sparse}
    arms: dict[str, Any] = {
        "full": "full",
        "two_level": {"method": "two_level", **sparse},
        "in depth": ahead | {"predictor": "auto"},
        "one process": ahead,
        "two processes": ahead | {"cache_rank": address, "transfer": args.transfer},
    }
    options = {"device": "cpu", "max_model_len": args.context + 256, "max_num_seqs": args.batch}
    llms = {
        name: LLM(MODEL, attention=attention, kv_memory=args.kv_memory, **options) for name, attention in arms.items()
    }
    prompts = random_prompts(llms["full"].spec.vocab_size, args.batch, args.context, 0)
    found: dict[str, list[Steps]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, llm in llms.items():
            before = llm.stats()
            watched = rank if name == "two processes" else None
            found[name].append(timed(llm, args.batch, args.context, args.steps, watched, prompts))
            after = llm.stats()
            if name != "full":
                rows = after["sparse_rows"] - before["sparse_rows"]
                check(rows >= args.steps * args.batch, f"{name}: {rows} sparse rows")
            if name == "two processes":
                check(after["asyncspade_bytes_in"] > before["asyncspade_bytes_in"], "nothing came from the cache rank")
                check(after.get("asyncspade_fallbacks", 0) == 0, "steps fell back to full attention")
    medians = {}
    for name, rounds in found.items():
        timing = Timing.of([step for taken in rounds for step in taken.times_s])
        cpu = {
            kind: round(statistics.median(getattr(r, kind) for r in rounds), 3) for kind in ("cpu_ms", "rank_cpu_ms")
        }
        stats = {k: v for k, v in llms[name].stats().items() if k.startswith("asyncspade_")}
        report.point(arm=name, **timing.fields("tpot"), **cpu, load=round(os.getloadavg()[0], 1), **stats)
        medians[name] = timing.median_ms, max(cpu.values())
        llms[name].close()
    for what, i in (("TPOT", 0), ("processor time of the busier process", 1)):
        ratio = medians["two processes"][i] / medians["full"][i]
        report.bar(f"two processes / full, {args.batch} x {args.context}, {what}", ratio, 1.0, "<=")


if __name__ == "__main__":
    main()
