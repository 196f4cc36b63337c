"""What candidates weigh: softmax per query head over the candidates of a row, joined over the heads of a KV head.

The definition is ``reference_select.token_scores``: the logarithm of the joined weight, or the logits of a head that is
alone. Here a weight that fp32 holds is ranked by its own bits, and only what is fainter by its logarithm, so that no
logarithm is taken of all candidates and yet no two logits become one by underflow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from slipstream.kernels.triton_choose import ABSENT, FORCED, to_image

FLOAT_MAX = tl.constexpr(torch.finfo(torch.float32).max)
LOG2_E = tl.constexpr(1.4426950408889634)
FAINT = tl.constexpr(1e-30)  # below this, fp32 is about to lose the weights of single heads


@triton.jit
def candidates(blocks_ptr, first, width, length, SIZE: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of the candidates first .. first + BLOCK - 1 of a row, and which of them exist."""
    tokens = first + tl.arange(0, BLOCK)
    exists = tokens < width
    if LISTED:
        block = tl.load(blocks_ptr + tokens // SIZE, mask=exists, other=-1)
        exists = block >= 0
        tokens = block * SIZE + tokens % SIZE
    return tokens, exists & (tokens < length)


@triton.jit
def finite(x):
    """-inf for NaN, the largest float for +inf. NaN goes first: a minimum with it is the other number."""
    return tl.minimum(tl.where(x == x, x, -float("inf")), FLOAT_MAX)


@triton.jit
def load_logits(logits_ptr, exists, first, width, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 logits [BLOCK_G, BLOCK] of a row; -inf for NaN and for what does not exist, the largest float for +inf."""
    heads = tl.arange(0, BLOCK_G)[:, None]
    at = (first + tl.arange(0, BLOCK))[None, :]
    # Existence follows from a load where blocks are listed, so it waits beside this load and not before it.
    x = tl.load(logits_ptr + heads.to(tl.int64) * width + at, mask=(heads < GROUP) & (at < width), other=-float("inf"))
    return tl.where(exists[None, :], finite(x), -float("inf"))


@triton.jit
def statistics(x):
    """Peaks of the heads, never -inf, and sums of their weights relative to that. x: [BLOCK_G, BLOCK]."""
    peak = tl.maximum(tl.max(x, axis=1), -FLOAT_MAX)
    return peak, tl.sum(tl.exp2((x - peak[:, None]) * LOG2_E), axis=1)


@triton.jit
def joined(partials_ptr, num_partials, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr):
    """Statistics [BLOCK_G] of a whole row from those of its parts, [n, 2, BLOCK_G] from ``partials_ptr`` on."""
    parts = tl.arange(0, BLOCK_P)[None, :]
    at = partials_ptr + parts * 2 * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
    peaks = tl.load(at, mask=parts < num_partials, other=-FLOAT_MAX)
    totals = tl.load(at + BLOCK_G, mask=parts < num_partials, other=0.0)
    peak = tl.max(peaks, axis=1)
    return peak, tl.sum(totals * tl.exp2((peaks - peak[:, None]) * LOG2_E), axis=1)


@triton.jit
def token_images(
    x, peak, total, tokens, exists, length, sink, recent, logits_ptr, first, width,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr, IS_SUM: tl.constexpr,
):  # fmt: skip
    """Images [BLOCK] of the joined weights of candidates. peak, total: [BLOCK_G] statistics of the whole row."""
    total = tl.maximum(total, 1.0)
    if BLOCK_G == 1:
        images = to_image(tl.max(x, axis=0))
    elif IS_SUM:
        # These are the weights that the statistics were made of: where those are at hand, nothing is computed again.
        weight = tl.sum(tl.exp2((x - peak[:, None]) * LOG2_E) * (1.0 / total)[:, None], axis=0)
        images = weight.to(tl.int32, bitcast=True)
        if tl.min(tl.where(exists, weight, 1.0), axis=0) < FAINT:
            # Loaded again, so that logits and weights need not share the registers.
            x = load_logits(logits_ptr, exists, first, width, GROUP, BLOCK_G, BLOCK)
            x = (x - peak[:, None]) * LOG2_E - tl.log2(total)[:, None]
            best = tl.maximum(tl.max(x, axis=0), -FLOAT_MAX)
            score = best + tl.log2(tl.sum(tl.exp2(x - best[None, :]), axis=0))
            # Images of negative numbers are below the bits of any weight.
            images = tl.where(weight < FAINT, to_image(score), images)
    else:
        images = to_image(tl.max((x - peak[:, None]) * LOG2_E - tl.log2(total)[:, None], axis=0))
    forced = (tokens < sink) | (tokens >= length - recent)
    return tl.where(exists, tl.where(forced, FORCED, images), ABSENT)
