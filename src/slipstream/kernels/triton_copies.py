"""Copies of blocks and pages by kernels that read and write pinned host memory in place (unified addressing)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

from slipstream.kernels.launch import block_size as power_of_two
from slipstream.kernels.launch import launch_options
from slipstream.kernels.reference import stored

LOAD_PROGRAMS = 16
"""Programs that load blocks. As long as they wait for the host, no product gets the processors that they are on."""
COPY_PROGRAMS = 16
"""Programs that copy pages."""
TILE_BYTES = 32768
"""What a program has in flight: of all programs more than PCIe delivers in the time that one answer takes."""


@triton.jit
def _copy_tile(
    k_ptr, v_ptr, to_k_ptr, to_v_ptr, source, target, tile, ROW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One of the tiles of a row of K and V; of K alone where there is no other store."""
    at = tile * BLOCK + tl.arange(0, BLOCK)
    k = tl.load(k_ptr + source + at, mask=at < ROW, other=0.0)
    if v_ptr is not None:
        v = tl.load(v_ptr + source + at, mask=at < ROW, other=0.0)
        tl.store(to_v_ptr + target + at, v, mask=at < ROW)
    tl.store(to_k_ptr + target + at, k, mask=at < ROW)


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
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (programs,): each takes every ``programs``-th tile of the loads of all heads, whoever has how many."""
    if PDL:
        gdc_wait()  # and nobody is let in before the end, who would wait on a processor
    heads = tl.arange(0, BLOCK_H)
    ends = tl.cumsum(tl.load(counts_ptr + heads, mask=heads < NUM_KV, other=0), axis=0)
    total = tl.max(ends, axis=0)
    if clock_ptr is not None:
        if (tl.program_id(0) == 0) & (total > 0):
            tl.store(clock_ptr, globaltimer())
    for i in range(tl.program_id(0), total * TILES, tl.num_programs(0)):
        before = ends <= i // TILES
        head = tl.sum(before.to(tl.int32), axis=0)
        load = loads_ptr + (head * most + i // TILES - tl.max(tl.where(before, ends, 0), axis=0)) * 2
        key, slot = tl.load(load).to(tl.int64), tl.load(load + 1).to(tl.int64)
        source = ((key // PER_PAGE * NUM_KV + head) * PER_PAGE + key % PER_PAGE) * ROW
        _copy_tile(
            k_ptr, v_ptr, to_k_ptr, to_v_ptr, source, (first + head * num_slots + slot) * ROW, i % TILES, ROW, BLOCK
        )
    if clock_ptr is not None:
        if total > 0:
            tl.debug_barrier()
            if tl.atomic_add(clock_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:  # the last to end
                tl.store(clock_ptr + 1, tl.zeros((), tl.int64))
                tl.store(clock_ptr + 2, tl.load(clock_ptr + 2) + globaltimer() - tl.load(clock_ptr))


def load_blocks(
    pages: tuple[Tensor, Tensor], loads: Tensor, counts: Tensor, store: tuple[Tensor, Tensor], num_slots: int,
    first: int, clock: Tensor | None = None,
) -> None:  # fmt: skip
    """See :func:`slipstream.kernels.reference_residency.load_blocks`. Reads nothing back to the host."""
    num_kv, page, dim = pages[0].shape[1:]
    block = store[0].shape[1]
    if not loads.shape[1]:
        return
    row = block * dim
    tile, tiles = _tiles(pages, row)
    _load_kernel[(min(LOAD_PROGRAMS, num_kv * loads.shape[1] * tiles),)](
        *_parts(pages), loads, counts, *_parts(store), clock, num_slots, first, loads.shape[1], NUM_KV=num_kv,
        PER_PAGE=page // block, ROW=row, TILES=tiles, BLOCK=tile, BLOCK_H=power_of_two(num_kv),
        **launch_options(loads, num_warps=8),
    )  # fmt: skip


def _tiles(store: tuple[Tensor, Tensor], row: int) -> tuple[int, int]:
    """Elements of K that a program copies at once, and such tiles of a row."""
    parts = stored(*store)
    tile = min(TILE_BYTES // (len(parts) * parts[0].element_size()), power_of_two(row))
    return tile, triton.cdiv(row, tile)


def _parts(store: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """K, and V where it is not columns of K."""
    parts = stored(*store)
    assert all(x.is_contiguous() for x in parts)
    return parts[0], parts[1] if len(parts) > 1 else None


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
    for i in range(tl.program_id(0), total, tl.num_programs(0)):
        source = tl.load(sources_ptr + i // TILES)
        target = tl.load(targets_ptr + i // TILES)
        if (source >= 0) & (target >= 0):
            _copy_tile(k_ptr, v_ptr, to_k_ptr, to_v_ptr, source * ROW, target * ROW, i % TILES, ROW, BLOCK)


def copy_between(
    source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], source_pages: Tensor, target_pages: Tensor
) -> None:
    """See :func:`slipstream.kernels.reference_residency.copy_between`. Reads nothing back to the host."""
    num_pages, row = source_pages.shape[0], source[0][0].numel()
    if num_pages:
        tile, tiles = _tiles(source, row)
        _copy_kernel[(min(COPY_PROGRAMS, num_pages * tiles),)](
            *_parts(source), *_parts(target), source_pages, target_pages, num_pages * tiles, ROW=row, TILES=tiles,
            BLOCK=tile, **launch_options(source_pages, num_warps=8),
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
