"""Rows of a query window on the device: into it from rotated queries, and out of it rotated to the next position.

Used by every kernel that predicts. All arithmetic is spelt as fused multiply-adds, so that a query has the same bits
whether a kernel of its own has pushed it or the one that predicts from it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _angles(cos_sin_ptr, position, last, stride, dims, DIM: tl.constexpr, HALF: tl.constexpr):
    """Cosine and sine of every dimension at a position of the table, 1 and 0 where nothing is rotated; [D] each."""
    row = cos_sin_ptr + tl.minimum(position, last) * stride
    rotated = (dims >= DIM - 2 * HALF) & (dims < DIM)
    pair = tl.where(rotated, dims - (DIM - 2 * HALF), 0) % HALF
    cos = tl.load(row + pair, mask=rotated, other=1.0)
    return cos, tl.load(row + HALF + pair, mask=rotated, other=0.0)


@triton.jit
def _partner(dims, DIM: tl.constexpr, HALF: tl.constexpr):
    """The dimension that each one is rotated with, and the sign that its sine has there."""
    upper = (dims >= DIM - HALF) & (dims < DIM)
    lower = (dims >= DIM - 2 * HALF) & (dims < DIM - HALF)
    return tl.where(lower, dims + HALF, tl.where(upper, dims - HALF, dims)), tl.where(lower, -1.0, 1.0)


@triton.jit
def load_plain(
    q_ptr, cos_sin_ptr, position, last, stride, dims, live,
    DIM: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """A query without its rotation, in its own dtype. q_ptr: one pointer or [H, 1] of them; dims: [D] or [1, D].

    live: masks heads, broadcast with ``dims``. HALF: rotated pairs, from the model's table [last + 1, 2 * HALF]; they
    are the last columns of DIM.
    """
    mask = live & (dims < DIM)
    x = tl.load(q_ptr + dims, mask=mask, other=0.0)
    if ROTATE:
        cos, sin = _angles(cos_sin_ptr, position, last, stride, dims, DIM, HALF)
        partner, sign = _partner(dims, DIM, HALF)
        other = tl.load(q_ptr + partner, mask=mask, other=0.0).to(tl.float32)
        square = tl.fma(cos, cos, sin * sin)
        # The inverse of a rotation is the rotation by the negative sine.
        x = tl.fma(x.to(tl.float32), cos / square, -(other * (sign * sin / square))).to(q_ptr.dtype.element_ty)
    return x


@triton.jit
def store_rotated(
    out_ptr, x, cos_sin_ptr, position, last, stride, dims,
    DIM: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """x: [D] fp32, rotated to ``position`` and stored in the dtype of ``out_ptr``."""
    if ROTATE:
        cos, sin = _angles(cos_sin_ptr, position, last, stride, dims, DIM, HALF)
        partner, sign = _partner(dims, DIM, HALF)
        x = tl.fma(x, cos, tl.gather(x, partner, 0) * (sign * sin))
    tl.store(out_ptr + dims, x.to(out_ptr.dtype.element_ty), mask=dims < DIM)


@triton.jit
def slot_of(ages, newest_slot, W: tl.constexpr):
    """Where in the ring the query of an age (0 is the newest) lies; 0 for ages that a window has not."""
    slots = newest_slot - ages
    return tl.maximum(tl.where(slots < 0, slots + W, slots), 0)


@triton.jit
def push_newest(
    q_ptr, window_ptr, newest_slot, cos_sin_ptr, position, last, stride, dims,
    STRIDE: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Put one head's newest query into its window, before any thread of this program reads from there.

    STRIDE: from slot to slot of ``window_ptr``. No other program touches this head's window.
    """
    newest = load_plain(q_ptr, cos_sin_ptr, position, last, stride, dims, dims < DIM, DIM, HALF, ROTATE)
    tl.store(window_ptr + newest_slot * STRIDE + dims, newest, mask=dims < DIM)
    tl.debug_barrier()


@triton.jit
def load_window(window_ptr, slots, live, dims, STRIDE: tl.constexpr, DIM: tl.constexpr):
    """Rows ``slots`` [R] of one head's window, zeros where not ``live``: [R, D]."""
    mask = live[:, None] & (dims < DIM)[None, :]
    return tl.load(window_ptr + slots[:, None] * STRIDE + dims[None, :], mask=mask, other=0.0)
