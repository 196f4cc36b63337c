"""The command line. Flags that configure an engine are derived from ``build.Options``: they cannot drift apart."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.markup import escape

from slipstream import cli_asyncspade, cli_cache_rank, cli_deploy, cli_scale, cli_serve, cli_sparse
from slipstream.build import ATTENTION, DEFAULT_MODEL, Options, embedded_models, parse_attention
from slipstream.console import (
    Model,
    err,
    ids_of,
    load,
    numbers,
    print_table,
    progress_bar,
    read_requests,
    write_result,
)
from slipstream.types import SamplingParams

app = typer.Typer(
    help="Decode long chains of thought fast, without losing answers.", no_args_is_help=True, add_completion=False
)
bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


def _attention_flags() -> dict[str, inspect.Parameter]:
    """One flag per option of any attention method; None leaves it to the method that is chosen."""
    flags: dict[str, inspect.Parameter] = {}
    for config in ATTENTION.values():
        kinds = get_type_hints(config)
        for option in fields(config):
            flag = typer.Option(help=option.metadata["help"], rich_help_panel="Attention")
            kind: Any = str | None if str in get_args(kinds[option.name]) else kinds[option.name] | None
            parameter = inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, flag]
            )
            flags.setdefault(option.name, parameter)
    return flags


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add flags to a command that takes ``engine: dict``: the fields of ``Options``, and those of attention methods.

    The latter end up in ``engine["attention"]``; a command's own parameter of the same name takes its place.
    """
    own = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    parameters = [p.replace(annotation=hints[p.name]) for n, p in own.parameters.items() if n != "engine"]
    for option in fields(Options):
        assert option.default is not MISSING
        kind = {"bool": bool, "int": int, "float": float, "int | None": int | None, "bool | None": bool | None}.get(
            str(option.type), str if isinstance(option.default, str) else str | None
        )
        flag = typer.Option(*option.metadata["flags"], help=option.metadata["help"], rich_help_panel="Engine")
        parameters.append(
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=Annotated[kind, flag]
            )
        )

    attention = {name: flag for name, flag in _attention_flags().items() if name not in own.parameters}
    parameters += attention.values()

    @functools.wraps(command)
    def wrapper(**given: Any) -> Any:
        engine = {option.name: given.pop(option.name) for option in fields(Options)}
        own_to_method = {name: value for name in attention if (value := given.pop(name)) is not None}
        if own_to_method:
            engine["attention"] = {"method": engine["attention"], **own_to_method}
            try:
                parse_attention(engine["attention"])
            except TypeError as error:  # an option that the method does not have
                raise ValueError(str(error)) from None
        return command(**given, engine=engine)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


@app.command()
@engine_options
def generate(
    engine: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="What to ask; the answer is streamed.")] = None,
    model: Model = DEFAULT_MODEL,
    file: Annotated[Path | None, typer.Option(help="JSON lines of prompts; answers are JSON lines too.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the answers of --file go; default: stdout.")] = None,
    raw: Annotated[bool, typer.Option(help="Give the prompt as it is, without the model's chat template.")] = False,
    n: Annotated[int, typer.Option(help="Chains per prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 is all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the best one.")] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens per chain; default: up to the model's length.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a chain; may be repeated.")] = None,
    request_seed: Annotated[int | None, typer.Option(help="Seed of the sampled tokens.")] = None,
) -> None:
    """Generate from one PROMPT (streamed), or from a file of prompts."""
    if (prompt is None) == (file is None):
        raise ValueError("give either a PROMPT or --file, not both and not neither")
    if out is not None and file is None:
        raise ValueError("--out is where the answers of --file go; a PROMPT is answered on stdout")
    params = SamplingParams(
        n=n, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=max_tokens,
        stop=tuple(stop or ()), seed=request_seed,
    )  # fmt: skip
    if file is not None:
        requests = list(read_requests(file))
        _answer_file(load(model, engine), file, requests, params, raw, out)
    elif prompt is not None:
        _stream(load(model, engine), prompt, params, raw)


def _stream(llm: Any, prompt: str, params: SamplingParams, raw: bool) -> None:
    ids = llm.encode(prompt, chat=not raw)
    if params.n == 1:
        for chunk in llm.stream(ids, params):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    for chain in llm.generate(ids, params)[0].outputs:
        print(f"--- chain {chain.index} ({chain.finish_reason})\n{chain.text}")


def _answer_file(
    llm: Any,
    file: Path,
    requests: list[tuple[int, dict[str, Any]]],
    params: SamplingParams,
    raw: bool,
    out: Path | None,
) -> None:
    def checked(number: int, request: dict[str, Any]) -> list[int]:
        try:
            return llm.check(ids_of(llm, request, chat=not raw), params).prompt_ids
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error

    def prompts() -> Iterator[tuple[int, list[int], SamplingParams]]:
        for i, (number, request) in enumerate(requests):
            yield i, checked(number, request), params

    for number, request in requests:  # a bad line is found before any work
        checked(number, request)
    sink = out.open("w", encoding="utf-8") if out else sys.stdout
    try:
        with progress_bar() as bar:
            task = bar.add_task("prompts", total=len(requests))
            for i, output in llm.as_completed(prompts()):
                chains = [
                    {"text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason} for c in output.outputs
                ]
                sink.write(json.dumps({"index": i, "outputs": chains}) + "\n")
                sink.flush()
                bar.advance(task)
    finally:
        if out:
            sink.close()


@app.command("eval")
@engine_options
def evaluate(
    engine: dict[str, Any],
    tasks: Annotated[
        str, typer.Option(help="Comma-separated, e.g. needle_single,program:steps=50")
    ] = "program:steps=50",
    model: Model = DEFAULT_MODEL,
    length: Annotated[int | None, typer.Option(help="Prompt length in tokens of the tasks that have one.")] = None,
    protocol: Annotated[str, typer.Option(help="A: prompts are dense. B: only their contexts (docs/tasks.md).")] = "A",
    samples: Annotated[int, typer.Option(help="Problems per task.")] = 100,
    n: Annotated[int, typer.Option(help="Chains per problem (temperature > 0), for pass@n.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    problem_seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 0,
    log: Annotated[Path | None, typer.Option(help="JSON lines of answers; an interrupted run goes on from it.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON.")] = None,
) -> None:
    """Accuracy of a model on tasks whose answers can be checked. Resumable with --log."""
    from slipstream import evaluation

    cells = [evaluation.parse_cell(text, length, samples, protocol) for text in tasks.split(",") if text.strip()]
    if not cells:
        raise ValueError("--tasks names no task, e.g. program:steps=50")
    params = SamplingParams(n=n, temperature=temperature, max_tokens=None, seed=0)
    if n > 1 and temperature == 0:
        raise ValueError(f"--n {n} at temperature 0 gives {n} equal chains: set --temperature, e.g. 0.8")
    if log is None and json_out is not None:
        log = json_out.with_suffix(".jsonl")
    llm = load(model, engine)
    try:
        with progress_bar() as bar:
            task = bar.add_task("problems", total=sum(cell.samples for cell in cells))
            answers = evaluation.run(
                llm, cells, params=params, seed=problem_seed, log=log,
                progress=lambda done, total, cell: bar.update(task, completed=done, description=cell),
            )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"{log} keeps what was done, the same command goes on from it" if log else "nothing was kept (no --log)"
        err.print(f"interrupted: {escape(kept)}", soft_wrap=True, highlight=False)
        raise
    rows = evaluation.summary(answers)
    print_table("accuracy", rows)
    stats = llm.stats()
    if stats.get("sparse_steps"):
        attended, context = (f"{stats[name]:,.0f}" for name in ("tokens_attended", "tokens_in_context"))
        rows_of_both = f"{stats['sparse_rows']:,} sparse and {stats['dense_rows']:,} dense rows"
        index = f"index {stats['index_bytes'] / 2**20:.1f} MiB"
        text = f"density {stats['density']:.3f}: {attended} of {context} tokens attended, {rows_of_both}, {index}"
        err.print(text, highlight=False, soft_wrap=True)
    result = {"model": llm.name, "attention": str(engine["attention"]), "rows": rows, "stats": stats}
    write_result(result, json_out)


@bench.command("decode")
@engine_options
def bench_decode(
    engine: dict[str, Any],
    model: Model = DEFAULT_MODEL,
    batch: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,8",
    context: Annotated[str, typer.Option(help="Comma-separated context lengths.")] = "512,2048",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed at each point.")] = 64,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
) -> None:
    """Time per output token over batch sizes and context lengths, with random prompts."""
    from slipstream.benchmark import decode_grid

    batches, contexts = numbers(batch, "batch"), numbers(context, "context")
    llm = load(model, engine)
    rows = decode_grid(llm, batches, contexts, steps)
    print_table("decode", rows)
    write_result({"benchmark": "decode", "model": llm.name, "device": str(llm.device), "points": rows}, json_out)


app.command()(engine_options(cli_sparse.compare))
app.command()(cli_sparse.calibrate)
bench.command("crossover")(engine_options(cli_sparse.crossover))
bench.command("offload")(engine_options(cli_sparse.offload))
app.command()(engine_options(cli_serve.serve))
app.command("compare-predictors")(cli_asyncspade.compare_predictors)
app.command("train-predictor")(cli_asyncspade.train_predictor)
app.command("trace")(engine_options(cli_asyncspade.trace))
app.command("cache-rank")(cli_cache_rank.cache_rank)
app.command("deploy")(cli_deploy.deploy)
app.command("status")(cli_deploy.status)
bench.command("serve")(cli_serve.bench_serve)
app.add_typer(cli_scale.app, name="scale")


@app.command()
def models() -> None:
    """The models that ship with the package."""
    for name, path in embedded_models().items():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        millions = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 2e6  # bfloat16
        print(
            f"{name}: {config['architectures'][0]}, {millions:.1f} M parameters, {config['num_hidden_layers']} layers, "
            f"hidden size {config['hidden_size']}\n    {path}"
        )


@app.command()
def demo(
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    samples: Annotated[int, typer.Option(help="Problems per task.")] = 8,
) -> None:
    """The embedded model thinks aloud, then solves a batch; ends with a table, a picture and one JSON line."""
    from slipstream.demo import run_demo

    run_demo(picture, samples, err)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, Ctrl-C exit code 130."""
    try:
        app(standalone_mode=True)
    except (ValueError, OSError) as error:
        err.print(f"[red]error:[/red] {escape(' '.join(str(error).split()))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        err.print("interrupted")
        raise SystemExit(130) from None
