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
from slipstream.kernels.reference_index import GROUP_SHIFT

LABEL_TILE = 64
"""Tokens of a program where only labels are asked for."""
DECODE_WARPS = 1
PREFILL_WARPS = 4
SUMMARY_DIMS = 128
"""Dimensions of a block that are summarised at once."""
MAX_HALF = tl.constexpr(65504.0)
SHIFT = tl.constexpr(GROUP_SHIFT)
NUMBER = tl.constexpr((1 << GROUP_SHIFT) - 1)


@triton.jit
def _quantise(first, second, in_first, in_second):
    """first, second: [T, r / 2] fp32, halves of the channels -> (codes [T, r / 2] int32, step, zero [T] fp16).

    Of the channels that are ``in_first`` and ``in_second`` [1, r / 2]; the codes of others are 0.
    """
    low = tl.minimum(
        tl.min(tl.where(in_first, first, float("inf")), 1), tl.min(tl.where(in_second, second, float("inf")), 1)
    )
    high = tl.maximum(
        tl.max(tl.where(in_first, first, -float("inf")), 1), tl.max(tl.where(in_second, second, -float("inf")), 1)
    )
    is_empty = low > high
    low, high = tl.where(is_empty, 0.0, low), tl.where(is_empty, 0.0, high)
    zero = tl.minimum(tl.maximum(low, -MAX_HALF), MAX_HALF).to(tl.float16)
    step = tl.minimum(tl.div_rn(high - low, tl.full(low.shape, 15.0, tl.float32)), MAX_HALF).to(tl.float16)
    codes = tl.where(in_first, _codes(first, step, zero), 0) | tl.where(in_second, _codes(second, step, zero) << 4, 0)
    return codes, step, zero


@triton.jit
def _codes(x, step, zero):
    """x: [T, r / 2] fp32 -> its codes 0 .. 15, int32. Division rounds as torch's: no code is off by one."""
    step = tl.broadcast_to(step.to(tl.float32)[:, None], x.shape)
    code = tl.floor(tl.div_rn(x - zero.to(tl.float32)[:, None], tl.where(step == 0.0, 1.0, step)) + 0.5)
    return tl.where(step == 0.0, 0.0, tl.minimum(tl.maximum(code, 0.0), 15.0)).to(tl.int32)


@triton.jit
def _label(
    k_ptr, labels_ptr, scales_ptr, channels_ptr, key_rows, rows, live, head, DIM, HALF: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Labels ``rows`` [T] of the live ones of the keys ``key_rows`` [T], both of ``pages.view(P * Hk * S, ...)``."""
    half = tl.arange(0, BLOCK_H)
    in_half = half < HALF
    channels = channels_ptr + head * 2 * HALF + half
    mask = live[:, None] & in_half[None, :]
    keys = k_ptr + key_rows[:, None] * DIM
    first_channels = tl.load(channels, mask=in_half, other=0)[None, :]
    second_channels = tl.load(channels + HALF, mask=in_half, other=0)[None, :]
    first = tl.load(keys + (first_channels & NUMBER), mask=mask, other=0.0).to(tl.float32)
    second = tl.load(keys + (second_channels & NUMBER), mask=mask, other=0.0).to(tl.float32)
    codes = tl.zeros(first.shape, tl.int32)
    for group in tl.static_range(GROUPS):
        in_first = in_half[None, :] & (first_channels >> SHIFT == group)
        in_second = in_half[None, :] & (second_channels >> SHIFT == group)
        own, step, zero = _quantise(first, second, in_first, in_second)
        codes |= own
        tl.store(scales_ptr + rows * 2 * GROUPS + 2 * group, step, mask=live)
        tl.store(scales_ptr + rows * 2 * GROUPS + 2 * group + 1, zero, mask=live)
    tl.store(labels_ptr + rows[:, None] * HALF + half[None, :], codes.to(tl.uint8), mask=mask)


@triton.jit
def _summarise(
    k_ptr, out_ptr, row, KIND: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The summary at ``out_ptr`` [C, D] of the BLOCK keys from ``row`` on."""
    tokens = tl.arange(0, BLOCK_T)
    in_block = (tokens < BLOCK)[:, None]
    for start in range(0, DIM, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        in_dim = dims < DIM
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
    key_table_ptr,
    query_start_ptr,
    lengths_ptr,
    summaries_ptr,
    labels_ptr,
    scales_ptr,
    channels_ptr,
    table_stride,
    key_table_stride,
    NUM_KV: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    NUM_STATS: tl.constexpr,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
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
        key_row = row
        if key_table_ptr is not None:
            key_page = tl.load(key_table_ptr + request.to(tl.int64) * key_table_stride + begin // PAGE).to(tl.int64)
            key_row = (key_page * NUM_KV + head) * PAGE + begin % PAGE
        if HALF:
            if ONE:
                tokens = length - 1 + tl.arange(0, 1)
            else:
                tokens = begin + tl.arange(0, BLOCK_T)
            live = (tokens >= oldest) & (tokens < tl.minimum(length, begin + BLOCK))
            places = tokens - begin
            _label(
                k_ptr, labels_ptr, scales_ptr, channels_ptr, key_row + places, row + places, live, head, DIM, HALF,
                GROUPS, BLOCK_H,
            )  # fmt: skip
        if NUM_STATS:
            if begin + BLOCK <= length:
                _summarise(
                    k_ptr, summaries_ptr + row // BLOCK * (NUM_STATS * DIM), key_row, KIND, DIM, BLOCK, BLOCK_T, BLOCK_D
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
    key_table: Tensor | None = None,
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
        k_pages, page_table, key_table, query_start, lengths, summaries, labels, scales, channels,
        page_table.stride(0), 0 if key_table is None else key_table.stride(0),
        NUM_KV=num_kv, PAGE=page, DIM=dim, BLOCK=block, KIND=kind,
        NUM_STATS=0 if summaries is None else summaries.shape[3], HALF=half, ONE=max_query == 1,
        GROUPS=1 if scales is None else scales.shape[3] // 2,
        BLOCK_T=block_size(block), BLOCK_D=min(SUMMARY_DIMS, block_size(dim)), BLOCK_H=block_size(half),
        **launch_options(lengths, num_warps=DECODE_WARPS if max_query == 1 else PREFILL_WARPS),
    )  # fmt: skip
