"""Decode attention over selected tokens: rows of K and V scattered over the pages, a request's selection cut evenly.

Flash-Decoding's split and merge (Dao et al., 2023), with a list of tokens where the dense kernel has a line of pages.
The cut follows from shapes, so that about ``PROGRAMS_PER_PROCESSOR`` programs run on a processor when every row is
full, and programs beyond a row's count have nothing to do: a captured graph serves any counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options, num_processors

LOG2_E = 1.4426950408889634
PROGRAMS_PER_PROCESSOR = 4
TILE_BYTES = 32768  # of the keys, and of the values, that are attended at once
SMALLEST_SPLIT, LARGEST_SPLIT = 32, 512  # selected tokens of one program
STAGES = 2
WARPS = 4
MERGE_TILE = 32


@triton.jit
def attend_places(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    indices_ptr,
    scores_ptr,
    scores_stride,
    head,
    first,
    last,
    scale_log2,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the places first .. last - 1 of a selection: (unnormalised sum, row sums, row maxima).

    indices_ptr: the token at every place, or None: place i is token i. scores_ptr: where the scores, base 2, of head g
    at place i are kept, at g * scores_stride + i, or None.
    """
    dims = tl.arange(0, BLOCK_D)
    in_dim = (dims < DIM)[None, :]
    peak = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        valid = places < last
        tokens = places
        if indices_ptr is not None:
            tokens = tl.load(indices_ptr + places, mask=valid, other=0)
        pages = tl.load(table_ptr + tokens // PAGE, mask=valid, other=0).to(tl.int64)
        offsets = ((pages * NUM_KV + head) * PAGE + tokens % PAGE)[:, None] * DIM + dims[None, :]
        mask = valid[:, None] & in_dim
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if scores_ptr is not None:
            at = tl.arange(0, BLOCK_G)[:, None] * scores_stride + places[None, :]
            tl.store(scores_ptr + at, scores, mask=(tl.arange(0, BLOCK_G) < GROUP)[:, None] & valid[None, :])
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit
def _split_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, indices_ptr, counts_ptr, rows_ptr, out_ptr, piece_ptr, lse_ptr, scale_log2,
    table_stride, budget, split,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (splits, Hk, B). A piece that is a whole row goes to ``out``, any other to ``piece_ptr`` and ``lse_ptr``."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, request = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = request * NUM_KV + head
    chosen = row
    if rows_ptr is not None:
        chosen = tl.load(rows_ptr + request) * NUM_KV + head
    count = tl.load(counts_ptr + chosen)
    first = tl.program_id(0) * split
    if first < count:
        group = tl.arange(0, BLOCK_G)
        dims = tl.arange(0, BLOCK_D)
        mask = (group < GROUP)[:, None] & (dims < DIM)[None, :]
        offsets = (row * GROUP + group)[:, None] * DIM + dims[None, :]
        q = tl.load(q_ptr + offsets, mask=mask, other=0.0)
        acc, total, peak = attend_places(
            q, k_ptr, v_ptr, table_ptr + request * table_stride, indices_ptr + chosen * budget, None, 0, head,
            first, tl.minimum(first + split, count), scale_log2, NUM_KV, GROUP, PAGE, DIM, BLOCK_D, BLOCK_G, BLOCK_N,
        )  # fmt: skip
        acc = acc / total[:, None]
        if count <= split:
            tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            piece = (row * tl.num_programs(0) + tl.program_id(0)) * GROUP + group
            tl.store(piece_ptr + piece[:, None] * DIM + dims[None, :], acc, mask=mask)
            tl.store(lse_ptr + piece, peak + tl.log2(total), mask=group < GROUP)


@triton.jit
def merge_pieces(piece_ptr, lse_ptr, pieces, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp merge of pieces of one head, ``stride`` rows apart: (weighted sum [BLOCK_D], total, peak), base 2."""
    dims = tl.arange(0, BLOCK_D)
    peak = -float("inf")
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, pieces, BLOCK):
        piece = start + tl.arange(0, BLOCK)
        live = piece < pieces
        lse = tl.load(lse_ptr + piece * stride, mask=live, other=-float("inf"))
        part = tl.load(
            piece_ptr + (piece * stride)[:, None] * DIM + dims[None, :],
            mask=live[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        weight = tl.exp2(lse - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weight, axis=0)
        acc = acc * shrink + tl.sum(part * weight[:, None], axis=0)
        peak = new_peak
    return acc, total, peak


@triton.jit
def _merge_kernel(
    counts_ptr,
    rows_ptr,
    out_ptr,
    piece_ptr,
    lse_ptr,
    split,
    splits,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (B * Hq,): merges the pieces of one request and head where there is more than one."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    query_row = tl.program_id(0).to(tl.int64)
    row, member = query_row // GROUP, query_row % GROUP
    chosen = row
    if rows_ptr is not None:
        chosen = tl.load(rows_ptr + row // NUM_KV) * NUM_KV + row % NUM_KV
    count = tl.load(counts_ptr + chosen)
    if count > split:
        base = row * splits * GROUP + member
        acc, total, _ = merge_pieces(
            piece_ptr + base * DIM, lse_ptr + base, tl.cdiv(count, split), GROUP, DIM, BLOCK_D, BLOCK
        )
        dims = tl.arange(0, BLOCK_D)
        tl.store(out_ptr + query_row * DIM + dims, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < DIM)


def split_size(rows: int, budget: int, programs: int) -> int:
    """Selected tokens per program, a power of two, so that ``rows`` rows of ``budget`` make at most ``programs``.

    Fewer where that would be more than LARGEST_SPLIT, more where it would be less than SMALLEST_SPLIT.
    """
    share = triton.cdiv(budget, max(1, programs // rows))
    return min(LARGEST_SPLIT, block_size(share, smallest=SMALLEST_SPLIT))


def tile_size(split: int, block_dim: int, itemsize: int) -> int:
    """Selected tokens that are attended at once, a power of two from 16 up to ``split``."""
    return min(split, max(16, TILE_BYTES // (block_dim * itemsize)))


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    out: Tensor,
    rows: Tensor | None = None,
) -> None:
    """See :func:`slipstream.kernels.reference_select.sparse_attention`. Reads nothing back to the host."""
    requests, num_q, dim = q.shape
    num_kv, page = k_pages.shape[1:3]
    budget = indices.shape[2]
    assert q.is_contiguous() and out.is_contiguous() and indices.is_contiguous() and counts.is_contiguous()
    assert k_pages.is_contiguous() and v_pages.is_contiguous() and q.dtype == k_pages.dtype
    if not requests:
        return
    group = num_q // num_kv
    split = split_size(requests * num_kv, budget, PROGRAMS_PER_PROCESSOR * num_processors(q.device))
    splits = triton.cdiv(budget, split)
    piece = torch.empty((requests * num_q * splits, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((requests * num_q * splits,), dtype=torch.float32, device=q.device)
    block_dim = block_size(dim, smallest=16)
    shape = {"NUM_KV": num_kv, "GROUP": group, "DIM": dim, "BLOCK_D": block_dim}
    _split_kernel[(splits, num_kv, requests)](
        q, k_pages, v_pages, page_table, indices, counts, rows, out, piece, lse, scale * LOG2_E, page_table.stride(0),
        budget, split, PAGE=page, BLOCK_G=block_size(group, smallest=16),
        BLOCK_N=tile_size(split, block_dim, k_pages.element_size()), **shape,
        **launch_options(q, num_warps=WARPS, num_stages=STAGES),
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(requests * num_q,)](
            counts, rows, out, piece, lse, split, splits, BLOCK=MERGE_TILE, **shape, **launch_options(q, num_warps=4),
        )  # fmt: skip
