"""From which context length on sparse attention pays: measured once per machine, model shape, method and budget.

`slipstream bench crossover` measures and stores; whoever loads a model without ``min_context`` reads. The file is
``crossover.json`` in ``$SLIPSTREAM_CACHE``, by default ``~/.cache/slipstream``.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

from slipstream.types import ModelSpec

BUDGETS_OF_CONTEXT = {"cpu": 4, "cuda": 20}
"""For the unmeasured: sparse above so many budgets. On an H200 a lone chain breaks even there (two_level, budget 1024:
``benchmarks/operator_sparse.py``); eight chains do at a fifth of it."""


def cache_path() -> Path:
    folder = os.environ.get("SLIPSTREAM_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "slipstream") / "crossover.json"


def key(device: torch.device, spec: ModelSpec, method: str, budget: int) -> str:
    """What a crossover depends on, as text that a user can read."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    shape = f"{spec.num_layers} layers, {spec.num_heads}/{spec.num_kv_heads} heads of {spec.head_dim}"
    return f"{machine} | {shape}, {str(spec.dtype).removeprefix('torch.')} | {method} | budget {budget}"


def load(device: torch.device, spec: ModelSpec, method: str, budget: int) -> int | None:
    """Tokens of context up to which dense decoding was the faster; None where nobody measured."""
    return _read().get(key(device, spec, method, budget))


def store(device: torch.device, spec: ModelSpec, method: str, budget: int, tokens: int) -> Path:
    """Keep a measured crossover; a later one replaces it. Returns the file."""
    path = cache_path()
    entries = _read() | {key(device, spec, method, budget): tokens}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    fresh.replace(path)
    return path


def gate(device: torch.device, spec: ModelSpec, method: str, budget: int, min_context: int | None) -> int:
    """Tokens of context up to which a request decodes densely.

    ``min_context`` where the user gave one, else what was measured, else a multiple of the budget. Never below the
    budget: up to there a selection is the whole context.
    """
    if min_context is None:
        min_context = load(device, spec, method, budget)
    if min_context is None:
        min_context = BUDGETS_OF_CONTEXT[device.type] * budget
    return max(min_context, budget)


def _read() -> dict[str, int]:
    path = cache_path()
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable ({error}): delete it and run `slipstream bench crossover`") from error
    if not isinstance(entries, dict) or not all(isinstance(tokens, int) for tokens in entries.values()):
        raise ValueError(f"{path} does not hold crossovers: delete it and run `slipstream bench crossover`")
    return entries
