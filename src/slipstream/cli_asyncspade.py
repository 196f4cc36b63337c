"""The commands of AsyncSpade: ``compare-predictors``, ``train-predictor`` and ``trace``. See docs/asyncspade.md."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from slipstream.build import DEFAULT_MODEL, embedded_models
from slipstream.console import Model, err, load, numbers, print_table, progress_bar, write_result

TASKS = "program:steps=100,program_shuffled:steps=100,needle_multiquery,variable_tracking"


def _check_picture(picture: Path | None) -> None:
    if picture and find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib: pip install 'slipstream[eval]'")


def _recording(model: str, device: str | None) -> Any:
    """A window costs nothing to record under; what is in the prefix cache would not be seen."""
    return load(model, {"attention": "window", "device": device, "prefix_cache": False, "cuda_graphs": False})


def _writes(model: str, greedy: bool | None) -> bool:
    return model not in embedded_models() if greedy is None else greedy


def compare_predictors(
    predictors: Annotated[
        str | None,
        typer.Option(help="Comma-separated, as in ridge:window=64:ridge=0.1:rotate=0; default: the ablation."),
    ] = None,
    budgets: Annotated[str, typer.Option(help="Fractions of the sequence.")] = "1/8,1/16",
    tasks: Annotated[str, typer.Option(help="Comma-separated, as of eval.")] = TASKS,
    length: Annotated[int, typer.Option(help="Prompt length in tokens of the tasks that have one.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Chains per task.")] = 10,
    points: Annotated[int, typer.Option(min=1, help="Positions per chain, evenly spaced.")] = 64,
    sink: Annotated[int, typer.Option(min=0, help="First tokens always selected.")] = 4,
    recent: Annotated[int, typer.Option(min=1, help="Last tokens always selected.")] = 64,
    greedy: Annotated[
        bool | None, typer.Option(help="The model writes the chains itself; default: embedded models need not.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    device: Annotated[str | None, typer.Option(help="'cuda', 'cpu'; default: a GPU where there is one.")] = None,
    problem_seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all rows as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw attention mass by predictor, e.g. out.png.")] = None,
) -> None:
    """Which predictor finds the tokens that the next query wants? Overlap and attention mass on recorded chains."""
    from slipstream import predictors as comparison
    from slipstream.compare import parse_budget

    _check_picture(picture)
    shares = [share for text in budgets.split(",") if isinstance(share := parse_budget(text), Fraction)]
    if len(shares) < budgets.count(",") + 1:
        raise ValueError(f"--budgets takes fractions of the sequence here, e.g. 1/8, got {budgets!r}")
    rule = comparison.Rule(tuple(shares), sink, recent, points)
    cells = comparison.cells_of(tasks, length, samples)
    llm = _recording(model, device)
    candidates = comparison.parse_candidates(predictors or comparison.CANDIDATES, llm)
    writes = _writes(model, greedy)
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar:
        for cell in cells:
            task = bar.add_task(escape(cell.name), total=samples)
            rows += comparison.compare(llm, cell, candidates, rule, problem_seed, writes, partial(bar.advance, task))
    for budget in dict.fromkeys(row["budget"] for row in rows):
        print_table(
            f"attention mass, overlap beyond what is always kept; budget {budget}", comparison.pivot(rows, budget)
        )
    if picture:
        comparison.draw(rows, picture, f"{llm.name}, {samples} chains a task")
        err.print(f"picture: {escape(str(picture))}", soft_wrap=True)
    write_result(
        {"comparison": "predictors", "model": llm.name, "device": str(llm.device), "samples": samples, "points": points,
         "sink": sink, "recent": recent, "greedy": writes, "rows": rows}, json_out,
    )  # fmt: skip


def train_predictor(
    out: Annotated[Path, typer.Argument(help="Where the weights go, e.g. mlp.safetensors.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated, as of eval: what chains to learn from.")] = TASKS,
    length: Annotated[int, typer.Option(help="Prompt length in tokens of the tasks that have one.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Chains per task.")] = 6,
    window: Annotated[int, typer.Option(help="Queries that the network sees.")] = 32,
    features: Annotated[int, typer.Option(help="Learned sums over them.")] = 8,
    hidden: Annotated[int, typer.Option(help="Inner width.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps of Adam, per layer.")] = 300,
    rotate: Annotated[bool, typer.Option(help="Learn queries before RoPE.")] = True,
    greedy: Annotated[
        bool | None, typer.Option(help="The model writes the chains itself; default: embedded models need not.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    device: Annotated[str | None, typer.Option(help="'cuda', 'cpu'; default: a GPU where there is one.")] = None,
    problem_seed: Annotated[int, typer.Option(help="Seed of the problems; not one that is evaluated on.")] = 7,
) -> None:
    """Record queries of chains, and train the predictor mlp on them."""
    from slipstream import predictors
    from slipstream.asyncspade.mlp import Training, train

    training = Training(window=window, features=features, hidden=hidden, steps=steps)
    cells = predictors.cells_of(tasks, length, samples)
    llm = _recording(model, device)
    losses: list[float] = []
    with err.status("recording") as status:
        chains = [
            replace(one, k=[], foreseen=[])
            for cell in cells
            for one in predictors.traces(llm, cell, problem_seed, _writes(model, greedy))
        ]

        def report(layer: int, loss: float) -> None:
            losses.append(round(loss, 4))
            status.update(f"layer {layer}: {loss:.3f} of the error of last")

        found = train(chains, llm.model.cos_sin, llm.identity, training, rotate, report)
    out.parent.mkdir(parents=True, exist_ok=True)
    found.save(out)
    write_result({"predictor": str(out), "model": llm.name, "chains": len(chains), "loss_by_layer": losses}, None)


def trace(
    engine: dict[str, Any],
    model: Model = DEFAULT_MODEL,
    batch: Annotated[int, typer.Option(min=1, help="Chains decoded together.")] = 4,
    context: Annotated[str, typer.Option(help="Tokens of KV of each chain when the trace begins.")] = "2048",
    steps: Annotated[int, typer.Option(min=2, help="Decode steps to trace.")] = 8,
    out: Annotated[Path, typer.Option(help="Chrome trace, for ui.perfetto.dev.")] = Path("trace.json"),
    picture: Annotated[Path | None, typer.Option(help="The same as a picture; default: beside --out.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the summary as JSON.")] = None,
) -> None:
    """A timeline of decode steps: per layer attention against selection, transfers and stalls."""
    from slipstream import timeline

    (tokens,) = numbers(context, "context")
    picture = picture or out.with_suffix(".png")
    _check_picture(picture)
    engine["max_num_seqs"] = max(engine["max_num_seqs"], batch)
    llm = load(model, engine)
    with err.status("tracing"):
        spans = timeline.trace(llm, batch, tokens, steps)
    facts = timeline.summary(spans)
    timeline.write_chrome(spans, out)
    method = engine["attention"] if isinstance(engine["attention"], str) else engine["attention"]["method"]
    timeline.draw(spans, picture, f"{llm.name}, {method}, {batch} chains x {tokens} tokens, {llm.device}")
    print_table("us per step", [facts["us_by_kind"]])
    err.print(f"hidden behind the forward pass: {facts['hidden']:.0%}; {facts['stalls']} stalls", highlight=False)
    err.print(f"timeline: {escape(str(out))}, {escape(str(picture))}", soft_wrap=True, highlight=False)
    about = {"timeline": str(out), "model": llm.name, "method": method, "batch": batch, "context": tokens}
    write_result(about | facts, json_out)
