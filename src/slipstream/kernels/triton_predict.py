"""Query windows, predictors and stored sets on the device. Ridge has a file of its own, :mod:`triton_ridge`.

A window of W queries of one head is read by one program; what the other predictors compute is a few operations per
element, so that memory decides: 16 KB per head at W = 64, D = 128 in 16 bits.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options
from slipstream.kernels.predict import LARGEST_SYSTEM
from slipstream.kernels.reference_predict import FEWEST, FLOOR, TINY
from slipstream.kernels.triton_ridge import ridge_kernel
from slipstream.kernels.triton_window import load_plain, load_window, push_newest, slot_of, store_rotated

LOG2_E = 1.4426950408889634
HEADS_PER_PROGRAM = 4  # of a push
TILE = 32  # queries of a window that are read at once; of heads wider than 128 so many fewer
WARPS = 4
SMALL_SYSTEM = 64
"""Unknowns that one warp solves in blocks of 16; larger systems take four warps and blocks of 32."""
CHUNK = 32  # dimensions that the Gram matrix is summed over at once
PLACES = 1024  # of a stored set that are written at once


@triton.jit
def _push_kernel(
    q_ptr, positions_ptr, seats_ptr, cos_sin_ptr, window_ptr, q_stride, last, cos_sin_stride,
    W: tl.constexpr, NUM_Q: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, tiles of HEADS heads)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    position = tl.load(positions_ptr + token)
    x = load_plain(
        q_ptr + token * q_stride + heads * DIM, cos_sin_ptr, position, last, cos_sin_stride, dims, heads < NUM_Q,
        DIM, HALF, ROTATE,
    )  # fmt: skip
    row = tl.load(seats_ptr + token) * W + position % W
    tl.store(window_ptr + (row * NUM_Q + heads) * DIM + dims, x, mask=(heads < NUM_Q) & (dims < DIM))


def push_queries(q: Tensor, positions: Tensor, seats: Tensor, cos_sin: Tensor, window: Tensor, rotate: bool) -> None:
    """See :func:`slipstream.kernels.reference_predict.push_queries`. The rows of q need no more than unit strides."""
    tokens, num_q, dim = q.shape
    assert window.is_contiguous() and q.dtype == window.dtype and q.stride()[1:] == (dim, 1)
    if tokens:
        _push_kernel[(tokens, triton.cdiv(num_q, HEADS_PER_PROGRAM))](
            q, positions, seats, cos_sin, window, q.stride(0), len(cos_sin) - 1, cos_sin.stride(0),
            W=window.shape[1], NUM_Q=num_q, DIM=dim, HALF=cos_sin.shape[1] // 2, ROTATE=rotate,
            HEADS=HEADS_PER_PROGRAM, BLOCK_D=block_size(dim), **launch_options(q, num_warps=1),
        )  # fmt: skip


@triton.jit
def _cosines(x, query, size, TINY: tl.constexpr):
    """Rows of x [R, D] with query [D], whose norm is ``size``: [R]."""
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    return tl.sum(x * query[None, :], axis=1) / tl.maximum(norm * size, TINY)


@triton.jit
def _recall_kernel(
    q_ptr, window_ptr, seats_ptr, positions_ptr, first_ptr, cos_sin_ptr, out_ptr, strength, last, cos_sin_stride,
    KIND: tl.constexpr, W: tl.constexpr, NUM_Q: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    ROTATE: tl.constexpr, PUSH: tl.constexpr, FEWEST: tl.constexpr, TINY: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (Hq, B). strength: beta * log2(e) of "analog", log2 of the decay of "ema"; the others do not read it."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seat, position = tl.load(seats_ptr + request), tl.load(positions_ptr + request)
    number = tl.minimum(tl.maximum(position - tl.load(first_ptr + seat) + 1, 1), W).to(tl.int32)
    newest_slot = (position % W).to(tl.int32)
    stride: tl.constexpr = NUM_Q * DIM
    window_ptr += seat * W * stride + head * DIM
    row = (request * NUM_Q + head) * DIM
    dims = tl.arange(0, BLOCK_D)
    places = tl.arange(0, TILE)
    if PUSH:
        push_newest(
            q_ptr + row, window_ptr, newest_slot, cos_sin_ptr, position, last, cos_sin_stride, dims,
            stride, DIM, HALF, ROTATE,
        )  # fmt: skip
    newest = tl.load(window_ptr + newest_slot * stride + dims, mask=dims < DIM, other=0.0)
    guess = newest.to(tl.float32)
    if KIND != "last":
        if number >= FEWEST:
            acc = tl.zeros((BLOCK_D,), tl.float32)
            total = 0.0
            for start in range(0, W, TILE):  # the mean, or that of "ema"
                ages = start + places
                live = ages < number
                x = load_window(window_ptr, slot_of(ages, newest_slot, W), live, dims, stride, DIM)
                weight = tl.where(live, 1.0, 0.0)
                if KIND == "ema":
                    weight = tl.where(live, tl.exp2(ages.to(tl.float32) * strength), 0.0)
                acc += tl.sum(weight[:, None] * x.to(tl.float32), axis=0)
                total += tl.sum(weight, axis=0)
            guess = acc / total
            if KIND == "analog":
                mean = guess
                query = newest.to(tl.float32) - mean
                size = tl.sqrt(tl.sum(query * query, axis=0))
                acc = tl.zeros((BLOCK_D,), tl.float32)
                total = 0.0
                peak = -1e30
                for start in range(0, W, TILE):  # y came after x, and counts by how much x is like the newest
                    ages = 1 + start + places
                    live = ages < number
                    x = load_window(window_ptr, slot_of(ages, newest_slot, W), live, dims, stride, DIM)
                    y = load_window(window_ptr, slot_of(ages - 1, newest_slot, W), live, dims, stride, DIM)
                    cosine = _cosines(x.to(tl.float32) - mean[None, :], query, size, TINY)
                    logits = tl.where(live, cosine * strength, -float("inf"))
                    new_peak = tl.maximum(peak, tl.max(logits, axis=0))
                    weight, shrink = tl.exp2(logits - new_peak), tl.exp2(peak - new_peak)
                    acc = acc * shrink + tl.sum(weight[:, None] * y.to(tl.float32), axis=0)
                    total = total * shrink + tl.sum(weight, axis=0)
                    peak = new_peak
                guess = acc / total
    store_rotated(out_ptr + row, guess, cos_sin_ptr, position + 1, last, cos_sin_stride, dims, DIM, HALF, ROTATE)


def _predict(
    q: Tensor | None,
    positions: Tensor,
    seats: Tensor,
    first: Tensor,
    cos_sin: Tensor,
    window: Tensor,
    kind: str,
    strength: float,
    rotate: bool,
) -> Tensor:
    """One launch; with q [B, Hq, D] it also pushes."""
    size, num_q, dim = window.shape[1:]
    assert window.is_contiguous() and (q is None or (q.is_contiguous() and q.dtype == window.dtype))
    out = window.new_empty((len(seats), num_q, dim))
    if not len(seats):
        return out
    args = (window if q is None else q, window, seats, positions, first, cos_sin, out)
    table = (len(cos_sin) - 1, cos_sin.stride(0))
    shape = {"W": size, "NUM_Q": num_q, "DIM": dim, "HALF": cos_sin.shape[1] // 2, "BLOCK_D": block_size(dim, 16)}
    mode = {"ROTATE": rotate, "PUSH": q is not None, "FEWEST": FEWEST, "TINY": TINY}
    grid = (num_q, len(seats))
    if kind != "ridge":
        scale = {"analog": strength * LOG2_E, "ema": math.log2(max(strength, TINY))}.get(kind, 0.0)
        tile = min(TILE, max(4, TILE * 128 // shape["BLOCK_D"]), block_size(size))
        _recall_kernel[grid](
            *args, scale, *table, KIND=kind, TILE=tile, **shape, **mode, **launch_options(window, num_warps=WARPS)
        )
        return out
    assert size <= LARGEST_SYSTEM, f"ridge solves for at most {LARGEST_SYSTEM} queries, not {size}"
    unknowns = block_size(size, smallest=16)
    block, warps = (16, 1) if unknowns <= SMALL_SYSTEM else (32, 4)
    ridge_kernel[grid](
        *args, strength, *table, FLOOR=FLOOR, CHUNK=min(CHUNK, shape["BLOCK_D"]), N=block, BLOCKS=unknowns // block,
        **shape, **mode, **launch_options(window, num_warps=warps),
    )  # fmt: skip
    return out


def predict_queries(
    window: Tensor,
    seats: Tensor,
    positions: Tensor,
    first: Tensor,
    cos_sin: Tensor,
    kind: str,
    strength: float,
    rotate: bool,
) -> Tensor:
    """See :func:`slipstream.kernels.reference_predict.predict_queries`."""
    return _predict(None, positions, seats, first, cos_sin, window, kind, strength, rotate)


def push_and_predict(
    q: Tensor,
    positions: Tensor,
    seats: Tensor,
    first: Tensor,
    cos_sin: Tensor,
    window: Tensor,
    kind: str,
    strength: float,
    rotate: bool,
) -> Tensor:
    """See :func:`slipstream.kernels.reference_predict.push_and_predict`."""
    return _predict(q, positions, seats, first, cos_sin, window, kind, strength, rotate)


@triton.jit
def _store_kernel(
    indices_ptr,
    counts_ptr,
    seats_ptr,
    lengths_ptr,
    all_indices_ptr,
    all_counts_ptr,
    NUM_KV: tl.constexpr,
    BUDGET: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of BLOCK places, Hk, B)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, request = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, target = request * NUM_KV + head, tl.load(seats_ptr + request) * NUM_KV + head
    length, count = tl.load(lengths_ptr + request), tl.load(counts_ptr + row)
    count = tl.where(length > 0, count, -1)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.load(indices_ptr + row * (BUDGET - 1) + places, mask=places < count, other=-1)
    tokens = tl.where(places == count, length, tokens)
    tl.store(all_indices_ptr + target * BUDGET + places, tokens, mask=places < BUDGET)
    if tl.program_id(0) == 0:
        tl.store(all_counts_ptr + target, count + 1)


def store_sets(
    indices: Tensor, counts: Tensor, seats: Tensor, lengths: Tensor, all_indices: Tensor, all_counts: Tensor
) -> None:
    """See :func:`slipstream.kernels.reference_predict.store_sets`."""
    requests, num_kv, budget = indices.shape[0], *all_indices.shape[1:]
    assert all(x.is_contiguous() for x in (indices, counts, all_indices, all_counts)) and indices.shape[2] == budget - 1
    block = min(PLACES, block_size(budget))
    if requests:
        _store_kernel[(triton.cdiv(budget, block), num_kv, requests)](
            indices, counts, seats, lengths, all_indices, all_counts, NUM_KV=num_kv, BUDGET=budget, BLOCK=block,
            **launch_options(indices, num_warps=4),
        )  # fmt: skip


@triton.jit
def _check_kernel(
    q_ptr,
    predicted_ptr,
    seats_ptr,
    lengths_ptr,
    threshold_ptr,
    flagged_ptr,
    counter_ptr,
    threshold_stride,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TINY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (Hk, B)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    members, dims = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (members < GROUP) & (dims < DIM)
    at = (head * GROUP + members) * DIM + dims
    true = tl.load(q_ptr + request * NUM_KV * GROUP * DIM + at, mask=mask, other=0.0).to(tl.float32)
    seat = tl.load(seats_ptr + request)
    expected = tl.load(predicted_ptr + seat * NUM_KV * GROUP * DIM + at, mask=mask, other=0.0).to(tl.float32)
    size = tl.sqrt(tl.sum(true * true, axis=1)) * tl.sqrt(tl.sum(expected * expected, axis=1))
    # tl.maximum would make a norm that is no number the smallest one, and the head look well predicted.
    cosine = tl.sum(true * expected, axis=1) / tl.where(size < TINY, TINY, size)
    mean = tl.sum(cosine, axis=0) / GROUP
    good = mean >= tl.load(threshold_ptr + head * threshold_stride)
    flagged = tl.where(good, 0, tl.load(lengths_ptr + request))
    tl.store(flagged_ptr + request * NUM_KV + head, flagged)
    tl.atomic_add(counter_ptr, (flagged > 0).to(tl.int64), mask=flagged > 0, sem="relaxed")


def check_queries(
    q: Tensor,
    predicted: Tensor,
    seats: Tensor,
    lengths: Tensor,
    num_kv: int,
    threshold: Tensor,
    flagged_lengths: Tensor,
    counter: Tensor,
) -> None:
    """See :func:`slipstream.kernels.reference_predict.check_queries`."""
    requests, num_q, dim = q.shape
    assert q.is_contiguous() and predicted.is_contiguous() and flagged_lengths.is_contiguous()
    group = num_q // num_kv
    if requests:
        _check_kernel[(num_kv, requests)](
            q, predicted, seats, lengths, threshold, flagged_lengths, counter, threshold.stride(0) if threshold.dim()
            else 0, NUM_KV=num_kv, GROUP=group, DIM=dim, BLOCK_G=block_size(group), BLOCK_D=block_size(dim), TINY=TINY,
            **launch_options(q, num_warps=1),
        )  # fmt: skip
