"""The commands ``deploy`` and ``status``: engines on a Ray cluster (docs/scale.md). Ray is imported when they run."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from slipstream.console import err, print_table, write_result

NAME, LOOK_S = "slipstream", 0.5
Json = Annotated[Path | None, typer.Option("--json", help="Write the status as JSON.")]


def deploy(
    config: Annotated[Path | None, typer.Argument(help="YAML: pools of models, and their entrance.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End a deployment: CONFIG's, or --name's.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start every replica anew, one after the other.")] = False,
    name: Annotated[str, typer.Option(help="Deployment that --stop ends.")] = NAME,
    json_out: Json = None,
) -> None:
    """Serve what CONFIG describes on a Ray cluster; on one that runs, change it into that without a pause."""
    cluster = _cluster()
    from slipstream.deploy.config import read

    told = None if config is None else read(config)
    if stop:
        name, drain_s = (name, 60) if told is None else (told.name, told.drain_s)
        write_result({"deployment": name, "stopped": cluster.stop(name, drain_s)}, json_out)
        return
    if told is None:
        raise ValueError("name the deployment's YAML file, or --stop")
    cluster.deploy(told, restart)
    until = time.monotonic() + told.start_s
    with err.status("starting") as line:
        while not (found := cluster.status(told.name))["ready"]:
            states = [f"{row['replica']} {row['state']}" for row in _rows(found)]
            line.update(escape(", ".join(states)))
            troubles = [state for state in states if "failed" in state]
            troubles += [f"not ready within {told.start_s:g} s"] if time.monotonic() > until else []
            troubles += [f"the entrance: {found['trouble']}"] if found["trouble"] else []
            if troubles:
                raise ValueError(f"{'; '.join(troubles)} (it goes on trying: slipstream status, or deploy --stop)")
            time.sleep(LOOK_S)
    _show(found, json_out)


def status(name: Annotated[str, typer.Argument(help="The deployment.")] = NAME, json_out: Json = None) -> None:
    """What a deployment on the Ray cluster is doing. Exit code 1 while something of it is not up."""
    found = _cluster().status(name)
    _show(found, json_out)
    if not found["ready"]:
        raise typer.Exit(1)


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [row for pool in found["pools"].values() for row in pool["replicas"]]
    return [{name: row.get(name, "") for name in ("replica", "state", "chains", "address")} for row in rows]


def _show(found: dict[str, Any], path: Path | None) -> None:
    del found["key"]
    print_table(f"{found['deployment']} at {found['entrance']}", _rows(found))
    if found["trouble"]:
        err.print(f"[yellow]entrance:[/yellow] {escape(found['trouble'])}", soft_wrap=True)
    write_result(found, path)


def _cluster() -> Any:
    missing = [name for name in ("ray", "pydantic", "uvicorn", "prometheus_client", "httpx") if find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed: pip install 'slipstream[scale]'")
    from slipstream.deploy import cluster

    return cluster
