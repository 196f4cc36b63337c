"""What every benchmark shares: timing, bars, and the one JSON line at the end.

A benchmark answers one question. It runs its arms and their peers in one process on the same work, checks that they
agree before it prints any ratio, asserts by counters that every arm was active, and ends with one JSON line:

    {"benchmark", "device", "versions", "commit", "points": [...],
     "bars": [{"name", "value", "limit", "direction", "ok"}]}
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class CheckFailed(AssertionError):
    """An arm gave wrong results or was not active: no speed-up may be printed."""


def check(ok: bool, what: str) -> None:
    if not ok:
        raise CheckFailed(what)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one repeated piece of work."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Timing:
        times = sorted(t * 1e3 for t in times_s)
        return cls(
            statistics.median(times), times[int(0.1 * (len(times) - 1))], times[int(0.9 * (len(times) - 1))], len(times)
        )

    def fields(self, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}_ms": round(self.median_ms, 4),
            f"{prefix}_p10_ms": round(self.p10_ms, 4),
            f"{prefix}_p90_ms": round(self.p90_ms, 4),
        }


def time_host(work: Callable[[], Any], repeats: int, warmup: int = 1) -> Timing:
    """Wall time of synchronous work."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return Timing.of(times)


def time_graph(work: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> Timing:
    """Device time of work captured as one CUDA graph, by events around each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(warmup):
        graph.replay()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return Timing.of([start.elapsed_time(end) / 1e3 for start, end in pairs])


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu-{platform.machine()}-{torch.get_num_threads()}-threads"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "triton", "flashinfer-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def commit() -> str:
    """The commit that ran. Where the tree travels without its history, the caller names it in SLIPSTREAM_COMMIT."""
    named = os.environ.get("SLIPSTREAM_COMMIT")
    if named:
        return named
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


@dataclass
class Report:
    """Collects points and bars, then prints the one JSON line and writes it."""

    benchmark: str
    points: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def point(self, **values: Any) -> None:
        self.points.append(values)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)

    def bar(self, name: str, value: float, limit: float, direction: str) -> None:
        value = round(value, 9)  # .01 of a mean of hundredths is .01
        ok = value <= limit if direction == "<=" else value >= limit
        self.bars.append(
            {"name": name, "value": round(value, 4), "limit": limit, "direction": direction, "ok": bool(ok)}
        )
        print(f"bar {'ok  ' if ok else 'MISS'} {name}: {value:.4g} {direction} {limit}", flush=True)

    def keep(self, path: str | None) -> str:
        """Everything so far as one line, and in the file: a run that is cut off loses nothing."""
        where = {"device": device_name(), "versions": versions(), "commit": commit()}
        results = {"points": self.points, "bars": self.bars}
        line = json.dumps({"benchmark": self.benchmark} | where | self.notes | results)
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(line + "\n", encoding="utf-8")
        return line

    def finish(self, path: str | None) -> str:
        line = self.keep(path)
        print(line, flush=True)
        return line
