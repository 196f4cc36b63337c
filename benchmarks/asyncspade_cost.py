"""What does a token cost on one device, on two, and on two that do not know of each other? And how much memory?

Each arm is a process of its own (or two at once), on the embedded target: ``two devices`` is AsyncSpade with its cache
rank on the second (on CPUs a process with its own core, on GPUs ``cache_device``), ``two independent`` the arm of one
device twice at the same time, each with a batch of its own. Cost is device time: devices x TPOT / chains; on CPUs also
the processor time that was really spent (``busy_ms_per_token``). Memory is the peak of each process, resident on a CPU,
allocated on a GPU, with a pool for these chains and no more (``needed_mb``: the pool that there was taken off).

    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/asyncspade_cost.py --json runs/cost.json --picture runs/cost.png
    PYTHONPATH=src python benchmarks/asyncspade_cost.py --times benchmarks/results/h200/asyncspade.json --json c.json

``--times`` takes TPOT from a result of ``asyncspade.py`` instead; arms with a ``cache_device`` have two devices.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from asyncspade_cpu import start_rank, timed
from harness import Report, Timing, check

from slipstream import LLM
from slipstream.asyncspade import placement
from slipstream.asyncspade.config import AsyncSpade
from slipstream.build import parse_attention
from slipstream.evaluation import parse_name

IN_TIME = "asyncspade:predictor=last"
ONE = ("full", "quest", "double_sparsity", "two_level", "asyncspade", IN_TIME)
TWO, INDEPENDENT = "two devices", "two independent"


def one_arm(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: what one engine takes."""
    rank = None
    name, options = parse_name(args.arm, "method:option=value")
    attention: Any = name
    if name != "full":
        attention = {"method": name, "budget": args.budget, "min_context": args.budget, **options}
    if args.two:
        if args.device == "cuda":
            attention["cache_device"] = "cuda:1"
        else:
            rank, attention["cache_rank"] = start_rank(args.kv_memory)
            attention["transfer"] = args.transfer
    longest = args.context + 256
    llm = LLM(
        args.model, device=args.device, attention=attention, max_model_len=longest, max_num_seqs=args.batch,
        kv_memory=args.kv_memory,
    )  # fmt: skip
    times = timed(llm, args.batch, args.context, args.steps, rank)
    stats, config = llm.stats(), parse_attention(attention)
    check(name == "full" or stats["sparse_rows"] >= args.steps * args.batch, f"{args.arm} was not sparse")
    seats = placement.seat_bytes(config, llm.spec) if isinstance(config, AsyncSpade) and config.is_ahead else 0
    held = stats["kv_pool_bytes"] + stats.get("index_bytes", 0)
    peak, used = _peak(args.device), held * args.batch * longest / llm.pool.num_tokens
    found = {
        "arm": args.arm, "batch": args.batch, "context": args.context, **Timing.of(times.times_s).fields("tpot"),
        "busy_ms": round(times.cpu_ms + times.rank_cpu_ms, 3), "bytes_per_token": held // llm.pool.num_tokens,
        "load": round(os.getloadavg()[0], 1),
        "seats_mb": _mb(seats * (args.batch + 1)), "peak_mb": _mb(peak), "needed_mb": _mb(peak - held + used),
    }  # fmt: skip
    if args.two and args.device == "cuda":
        found["rank_peak_mb"] = _mb(torch.cuda.max_memory_allocated(1))
    llm.close()
    if rank is not None:
        status = Path(f"/proc/{rank.pid}/status").read_text()
        found["rank_peak_mb"] = round(int(status.split("VmHWM:")[1].split()[0]) / 1e3, 1)
        rank.terminate()
        rank.wait()
    return found


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mb(size: float) -> float:
    return round(size / 1e6, 1)


def start(args: argparse.Namespace, arm: str, two: bool = False, gpu: int = 0) -> subprocess.Popen[str]:
    names = ("model", "device", "batch", "context", "budget", "steps", "kv_memory", "transfer")
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    env = os.environ | ({} if two or args.device != "cuda" else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    command = [sys.executable, __file__, "--arm", arm, *options, *(["--two"] * two)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    check(process.returncode == 0, f"an arm failed: {out}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def priced(point: dict[str, Any], devices: int, chains: int) -> dict[str, Any]:
    """With what a token costs: device milliseconds, and how many a device makes in a second."""
    cost = devices * point["tpot_ms"] / chains
    return point | {
        "devices": devices, "chains": chains, "device_ms_per_token": round(cost, 4),
        "tokens_per_s_per_device": round(1e3 / cost, 2),
    } | ({"busy_ms_per_token": round(point["busy_ms"] / chains, 4)} if "busy_ms" in point else {})  # fmt: skip


def measure(report: Report, args: argparse.Namespace) -> None:
    for arm in ONE:
        report.point(**priced(finished(start(args, arm)), 1, args.batch))
        report.keep(args.json)
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        print("one GPU: the arms of two devices are left out", flush=True)
        return
    both = [finished(process) for process in [start(args, "asyncspade", gpu=gpu) for gpu in (0, 1)]]
    slower = max(both, key=lambda found: found["tpot_ms"]) | {"busy_ms": sum(found["busy_ms"] for found in both)}
    report.point(**priced(slower | {"arm": INDEPENDENT}, 2, 2 * args.batch))
    report.keep(args.json)
    found = finished(start(args, IN_TIME, two=True))
    report.point(**priced(found | {"arm": TWO}, 2, args.batch))


def from_times(report: Report, path: Path) -> None:
    for point in json.loads(path.read_text(encoding="utf-8"))["points"]:
        if not point["arm"].endswith("floor"):
            kept = {name: point[name] for name in ("arm", "budget", "batch", "context", "tpot_ms", "peak_bytes")}
            report.point(**priced(kept, 1 + ("cache_device" in point["arm"]), point["batch"]))


def draw(report: Report, path: Path) -> None:
    """Device time of a token, and peak memory, a bar for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 0.34 * len(report.points) + 1.6), sharey=True, layout="constrained")
    names = [point["arm"] for point in report.points]
    axes[0].barh(names, [point["device_ms_per_token"] for point in report.points])
    busy = [point["busy_ms_per_token"] for point in report.points]
    axes[0].scatter(busy, names, color="0.2", zorder=3, marker="|", s=90, label="processor time")
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_xlabel("device ms per token")
    left = [0.0] * len(names)
    for part in ("needed_mb", "rank_peak_mb"):
        own = [point.get(part, 0.0) for point in report.points]
        axes[1].barh(names, own, left=left, label={"needed_mb": "engine", "rank_peak_mb": "cache rank"}[part])
        left = [a + b for a, b in zip(left, own, strict=True)]
    axes[1].set_xlabel("peak memory of a device, MB")
    axes[1].legend(frameon=False, fontsize=8)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(axis="x", alpha=0.25)
    notes = report.notes
    figure.suptitle(f"{notes['model']}, {notes['batch']} x {notes['context']}, budget {notes['budget']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="slipstream-target")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--kv-memory", default="512MiB")
    parser.add_argument("--transfer", default="indices", help="what a cache rank in another process sends")
    parser.add_argument("--times", type=Path, help="a result of asyncspade.py, instead of measuring")
    parser.add_argument("--arm", help="measure this arm alone, and print it")
    parser.add_argument("--two", action="store_true", help="with --arm: with a cache rank elsewhere")
    parser.add_argument("--json", default=None)
    parser.add_argument("--picture", type=Path, default=None)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(one_arm(args)))
        return
    notes = {name: getattr(args, name) for name in ("model", "batch", "context", "budget", "transfer")}
    report = Report("asyncspade_cost", notes=notes)
    if args.times:
        from_times(report, args.times)
    else:
        measure(report, args)
        if args.picture:
            draw(report, args.picture)
    report.finish(args.json)


if __name__ == "__main__":
    main()
