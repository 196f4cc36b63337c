"""One launch between MLA's projections and attention: norm of the latents, rotary embedding, store of the rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options

HEADS_PER_PROGRAM = 8


@triton.jit
def _turn(x_ptr, out_ptr, cos_sin_ptr, mask, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """x_ptr, out_ptr: [HEADS, 1] pointers to rotary parts; cos_sin_ptr: this position's row of cosines then sines."""
    cols = tl.arange(0, HALF_BLOCK)
    mask = mask & (cols < HALF)[None, :]
    cos = tl.load(cos_sin_ptr + cols, mask=cols < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + HALF + cols, mask=cols < HALF, other=0.0)[None, :]
    first = tl.load(x_ptr + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + cols[None, :], (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + HALF + cols[None, :], (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _turn_heads(
    heads_ptr, q_ptr, cos_sin_row, token, tile, heads_stride, NUM_Q: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The rotary columns of HEADS heads of a token into those of its queries."""
    head = (tile * HEADS + tl.arange(0, HEADS))[:, None]
    heads_ptr += token * heads_stride + HEAD - 2 * HALF
    out_ptr = q_ptr + (token * NUM_Q + head) * (VALUE + 2 * HALF) + VALUE
    _turn(heads_ptr + head * HEAD, out_ptr, cos_sin_row, head < NUM_Q, HALF, HALF_BLOCK)


@triton.jit
def _mla_rope_kernel(
    heads_ptr,
    cos_sin_ptr,
    positions_ptr,
    q_ptr,
    heads_stride,
    cos_sin_stride,
    NUM_Q: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, tiles of HEADS query heads)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    cos_sin_row = cos_sin_ptr + tl.load(positions_ptr + token) * cos_sin_stride
    _turn_heads(
        heads_ptr,
        q_ptr,
        cos_sin_row,
        token,
        tl.program_id(1),
        heads_stride,
        NUM_Q,
        HEAD,
        VALUE,
        HALF,
        HALF_BLOCK,
        HEADS,
    )


@triton.jit
def _mla_rope_store_kernel(
    heads_ptr, latent_ptr, weight_ptr, cos_sin_ptr, positions_ptr, slots_ptr, k_pages_ptr, q_ptr, heads_stride,
    latent_stride, cos_sin_stride, eps,
    NUM_Q: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, 1 + tiles of HEADS query heads): the first program of a token stores its row, the others turn heads."""
    row_width: tl.constexpr = VALUE + 2 * HALF
    cols = tl.arange(0, VALUE_BLOCK)
    weight = tl.load(weight_ptr + cols, mask=cols < VALUE, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos_sin_row = cos_sin_ptr + tl.load(positions_ptr + token) * cos_sin_stride
    if tile == 0:
        row_ptr, out_ptr = latent_ptr + token * latent_stride, k_pages_ptr + tl.load(slots_ptr + token) * row_width
        x = tl.load(row_ptr + cols, mask=cols < VALUE, other=0.0)
        x32 = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x32 * x32, axis=0) / VALUE + eps)
        normed = (x32 * scale).to(x.dtype).to(tl.float32) * weight
        tl.store(out_ptr + cols, normed.to(x.dtype), mask=cols < VALUE)
        one = tl.zeros((1, 1), tl.int64)
        _turn(row_ptr + VALUE + one, out_ptr + VALUE + one, cos_sin_row, one == 0, HALF, HALF_BLOCK)
    else:
        _turn_heads(
            heads_ptr, q_ptr, cos_sin_row, token, tile - 1, heads_stride, NUM_Q, HEAD, VALUE, HALF, HALF_BLOCK, HEADS
        )


def mla_rope_store(
    heads: Tensor,
    latent: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
) -> Tensor:
    """See :func:`slipstream.kernels.reference_mla.mla_rope_store`. Heads and latent of a token are contiguous."""
    tokens, num_q, head = heads.shape
    width, half = k_pages.shape[3], cos_sin.shape[1] // 2
    assert k_pages.is_contiguous() and heads.stride()[1:] == (head, 1) and latent.stride(1) == 1
    q = heads.new_empty((tokens, num_q, width))
    if tokens:
        _mla_rope_store_kernel[(tokens, 1 + triton.cdiv(num_q, HEADS_PER_PROGRAM))](
            heads, latent, weight, cos_sin, positions, slots, k_pages, q,
            heads.stride(0), latent.stride(0), cos_sin.stride(0), eps,
            NUM_Q=num_q, HEAD=head, VALUE=width - 2 * half, HALF=half, HALF_BLOCK=block_size(half),
            VALUE_BLOCK=block_size(width - 2 * half), HEADS=HEADS_PER_PROGRAM,
            **launch_options(heads, num_warps=2),
        )  # fmt: skip
    return q


def mla_rope(heads: Tensor, cos_sin: Tensor, positions: Tensor, width: int) -> Tensor:
    """See :func:`slipstream.kernels.reference_mla.mla_rope`. The heads of a token are contiguous."""
    (tokens, num_q, head), half = heads.shape, cos_sin.shape[1] // 2
    assert heads.stride()[1:] == (head, 1)
    q = heads.new_empty((tokens, num_q, width))
    if tokens:
        _mla_rope_kernel[(tokens, triton.cdiv(num_q, HEADS_PER_PROGRAM))](
            heads, cos_sin, positions, q, heads.stride(0), cos_sin.stride(0),
            NUM_Q=num_q, HEAD=head, VALUE=width - 2 * half, HALF=half, HALF_BLOCK=block_size(half),
            HEADS=HEADS_PER_PROGRAM, **launch_options(heads, num_warps=2),
        )  # fmt: skip
    return q
