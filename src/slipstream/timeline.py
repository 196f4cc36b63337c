"""When does what run in a decode step? Spans of attention, prediction, selection and transfers, layer by layer.

On CUDA they are the kernels that the profiler saw, in replayed graphs too; on a CPU the calls of the catalogues in
:mod:`slipstream.kernels`, timed on the host. Both are put in rows by name: what no layer waits for stands under it.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from slipstream import overlap
from slipstream.asyncspade.feed import Feed
from slipstream.asyncspade.foresight import ForesightBackend
from slipstream.benchmark import decoding
from slipstream.kernels import ops, predict, residency, sparse
from slipstream.llm import LLM
from slipstream.models.linear import Linear

# The first pattern found in a span's name says what it is. Kernels are named as the ops are, near enough.
KINDS = (
    ("transfer", "memcpy|nccl|send|receive|transfer|load_blocks|copy_between|_load_kernel|_copy_kernel"),
    ("stall", "wait"),
    ("predict", "predict|push|ridge|analog|solve"),
    ("check", "check_quer"),
    ("index", "extend"),
    (
        "select",
        "store_sets|_tokens|_blocks|label|score|_key_kernel|_list_kernel|statistics|images|_select|chunk|union|"
        "claim|forget|block_rows|_find_kernel|_rows_kernel",
    ),
    ("attend", "attention|_decode_kernel|_split_kernel|_merge_kernel|BatchDecode|PagedKV|Persistent|_seat_kernel"),
    ("rope", "rope"),
    ("linear", "gemm|nvjet|cutlass|gemv|splitk|linear|experts"),
)
ROWS = {"predict": "ahead", "select": "ahead", "index": "ahead", "transfer": "link"}
COLOURS = {
    "attend": "#2c7fb8", "linear": "#d0d0d0", "rope": "#a6bddb", "other": "#e6e6e6", "check": "#7fcdbb",
    "predict": "#fdae61", "select": "#d7301f", "index": "#fdd49e", "transfer": "#6a51a3", "stall": "#111111",
}  # fmt: skip
HOST_CALLS: tuple[tuple[type, str, str], ...] = (  # beside the catalogues
    (Linear, "__call__", "linear"), (overlap._HostTicket, "wait", "wait"),
    (Feed, "tell", "send"), (Feed, "take", "receive"), (Feed, "wait", "wait"),
)  # fmt: skip
STALL_US = 5.0  # the main row stands still for longer than this, in the middle of a step


@dataclass
class Span:
    """One kernel, copy or call. row: "main", "ahead" or "link"; step and layer count from 0, -1 where unknown."""

    name: str
    kind: str
    row: str
    start_us: float
    us: float
    step: int = -1
    layer: int = -1

    @property
    def end_us(self) -> float:
        return self.start_us + self.us


def span(name: str, start_us: float, us: float) -> Span:
    kind = next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
    return Span(name, kind, ROWS.get(kind, "main"), start_us, us)


def trace(llm: LLM, batch: int, context: int, steps: int) -> list[Span]:
    """Spans of ``steps`` decode steps of ``batch`` random chains, with their step and layer, by start."""
    with decoding(llm, batch, context, steps):
        record = _record_device if llm.device.type == "cuda" else _record_host
        spans = record(lambda: [llm.engine.step() for _ in range(steps)])
    spans.sort(key=lambda one: one.start_us)
    origin = spans[0].start_us
    for one in spans:
        one.start_us -= origin
    backend = llm.engine.backend
    dense = getattr(backend, "dense_layers", 0)
    if isinstance(backend, ForesightBackend):
        _tell_apart([one for one in spans if one.kind == "rope"], llm.spec.num_layers - dense, dense)
    _number([one for one in spans if one.row == "main"], "rope", llm.spec.num_layers, 0)
    ahead = [one for one in spans if one.row == "ahead"]
    chosen = [one for one in ahead if one.kind != "index"]  # not every step extends the index
    _number(chosen, chosen[0].name if chosen else "", llm.spec.num_layers - dense, dense)
    for one, after in zip(ahead[-2::-1], ahead[::-1], strict=False):
        if one.kind == "index":
            one.step, one.layer = after.step, after.layer
    return spans + (_stalls(spans) if llm.device.type == "cuda" else [])


def _tell_apart(ropes: Sequence[Span], layers: int, offset: int) -> None:
    """Foreseen queries are turned by the op that turns true ones: before each sparse layer's own but the first's."""
    for at, one in enumerate(ropes):
        behind = at % (2 * layers - 1 + offset) - offset
        if behind > 0 and behind % 2 == 1:
            one.row, one.kind = "ahead", "predict"


def _record_device(work: Callable[[], Any]) -> list[Span]:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kinds = ("kernel", "gpu_memcpy")
    return [span(e["name"], float(e["ts"]), float(e["dur"])) for e in events if e.get("cat") in kinds]


def _record_host(work: Callable[[], Any]) -> list[Span]:
    spans: list[Span] = []
    with ExitStack() as patches:
        for module in (ops, sparse, predict, residency):
            for name, op in vars(module).copy().items():
                if hasattr(op, "__wrapped__") or (callable(op) and op.__module__ == module.__name__ and name[0] != "_"):
                    patches.enter_context(patch.object(module, name, _timed(op, name, spans)))
        for kind, call, name in HOST_CALLS:
            patches.enter_context(patch.object(kind, call, _timed(getattr(kind, call), name, spans)))
        work()
    return [one for one in spans if one.kind != "stall" or one.us > STALL_US]


def _timed(op: Callable[..., Any], name: str, spans: list[Span]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return op(*args, **kwargs)
        finally:
            spans.append(span(name, 1e6 * start, 1e6 * (time.perf_counter() - start)))

    return timed


def _number(spans: Sequence[Span], first: str, layers: int, offset: int) -> None:
    """Step and layer of spans in order: a layer begins with the span that is named (or of the kind) ``first``."""
    begun = -1
    for one in spans:
        begun += first in (one.name, one.kind)
        if begun >= 0 and layers:
            one.step, one.layer = begun // layers, begun % layers + offset


def _stalls(spans: Sequence[Span]) -> list[Span]:
    """Where the main row of a device stands still inside a step."""
    found = []
    main = [one for one in spans if one.row == "main"]
    for before, after in zip(main, main[1:], strict=False):
        gap = after.start_us - before.end_us
        if gap > STALL_US and before.step == after.step:
            found.append(Span("idle", "stall", "main", before.end_us, gap, before.step, before.layer))
    return found


def summary(spans: Sequence[Span]) -> dict[str, Any]:
    """Means over steps: microseconds of each kind per step, and per layer those of attention and of ahead work.

    hidden: the share of the ahead row's time in which the main row was at work too.
    """
    steps = sorted({one.step for one in spans if one.step >= 0})
    by_step = [[one for one in spans if one.step == step] for step in steps]
    kinds = list(dict.fromkeys(one.kind for one in spans))
    layers = sorted({one.layer for one in spans if one.layer >= 0})

    def mean(**wanted: Any) -> float:
        """Microseconds per step of the spans that are all of this."""
        times = [one.us for step in by_step for one in step if all(getattr(one, k) == v for k, v in wanted.items())]
        return round(sum(times) / max(len(steps), 1), 2)

    main = [one for one in spans if one.row == "main" and one.kind != "stall"]
    ahead = [one for one in spans if one.row == "ahead"]
    total = sum(one.us for one in ahead)
    return {
        "steps": len(steps),
        "us_by_kind": {kind: mean(kind=kind) for kind in kinds},
        "by_layer": [
            {"layer": n, "attend_us": mean(layer=n, kind="attend"), "ahead_us": mean(layer=n, row="ahead")}
            for n in layers
        ],
        "stalls": sum(one.kind == "stall" for one in spans),
        "stall_us": round(sum(one.us for one in spans if one.kind == "stall"), 1),
        "hidden": round(_shared(main, ahead) / total, 4) if total else 1.0,
    }


def _shared(first: Sequence[Span], second: Sequence[Span]) -> float:
    """Microseconds in which both rows are at work; neither row overlaps itself."""
    shared, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        a, b = first[i], second[j]
        shared += max(0.0, min(a.end_us, b.end_us) - max(a.start_us, b.start_us))
        if a.end_us < b.end_us:
            i += 1
        else:
            j += 1
    return shared


def write_chrome(spans: Sequence[Span], path: Path) -> None:
    """For chrome://tracing and https://ui.perfetto.dev."""
    rows = list(dict.fromkeys(one.row for one in spans))
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": row}} for i, row in enumerate(rows)
    ]
    events += [
        {"name": one.name, "cat": one.kind, "ph": "X", "ts": round(one.start_us, 3), "dur": round(one.us, 3), "pid": 0,
         "tid": rows.index(one.row), "args": {"step": one.step, "layer": one.layer}}
        for one in spans
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")


def draw(spans: Sequence[Span], path: Path, title: str) -> None:
    """A whole step, some layers of it closer, and per layer how long attention and the work ahead take."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    facts = summary(spans)
    step = max(facts["steps"] - 2, 0)
    own = [one for one in spans if one.step == step]
    layers = sorted({one.layer for one in own if one.layer >= 0})
    middle = set(layers[len(layers) // 2 : len(layers) // 2 + 3])
    near = [one for one in own if one.row == "main" and one.layer in middle]
    figure, axes = plt.subplots(3, 1, figsize=(12, 7.5), height_ratios=(1.2, 1.4, 2), layout="constrained")
    for axis, (begin, end), name in (
        (axes[0], _bounds(own), f"step {step}"),
        (axes[1], _bounds(near), f"layers {min(middle, default=0)} to {max(middle, default=0)}"),
    ):
        _draw_rows(axis, spans, begin, end)
        axis.set_title(name, fontsize=9, loc="left")
    rows = facts["by_layer"]
    for offset, key, colour in ((-0.2, "attend_us", COLOURS["attend"]), (0.2, "ahead_us", COLOURS["select"])):
        at, values = [row["layer"] + offset for row in rows], [row[key] for row in rows]
        axes[2].bar(at, values, 0.4, color=colour, label=key.replace("_us", ""))
    axes[2].set(xlabel="layer", ylabel="us, mean of steps")
    text = (
        f"hidden behind the forward pass: {facts['hidden']:.0%}; {facts['stalls']} stalls, {facts['stall_us']:.0f} us"
    )
    axes[2].set_title(text, fontsize=9, loc="left")
    axes[2].legend(frameon=False, fontsize=8)
    shown = {one.kind for one in spans}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind], label=kind) for kind in COLOURS if kind in shown]
    axes[0].legend(
        handles=handles, ncols=len(handles), frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1)
    )
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bounds(spans: Sequence[Span]) -> tuple[float, float]:
    return (min(one.start_us for one in spans), max(one.end_us for one in spans)) if spans else (0.0, 1.0)


def _draw_rows(axis: Any, spans: Sequence[Span], begin: float, end: float) -> None:
    rows = [row for row in ("link", "ahead", "main") if any(one.row == row for one in spans)]
    for one in spans:
        if one.end_us > begin and one.start_us < end:
            bar = [(one.start_us - begin, max(one.us, (end - begin) / 2000))]
            axis.broken_barh(bar, (rows.index(one.row) - 0.4, 0.8), color=COLOURS[one.kind], linewidth=0)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xlim(0, end - begin)
    axis.set_xlabel("us", fontsize=8, loc="right")
    axis.spines[["top", "right"]].set_visible(False)
