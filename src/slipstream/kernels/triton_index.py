"""Labels of new tokens and summaries of the blocks that they complete, one launch, in decode and in prefill.

A program owns one block of one request and KV head, so that the block lies in one page and its summary is made in one
place from all its keys: the order of the sum, and so the last bit, is the same however the keys came.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options

LABEL_TILE = 64
"""Tokens of a program where only labels are asked for."""
DECODE_WARPS = 1
PREFILL_WARPS = 4
MAX_HALF = tl.constexpr(65504.0)


@triton.jit
def _quantise(first, second, in_half):
    """first, second: [T, r / 2] fp32, halves of the channels -> (codes [T, r / 2] int32, step, zero [T] fp16)."""
    low = tl.minimum(
        tl.min(tl.where(in_half, first, float("inf")), 1), tl.min(tl.where(in_half, second, float("inf")), 1)
    )
    high = tl.maximum(
        tl.max(tl.where(in_half, first, -float("inf")), 1), tl.max(tl.where(in_half, second, -float("inf")), 1)
    )
    zero = tl.minimum(tl.maximum(low, -MAX_HALF), MAX_HALF).to(tl.float16)
    step = tl.minimum(tl.div_rn(high - low, tl.full(low.shape, 15.0, tl.float32)), MAX_HALF).to(tl.float16)
    return _codes(first, step, zero) | (_codes(second, step, zero) << 4), step, zero


@triton.jit
def _codes(x, step, zero):
    """x: [T, r / 2] fp32 -> its codes 0 .. 15, int32. Division rounds as torch's: no code is off by one."""
    step = tl.broadcast_to(step.to(tl.float32)[:, None], x.shape)
    code = tl.floor(tl.div_rn(x - zero.to(tl.float32)[:, None], tl.where(step == 0.0, 1.0, step)) + 0.5)
    return tl.where(step == 0.0, 0.0, tl.minimum(tl.maximum(code, 0.0), 15.0)).to(tl.int32)


@triton.jit
def _label(
    k_ptr, labels_ptr, scales_ptr, channels_ptr, rows, live, head, DIM, HALF: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Labels of the live ones of the keys ``rows`` [T] of ``pages.view(P * Hk * S, D)``."""
    half = tl.arange(0, BLOCK_H)
    in_half = half < HALF
    channels = channels_ptr + head * 2 * HALF + half
    mask = live[:, None] & in_half[None, :]
    keys = k_ptr + rows[:, None] * DIM
    first = tl.load(keys + tl.load(channels, mask=in_half, other=0)[None, :], mask=mask, other=0.0)
    second = tl.load(keys + tl.load(channels + HALF, mask=in_half, other=0)[None, :], mask=mask, other=0.0)
    codes, step, zero = _quantise(first.to(tl.float32), second.to(tl.float32), in_half[None, :])
    tl.store(labels_ptr + rows[:, None] * HALF + half[None, :], codes.to(tl.uint8), mask=mask)
    tl.store(scales_ptr + rows * 2, step, mask=live)
    tl.store(scales_ptr + rows * 2 + 1, zero, mask=live)


@triton.jit
def _summarise(
    k_ptr, out_ptr, row, KIND: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The summary at ``out_ptr`` [C, D] of the BLOCK keys from ``row`` on."""
    dims, tokens = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    in_dim, in_block = dims < DIM, (tokens < BLOCK)[:, None]
    offsets = (row + tokens)[:, None] * DIM + dims[None, :]
    x = tl.load(k_ptr + offsets, mask=in_block & in_dim[None, :], other=0.0).to(tl.float32)
    if KIND == "minmax":
        first = tl.max(tl.where(in_block, x, -float("inf")), axis=0)
        second = tl.min(tl.where(in_block, x, float("inf")), axis=0)
    else:
        first = tl.sum(x, axis=0) / BLOCK
        centred = tl.where(in_block, x - first[None, :], 0.0)
        second = tl.sqrt_rn(tl.sum(centred * centred, axis=0) / BLOCK)
    tl.store(out_ptr + dims, first.to(out_ptr.dtype.element_ty), mask=in_dim)
    if KIND != "mean":
        tl.store(out_ptr + DIM + dims, second.to(out_ptr.dtype.element_ty), mask=in_dim)


@triton.jit
def _extend_kernel(
    k_ptr,
    table_ptr,
    query_start_ptr,
    lengths_ptr,
    summaries_ptr,
    labels_ptr,
    scales_ptr,
    channels_ptr,
    table_stride,
    NUM_KV: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    NUM_STATS: tl.constexpr,
    HALF: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks that the newest tokens may touch, Hk, B). ONE: no request has more than one new token."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, request = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + request)
    asked = tl.load(query_start_ptr + request + 1) - tl.load(query_start_ptr + request)
    oldest = length - tl.minimum(asked, length)
    begin = (oldest // BLOCK + tl.program_id(0)) * BLOCK
    if (begin < length) & (oldest < length):
        page = tl.load(table_ptr + request.to(tl.int64) * table_stride + begin // PAGE).to(tl.int64)
        row = (page * NUM_KV + head) * PAGE + begin % PAGE
        if HALF:
            if ONE:
                tokens = length - 1 + tl.arange(0, 1)
            else:
                tokens = begin + tl.arange(0, BLOCK_T)
            live = (tokens >= oldest) & (tokens < tl.minimum(length, begin + BLOCK))
            _label(k_ptr, labels_ptr, scales_ptr, channels_ptr, row + tokens - begin, live, head, DIM, HALF, BLOCK_H)
        if NUM_STATS:
            if begin + BLOCK <= length:
                _summarise(
                    k_ptr, summaries_ptr + row // BLOCK * (NUM_STATS * DIM), row, KIND, DIM, BLOCK, BLOCK_T, BLOCK_D
                )


def extend_index(
    k_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    max_query: int,
    summaries: Tensor | None,
    kind: str,
    labels: Tensor | None,
    scales: Tensor | None,
    channels: Tensor | None,
) -> None:
    """See :func:`slipstream.kernels.reference_index.extend_index`. Contiguous tensors."""
    num_kv, page, dim = k_pages.shape[1:]
    requests = lengths.shape[0]
    if not requests or not max_query or (summaries is None and labels is None):
        return
    stored = (k_pages, summaries, labels, scales, channels)
    assert all(x is None or x.is_contiguous() for x in stored)
    if summaries is not None:
        block = page // summaries.shape[2]
    else:
        block = LABEL_TILE if page % LABEL_TILE == 0 else page
    half = 0 if labels is None else labels.shape[3]
    # Tokens of one request that are not aligned to a block reach one block further.
    grid = (triton.cdiv(max_query - 1, block) + 1, num_kv, requests)
    _extend_kernel[grid](
        k_pages, page_table, query_start, lengths, summaries, labels, scales, channels, page_table.stride(0),
        NUM_KV=num_kv, PAGE=page, DIM=dim, BLOCK=block, KIND=kind,
        NUM_STATS=0 if summaries is None else summaries.shape[3], HALF=half, ONE=max_query == 1,
        BLOCK_T=block_size(block), BLOCK_D=block_size(dim), BLOCK_H=block_size(half),
        **launch_options(k_pages, num_warps=DECODE_WARPS if max_query == 1 else PREFILL_WARPS),
    )  # fmt: skip
