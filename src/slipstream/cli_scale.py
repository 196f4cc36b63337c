"""``slipstream scale``: problems through a draft and a target; ``slipstream scale replay``: a stream of scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from slipstream.atts.config import ATTS
from slipstream.atts.conformal import MODES, Conformal
from slipstream.atts.events import Decided, Drafted, Ended, Event, Failed, TakenOver
from slipstream.console import err, write_result
from slipstream.scaling import DRAFT, TARGET, scale_sync


class _RunByDefault(TyperGroup):
    """``scale FILE`` is ``scale run FILE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_RunByDefault, help="Test-time scaling: a draft thinks, a target verifies.", no_args_is_help=True)


def _atts_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one flag per field of ``ATTS`` to a command that takes ``config: dict`` as its last parameter."""
    kinds: dict[str, Any] = {"int": int, "float": float, "bool": bool}
    kinds |= {f"{name} | None": kind | None for name, kind in kinds.items()}
    own = inspect.signature(command, eval_str=True)
    parameters = [p for name, p in own.parameters.items() if name != "config"]
    for option in fields(ATTS):
        assert option.default is not MISSING
        flag = typer.Option(help=option.metadata["help"], rich_help_panel="Scaling")
        kind: Any = kinds.get(str(option.type), str)
        kw = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(option.name, kw, default=option.default, annotation=Annotated[kind, flag]))

    def wrapper(**given: Any) -> Any:
        config = {option.name: given.pop(option.name) for option in fields(ATTS)}
        return command(**given, config=config)

    wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


@app.command()
@_atts_options
def run(
    problems: Annotated[Path, typer.Argument(help="JSON lines: id, prompt (or messages, prompt_token_ids), answer.")],
    config: dict[str, Any],
    draft: Annotated[
        str, typer.Option(help="Model, directory, URL (http, vllm+http, sglang+http; #name), or ray://POOL.")
    ] = DRAFT,
    target: Annotated[str, typer.Option(help="The same.")] = TARGET,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer directory for servers.")] = None,
    log: Annotated[Path | None, typer.Option(help="Append-only log; a killed run goes on from it.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with --log.")] = False,
    device: Annotated[str | None, typer.Option(help="Of local models; default: a GPU if there is one.")] = None,
    kv_memory: Annotated[str | None, typer.Option(help="Of each local model, e.g. 4GiB.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write a picture of rates and tokens.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
) -> None:
    """Scale the PROBLEMS: live progress, a table, a picture, one JSON line."""
    from slipstream.atts.problems import read_problems
    from slipstream.atts.report import picture as draw
    from slipstream.atts.report import summary

    if config["answers"] == "boxed" and {draft, target} <= {DRAFT, TARGET}:
        config["answers"] = "tagged"  # what the embedded models were trained to write
    options = ATTS(**config)
    if resume and log is None:
        raise ValueError("--resume goes on with a log: name it with --log")
    read = read_problems(problems, options.seed)
    with _Progress(len(read), options.samples) as progress:
        outcome = scale_sync(
            read, draft=_opened(draft), target=_opened(target), config=options, log=log, resume=resume,
            on_event=progress, tokenizer=tokenizer, device=device, kv_memory=kv_memory,
        )  # fmt: skip
    result = summary(outcome)
    _show(result)
    write_result({"scale": str(problems), "draft": draft, "target": target, **result}, json_out)
    if picture:
        draw(outcome, picture)
        err.print(f"picture: {picture}")


def _opened(model: str) -> Any:
    """``ray://`` is a pool of a deployment."""
    if not model.startswith("ray://"):
        return model
    from slipstream.deploy.cluster import open_pool

    return open_pool(model)


@app.command()
def replay(
    log: Annotated[Path, typer.Argument(help="JSON lines of question, sample, turn, nll; a run's log; or an .npz.")],
    alpha: Annotated[float, typer.Option(help="Share of tests to reject.")] = 0.3,
    mode: Annotated[str, typer.Option(help=", ".join(MODES))] = "per-question",
    seed: Annotated[int, typer.Option(help="Of the randomised p-values.")] = 0,
    window: Annotated[int, typer.Option(help="Tests per window.")] = 200,
    stream: Annotated[str | None, typer.Option(help="Prefix of an .npz with several streams.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
) -> None:
    """Run a stream of scores through the controller, without a model."""
    from slipstream.atts.replay import read_tests, summary

    config = Conformal(alpha=alpha, mode=mode, seed=seed, window=window)
    result = summary(read_tests(log, stream), config)
    _show({name: value for name, value in result.items() if not isinstance(value, dict)} | {
        "rate_per_turn": " ".join(f"{rate:.3f}" for rate in result["rate_per_turn"].values()),
        "certificate": result["certificate"],
    })  # fmt: skip
    write_result({"replay": str(log), **result}, json_out)


def _show(result: dict[str, Any]) -> None:
    """The result as a table of two columns, the certificate in words below."""
    table = Table(box=SIMPLE_HEAD, show_header=False, padding=(0, 1))
    for name, value in result.items():
        if name != "certificate" and value not in (None, {}):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else escape(str(value)))
    err.print(table)
    found = result["certificate"]
    worst, bound = (
        "none" if found[name] is None else f"{found[name]:.3f}" for name in ("worst_window", "window_bound")
    )
    err.print(
        f"{found['mode']}: {found['rejected']} of {found['tests']} tests taken over, rate {found['rate']:.4f} for "
        f"alpha {found['alpha']:.4f}; worst window of {found['window']}: {worst}, guaranteed: {bound}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if result.get("untested"):
        what = ", ".join(f"{count} {policy}" for policy, count in result["untested"].items())
        err.print(f"[yellow]outside the certificate:[/yellow] turns whose score failed: {what}; with them "
                  f"{result['rate_with_untested']:.4f} of the turns were to be taken over", soft_wrap=True)  # fmt: skip
    for name in ("turns", "questions"):
        rates = sorted(group["rate"] for group in found[name].values())
        if rates:
            err.print(f"rate per {name[:-1]}: {rates[0]:.3f} to {rates[-1]:.3f} over {len(rates)}", highlight=False)
    if found["mode"] == "static" and not found["exchangeable"]:
        err.print("[yellow]warning:[/yellow] scores are not exchangeable with the calibration (martingale above 100): "
                  "the static rate is not guaranteed", soft_wrap=True)  # fmt: skip


class _Progress:
    """One bar per question that is under way, and one for all chains; called with every event."""

    def __init__(self, questions: int, samples: int) -> None:
        self._samples = samples
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), console=err,
        )  # fmt: skip
        self._all = self._bar.add_task("chains", total=questions * samples, note="")
        self._tasks: dict[str, Any] = {}
        self._count = {Decided: 0, TakenOver: 0, Failed: 0}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Drafted | TakenOver) and event.question not in self._tasks:
            self._tasks[event.question] = self._bar.add_task(escape(event.question[:24]), total=self._samples, note="")
        if type(event) in self._count:
            self._count[type(event)] += 1
            tests, taken, failed = self._count.values()
            self._bar.update(
                self._all, note=f"{tests} tests, {taken} take-overs" + f", {failed} failures" * (failed > 0)
            )
        if isinstance(event, Ended):
            self._bar.advance(self._all)
            task = self._tasks.get(event.question)
            if task is not None:
                self._bar.advance(task)
                if self._bar.tasks[self._bar.task_ids.index(task)].finished:
                    self._bar.remove_task(self._tasks.pop(event.question))

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
