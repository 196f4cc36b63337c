"""The command ``cache-rank``: the other half of ``--cache-rank HOST:PORT``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from slipstream.asyncspade.rank_process import RankConfig, RankProcess
from slipstream.build import Options, build, choose_device
from slipstream.console import err


def cache_rank(
    model: Annotated[
        str | None, typer.Argument(help="Serve this model only (embedded, directory or hub id); default: any.")
    ] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:5555",
    device: Annotated[str, typer.Option(help="Where keys, values and the index are: 'cpu', 'cuda', 'cuda:1'.")] = "cpu",
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory for keys, values and the index, e.g. '16GiB'; default: what is free.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Shared secret; needed where other machines can reach HOST.")
    ] = None,
    predictor_file: Annotated[Path | None, typer.Option(help="Weights for predictor 'mlp'.")] = None,
) -> None:
    """Hold the keys and values of an engine's chains, predict its queries and select for it (docs/asyncspade.md)."""
    chosen = choose_device(device)
    identity = None
    if model is not None:
        with err.status(f"reading {escape(model)}"):
            identity = build(model, Options(device="cpu", max_model_len=64, max_num_seqs=1)).identity
    config = RankConfig(listen, identity, str(chosen), kv_memory, key_file, predictor_file)
    rank = RankProcess(config, lambda line: err.print(escape(line), soft_wrap=True, highlight=False))
    print(f"READY {rank.address}", flush=True)
    rank.serve()
