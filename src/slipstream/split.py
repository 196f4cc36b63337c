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
from slipstream.scale.lead import Lead

COMMAND = [sys.executable, "-m", "slipstream.rank"]


def check_methods(count: int, config: Any, device: torch.device) -> None:
    """``ValueError`` for what one rank cannot do with its own heads and device alone."""
    if device.type == "cuda":
        first, there = device.index or 0, torch.cuda.device_count()
        if first + count > there:
            raise ValueError(
                f"tensor_parallel_size = {count} needs as many GPUs from {device} on, and torch sees {there} in all"
            )
    if isinstance(config, AsyncSpade) and config.is_remote:
        raise ValueError(
            f"tensor_parallel_size = {count}: asyncspade's cache rank serves one inference rank only: drop cache_rank "
            "and cache_device"
        )


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
