"""Ridge regression over a window of queries: one warp solves one head's system, all heads of a layer in one launch.

The Gram matrix of W queries is one tl.dot: products of 16-bit numbers are exact in fp32, so it is made of the queries
as they are and centred afterwards (fp32 queries before). Then a block LDL^T in 16 x 16 blocks that never leave the
registers: a diagonal block is inverted by Gauss-Jordan sweeps, two pivots per exchange between lanes, and what is below
and behind it is tl.dot in three tf32 parts. Above 64 unknowns it is four warps and 32 x 32 blocks.

Why a direct solve: eps = lambda * mean diagonal bounds the condition number by 1 + W / lambda (641 at the defaults), so
fp32 needs no pivoting. Conjugate gradients would take some 40 steps on the worst spectra, each a product with all of
the matrix: as many instructions and as long a chain, and no number of steps that is enough for every window.

What it costs at W = 64, D = 128 in bf16, counted in sm_90 code: 10,300 instructions of one warp per head (5,100 of them
32 double sweeps of 158, 1,400 in 16 products, 600 for the Gram matrix and its 256 mma, 900 for the weighted sum), 1,350
shuffles, 248 registers, no spill, so 8 heads on a processor at once. 1024 heads (B = 32) are 7.8 a processor, two a
scheduler: 21,000 issue slots, 12 us at 1.75 GHz if nothing stalls; 16.8 MB of windows are 4.2 us, under it. 256 heads
(B = 8) are bound by the chain: 32 sweeps of some 250 cycles, the products and two passes over memory, about 9 us.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Tuples grow while a kernel is compiled; mypy reads them as Python's.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.triton_window import load_window, push_newest, slot_of, store_rotated

HEAVY = tl.constexpr(1e25)
"""Diagonal of an unknown that is none, where those of the others are between 1 and some thousands."""


@triton.jit
def _column(x, cols, at):
    """Column ``at`` of x [N, N]: [N]. Of a symmetric x it is the row too, by fewer exchanges between lanes."""
    return tl.sum(tl.where(cols == at, x, 0.0), axis=1)


@triton.jit
def _scalar(x, index, at):
    return tl.sum(tl.where(index == at, x, 0.0), axis=0)


@triton.jit
def _minus_inverse(x, N: tl.constexpr):
    """x: [N, N] fp32, symmetric and positive definite -> minus its inverse, by sweeps.

    The sweep of pivot k: x_kk -> -1 / x_kk, x_ik -> x_ik / x_kk, x_ij -> x_ij - x_ik x_kj / x_kk. With row and column k
    set to zero first this is one outer product u w^T, u = column / x_kk and w = row, with -1 at place k. The row and
    column of a second pivot are fetched together with those of the first, and taken through its sweep by hand.
    """
    places = tl.arange(0, N)
    rows, cols = places[:, None], places[None, :]
    for k in range(0, N, 2):
        line0, line1 = _column(x, cols, k), _column(x, cols, k + 1)
        pivot, beside, below = _scalar(line0, places, k), _scalar(line0, places, k + 1), _scalar(line1, places, k + 1)
        inverse = 1.0 / pivot
        w0 = tl.where(places == k, -1.0, line0)
        u0 = w0 * inverse
        line1 = tl.where(places == k, 0.0, line1) - beside * u0
        second = 1.0 / (below - beside * inverse * beside)
        w1 = tl.where(places == k + 1, -1.0, line1)
        u1 = w1 * second
        x = tl.where((rows == k) | (cols == k), 0.0, x) - u0[:, None] * w0[None, :]
        x = tl.where((rows == k + 1) | (cols == k + 1), 0.0, x) - u1[:, None] * w1[None, :]
    return x


@triton.jit
def _block(x, i: tl.constexpr, j: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr):
    """Block (i, j) of x [BLOCKS, N, BLOCKS, N] fp32: [N, N]. As integers, because x + 0 is x only for them."""
    number = tl.arange(0, BLOCKS)
    here = (number == i)[:, None, None, None] & (number == j)[None, None, :, None]
    bits = tl.where(here, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(tl.sum(bits, axis=2), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def _first_column(x, SIZE: tl.constexpr):
    """Column 0 of x [SIZE, SIZE], as :func:`_block`."""
    bits = tl.where((tl.arange(0, SIZE) == 0)[None, :], x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _part(x, i: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr):
    """Part i of a vector x [BLOCKS * N]: [N]."""
    parts = tl.where((tl.arange(0, BLOCKS) == i)[:, None], tl.reshape(x, (BLOCKS, N)), 0.0)
    return tl.sum(parts, axis=0)


@triton.jit
def _high(x):
    """x rounded to the bits that a tensor core reads of an fp32 number (tf32)."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _plus_product(acc, x, y):
    """acc + x y to fp32's accuracy, as three products of tf32 parts; "tf32x3" would look for infinities as well."""
    x_high, y_high = _high(x), _high(y)
    acc = tl.dot(x - x_high, y_high, acc, input_precision="tf32")
    acc = tl.dot(x_high, y - y_high, acc, input_precision="tf32")
    return tl.dot(x_high, y_high, acc, input_precision="tf32")


@triton.jit
def _solve(system, right, N: tl.constexpr, BLOCKS: tl.constexpr):
    """system: [BLOCKS * N] squared, positive definite; right: [BLOCKS * N] -> the solution, a tuple of BLOCKS [N].

    The lower blocks are a tuple, row by row: block (i, j) is number i (i + 1) / 2 + j.
    """
    blocks = tl.reshape(system, (BLOCKS, N, BLOCKS, N))
    lower = ()
    rest = ()
    for i in tl.static_range(BLOCKS):
        rest = rest + (_part(right, i, N, BLOCKS),)
        for j in tl.static_range(i + 1):
            lower = lower + (_block(blocks, i, j, N, BLOCKS),)
    # Eliminate: a diagonal block becomes minus its inverse, the blocks below it what they multiply its unknowns with.
    for k in tl.static_range(BLOCKS):
        inverse = _minus_inverse(lower[k * (k + 1) // 2 + k], N)
        old = lower
        lower = ()
        for i in tl.static_range(BLOCKS):
            for j in tl.static_range(i + 1):
                entry = old[i * (i + 1) // 2 + j]
                if i == k and j == k:
                    entry = inverse
                elif j == k:
                    entry = _plus_product(tl.zeros((N, N), tl.float32), entry, inverse)
                lower = lower + (entry,)
        done = lower
        lower = ()
        for i in tl.static_range(BLOCKS):
            for j in tl.static_range(i + 1):
                entry = done[i * (i + 1) // 2 + j]
                if j > k:
                    entry = _plus_product(entry, done[i * (i + 1) // 2 + k], tl.trans(old[j * (j + 1) // 2 + k]))
                lower = lower + (entry,)
        known = rest
        rest = ()
        for i in tl.static_range(BLOCKS):
            part = known[i]
            if i > k:
                part += tl.sum(lower[i * (i + 1) // 2 + k] * known[k][None, :], axis=1)
            rest = rest + (part,)
    # Substitute, from the last block of unknowns to the first.
    solution = ()
    for k in tl.static_range(BLOCKS - 1, -1, -1):
        unknown = -tl.sum(lower[k * (k + 1) // 2 + k] * rest[k][None, :], axis=1)
        for i in tl.static_range(k + 1, BLOCKS):
            unknown += tl.sum(lower[i * (i + 1) // 2 + k] * solution[i - k - 1][:, None], axis=0)
        solution = (unknown,) + solution
    return solution


@triton.jit
def _gram(
    window_ptr, slots, live, count,
    STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Products of the live queries [SIZE, SIZE] fp32, zeros where one is not live; |q|^2 summed over them.

    fp32 queries are centred already: their products are not exact, and the mean may be much larger than what is left.
    """
    gram = tl.zeros((SIZE, SIZE), tl.float32)
    square = tl.zeros((SIZE,), tl.float32)
    exact: tl.constexpr = window_ptr.dtype.element_ty != tl.float32
    for start in range(0, BLOCK_D, CHUNK):
        x = load_window(window_ptr, slots, live, start + tl.arange(0, CHUNK), STRIDE, DIM)
        if exact:
            gram = tl.dot(x, tl.trans(x), gram)
        else:
            square += tl.sum(x * x, axis=1)
            x = tl.where(live[:, None], x - (tl.sum(x, axis=0) / count)[None, :], 0.0)
            gram = tl.dot(x, tl.trans(x), gram, input_precision="tf32x3")
    places = tl.arange(0, SIZE)
    diagonal = tl.sum(tl.where(places[:, None] == places[None, :], gram, 0.0), axis=1)
    if exact:
        square = diagonal
    return gram, diagonal, tl.sum(square, axis=0)


@triton.jit
def ridge_kernel(
    q_ptr, window_ptr, seats_ptr, positions_ptr, first_ptr, cos_sin_ptr, out_ptr, strength, last, cos_sin_stride,
    W: tl.constexpr, NUM_Q: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
    PUSH: tl.constexpr, FEWEST: tl.constexpr, FLOOR: tl.constexpr, TINY: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (Hq, B). Unknown i is the weight of what came after the query of age i; 0 is the newest and has none."""
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
    count = number.to(tl.float32)

    dims = tl.arange(0, BLOCK_D)
    if PUSH:
        push_newest(
            q_ptr + row, window_ptr, newest_slot, cos_sin_ptr, position, last, cos_sin_stride, dims,
            stride, DIM, HALF, ROTATE,
        )  # fmt: skip

    ages = tl.arange(0, BLOCKS * N)
    live = ages < number
    gram, diagonal, square = _gram(
        window_ptr, slot_of(ages, newest_slot, W), live, count, stride, DIM, BLOCK_D, CHUNK, BLOCKS * N
    )
    # Less the mean of the live rows and columns, where live is 1: g - a_i live_j - live_i a_j.
    is_live = tl.where(live, 1.0, 0.0)
    off = tl.sum(gram, axis=1) / count
    off -= is_live * (0.5 * tl.sum(off, axis=0) / count)
    trace = tl.sum(tl.where(ages == 0, 0.0, diagonal - 2.0 * off * is_live), axis=0)
    eps = tl.maximum(strength * trace / tl.maximum(count - 1.0, 1.0), FLOOR * square / count)
    inverse = 1.0 / tl.maximum(eps, TINY)
    off *= inverse
    system = gram * inverse - off[:, None] * is_live[None, :] - is_live[:, None] * off[None, :]
    right = _first_column(system, BLOCKS * N)
    # The newest query is no X: its unknown is so heavy that nothing in fp32 feels it.
    on_diagonal = ages[:, None] == ages[None, :]
    system = tl.where(on_diagonal, system + tl.where(ages == 0, HEAVY, 1.0)[:, None], system)
    solution = _solve(system, right, N, BLOCKS)

    known = 0.0
    for k in tl.static_range(BLOCKS):
        known += tl.sum(solution[k], axis=0)
    share = (1.0 - known) / count
    guess = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(BLOCKS):
        after = k * N + tl.arange(0, N) - 1  # the age of what came next; of the first row, the oldest of a full window
        after = tl.where(after < 0, BLOCKS * N - 1, after)
        x = load_window(window_ptr, slot_of(after, newest_slot, W), after < number, dims, stride, DIM)
        guess += tl.sum((solution[k] + share)[:, None] * x.to(tl.float32), axis=0)
    if number < FEWEST:
        guess = tl.load(window_ptr + newest_slot * stride + dims, mask=dims < DIM, other=0.0).to(tl.float32)
    store_rotated(out_ptr + row, guess, cos_sin_ptr, position + 1, last, cos_sin_stride, dims, DIM, HALF, ROTATE)
