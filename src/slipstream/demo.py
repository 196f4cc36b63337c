"""``make demo``: the embedded model thinks aloud on one problem, then solves a batch, and shows what that took."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from slipstream import tasks
from slipstream.evaluation import Answer, Cell, prompt_ids, run, summary, timings
from slipstream.llm import LLM
from slipstream.types import SamplingParams

MODEL, LATENT = "slipstream-target", "slipstream-mla"
GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


def demo_cells(samples: int) -> list[Cell]:
    """What the batch is made of: chains of thought and retrieval, from hundreds to thousands of tokens."""
    return [
        Cell("program", (("steps", 50),), samples),
        Cell("program_shuffled", (("steps", 30),), samples),
        Cell("program_spread", (("num_tokens", 4096), ("steps", 20)), samples),
        Cell("expression", (("operations", 12),), samples),
        Cell("needle_multiquery", (("num_tokens", 2048),), samples),
        Cell("needle_multikey", (("num_tokens", 4096),), samples),
    ]


def think_aloud(llm: LLM, err: Console) -> dict[str, Any]:
    """Stream one program's execution to stdout; returns whether it was right and how fast it came."""
    problem = tasks.make("program", 7, steps=12)
    err.print(f"[bold]The problem[/bold]\n{problem.prompt}\n\n[bold]{MODEL} thinks[/bold]", highlight=False)
    text, num_tokens = "", 0
    start = first = time.perf_counter()
    for chunk in llm.stream(prompt_ids(llm, problem), GREEDY):
        if not num_tokens:
            first = time.perf_counter()
        text += chunk.text
        num_tokens += len(chunk.token_ids)
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    end = time.perf_counter()
    sys.stdout.write("\n")
    right = tasks.verify(problem, text)
    speed = (num_tokens - 1) / (end - first)
    err.print(
        f"[{'green' if right else 'red'}]{'right' if right else 'wrong'}[/]: {num_tokens} tokens, {speed:.0f}/s\n"
    )
    return {"correct": right, "tokens": num_tokens, "tokens_per_s": speed, "ttft_ms": 1e3 * (first - start)}


def solve_batch(llm: LLM, cells: Sequence[Cell], err: Console) -> tuple[list[Answer], float]:
    """All problems of all cells, batched by the engine; returns the answers and the wall time in seconds."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("problems", total=sum(cell.samples for cell in cells))
        answers = run(llm, cells, params=GREEDY, progress=lambda done, total, name: bar.update(task, completed=done))
    return answers, time.perf_counter() - start


def latent_cells(samples: int) -> list[Cell]:
    """What the model with latent attention is shown with: the shorter ones, fewer of them."""
    wanted = ("program", "program_shuffled", "needle_multiquery")
    return [cell for cell in demo_cells(max(1, samples // 2)) if cell.task in wanted]


def show_table(model: str, rows: Sequence[dict[str, Any]], err: Console) -> None:
    table = Table(
        title=f"{model}, greedy, full attention, {rows[0]['problems']} problems a task (prompt and chain in tokens)"
    )
    for name in ("task", "right", "prompt", "chain", "TTFT p50/p99", "TPOT p50/p99"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in rows:
        table.add_row(
            row["cell"].replace("num_tokens=", ""),
            f"{row['accuracy']:.0%}",
            str(row["prompt_tokens"]),
            str(row["output_tokens"]),
            f"{row['ttft_p50_ms'] / 1e3:.1f}/{row['ttft_p99_ms'] / 1e3:.1f} s",
            f"{row['tpot_p50_ms']:.0f}/{row['tpot_p99_ms']:.0f} ms",
        )
    err.print(table)


def draw(rows: Sequence[dict[str, Any]], answers: Sequence[Answer], path: Path) -> None:
    """Left: accuracy by task. Right: every problem's chain length against its time per token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [row["cell"] for row in rows]
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    left.barh(names, [100 * row["accuracy"] for row in rows], color=[colours[n] for n in names])
    left.invert_yaxis()
    left.set(xlim=(0, 105), xlabel="problems solved, %", title="Accuracy by task")
    for i, row in enumerate(rows):
        left.text(2, i, f"{row['accuracy']:.0%}", va="center", color="white", fontweight="bold")
    for name in names:
        group = [a for a in answers if a.cell == name and a.tpot_s is not None]
        right.scatter(
            [a.prompt_tokens + a.output_tokens for a in group], [1e3 * (a.tpot_s or 0) for a in group],
            color=colours[name], s=18, alpha=0.8,
        )  # fmt: skip
    right.set(ylim=(0, None), xlabel="tokens of prompt and chain", ylabel="ms per token, others' prefills included")
    right.set_title("Speed, one dot per problem")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run_demo(picture: Path, samples: int, err: Console) -> None:
    """The whole demo. Ends with one JSON line on stdout."""
    if not picture.parent.is_dir():
        raise ValueError(f"there is no directory {picture.parent} for the picture")
    llm = LLM(MODEL, max_model_len=16384)
    err.print(f"[dim]{llm.name} on {llm.device}; {llm.memory}[/dim]\n")
    aloud = think_aloud(llm, err)
    answers, wall_s = solve_batch(llm, demo_cells(samples), err)
    rows = summary(answers)
    show_table(MODEL, rows, err)
    stats = llm.stats()
    output_tokens = sum(a.output_tokens for a in answers)
    kv_bytes = max(a.prompt_tokens + a.output_tokens for a in answers) * llm.spec.kv_bytes_per_token()
    per_token, longest, pool = llm.spec.kv_bytes_per_token(), kv_bytes / 2**20, llm.pool.bytes / 2**20
    err.print(f"{output_tokens:,} tokens in {wall_s:.0f} s ({output_tokens / wall_s:.0f}/s)")
    err.print(f"KV: {per_token:,} bytes a token, {longest:.1f} MiB for the longest chain, pool {pool:.0f} MiB")
    draw(rows, answers, picture)
    err.print(f"picture: {picture}")
    result = {
        "demo": MODEL,
        "device": str(llm.device),
        "aloud": aloud,
        "rows": rows,
        **timings(answers),
        "output_tokens": output_tokens,
        "wall_s": wall_s,
        "kv_bytes_per_token": llm.spec.kv_bytes_per_token(),
        "kv_bytes_longest_chain": kv_bytes,
        "kv_pool_bytes": stats["kv_pool_bytes"],
        "picture": str(picture),
    }
    result["latent"] = show_latent(samples, err)
    print(json.dumps(result))


def show_latent(samples: int, err: Console) -> dict[str, Any]:
    """The second architecture, latent attention and a mixture of experts, on some of the same tasks."""
    llm = LLM(LATENT, max_model_len=16384)
    answers, wall_s = solve_batch(llm, latent_cells(samples), err)
    rows, per_token = summary(answers), llm.spec.kv_bytes_per_token()
    show_table(LATENT, rows, err)
    err.print(f"KV: {per_token:,} bytes a token (latent attention: one row for all heads)")
    return {"model": LATENT, "rows": rows, "wall_s": wall_s, "kv_bytes_per_token": per_token, **timings(answers)}
