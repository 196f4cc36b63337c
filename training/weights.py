"""Weights on disk: bfloat16 safetensors with Hugging Face's names, in files below 16 MB."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MAX_BYTES = 15_900_000
SNAPSHOTS_PER_FILE = 3


def shards(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split a state dict, in its order, into the fewest nearly equal parts of at most ``MAX_BYTES`` (as bfloat16)."""
    sizes = {name: 2 * tensor.numel() for name, tensor in state.items()}
    if max(sizes.values()) > MAX_BYTES:
        raise ValueError(f"a tensor is larger than one file may be ({MAX_BYTES} bytes)")
    total = sum(sizes.values())
    count = -(-total // MAX_BYTES)
    while True:
        parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
        used = 0
        for name, tensor in state.items():
            middle = used + sizes[name] / 2
            parts[min(int(middle * count / total), count - 1)][name] = tensor
            used += sizes[name]
        if all(sum(sizes[n] for n in part) <= MAX_BYTES for part in parts):
            return [part for part in parts if part]
        count += 1


def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a file holds them: bfloat16 on the host; the corrections of routers, which only compare, in float32."""
    return {
        name: tensor.detach().to("cpu", torch.float32 if "correction" in name else torch.bfloat16).contiguous()
        for name, tensor in state.items()
    }


def save_target(directory: Path, state: dict[str, Tensor]) -> None:
    """target-1.safetensors, target-2.safetensors, ..."""
    for i, part in enumerate(shards(state)):
        save_file(stored(part), directory / f"target-{i + 1}.safetensors")


def load_target(directory: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in sorted(directory.glob("target-*.safetensors")):
        state.update(load_file(path))
    return state


def save_drafts(directory: Path, snapshots: dict[str, dict[str, Tensor]]) -> None:
    """drafts-1.safetensors, ...: several snapshots in one file, names prefixed by the snapshot's."""
    names = sorted(snapshots)
    for i in range(0, len(names), SNAPSHOTS_PER_FILE):
        group = names[i : i + SNAPSHOTS_PER_FILE]
        flat = {f"{name}/{key}": tensor.contiguous() for name in group for key, tensor in snapshots[name].items()}
        save_file(flat, directory / f"drafts-{i // SNAPSHOTS_PER_FILE + 1}.safetensors")


def load_draft(directory: Path, name: str) -> dict[str, Tensor]:
    """One snapshot, by its percentage (``"065"``)."""
    state: dict[str, Tensor] = {}
    for path in sorted(directory.glob("drafts-*.safetensors")):
        state.update({k.split("/", 1)[1]: v for k, v in load_file(path).items() if k.startswith(name + "/")})
    if not state:
        raise ValueError(f"no snapshot {name!r} in {directory}")
    return state
