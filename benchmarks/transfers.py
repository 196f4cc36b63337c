"""How fast KV moves between host and device: pinned memory that engines share, and copies alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from harness import Report, time_host

from slipstream.asynctls import config as asynctls_config
from slipstream.asynctls import offload as asynctls_offload
from slipstream.asynctls.offload import load_pooled
from slipstream.kernels import residency, triton_copies

PAGE = 64


class SharedHost:
    """One piece of pinned memory for the pools of all engines, one engine at a time: K and V in a half each.

    A latent cache is one store, and may be larger than a half.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        began = time.perf_counter()
        self.memory = asynctls_offload.HostMemory(num_bytes, device)
        self.seconds, self._num_pools = time.perf_counter() - began, 0
        asynctls_offload.HostMemory = self._part  # type: ignore[assignment,misc]
        asynctls_config.available_host_bytes = lambda: num_bytes

    def _part(self, num_bytes: int, device: torch.device, folder: str | None = None) -> SimpleNamespace:
        self._num_pools += 1
        part = self.half(self._num_pools % 2)
        return SimpleNamespace(bytes=(part if num_bytes <= len(part) else self.memory.bytes)[:num_bytes], close=int)

    def half(self, which: int) -> torch.Tensor:
        size = len(self.memory.bytes) // 2 // 4096 * 4096
        return self.memory.bytes[which * size :][:size]


def transfers(report: Report, host: SharedHost, device: torch.device, num_blocks: int) -> float:
    """Plain copies, and the kernels that load blocks and copy pages. Returns bytes per second of the first."""
    shape, tile = (num_blocks, 8, PAGE, 128), 2 * PAGE * 128
    far = tuple(host.half(i)[: num_blocks * 8 * tile].view(torch.bfloat16).view(shape) for i in (0, 1))
    near = tuple(torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    pages = torch.randperm(num_blocks, device=device)

    def rate(tiles: int, work: Callable[..., object], *args: Any) -> float:
        """GB/s, of small ones many; the first run compiles."""
        times = max(1, 2048 // tiles)

        def whole() -> None:
            for _ in range(times):
                work(*args)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return times * tiles * tile / time_host(whole, 5).median_ms / 1e6

    plain = rate(num_blocks * 8, near[0].copy_, far[0], True)
    report.point(
        part="transfer", kind="plain", in_gb_s=plain, out_gb_s=rate(num_blocks * 8, far[0].copy_, near[0], True)
    )
    for programs in (8, 32, 64, 128, 16):
        triton_copies.COPY_PROGRAMS = programs
        rates = [
            rate(16 * num_blocks, residency.copy_between, *pair, pages, pages) for pair in ((far, near), (near, far))
        ]
        report.point(part="transfer", kind="pages", programs=programs, in_gb_s=rates[0], out_gb_s=rates[1])
    store, found = tuple(x.view(-1, PAGE, 128) for x in near), 0.0
    for count in (4, 16, 64, num_blocks // 2):
        loads = torch.stack((torch.randperm(num_blocks)[:count], torch.arange(count)[:num_blocks]), dim=1).int()
        args = (far, loads.expand(8, -1, -1).contiguous().to(device))
        args += (torch.full((8,), len(loads), dtype=torch.int32, device=device), store, num_blocks, 0)
        row = {"pooled_gb_s": rate(16 * len(loads), load_pooled, *args)}
        for programs in (4, 8, 32, 64, 16):  # the defaults of both last
            triton_copies.LOAD_PROGRAMS = programs
            row[f"gather_{programs}_gb_s"] = found = rate(16 * len(loads), residency.load_blocks, *args)
        report.point(part="transfer", kind="blocks", per_head=len(loads), **row)
    report.notes |= {"h2d_bytes_per_s": plain * 1e9, "gather_bytes_per_s": found * 1e9}
    return plain * 1e9
