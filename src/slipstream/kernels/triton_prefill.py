"""Prefill attention: ragged, causal, over the paged cache. FlashAttention-2 (Dao, 2023) tiles in Triton.

The heads of one group are packed with the tokens into the rows of a tile (row = token * G + member), so that K and V
are read once per group and a request with one new token fills a tile as well as it can.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options
from slipstream.kernels.triton_decode import LOG2_E, page_rows


@triton.jit
def _attend_span(
    q,
    acc,
    total,
    peak,
    k_ptr,
    v_ptr,
    table_ptr,
    head,
    length,
    positions,
    first,
    last,
    scale_log2,
    NUM_KV: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Online softmax over the key tiles first .. last; without CAUSAL every row sees all of their tokens."""
    dims = tl.arange(0, BLOCK_D)
    in_dim = (dims < DIM)[None, :]
    for tile in range(first, last):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = page_rows(table_ptr, tile, head, length, NUM_KV, PAGE, BLOCK_N)
        offsets = rows[:, None] * DIM + dims[None, :]
        mask = in_dim
        if CAUSAL:
            mask = in_dim & (tokens < length)[:, None]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if CAUSAL:
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, query_start_ptr, lengths_ptr, out_ptr, scale_log2, table_stride,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, Hk, B). The last row tiles see the most keys, so they start first."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, request = tl.program_id(1), tl.program_id(2)
    row_begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    query_begin = tl.load(query_start_ptr + request)
    num_queries = tl.load(query_start_ptr + request + 1) - query_begin
    length = tl.load(lengths_ptr + request)
    if row_begin < num_queries * GROUP:
        rows = row_begin + tl.arange(0, BLOCK_M)
        token = rows // GROUP
        live = token < num_queries
        positions = length - num_queries + token
        dims = tl.arange(0, BLOCK_D)
        mask = live[:, None] & (dims < DIM)[None, :]
        query_row = (query_begin + token).to(tl.int64) * (NUM_KV * GROUP) + head * GROUP + rows % GROUP
        offsets = query_row[:, None] * DIM + dims[None, :]
        q = tl.load(q_ptr + offsets, mask=mask, other=0.0)
        last_token = tl.minimum((row_begin + BLOCK_M - 1) // GROUP, num_queries - 1)
        seen_by_all = length - num_queries + row_begin // GROUP + 1
        seen_by_some = length - num_queries + last_token + 1
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        table = table_ptr + request.to(tl.int64) * table_stride
        border = seen_by_all // BLOCK_N
        acc, total, peak = _attend_span(
            q, acc, total, peak, k_ptr, v_ptr, table, head, length, positions, 0, border,
            scale_log2, NUM_KV, PAGE, DIM, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
        acc, total, peak = _attend_span(
            q, acc, total, peak, k_ptr, v_ptr, table, head, length, positions, border, tl.cdiv(seen_by_some, BLOCK_N),
            scale_log2, NUM_KV, PAGE, DIM, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
        tl.store(out_ptr + offsets, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def _tile_shape(block_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) that fit an sm_90 processor; fp32 runs without tensor cores."""
    if itemsize > 2:
        return 16, 32, 4, 2
    if block_dim > 128:
        return 64, 32, 4, 5
    return 128, 64, 8, 5


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    scale: float,
    max_query: int,
) -> Tensor:
    """See :func:`slipstream.kernels.reference.prefill_attention`. Rows that belong to no request are left undefined."""
    num_q, dim = q.shape[1:]
    num_kv, page = k_pages.shape[1:3]
    group = num_q // num_kv
    requests = lengths.shape[0]
    assert q.is_contiguous() and k_pages.is_contiguous() and v_pages.is_contiguous() and q.dtype == k_pages.dtype
    out = torch.empty_like(q)
    if not requests or not max_query:
        return out
    block_dim = block_size(dim, smallest=16)
    block_m, block_n, warps, stages = _tile_shape(block_dim, k_pages.element_size())
    if max_query * group <= 16:
        block_m, warps = 16, 4
    grid = (triton.cdiv(max_query * group, block_m), num_kv, requests)
    _prefill_kernel[grid](
        q, k_pages, v_pages, page_table, query_start, lengths, out, scale * LOG2_E, page_table.stride(0),
        NUM_KV=num_kv, GROUP=group, PAGE=page, DIM=dim, BLOCK_D=block_dim, BLOCK_M=block_m, BLOCK_N=block_n,
        **launch_options(q, num_warps=warps, num_stages=stages),
    )  # fmt: skip
    return out
