"""How many pages fit: from shapes and bytes to a plan, with a refusal of what never can."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from slipstream.types import ModelSpec

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_CPU_DEFAULT_BYTES = 2**30
_CUDA_SHARE = 0.9  # of the free memory; the rest is for what the allocator loses in fragments


def parse_bytes(size: int | str) -> int:
    """Bytes of ``1073741824``, ``"1GiB"``, ``"512 MiB"``, ``"1.5GB"``. Raises ``ValueError`` for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        value = float(size)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size) if isinstance(size, str) else None
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"cannot read {size!r} as a size: write bytes as an integer, or e.g. '16GiB' or '512MiB'")
        value = float(match[1]) * _UNITS[match[2].lower()]
    if value <= 0:
        raise ValueError(f"a size must be positive, got {size!r}")
    return int(value)


@dataclass(frozen=True)
class MemoryPlan:
    """What fits: ``num_pages`` pages (the null page among them) of ``page_size`` slots, ``page_bytes`` each.

    fixed_bytes: what the attention method keeps whatever the number of pages.
    """

    num_pages: int
    page_size: int
    page_bytes: int
    fixed_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return (self.num_pages - 1) * self.page_size

    @property
    def bytes(self) -> int:
        return self.num_pages * self.page_bytes + self.fixed_bytes

    def __str__(self) -> str:
        size = f"{self.bytes / 2**30:.2f} GiB" if self.bytes >= 2**28 else f"{self.bytes / 2**20:.1f} MiB"
        return f"{size} of KV: {self.num_tokens:,} tokens in {self.num_pages - 1:,} pages of {self.page_size}"


def plan_memory(
    spec: ModelSpec,
    *,
    page_size: int = 64,
    kv_memory: int | str | None = None,
    device: torch.device | str = "cpu",
    reserve_bytes: int = 0,
    extra_bytes_per_token: int = 0,
    fixed_bytes: int = 0,
    most_tokens: int | None = None,
) -> MemoryPlan:
    """How many pages of this model's KV fit.

    kv_memory: bytes, or text for :func:`parse_bytes`; ``None`` takes what the device has: on CUDA nine tenths of the
    free memory less ``reserve_bytes`` (activations, graphs), on the CPU 1 GiB, at most half of what is available.
    extra_bytes_per_token: what an attention method keeps beside K and V; fixed_bytes: what it keeps whatever the
    number of tokens. most_tokens: more than that is of no use.
    Raises ``ValueError`` when not even one page fits beside the null page.
    """
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1, got {page_size}")
    page_bytes = page_size * (spec.kv_bytes_per_token() + extra_bytes_per_token)
    if kv_memory is None:
        budget, source = device_bytes(torch.device(device), reserve_bytes), f"free on {device}"
    else:
        budget, source = parse_bytes(kv_memory), f"given as kv_memory={kv_memory!r}"
    num_pages = (budget - fixed_bytes) // page_bytes
    if num_pages < 2:
        beside = f", beside {fixed_bytes:,} bytes of seats" if fixed_bytes else ""
        raise ValueError(
            f"the KV cache needs at least 2 pages (one is the null page) of {page_bytes:,} bytes ({page_size} tokens)"
            f"{beside}, but only {max(budget, 0):,} bytes are {source}: raise kv_memory to "
            f"{2 * page_bytes + fixed_bytes:,} or shrink page_size"
        )
    if most_tokens is not None:
        num_pages = min(num_pages, 1 + max(1, -(-most_tokens // page_size)))
    return MemoryPlan(num_pages, page_size, page_bytes, fixed_bytes)


def device_bytes(device: torch.device, reserve_bytes: int) -> int:
    """What a device can give to KV when nobody says how much."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_SHARE) - reserve_bytes
    return min(_CPU_DEFAULT_BYTES, available_host_bytes() // 2)


def activation_bytes(spec: ModelSpec, max_batch_tokens: int) -> int:
    """Device memory to leave for a step: some hidden-sized tensors per token, logits of 256 rows, workspaces."""
    per_token = 16 * max(spec.hidden_size, spec.num_heads * spec.head_dim) * spec.dtype.itemsize
    logits = 3 * 256 * spec.vocab_size * 4
    return max_batch_tokens * per_token + logits + (512 << 20)


def available_host_bytes() -> int:
    """Memory that the host can still give, in bytes (Linux counts what it could drop from its caches too)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if match is not None:
            return int(match[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
