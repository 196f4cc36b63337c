"""Which channels of a key its label holds: those that make the largest products with queries (Double Sparsity).

Measured over the tokens of prompts, after norm and RoPE, and kept in a file beside the model; without one, the first
prompt that an engine serves decides, and results depend on which that was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from slipstream.types import ModelSpec, SamplingParams

SCHEMA = 1
FILE_NAME = "calibration.safetensors"


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a calibration is of. name: for people only; weights: a digest of some of them, for the comparison."""

    name: str
    architecture: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    weights: str

    @classmethod
    def of(cls, name: str, spec: ModelSpec, weights: str) -> ModelIdentity:
        return cls(name, spec.architecture, spec.num_layers, spec.num_kv_heads, spec.head_dim, weights)

    def matches(self, other: ModelIdentity) -> bool:
        """The same model, wherever it lies."""
        return asdict(self) | {"name": ""} == asdict(other) | {"name": ""}

    def __str__(self) -> str:
        heads = f"{self.num_layers} layers of {self.num_kv_heads} KV heads of {self.head_dim}"
        return f"{self.name} ({self.architecture}, {heads}, weights {self.weights})"


class Calibration:
    """Sums of |q o k| over tokens. sums: [L, Hk, D] fp32; num_tokens: how many, counted by whoever observes.

    The absolute values of a group's query heads are added: they share the key's label.
    """

    def __init__(self, identity: ModelIdentity, device: torch.device | str = "cpu") -> None:
        self.identity, self.num_tokens = identity, 0
        shape = (identity.num_layers, identity.num_kv_heads, identity.head_dim)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=device)

    def observe(self, layer: int, q: Tensor, k: Tensor) -> None:
        """q: [T, Hq, D], k: [T, Hk, D] of the same tokens, after norm and RoPE."""
        queries = q.float().abs().unflatten(1, (k.shape[1], -1)).sum(2)
        self.sums[layer] += (queries * k.float().abs()).sum(0)

    def channels(self, num_channels: int) -> Tensor:
        """[L, Hk, r] int32, ascending: those of the largest sums, the first of equal ones."""
        order = self.sums.argsort(dim=-1, descending=True, stable=True)
        return order[..., :num_channels].sort(dim=-1).values.int()

    def part(self, heads: slice) -> Calibration:
        """Of some KV heads only: a rank's."""
        own = Calibration(replace(self.identity, num_kv_heads=heads.stop - heads.start), self.sums.device)
        own.num_tokens = self.num_tokens
        own.sums.copy_(self.sums[:, heads])
        return own

    def save(self, path: str | Path) -> None:
        assert self.num_tokens, "nothing was observed"
        facts = {"schema": SCHEMA, "num_tokens": self.num_tokens, **asdict(self.identity)}
        importance = {"importance": self.sums.cpu() / self.num_tokens}
        Path(path).write_bytes(save(importance, {"calibration": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path, identity: ModelIdentity, device: torch.device | str = "cpu") -> Calibration:
        """Raises ``ValueError`` for a file that is none, and for one of another model, naming both."""
        if not Path(path).is_file():
            raise ValueError(f"there is no calibration file {path}: write one with `slipstream calibrate`")
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["calibration"])
                importance = file.get_tensor("importance")
            version = facts.pop("schema")
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is no calibration file ({error}): write one with `slipstream calibrate`"
            ) from error
        if version != SCHEMA:
            raise ValueError(
                f"{path} has schema {version}, this version reads {SCHEMA}: run `slipstream calibrate` again"
            )
        num_tokens = facts.pop("num_tokens")
        found = ModelIdentity(**facts)
        if not found.matches(identity):
            raise ValueError(
                f"{path} is the calibration of {found}, not of {identity}: run `slipstream calibrate` on this model"
            )
        calibration = cls(identity, device)
        calibration.num_tokens = num_tokens
        calibration.sums.copy_(importance).mul_(num_tokens)
        return calibration


def find_calibration(path: str | None, source: Any, identity: ModelIdentity, device: torch.device) -> Calibration:
    """The one that the user names, else the one in the model's directory, else one without tokens."""
    if path is None and isinstance(source, Path) and (source / FILE_NAME).exists():
        return Calibration.load(source / FILE_NAME, identity, device)
    return Calibration(identity, device) if path is None else Calibration.load(path, identity, device)


def calibrate(llm: Any, prompts: Sequence[Any]) -> Calibration:
    """Run prompts (text or token ids) through an ``LLM`` with a sparse method and accumulate over all their tokens.

    Tokens that come from the prefix cache are not seen again, so load the model with ``prefix_cache=False`` if prompts
    begin alike. What the method itself selects by stays as it was loaded. Raises ``ValueError`` for a method that does
    not select, and when there was no token to observe.
    """
    record = getattr(llm.engine.backend, "record", None)
    if record is None:
        raise ValueError("calibration needs an attention method that selects: load with attention='double_sparsity'")
    if llm.identity.num_kv_heads != llm.spec.num_kv_heads:
        raise ValueError("one of several ranks sees its own heads only: calibrate with tensor_parallel_size=1")
    calibration = Calibration(llm.identity, llm.device)
    record(calibration)
    try:
        llm.generate(list(prompts), SamplingParams(temperature=0, max_tokens=1))
    finally:
        record(None)
    if not calibration.num_tokens:
        raise ValueError("no prompt token was computed: give prompts, and load the model with prefix_cache=False")
    return calibration
