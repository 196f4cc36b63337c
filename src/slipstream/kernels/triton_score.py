"""Scores of blocks: tiles of their summaries times query heads.

A program takes a tile of one request and KV head through the page table, and one tensor-core product serves all query
heads of the group: the tile is the left operand, the group (padded to 8) the right one, which wastes the least of the
product and reads the tile as it lies. Grids cover the table's width; what lies behind the true length leaves at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size as power_of_two
from slipstream.kernels.launch import launch_options, num_processors

# How work is cut for an H200; none of them moves a result beyond the order of sums.
SCORE_TILE_BYTES = 32768  # summaries in flight per program
SCORE_WARPS = 4
SCORE_STAGES = 3
WIDEST_ROW = 512  # elements of a row that a program holds at once, with the queries beside it
WIDE_TILE, WIDE_COLUMNS, WIDE_STAGES = 64, 128, 4  # of a row that is wider (latent caches): blocks, columns at a time
WIDE_PROGRAMS = 1  # per processor, where rows are wide: with fewer, tiles shrink
MIN_PROGRAMS = 2  # per processor: with fewer, tiles shrink
MAX_PROGRAMS = 64  # per processor: with more, a program takes several tiles


@triton.jit
def group_rows(request, head, GROUP: tl.constexpr, NUM_KV: tl.constexpr, BLOCK_G: tl.constexpr):
    """Rows of ``q.view(B * Hq, D)`` of the query heads of a KV head: [BLOCK_G] int64."""
    return (request.to(tl.int64) * NUM_KV + head) * GROUP + tl.arange(0, BLOCK_G)


@triton.jit
def _score_kernel(
    q_ptr, summaries_ptr, table_ptr, lengths_ptr, out_ptr, scale, deviation, table_stride, num_scores,
    tiles_per_program,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr,
    KIND: tl.constexpr, NUM_STATS: tl.constexpr, MERGE: tl.constexpr, SUM: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of tiles of the table's blocks, Hk, B)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, request = tl.program_id(1), tl.program_id(2)
    num_whole = tl.load(lengths_ptr + request) // BLOCK_SIZE
    begin = tl.program_id(0) * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, tl.cdiv(num_whole, BLOCK_N))
    if begin < end:
        # The statistics of a block lie side by side: one row of C * D, against a query widened likewise.
        wide = tl.arange(0, BLOCK_E)
        in_row = wide < NUM_STATS * DIM
        in_group = (tl.arange(0, BLOCK_G) < GROUP)[None, :]
        heads = group_rows(request, head, GROUP, NUM_KV, BLOCK_G)
        q = tl.load(q_ptr + heads[None, :] * DIM + (wide % DIM)[:, None], mask=in_group & in_row[:, None], other=0.0)
        if KIND != "mean":
            x = q.to(tl.float32)
            is_first = (wide < DIM)[:, None]
            if KIND == "minmax":
                x = tl.where(is_first, tl.maximum(x, 0.0), tl.minimum(x, 0.0))
            else:
                x = tl.where(is_first, x, tl.abs(x) * deviation)
            q = x.to(q.dtype)
        table = table_ptr + request.to(tl.int64) * table_stride
        out = out_ptr + (request.to(tl.int64) * NUM_KV + head) * num_scores
        for tile in range(begin, end):
            blocks = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            live = blocks < num_whole
            pages = tl.load(table + blocks // PER_PAGE, mask=live, other=0).to(tl.int64)
            rows = (pages * NUM_KV + head) * PER_PAGE + blocks % PER_PAGE
            offsets = rows[:, None] * (NUM_STATS * DIM) + wide[None, :]
            summaries = tl.load(summaries_ptr + offsets, mask=live[:, None] & in_row[None, :], other=0.0)
            scores = tl.dot(summaries, q, input_precision="ieee") * scale
            if MERGE > 1:
                scores = tl.max(tl.reshape(scores, (BLOCK_N // MERGE, MERGE, BLOCK_G)), axis=1)
            if SUM:
                scores = tl.sum(tl.where(in_group, scores, 0.0), axis=1)
            else:
                scores = tl.max(tl.where(in_group, scores, -float("inf")), axis=1)
            merged = tile * (BLOCK_N // MERGE) + tl.arange(0, BLOCK_N // MERGE)
            tl.store(out + merged, scores, mask=(merged + 1) * MERGE <= num_whole)


@triton.jit
def _wide_score_kernel(
    q_ptr, summaries_ptr, table_ptr, lengths_ptr, out_ptr, scale, deviation, table_stride, num_scores,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr,
    KIND: tl.constexpr, NUM_STATS: tl.constexpr, MERGE: tl.constexpr, SUM: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the table's blocks, Hk, B): as the kernel above, but rows are read BLOCK_E columns at a time."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_whole = tl.load(lengths_ptr + request) // BLOCK_SIZE
    blocks = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # The table is as wide as all scores: its pages need not wait for the length.
    table = table_ptr + request.to(tl.int64) * table_stride
    pages = tl.load(table + blocks // PER_PAGE, mask=blocks // MERGE < num_scores, other=0)
    if tile * BLOCK_N < num_whole:
        live = (blocks < num_whole)[:, None]
        rows = ((pages.to(tl.int64) * NUM_KV + head) * PER_PAGE + blocks % PER_PAGE)[:, None] * (NUM_STATS * DIM)
        in_group = (tl.arange(0, BLOCK_G) < GROUP)[None, :]
        heads = group_rows(request, head, GROUP, NUM_KV, BLOCK_G)
        scores = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
        for first in range(0, NUM_STATS * DIM, BLOCK_E):
            wide = first + tl.arange(0, BLOCK_E)
            in_row = wide < NUM_STATS * DIM
            summaries = tl.load(summaries_ptr + rows + wide[None, :], mask=live & in_row[None, :], other=0.0)
            at = heads[None, :] * DIM + (wide % DIM)[:, None]
            q = tl.load(q_ptr + at, mask=in_group & in_row[:, None], other=0.0)
            if KIND != "mean":
                x = q.to(tl.float32)
                is_first = (wide < DIM)[:, None]
                if KIND == "minmax":
                    x = tl.where(is_first, tl.maximum(x, 0.0), tl.minimum(x, 0.0))
                else:
                    x = tl.where(is_first, x, tl.abs(x) * deviation)
                q = x.to(q.dtype)
            scores = tl.dot(summaries, q, scores, input_precision="ieee")
        scores *= scale
        if MERGE > 1:
            scores = tl.max(tl.reshape(scores, (BLOCK_N // MERGE, MERGE, BLOCK_G)), axis=1)
        if SUM:
            best = tl.sum(tl.where(in_group, scores, 0.0), axis=1)
        else:
            best = tl.max(tl.where(in_group, scores, -float("inf")), axis=1)
        merged = tile * (BLOCK_N // MERGE) + tl.arange(0, BLOCK_N // MERGE)
        out = out_ptr + (request.to(tl.int64) * NUM_KV + head) * num_scores + merged
        tl.store(out, best, mask=(merged + 1) * MERGE <= num_whole)


def cut(width: int, rows: int, largest: int, device: torch.device, least: int | None = None) -> tuple[int, int, int]:
    """How ``rows`` rows of ``width`` columns are cut: (columns per tile, tiles per program, programs per row).

    least: programs per processor before tiles grow to the ``largest``.
    """
    processors, tile, least = num_processors(device), largest, MIN_PROGRAMS if least is None else least
    while tile > 16 and rows * triton.cdiv(width, tile) < least * processors:
        tile //= 2
    tiles = triton.cdiv(width, tile)
    per_program = triton.cdiv(tiles * rows, MAX_PROGRAMS * processors)
    return tile, per_program, triton.cdiv(tiles, per_program)


def tile_of(num_bytes: int, row_bytes: int) -> int:
    """How many rows take so many bytes, between 16 and 128; both are powers of two."""
    return min(128, max(16, num_bytes // row_bytes))


def score_blocks(
    q: Tensor,
    summaries: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    kind: str,
    merge: int,
    scale: float,
    aggregate: str,
    deviation: float,
    block_size: int,
) -> Tensor:
    """See :func:`slipstream.kernels.reference_index.score_blocks`. Contiguous; ``merge`` is a power of two up to 16."""
    requests, num_q, dim = q.shape
    num_kv, per_page, num_stats = summaries.shape[1:4]
    assert q.is_contiguous() and summaries.is_contiguous() and q.dtype == summaries.dtype
    assert merge in (1, 2, 4, 8, 16) and aggregate in ("max", "sum"), (merge, aggregate)
    width = page_table.shape[1] * per_page
    out = torch.empty((requests, num_kv, width // merge), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    block_e = power_of_two(num_stats * dim, smallest=16)
    shape = {
        "NUM_KV": num_kv, "GROUP": num_q // num_kv, "PER_PAGE": per_page, "BLOCK_SIZE": block_size, "DIM": dim,
        "KIND": kind, "NUM_STATS": num_stats, "MERGE": merge, "SUM": aggregate == "sum",
        "BLOCK_G": power_of_two(num_q // num_kv, smallest=8),
    }  # fmt: skip
    if block_e > WIDEST_ROW:
        tile, _, _ = cut(width, requests * num_kv, WIDE_TILE, q.device, WIDE_PROGRAMS)
        _wide_score_kernel[(triton.cdiv(width, tile), num_kv, requests)](
            q, summaries, page_table, lengths, out, scale, deviation, page_table.stride(0), out.shape[2],
            BLOCK_E=WIDE_COLUMNS, BLOCK_N=tile, **shape,
            **launch_options(q, num_warps=SCORE_WARPS, num_stages=WIDE_STAGES),
        )  # fmt: skip
        return out
    largest = tile_of(SCORE_TILE_BYTES, block_e * q.element_size())
    tile, per_program, programs = cut(width, requests * num_kv, largest, q.device)
    _score_kernel[(programs, num_kv, requests)](
        q, summaries, page_table, lengths, out, scale, deviation, page_table.stride(0), out.shape[2], per_program,
        BLOCK_E=block_e, BLOCK_N=tile, **shape,
        **launch_options(q, num_warps=SCORE_WARPS, num_stages=SCORE_STAGES if per_program > 1 else 2),
    )  # fmt: skip
    return out
