"""TOVA (arXiv 2401.06104) on the device: attention over whole seats that also says what each slot weighs.

The seats are cut as in :mod:`slipstream.kernels.triton_sparse`, and the scores of all heads are kept; then the pieces
are merged, while other programs turn the scores of a tile of slots into weights and sum them over the heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options, num_processors
from slipstream.kernels.reference import shares_rows
from slipstream.kernels.triton_mla import split_pieces
from slipstream.kernels.triton_sparse import (
    LOG2_E,
    MERGE_TILE,
    PROGRAMS_PER_PROCESSOR,
    STAGES,
    WARPS,
    attend_places,
    merge_pieces,
    split_size,
    tile_size,
)

WEIGH_SCORES = 4096
"""Scores, heads times slots, that one program turns into weights."""


@triton.jit
def _seat_kernel(
    q_ptr, k_ptr, v_ptr, rows_ptr, filled_ptr, scores_ptr, piece_ptr, lse_ptr, scale_log2, split,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (splits, Hk, B): a piece of the attention of one seat and KV head, and all its scores, base 2."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, request = tl.program_id(1), tl.program_id(2).to(tl.int64)
    filled = tl.load(filled_ptr + request)
    first = tl.program_id(0) * split
    if first < filled:
        row = request * NUM_KV + head
        group = tl.arange(0, BLOCK_G)
        dims = tl.arange(0, BLOCK_D)
        mask = (group < GROUP)[:, None] & (dims < DIM)[None, :]
        q = tl.load(q_ptr + (row * GROUP + group)[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
        # A seat is a request whose only page has all its slots.
        acc, total, peak = attend_places(
            q, k_ptr, v_ptr, rows_ptr + request, None, scores_ptr + row * GROUP * SLOTS, SLOTS, head,
            first, tl.minimum(first + split, filled), scale_log2, NUM_KV, GROUP, SLOTS, DIM, BLOCK_D, BLOCK_G, BLOCK_N,
        )  # fmt: skip
        piece = (row * tl.num_programs(0) + tl.program_id(0)) * GROUP + group
        tl.store(piece_ptr + piece[:, None] * DIM + dims[None, :], acc / total[:, None], mask=mask)
        tl.store(lse_ptr + piece, peak + tl.log2(total), mask=group < GROUP)


@triton.jit
def _merge_head(
    out_ptr, piece_ptr, lse_ptr, query_row, live, splits,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    base = query_row // GROUP * splits * GROUP + query_row % GROUP
    acc, total, _ = merge_pieces(piece_ptr + base * DIM, lse_ptr + base, live, GROUP, DIM, BLOCK_D, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    out = tl.where(live > 0, acc / total, 0.0)
    tl.store(out_ptr + query_row * DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < DIM)


@triton.jit
def _weigh_slots(
    weight_ptr, scores_ptr, lse_ptr, tile, filled, live, splits,
    NUM_Q: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums of weights in a tile of slots of one request."""
    heads = tl.arange(0, BLOCK_Q)[:, None]
    pieces = tl.arange(0, BLOCK_S)[None, :]
    at = (heads // GROUP * splits + pieces) * GROUP + heads % GROUP
    lse = tl.load(lse_ptr + at, mask=(heads < NUM_Q) & (pieces < live), other=-float("inf"))
    peak = tl.maximum(tl.max(lse, axis=1), -1e38)
    lse = peak + tl.log2(tl.sum(tl.exp2(lse - peak[:, None]), axis=1))
    slots = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (heads < NUM_Q) & (slots < filled)[None, :]
    scores = tl.load(scores_ptr + heads * SLOTS + slots[None, :], mask=mask, other=-float("inf"))
    weight = tl.sum(tl.where(mask, tl.exp2(scores - lse[:, None]), 0.0), axis=0)
    tl.store(weight_ptr + slots, weight, mask=slots < SLOTS)


@triton.jit
def _merge_and_weigh_kernel(
    filled_ptr, scores_ptr, piece_ptr, lse_ptr, out_ptr, weight_ptr, split, splits,
    NUM_Q: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (Hq + tiles, B): the first Hq programs merge a head each, the others weigh a tile of slots each."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    part, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    filled = tl.load(filled_ptr + request)
    live = tl.cdiv(filled, split)
    if part < NUM_Q:
        _merge_head(out_ptr, piece_ptr, lse_ptr, request * NUM_Q + part, live, splits, GROUP, DIM, BLOCK_D, BLOCK)
    else:
        _weigh_slots(
            weight_ptr + request * SLOTS, scores_ptr + request * NUM_Q * SLOTS, lse_ptr + request * NUM_Q * splits,
            part - NUM_Q, filled, live, splits, NUM_Q, GROUP, SLOTS, BLOCK_Q, BLOCK_S, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _lowest_kernel(weight_ptr, filled_ptr, victims_ptr, slots, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (B,): the first of the lowest weights."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    request = tl.program_id(0).to(tl.int64)
    ids, filled = tl.arange(0, BLOCK), tl.load(filled_ptr + request)
    weight = tl.load(weight_ptr + request * slots + ids, mask=ids < filled, other=float("inf"))
    weight = tl.where(weight == weight, weight, -1.0)
    victim = tl.min(tl.where(weight == tl.min(weight, axis=0), ids, 0x7FFFFFFF), axis=0)
    tl.store(victims_ptr + request, victim.to(tl.int64))


def tova_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, filled: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`slipstream.kernels.reference_select.tova_attention`. Reads nothing back to the host."""
    requests, num_q, dim = q.shape
    num_kv, slots = k.shape[1:3]
    latent, value_dim = shares_rows(k, v), v.shape[3]
    assert q.is_contiguous() and k.is_contiguous() and (latent or v.is_contiguous()) and q.dtype == k.dtype
    out = q.new_empty((requests, num_q, value_dim))
    weight = torch.empty((requests, slots), dtype=torch.float32, device=q.device)
    if not requests:
        return out, weight
    group, block_q = num_q // num_kv, block_size(num_q)
    block_c = max(16, WEIGH_SCORES // block_q)
    tiles = triton.cdiv(slots, block_c)
    scores = torch.empty((requests, num_q, slots), dtype=torch.float32, device=q.device)
    block_dim = block_size(value_dim, smallest=16)
    shape = {"GROUP": group, "SLOTS": slots, "DIM": value_dim, "BLOCK_D": block_dim}
    if latent:
        piece, lse, split, splits = split_pieces(
            q, k, value_dim, rows.unsqueeze(1), None, filled, None, scores, scale, out, slots
        )
    else:
        split = split_size(requests * num_kv, slots, PROGRAMS_PER_PROCESSOR * num_processors(q.device))
        splits = triton.cdiv(slots, split)
        piece = torch.empty((requests * num_q * splits, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((requests * num_q * splits,), dtype=torch.float32, device=q.device)
        _seat_kernel[(splits, num_kv, requests)](
            q, k, v, rows, filled, scores, piece, lse, scale * LOG2_E, split, NUM_KV=num_kv,
            BLOCK_G=block_size(group, smallest=16), BLOCK_N=tile_size(split, block_dim, k.element_size()), **shape,
            **launch_options(q, num_warps=WARPS, num_stages=STAGES),
        )  # fmt: skip
    _merge_and_weigh_kernel[(num_q + tiles, requests)](
        filled, scores, piece, lse, out, weight, split, splits, NUM_Q=num_q, BLOCK_Q=block_q,
        BLOCK_S=block_size(splits), BLOCK_C=block_c, BLOCK=MERGE_TILE, **shape, **launch_options(q, num_warps=4),
    )  # fmt: skip
    return out, weight


def lowest_slots(weights: Tensor, filled: Tensor) -> Tensor:
    """See :func:`slipstream.kernels.reference_select.lowest_slots`. weights: contiguous."""
    (requests, slots), victims = weights.shape, torch.empty(len(weights), dtype=torch.int64, device=weights.device)
    assert weights.is_contiguous()
    if requests:
        options = launch_options(weights, num_warps=4)
        _lowest_kernel[(requests,)](weights, filled, victims, slots, BLOCK=block_size(slots), **options)
    return victims
