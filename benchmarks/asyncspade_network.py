"""What does a slow link to the cache rank cost? One chain of the embedded target, the cache rank a process of its own.

The link is paced at 100 Mbps, 1 and 10 Gbps (in virtual time, at the receivers, 0.1 ms each way), and once not at all;
the rank sends indices, whole packed sets, or only what the other side lacks. Before any ratio: every arm gives the
tokens of AsyncSpade in one process, lost no connection, and fell back on nothing. A point says how long a token took at
the median, how much of that was waiting, the bytes of a token each way (those of the prompt apart), and how long the
link is busy with them (``link_ms``; both ways at once). ``hidden_mbps``: from which speed on that takes no longer than
the step of the same arm over loopback. load: of the machine, which should have two cores to spare.

    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/asyncspade_network.py \
        --json benchmarks/results/cpu/asyncspade_network.json --picture benchmarks/results/cpu/asyncspade_network.png
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from asyncspade_cpu import MODEL, start_rank
from harness import Report, Timing, check

from slipstream import LLM, SamplingParams, build, tasks
from slipstream.asyncspade import placement
from slipstream.asyncspade.channel import Pace

LINKS = {"loopback": None, "10 Gbps": 1e10, "1 Gbps": 1e9, "100 Mbps": 1e8}
TRANSFERS = ("indices", "packed", "delta")
DELAY_S = 1e-4
WARM = 3  # tokens: the prompt's step, and what it left to be sent


@dataclasses.dataclass
class Run:
    tokens: list[int]
    times_s: list[float]
    before: dict[str, Any]
    after: dict[str, Any]

    def per_token(self, name: str) -> float:
        return (self.after[name] - self.before[name]) / len(self.times_s)


def load(attention: dict[str, Any] | str, context: int, kv_memory: str) -> LLM:
    return LLM(
        MODEL, device="cpu", max_model_len=context + 1024, max_num_seqs=1, attention=attention, kv_memory=kv_memory
    )


def over(link: float | None, attention: dict[str, Any], context: int, kv_memory: str) -> LLM:
    """An engine whose cache rank is behind such a link."""
    reach = placement.reach_rank
    pace = None if link is None else Pace(link, DELAY_S)
    build.placement.reach_rank = lambda *args: reach(*args, pace=pace)  # type: ignore[attr-defined]
    try:
        return load(attention, context, kv_memory)
    finally:
        build.placement.reach_rank = reach  # type: ignore[attr-defined]


def decode(llm: LLM, prompt: list[int], num_tokens: int) -> Run:
    run = Run([], [], {}, {})
    start = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=num_tokens + WARM, ignore_eos=True)
    for count, chunk in enumerate(llm.stream(prompt, params), 1):
        run.tokens += chunk.token_ids
        now = time.perf_counter()
        if count > WARM:
            run.times_s.append(now - start)
        if count == WARM:
            run.before = dict(llm.stats())
        start = now
    run.after = dict(llm.stats())
    return run


def measure(report: Report, address: str, args: argparse.Namespace) -> None:
    method = {"method": "asyncspade", "predictor": args.predictor, "budget": args.budget, "min_context": 0}
    alone = load(method, args.context, args.kv_memory)
    prompt = list(alone.encode(tasks.make("needle_single", 0, num_tokens=args.context).prompt, chat=True))
    inline, full = (
        decode(alone, prompt, args.tokens),
        decode(load("full", args.context, args.kv_memory), prompt, args.tokens),
    )
    base = Timing.of(full.times_s)
    report.point(arm="full", link="none", context=len(prompt), **base.fields("tpot"))
    report.point(arm="one process", link="none", context=len(prompt), **Timing.of(inline.times_s).fields("tpot"))
    steps: dict[str, float] = {}
    for link, rate in LINKS.items():
        for transfer in TRANSFERS:
            attention = {**method, "cache_rank": address, "transfer": transfer, "rank_timeout": 120.0}
            with over(rate, attention, args.context, args.kv_memory) as llm:
                run = decode(llm, prompt, args.tokens)
            check(run.tokens == inline.tokens, f"{transfer} over {link}: other tokens than in one process")
            check(not run.after["asyncspade_losses"] and not run.after.get("asyncspade_fallbacks"), f"{link}: lost")
            timing = Timing.of(run.times_s)
            steps.setdefault(transfer, timing.median_ms)
            out, back = (run.per_token(f"asyncspade_bytes_{way}") for way in ("out", "in"))
            report.point(
                arm=transfer, link=link, context=len(prompt), **timing.fields("tpot"),
                over_full=round(timing.median_ms / base.median_ms, 3),
                stall_ms=round(1e3 * run.per_token("asyncspade_stall_s"), 3),
                kb_out=round(out / 1e3, 1), kb_in=round(back / 1e3, 1),
                link_ms=round(8e3 * max(out, back) / rate, 2) if rate else 0.0,
                hidden_mbps=round(8e-3 * max(out, back) / steps[transfer], 1),
                prompt_mb=round(run.before["asyncspade_bytes_out"] / 1e6, 1), load=round(os.getloadavg()[0], 1),
            )  # fmt: skip


def draw(report: Report, path: Path) -> None:
    """TPOT over the links, a line for what is transferred; both arms without a link as level lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm, style in (*((name, "o-") for name in TRANSFERS), ("one process", ":"), ("full", "--")):
        own = {p["link"]: p["tpot_ms"] for p in report.points if p["arm"] == arm}
        values = [own[link] for link in LINKS] if "none" not in own else [own["none"]] * len(LINKS)
        (line,) = axis.plot(list(LINKS), values, style, label=arm)
        alone = {p["link"]: p["link_ms"] for p in report.points if p["arm"] == arm and p.get("link_ms")}
        if alone:
            axis.plot(list(alone), list(alone.values()), ":", color=line.get_color(), label=f"{arm}: the bytes alone")
    axis.set(yscale="log", ylabel="ms per token, median")
    title = (
        f"a cache rank behind a link: {MODEL}, {report.notes['context']} tokens, budget {report.notes['budget']}, CPU"
    )
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.25, which="both")
    axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--predictor", default="ridge")
    parser.add_argument("--kv-memory", default="512MiB")
    parser.add_argument("--json", default=None)
    parser.add_argument("--picture", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    notes = {name: getattr(args, name) for name in ("context", "budget", "tokens", "predictor")}
    report = Report("asyncspade_network", notes={"model": MODEL, "delay_s": DELAY_S, **notes})
    rank, address = start_rank(args.kv_memory)
    try:
        measure(report, address, args)
    finally:
        rank.terminate()
        rank.wait()
    if args.picture:
        draw(report, args.picture)
    report.finish(args.json)


if __name__ == "__main__":
    main()
