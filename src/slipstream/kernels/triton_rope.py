"""One launch between the QKV projection and attention: q/k norm, rotary embedding, and the store into the pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options

HEADS_PER_PROGRAM = 4


@triton.jit
def _load_part(x_ptr, live, start: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x_ptr: [HEADS] pointers to heads. Columns start .. start + WIDTH as an fp32 block [HEADS, BLOCK], 0-padded."""
    cols = tl.arange(0, BLOCK)
    mask = live[:, None] & (cols < WIDTH)[None, :]
    return tl.load(x_ptr[:, None] + start + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_part(out_ptr, live, x, start: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    mask = live[:, None] & (cols < WIDTH)[None, :]
    tl.store(out_ptr[:, None] + start + cols[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _apply_norm(
    x, scale, weight_ptr, start: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):
    cols = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + start + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    normed = (x * scale[:, None]).to(DTYPE).to(tl.float32) * weight[None, :]
    # Rounded like the unfused model, which keeps the normed heads in its dtype.
    return normed.to(DTYPE).to(tl.float32)


@triton.jit
def _norm_rope(
    x_ptr,
    out_ptr,
    live,
    weight_ptr,
    cos_sin_ptr,
    eps,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """x_ptr, out_ptr: [HEADS] pointers to heads; cos_sin_ptr: this position's row of cosines then sines."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = _load_part(x_ptr, live, 0, HALF, HALF_BLOCK)
    second = _load_part(x_ptr, live, HALF, HALF, HALF_BLOCK)
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    if REST > 0:
        rest = _load_part(x_ptr, live, 2 * HALF, REST, REST_BLOCK)
        square += tl.sum(rest * rest, axis=1)
    if NORM:
        scale = tl.rsqrt(square / (2 * HALF + REST) + eps)
        first = _apply_norm(first, scale, weight_ptr, 0, HALF, HALF_BLOCK, dtype)
        second = _apply_norm(second, scale, weight_ptr, HALF, HALF, HALF_BLOCK, dtype)
        if REST > 0:
            rest = _apply_norm(rest, scale, weight_ptr, 2 * HALF, REST, REST_BLOCK, dtype)
    cols = tl.arange(0, HALF_BLOCK)
    cos = tl.load(cos_sin_ptr + cols, mask=cols < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + HALF + cols, mask=cols < HALF, other=0.0)[None, :]
    _store_part(out_ptr, live, first * cos - second * sin, 0, HALF, HALF_BLOCK)
    _store_part(out_ptr, live, second * cos + first * sin, HALF, HALF, HALF_BLOCK)
    if REST > 0:
        _store_part(out_ptr, live, rest, 2 * HALF, REST, REST_BLOCK)


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_pages_ptr,
    v_pages_ptr,
    q_ptr,
    qkv_stride,
    cos_sin_stride,
    eps,
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, tiles of HEADS heads: those of q, then k, then v)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    q_tiles: tl.constexpr = (NUM_Q + HEADS - 1) // HEADS
    kv_tiles: tl.constexpr = (NUM_KV + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    x_ptr = qkv_ptr + token * qkv_stride
    cos_sin_row = cos_sin_ptr + tl.load(positions_ptr + token) * cos_sin_stride
    if tile < q_tiles:
        head = tile * HEADS + tl.arange(0, HEADS)
        target = q_ptr + (token * NUM_Q + head) * DIM
        _norm_rope(
            x_ptr + head * DIM, target, head < NUM_Q, q_weight_ptr, cos_sin_row, eps,
            Q_NORM, HALF, REST, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        kv_tile = tile - q_tiles
        is_value = kv_tile >= kv_tiles
        head = (kv_tile % kv_tiles) * HEADS + tl.arange(0, HEADS)
        live = head < NUM_KV
        slot = tl.load(slots_ptr + token)
        row = ((slot // PAGE) * NUM_KV + head) * PAGE + slot % PAGE
        if is_value:
            value = _load_part(x_ptr + (NUM_Q + NUM_KV + head) * DIM, live, 0, DIM, DIM_BLOCK)
            _store_part(v_pages_ptr + row * DIM, live, value, 0, DIM, DIM_BLOCK)
        else:
            _norm_rope(
                x_ptr + (NUM_Q + head) * DIM, k_pages_ptr + row * DIM, live, k_weight_ptr, cos_sin_row, eps,
                K_NORM, HALF, REST, HALF_BLOCK, REST_BLOCK,
            )  # fmt: skip


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Tensor:
    """See :func:`slipstream.kernels.reference.qk_norm_rope_store`. qkv needs contiguous rows, the pages no gaps."""
    num_kv, page, dim = k_pages.shape[1:]
    tokens = qkv.shape[0]
    num_q = qkv.shape[1] // dim - 2 * num_kv
    half = cos_sin.shape[1] // 2
    rest = dim - 2 * half
    assert k_pages.is_contiguous() and v_pages.is_contiguous(), "a layer's pages must be one block of memory"
    q = torch.empty((tokens, num_q, dim), dtype=qkv.dtype, device=qkv.device)
    if not tokens:
        return q
    heads = HEADS_PER_PROGRAM
    grid = (tokens, triton.cdiv(num_q, heads) + 2 * triton.cdiv(num_kv, heads))
    _qk_norm_rope_store_kernel[grid](
        qkv, qkv if q_weight is None else q_weight, qkv if k_weight is None else k_weight, cos_sin, positions, slots,
        k_pages, v_pages, q, qkv.stride(0), cos_sin.stride(0), eps,
        NUM_Q=num_q, NUM_KV=num_kv, PAGE=page, DIM=dim, HALF=half, REST=rest,
        HALF_BLOCK=block_size(half), REST_BLOCK=block_size(rest), DIM_BLOCK=block_size(dim), HEADS=heads,
        Q_NORM=q_weight is not None, K_NORM=k_weight is not None,
        **launch_options(qkv, num_warps=1),
    )  # fmt: skip
    return q
