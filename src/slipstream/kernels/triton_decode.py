"""Decode attention over pages: one query token per request, work split evenly over the whole device.

Flash-Decoding (Dao et al., 2023) splits the keys of a request over programs and merges by log-sum-exp. Here the pieces
are cut as in Stream-K (Osama et al., 2023) and as FlashInfer does on the host, but on the device: the key tiles of all
requests form one line, and program ``c`` of ``C`` takes the ``c``-th C-th part of it, whatever requests that covers.
The grid depends on shapes only: a captured graph serves any lengths, and a ragged batch is as balanced as an even one.
The pieces of request ``b`` have the numbers ``c + b``: along the line one of the two always grows by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options, num_processors

LOG2_E = 1.4426950408889634
MERGE_BLOCK = 32
PROGRAMS_PER_PROCESSOR = 2
STAGES = 7  # loads through the page table count double in Triton's pipeliner: this makes three buffers of 32 KiB


@triton.jit
def page_rows(table_ptr, tile, head, length, NUM_KV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of ``pages.view(P * Hk * S, D)`` that hold the tokens of a tile: [BLOCK_N] int64."""
    tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        page = tl.load(table_ptr + (tile * BLOCK_N) // PAGE).to(tl.int64)
        return (page * NUM_KV + head) * PAGE + (tile * BLOCK_N) % PAGE + tl.arange(0, BLOCK_N)
    else:
        pages = tl.load(table_ptr + tokens // PAGE, mask=tokens < length, other=0).to(tl.int64)
        return (pages * NUM_KV + head) * PAGE + tokens % PAGE


@triton.jit
def _attend_tiles(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    head,
    length,
    first,
    last,
    scale_log2,
    NUM_KV: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the tiles first .. last of one request. Returns (unnormalised sum, row sums, row maxima)."""
    dims = tl.arange(0, BLOCK_D)
    in_dim = (dims < DIM)[None, :]
    peak = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for tile in range(first, last):
        valid = tile * BLOCK_N + tl.arange(0, BLOCK_N) < length
        rows = page_rows(table_ptr, tile, head, length, NUM_KV, PAGE, BLOCK_N)
        offsets = rows[:, None] * DIM + dims[None, :]
        mask = valid[:, None] & in_dim
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit
def tiles_of(lengths_ptr, num_requests, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Key tiles of every request, [BLOCK_B]."""
    ids = tl.arange(0, BLOCK_B)
    return tl.cdiv(tl.load(lengths_ptr + ids, mask=ids < num_requests, other=0), BLOCK_N)


@triton.jit
def request_at(tiles, tile):
    """The request that owns a tile of the line, and where on the line its tiles begin."""
    before = tl.cumsum(tiles, axis=0) <= tile
    return tl.sum(before.to(tl.int32), axis=0), tl.sum(tl.where(before, tiles, 0), axis=0)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, out_ptr, piece_ptr, lse_ptr, scale_log2, table_stride, num_requests,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (C, Hk). A piece that is a whole request goes to ``out``, any other to ``piece_ptr`` and ``lse_ptr``."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program, head = tl.program_id(0), tl.program_id(1)
    tiles = tiles_of(lengths_ptr, num_requests, BLOCK_B, BLOCK_N)
    line = tl.sum(tiles, axis=0)
    # On a short line the programs beyond its tiles have nothing to do, and every other has at least one.
    busy = tl.maximum(tl.minimum(tl.num_programs(0), line), 1)
    begin = tl.minimum(line * program // busy, line)
    end = tl.minimum(line * (program + 1) // busy, line)
    request, request_begin = request_at(tiles, begin)
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    mask = (group < GROUP)[:, None] & (dims < DIM)[None, :]
    while begin < end:
        length = tl.load(lengths_ptr + request)
        request_end = request_begin + tl.cdiv(length, BLOCK_N)
        piece_end = tl.minimum(end, request_end)
        if piece_end > begin:
            query_row = (request.to(tl.int64) * NUM_KV + head) * GROUP + group
            offsets = query_row[:, None] * DIM + dims[None, :]
            q = tl.load(q_ptr + offsets, mask=mask, other=0.0)
            acc, total, peak = _attend_tiles(
                q, k_ptr, v_ptr, table_ptr + request.to(tl.int64) * table_stride, head, length,
                begin - request_begin, piece_end - request_begin, scale_log2,
                NUM_KV, PAGE, DIM, BLOCK_D, BLOCK_G, BLOCK_N,
            )  # fmt: skip
            acc = acc / total[:, None]
            if (begin == request_begin) & (piece_end == request_end):
                tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
            else:
                row = (head * (tl.num_programs(0) + num_requests) + program + request).to(tl.int64) * GROUP + group
                tl.store(piece_ptr + row[:, None] * DIM + dims[None, :], acc, mask=mask)
                tl.store(lse_ptr + row, peak + tl.log2(total), mask=group < GROUP)
        begin = piece_end
        request_begin = request_end
        request += 1


@triton.jit
def _merge_kernel(
    lengths_ptr,
    out_ptr,
    piece_ptr,
    lse_ptr,
    programs,
    num_requests,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (B, Hq): the log-sum-exp merge of the pieces of one request and head; zeros for an empty one, or nothing."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    request, query_head = tl.program_id(0), tl.program_id(1)
    head, member = query_head // GROUP, query_head % GROUP
    ids = tl.arange(0, BLOCK_B)
    tiles = tiles_of(lengths_ptr, num_requests, BLOCK_B, BLOCK_N)
    line = tl.sum(tiles, axis=0)
    begin = tl.sum(tl.where(ids < request, tiles, 0), axis=0)
    end = begin + tl.sum(tl.where(ids == request, tiles, 0), axis=0)
    # The owner of tile t is the last program c with line * c // busy <= t, so with c <= ((t + 1) * busy - 1) / line.
    busy = tl.minimum(programs, line)
    first = ((begin + 1) * busy - 1) // tl.maximum(line, 1)
    last = (end * busy - 1) // tl.maximum(line, 1)
    dims = tl.arange(0, BLOCK_D)
    in_dim = dims < DIM
    out_row = request.to(tl.int64) * tl.num_programs(1) + query_head
    if begin == end:
        if not KEEP:
            tl.store(out_ptr + out_row * DIM + dims, tl.zeros((BLOCK_D,), out_ptr.dtype.element_ty), mask=in_dim)
    elif first < last:
        base = (head * (programs + num_requests) + request).to(tl.int64)
        peak = -float("inf")
        total = 0.0
        acc = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(first, last + 1, BLOCK):
            piece = start + tl.arange(0, BLOCK)
            live = piece <= last
            row = (base + piece) * GROUP + member
            lse = tl.load(lse_ptr + row, mask=live, other=-float("inf"))
            part = tl.load(
                piece_ptr + row[:, None] * DIM + dims[None, :], mask=live[:, None] & in_dim[None, :], other=0.0
            )
            new_peak = tl.maximum(peak, tl.max(lse, axis=0))
            weight = tl.exp2(lse - new_peak)
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weight, axis=0)
            acc = acc * shrink + tl.sum(part * weight[:, None], axis=0)
            peak = new_peak
        tl.store(out_ptr + out_row * DIM + dims, (acc / total).to(out_ptr.dtype.element_ty), mask=in_dim)


def key_tile(block_dim: int, itemsize: int) -> int:
    """Keys per tile so that K and V of one pipeline stage take 32 KiB."""
    return min(64, max(16, 16384 // (block_dim * itemsize)))


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`slipstream.kernels.reference.decode_attention`. Reads nothing back to the host; contiguous tensors.

    out: written where given; requests of length 0 keep what it holds.
    """
    requests, num_q, dim = q.shape
    num_kv, page = k_pages.shape[1:3]
    group = num_q // num_kv
    assert q.is_contiguous() and k_pages.is_contiguous() and v_pages.is_contiguous() and q.dtype == k_pages.dtype
    keep, out = out is not None, torch.empty_like(q) if out is None else out
    assert out.is_contiguous()
    if not requests:
        return out
    # Programs that share a processor hide each other's reductions; all of them run at once.
    programs = max(1, PROGRAMS_PER_PROCESSOR * num_processors(q.device) // num_kv)
    pieces = num_kv * (programs + requests) * group
    piece = torch.empty((pieces, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((pieces,), dtype=torch.float32, device=q.device)
    block_dim = block_size(dim, smallest=16)
    shape = {
        "GROUP": group,
        "DIM": dim,
        "BLOCK_B": block_size(requests),
        "BLOCK_D": block_dim,
        "BLOCK_N": key_tile(block_dim, k_pages.element_size()),
    }
    _decode_kernel[(programs, num_kv)](
        q, k_pages, v_pages, page_table, lengths, out, piece, lse, scale * LOG2_E, page_table.stride(0), requests,
        NUM_KV=num_kv, PAGE=page, BLOCK_G=block_size(group, smallest=16), **shape,
        **launch_options(q, num_warps=4, num_stages=STAGES),
    )  # fmt: skip
    _merge_kernel[(requests, num_q)](
        lengths, out, piece, lse, programs, requests, BLOCK=MERGE_BLOCK, KEEP=keep, **shape,
        **launch_options(q, num_warps=4),
    )  # fmt: skip
    return out
