"""Copies of blocks and pages by kernels that read and write pinned host memory in place (unified addressing)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

from slipstream.kernels.launch import block_size as power_of_two
from slipstream.kernels.launch import launch_options

COPY_TILE = 4096
"""Elements that a program copies at once."""
LOAD_PROGRAMS = 8
"""Programs per KV head that load blocks: few, because PCIe is slow and the processors have other work."""
COPY_PROGRAMS = 64
"""Programs that copy pages, for the same reason."""


@triton.jit
def _load_kernel(
    k_ptr,
    v_ptr,
    loads_ptr,
    counts_ptr,
    to_k_ptr,
    to_v_ptr,
    clock_ptr,
    num_slots,
    first,
    most,
    NUM_KV: tl.constexpr,
    PER_PAGE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (programs, Hk): each takes every ``programs``-th of its head's loads."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(1)
    count = tl.load(counts_ptr + head)
    at = tl.arange(0, BLOCK)
    for i in range(tl.program_id(0), count, tl.num_programs(0)):
        key = tl.load(loads_ptr + (head * most + i) * 2).to(tl.int64)
        slot = tl.load(loads_ptr + (head * most + i) * 2 + 1).to(tl.int64)
        source = ((key // PER_PAGE * NUM_KV + head) * PER_PAGE + key % PER_PAGE) * ROW
        target = (first + head * num_slots + slot) * ROW
        for start in range(0, ROW, BLOCK):
            inside = start + at < ROW
            k = tl.load(k_ptr + source + start + at, mask=inside, other=0.0)
            v = tl.load(v_ptr + source + start + at, mask=inside, other=0.0)
            tl.store(to_k_ptr + target + start + at, k, mask=inside)
            tl.store(to_v_ptr + target + start + at, v, mask=inside)
    if clock_ptr is not None:
        if count > 0:
            tl.debug_barrier()
            tl.atomic_max(clock_ptr + 1, globaltimer(), sem="relaxed")


def load_blocks(
    pages: tuple[Tensor, Tensor], loads: Tensor, counts: Tensor, store: tuple[Tensor, Tensor], num_slots: int,
    first: int, clock: Tensor | None = None,
) -> None:  # fmt: skip
    """See :func:`slipstream.kernels.reference_residency.load_blocks`. Reads nothing back to the host."""
    num_kv, page, dim = pages[0].shape[1:]
    block = store[0].shape[1]
    assert all(x.is_contiguous() for x in (*pages, *store, loads))
    if not loads.shape[1]:
        return
    row = block * dim
    _load_kernel[(min(LOAD_PROGRAMS, loads.shape[1]), num_kv)](
        *pages, loads, counts, *store, clock, num_slots, first, loads.shape[1], NUM_KV=num_kv, PER_PAGE=page // block,
        ROW=row, BLOCK=min(COPY_TILE, power_of_two(row)), **launch_options(loads, num_warps=8),
    )  # fmt: skip


@triton.jit
def _copy_kernel(
    k_ptr,
    v_ptr,
    to_k_ptr,
    to_v_ptr,
    sources_ptr,
    targets_ptr,
    total,
    ROW: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (programs,): each takes every ``programs``-th tile of all pages."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for i in range(tl.program_id(0), total, tl.num_programs(0)):
        source = tl.load(sources_ptr + i // TILES)
        target = tl.load(targets_ptr + i // TILES)
        if (source >= 0) & (target >= 0):
            at = i % TILES * BLOCK + tl.arange(0, BLOCK)
            k = tl.load(k_ptr + source * ROW + at, mask=at < ROW, other=0.0)
            v = tl.load(v_ptr + source * ROW + at, mask=at < ROW, other=0.0)
            tl.store(to_k_ptr + target * ROW + at, k, mask=at < ROW)
            tl.store(to_v_ptr + target * ROW + at, v, mask=at < ROW)


def copy_between(
    source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], source_pages: Tensor, target_pages: Tensor
) -> None:
    """See :func:`slipstream.kernels.reference_residency.copy_between`. Reads nothing back to the host."""
    num_pages, row = source_pages.shape[0], source[0][0].numel()
    assert all(x.is_contiguous() for x in (*source, *target))
    if num_pages:
        block = min(COPY_TILE, power_of_two(row))
        tiles = triton.cdiv(row, block)
        _copy_kernel[(min(COPY_PROGRAMS, num_pages * tiles),)](
            *source, *target, source_pages, target_pages, num_pages * tiles, ROW=row, TILES=tiles, BLOCK=block,
            **launch_options(source_pages, num_warps=8),
        )  # fmt: skip


@triton.jit
def _time_kernel(total_ptr, sign, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(total_ptr, tl.load(total_ptr) + sign * globaltimer())


def add_time(total: Tensor, sign: int) -> None:
    """See :func:`slipstream.kernels.reference_residency.add_time`: the device's time."""
    _time_kernel[(1,)](total, sign, **launch_options(total, num_warps=1))
