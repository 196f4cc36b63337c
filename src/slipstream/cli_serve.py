"""The commands ``serve`` and ``bench serve``. Flags of the server are derived from ``ServerConfig``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer

from slipstream.atts.config import ATTS
from slipstream.build import DEFAULT_MODEL, embedded_models
from slipstream.console import load, write_result
from slipstream.server.config import ServerConfig


def _server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one flag per field of ``ServerConfig`` to a command that takes ``server: dict``."""
    hints, kinds = get_type_hints(command, include_extras=True), get_type_hints(ServerConfig)
    own = inspect.signature(command).parameters.values()
    parameters = [p.replace(annotation=hints[p.name]) for p in own if p.name != "server"]
    for option in fields(ServerConfig):
        flag = typer.Option(help=option.metadata["help"], rich_help_panel="Server")
        kind: Any = Annotated[kinds[option.name], flag]  # type: ignore[valid-type, name-defined]
        parameters.append(
            inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=kind)
        )

    @functools.wraps(command)
    def wrapper(**given: Any) -> Any:
        server = {option.name: given.pop(option.name) for option in fields(ServerConfig)}
        return command(**given, server=server)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


@_server_options
def serve(
    engine: dict[str, Any],
    server: dict[str, Any],
    model: Annotated[str, typer.Argument(help="Embedded model, directory or hub id.")] = DEFAULT_MODEL,
    draft: Annotated[
        str | None, typer.Option(help="Second model (or http address): chats may then ask for scaling.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Share of the draft's turns that MODEL takes over, by default.")] = 0.3,
) -> None:
    """Serve MODEL over HTTP in OpenAI's words, with a live page at /."""
    config = ServerConfig(**server)
    _require("fastapi", "uvicorn", "prometheus_client")
    from slipstream.server import app

    # what the embedded models were trained to write
    answers = "tagged" if {model, draft or model} <= embedded_models().keys() else "boxed"
    defaults = ATTS(alpha=alpha, answers=answers)
    sock = app.bind(config)
    app.cap_caches()
    if draft is None:
        app.serve(load(model, engine), config, sock)
        return
    from slipstream.server.scaled import Scaler

    first = draft if "://" in draft else load(draft, _beside(engine))
    target = load(model, engine)
    try:
        app.serve(target, config, sock, Scaler(first, target, defaults, config.max_n))
    finally:
        if not isinstance(first, str):
            first.close()


def _beside(engine: dict[str, Any]) -> dict[str, Any]:
    """The options of a draft: dense, on a GPU with a fifth of what is free for its KV; the target takes the rest."""
    own = engine | {"attention": "full", "tensor_parallel_size": 1}
    if engine.get("kv_memory") is None and torch.cuda.is_available() and engine.get("device") != "cpu":
        own["kv_memory"] = int(0.2 * torch.cuda.mem_get_info()[0])
    return own


def bench_serve(
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Its model; default: the first.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 100,
    request_rate: Annotated[float, typer.Option(min=0, help="Requests a second; 0 is all at once.")] = 0.0,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Most requests at once.")] = 32,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    percentiles: Annotated[str, typer.Option(help="Comma-separated.")] = "50,90,99",
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
) -> None:
    """Load a running server (ours or another in OpenAI's words) with random prompts, and time it."""
    _require("httpx")
    from slipstream.server.load import Load, measure

    keys = api_key_file.read_text(encoding="utf-8").split() if api_key_file else [None]
    if not keys:
        raise ValueError(f"{api_key_file} holds no API key")
    try:
        wanted = tuple(float(part) for part in percentiles.split(","))
    except ValueError:
        wanted = (-1.0,)
    if not all(0 <= percentile <= 100 for percentile in wanted):
        raise ValueError(f"--percentiles takes comma-separated numbers in 0..100, got {percentiles!r}")
    result = measure(
        Load(url, model, num_prompts, request_rate, max_concurrency, input_len, output_len, seed, keys[0], wanted)
    )
    for name, value in result.items():
        typer.echo(f"{name:<24}{value:.2f}" if isinstance(value, float) else f"{name:<24}{value}", err=True)
    write_result({"benchmark": "serve", "url": url, **result}, json_out)
    if result["failed"]:
        raise typer.Exit(1)


def _require(*packages: str) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} not installed: pip install 'slipstream[serve]'")
