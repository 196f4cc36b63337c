"""What has to be so before a model is split over several ranks, and the start of the others."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from slipstream.asyncspade.config import AsyncSpade
from slipstream.asynctls.config import AsyncTLS
from slipstream.scale.lead import Lead
from slipstream.selection.tova import Tova

COMMAND = [sys.executable, "-m", "slipstream.rank"]


def check_methods(count: int, config: Any, device: torch.device) -> None:
    """``ValueError`` for what one rank cannot do with its own heads and device alone."""
    if device.type == "cuda":
        first, there = device.index or 0, torch.cuda.device_count()
        if first + count > there:
            raise ValueError(
                f"tensor_parallel_size = {count} needs as many GPUs from {device} on, and torch sees {there} in all"
            )
    why = _obstacle(config)
    if why:
        raise ValueError(f"tensor_parallel_size = {count}: {why}")


def _obstacle(config: Any) -> str | None:
    if isinstance(config, Tova):
        return "tova evicts a token for all heads of a layer together, which are not on one rank: use two_level"
    if isinstance(config, AsyncTLS) and config.offload:
        return "asynctls keeps KV on the host for one GPU only: set offload=False"
    if isinstance(config, AsyncSpade) and config.is_remote:
        return "asyncspade's cache rank serves one inference rank only: drop cache_rank and cache_device"
    if isinstance(config, AsyncSpade) and config.predictor_file is not None:
        return "a predictor file is for all heads of a model, and is not split yet: use another predictor"
    return None


def start_ranks(model: Any, options: Mapping[str, Any], method: str, config: Any, device: torch.device) -> Lead:
    """Rank 0, with the others on their way to it.

    model: as the user named it. options: those of ``build.Options``. method, config: of attention.
    """
    count, given = options["tensor_parallel_size"], {"method": method, **asdict(config)}
    check_methods(count, config, device)
    hello = {
        "model": model.to_dict() if isinstance(model, PretrainedConfig) else _plain(model),
        "options": {**options, "attention": {name: _plain(value) for name, value in given.items()}},
    }
    return Lead(hello, count, device, options["step_timeout"], COMMAND)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
