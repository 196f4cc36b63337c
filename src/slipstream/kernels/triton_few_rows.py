"""The products of a mixture of experts where each has few rows, as in decode steps: as fast as their weights are read.

Two launches, gate and up and their product, then down. The experts that everybody passes through are among them. A
program reads its rows of one expert's weight once, in tiles that are several stages ahead of the products; rows are
padded to the 16 of a tensor core's product, and where an expert has more, its weight is read again, from the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.experts import Rows, Weights
from slipstream.kernels.launch import block_size, launch_options


class Tile(NamedTuple):
    """How work is cut; moves no result beyond the order of sums. width: of outputs. depth: bytes of a weight's row."""

    width: int
    depth: int
    warps: int
    stages: int


ROWS = 16
GATE_UP = Tile(width=32, depth=256, warps=4, stages=4)
DOWN = Tile(width=64, depth=256, warps=4, stages=4)


@triton.jit
def _load(at, cols, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of a weight, zeros beyond SIZE columns."""
    if SIZE % BLOCK == 0:
        tile = tl.load(at + cols[None, :])
    else:
        tile = tl.load(at + cols[None, :], mask=(cols < SIZE)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["num_tokens", "num_routed"])
def _experts_kernel(
    x_ptr,
    tokens_ptr,
    busy_ptr,
    routed_ptr,
    shared_ptr,
    out_ptr,
    num_tokens,
    num_routed,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of OUT, shared experts and then busy ones): out [rows, OUT], rows of the shared ones last.

    GATED: weights are gates and ups below each other, and x has a row of each token, else of each row.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.program_id(1)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # All shared experts are one matrix, side by side.
    if slot < SHARED:
        first = num_routed + slot * num_tokens
        end = first + num_tokens
        weight = shared_ptr + slot * (OUT * IN if GATED else IN)
        stride = IN if GATED else SHARED * IN
        up = SHARED * OUT * IN
    else:
        at = busy_ptr + slot - SHARED
        first, end = tl.load(at + EXPERTS), tl.load(at + 2 * EXPERTS)
        weight = routed_ptr + tl.load(at).to(tl.int64) * ((2 if GATED else 1) * OUT * IN)
        stride = IN
        up = OUT * IN
    weights = weight + (outputs % OUT)[:, None] * stride
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        exist = (rows < end)[:, None]
        source = rows
        if GATED:
            source = tl.load(tokens_ptr + rows, mask=(rows < end) & (slot >= SHARED), other=0)
            source = tl.where(slot < SHARED, rows - first, source)
        inputs = x_ptr + source.to(tl.int64)[:, None] * IN
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for begin in range(0, IN, BLOCK_K):
            cols = begin + tl.arange(0, BLOCK_K)
            mask = exist
            if IN % BLOCK_K != 0:
                mask = exist & (cols < IN)[None, :]
            x = tl.load(inputs + cols[None, :], mask=mask, other=0.0)
            w = _load(weights, cols, IN, BLOCK_K)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
            if GATED:
                w = _load(weights + up, cols, IN, BLOCK_K)
                acc_up = tl.dot(x, tl.trans(w), acc_up, input_precision="ieee")
        dtype = out_ptr.dtype.element_ty
        if GATED:  # rounded as the library's product and ops.silu_mul are
            gate = acc.to(dtype).to(tl.float32)
            acc = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * acc_up.to(dtype).to(tl.float32)
        at = out_ptr + rows.to(tl.int64)[:, None] * OUT + outputs[None, :]
        tl.store(at, acc.to(dtype), mask=exist & (outputs < OUT)[None, :])


def multiply(x: Tensor, rows: Rows, routed: Tensor, shared: Tensor, tile: Tile, out: Tensor, gated: bool) -> None:
    """One launch: out [T * K + S * T, N] of x, [T, M] tokens where gated, else [T * K + S * T, M] rows.

    gated: routed is [E, 2N, M] and shared [2SN, M]; else [E, N, M] and [N, SM].
    """
    assert all(t.is_contiguous() for t in (x, routed, shared, out))
    (num_routed, tokens), count = (len(rows.tokens), len(rows.rows)), len(routed)
    block_n = min(tile.width, block_size(out.shape[1], smallest=16))
    block_k = min(tile.depth // x.element_size(), block_size(x.shape[1], smallest=16))
    common = (len(out) - num_routed) // tokens
    _experts_kernel[(triton.cdiv(out.shape[1], block_n), common + min(count, num_routed))](
        x, rows.tokens, rows.busy, routed, shared, out, tokens, num_routed, EXPERTS=count, SHARED=common,
        IN=x.shape[1], OUT=out.shape[1], GATED=gated, BLOCK_M=ROWS, BLOCK_N=block_n, BLOCK_K=block_k,
        **launch_options(x, num_warps=tile.warps, num_stages=tile.stages),
    )  # fmt: skip


def products(x: Tensor, rows: Rows, weights: Weights) -> tuple[Tensor, Tensor]:
    """What all experts make of x [T, H]: the chosen ones [T * K, H], as ``rows`` are, and the shared ones [S, T, H]."""
    (_, hidden, width), tokens = weights.down.shape, len(x)
    shared = weights.shared_down.shape[1] // width
    assert shared * width == weights.shared_down.shape[1], "shared experts are as wide as the others"
    num_routed = len(rows.tokens)
    inner = x.new_empty((num_routed + shared * tokens, width))
    results = x.new_empty((len(inner), hidden))
    multiply(x, rows, weights.gate_up, weights.shared_gate_up, GATE_UP, inner, gated=True)
    multiply(inner, rows, weights.down, weights.shared_down, DOWN, results, gated=False)
    return results[:num_routed], results[num_routed:].view(shared, tokens, hidden)
