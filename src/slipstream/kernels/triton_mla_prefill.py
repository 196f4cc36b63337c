"""Prefill attention over a latent cache (MLA), in absorbed form: ragged, causal, FlashAttention-2 tiles in Triton.

Rows of a tile are tokens times heads (row = token * Hq + head), all of which read the same cache rows, once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import launch_options
from slipstream.kernels.triton_decode import LOG2_E
from slipstream.kernels.triton_mla import latent_rows, load_query, shape_of


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, table_ptr, query_start_ptr, lengths_ptr, out_ptr, scale_log2, table_stride,
    NUM_Q: tl.constexpr, PAGE: tl.constexpr, VALUE: tl.constexpr, ROPE: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B). The last row tiles see the most keys, so they start first. BLOCK_H: rows of a tile."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    request = tl.program_id(1)
    row_begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_H
    query_begin = tl.load(query_start_ptr + request)
    num_queries = tl.load(query_start_ptr + request + 1) - query_begin
    length = tl.load(lengths_ptr + request)
    if row_begin < num_queries * NUM_Q:
        token = (row_begin + tl.arange(0, BLOCK_H)) // NUM_Q
        live = token < num_queries
        positions = length - num_queries + token
        first_row = query_begin.to(tl.int64) * NUM_Q + row_begin
        latent, rotary = load_query(q_ptr, first_row, live, VALUE, ROPE, BLOCK_V, BLOCK_R, BLOCK_H)
        last_token = tl.minimum((row_begin + BLOCK_H - 1) // NUM_Q, num_queries - 1)
        last = length - num_queries + last_token + 1
        cols, turned = tl.arange(0, BLOCK_V)[None, :], tl.arange(0, BLOCK_R)[None, :]
        table = table_ptr + request.to(tl.int64) * table_stride
        peak = tl.full((BLOCK_H,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_V), tl.float32)
        for start in range(0, last, BLOCK_N):
            tokens = start + tl.arange(0, BLOCK_N)
            rows = latent_rows(table, None, 0, start, last, PAGE, BLOCK_N)[:, None] * (VALUE + ROPE)
            valid = (tokens < last)[:, None]
            k = tl.load(k_ptr + rows + cols, mask=valid & (cols < VALUE), other=0.0)
            k_rotary = tl.load(k_ptr + rows + VALUE + turned, mask=valid & (turned < ROPE), other=0.0)
            scores = tl.dot(latent, tl.trans(k), input_precision="ieee")
            scores = tl.dot(rotary, tl.trans(k_rotary), scores, input_precision="ieee") * scale_log2
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weights, axis=1)
            acc = tl.dot(weights.to(k.dtype), k, acc * shrink[:, None], input_precision="ieee")
            peak = new_peak
        out = out_ptr + (first_row + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None] * VALUE + cols
        tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None] & (cols < VALUE))


def _tile_shape(itemsize: int) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) that fit an sm_90 processor; fp32 runs without tensor cores."""
    return (16, 16, 4, 1) if itemsize > 2 else (64, 32, 8, 2)


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
    num_q, value_dim, requests = q.shape[1], v_pages.shape[3], lengths.shape[0]
    assert q.is_contiguous() and k_pages.is_contiguous() and k_pages.shape[1] == 1 and q.dtype == k_pages.dtype
    out = q.new_empty((q.shape[0], num_q, value_dim))
    if not requests or not max_query:
        return out
    rows, keys, warps, stages = _tile_shape(q.element_size())
    shape = shape_of(q, value_dim) | {"BLOCK_H": rows, "BLOCK_N": keys}
    _prefill_kernel[(triton.cdiv(max_query * num_q, rows), requests)](
        q, k_pages, page_table, query_start, lengths, out, scale * LOG2_E, page_table.stride(0),
        PAGE=k_pages.shape[2], **shape, **launch_options(q, num_warps=warps, num_stages=stages),
    )  # fmt: skip
    return out
