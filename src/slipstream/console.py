"""What the commands share: where they print, progress, tables, and one JSON line at the end on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

err = Console(stderr=True)

Model = Annotated[str, typer.Option("--model", "-m", help="Embedded model, directory or hub id.")]


def load(model: str, engine: dict[str, Any]) -> Any:
    from slipstream.llm import LLM

    with err.status(f"loading {escape(model)}"):
        llm = LLM(model, **engine)
    err.print(f"[dim]{escape(llm.name)} on {llm.device}: {llm.memory}[/dim]", soft_wrap=True)
    return llm


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err
    )


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """A dozen columns have to fit a terminal of 80: names break at underscores, and nothing is cut off."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=0)
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name, "") for row in rows]
        columns.append([f"{v:.3g}" if isinstance(v, float) else str(v) for v in values])
        if name == "cell":
            longest = max(len(word) for text in columns[-1] for word in text.split())
            table.add_column(name, width=longest if err.width < 120 else None)
        else:
            table.add_column(name.replace("_", "\n"), justify="right", overflow="fold")
    for cells in zip(*columns, strict=True):
        table.add_row(*map(escape, cells))
    err.print(table)


def read_requests(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON lines with their numbers, each with ``prompt`` (text), ``messages`` (chat) or ``prompt_token_ids``."""
    kinds = {"prompt": str, "messages": list, "prompt_token_ids": list}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        found = [kind for kind in kinds if kind in request] if isinstance(request, dict) else []
        if len(found) != 1:
            raise ValueError(f"{path}, line {number}: needs an object with exactly one of {', '.join(kinds)}")
        if not isinstance(request[found[0]], kinds[found[0]]):
            raise ValueError(f"{path}, line {number}: {found[0]} must be a {kinds[found[0]].__name__}")
        yield number, request


def ids_of(llm: Any, request: dict[str, Any], chat: bool) -> list[int]:
    """Token ids of one of :func:`read_requests`' requests; ``chat`` makes a prompt the user's turn of the template."""
    if "prompt_token_ids" in request:
        return list(request["prompt_token_ids"])
    if "messages" in request:
        return list(llm.codec.chat(request["messages"]))
    return list(llm.encode(request["prompt"], chat=chat))


def numbers(text: str, flag: str) -> list[int]:
    """``"1,8"`` to positive integers; ``ValueError`` names the flag."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--{flag} takes comma-separated numbers, got {text!r}") from error
    if min(found) < 1:
        raise ValueError(f"--{flag} takes positive numbers, got {text!r}")
    return found


def write_result(result: dict[str, Any], path: Path | None) -> None:
    """One JSON line to stdout, and to a file where one is given."""
    line = json.dumps(result, default=str)
    print(line, flush=True)  # first: a file that cannot be written takes nothing along
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n", encoding="utf-8")
