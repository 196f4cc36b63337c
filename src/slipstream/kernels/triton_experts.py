"""Around the products of a mixture of experts: scores and the choice of rows before them, the weighted sum after."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.experts import Routing
from slipstream.kernels.launch import block_size, launch_options

COMBINE_BLOCK = 1024
ASSIGN_PER_WARP = 128  # scores
SCORE_BLOCK = 16384  # columns of tokens of one program


@triton.jit
def _router_kernel(
    x_ptr,
    router_ptr,
    logits_ptr,
    num_tokens,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (E, blocks of tokens): products and sums in fp32, of a token the same whoever else is there."""
    expert, tokens = tl.program_id(0), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.arange(0, BLOCK)
    weight = tl.load(router_ptr + expert * HIDDEN + cols, mask=cols < HIDDEN, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    mask = (tokens < num_tokens)[:, None] & (cols < HIDDEN)[None, :]
    x = tl.load(x_ptr + tokens.to(tl.int64)[:, None] * HIDDEN + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    logits = tl.sum(x * weight[None, :], axis=1)
    tl.store(logits_ptr + tokens * EXPERTS + expert, logits, mask=tokens < num_tokens)


@triton.jit
def in_best_groups(
    ranks, expert, SIZE: tl.constexpr, GROUPS: tl.constexpr, TOP: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """ranks [T, E] with -inf outside of the TOP best groups. A group is as good as its best, or its PAIR of best."""
    standing = tl.full(ranks.shape, -float("inf"), tl.float32)
    for group in tl.static_range(GROUPS):
        members = tl.where(expert // SIZE == group, ranks, -float("inf"))
        value = tl.max(members, axis=1)[:, None]
        if PAIRS:
            first = tl.argmax(members, axis=1)[:, None]
            value += tl.max(tl.where(expert == first, -float("inf"), members), axis=1)[:, None]
        standing = tl.where(expert // SIZE == group, value, standing)
    kept = tl.full(ranks.shape, -float("inf"), tl.float32)
    for _ in tl.static_range(TOP):
        best = expert // SIZE == (tl.argmax(standing, axis=1) // SIZE)[:, None]
        kept = tl.where(best, ranks, kept)
        standing = tl.where(best, -float("inf"), standing)
    return kept


@triton.jit
def _assign_kernel(
    logits_ptr,
    correction_ptr,
    tokens_ptr,
    ends_ptr,
    busy_ptr,
    rows_ptr,
    weights_ptr,
    num_tokens,
    scaling,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (1,): without a sort, because the place of a row is a count of the rows before it."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token, expert = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_E)[None, :]
    exists = (token < num_tokens) & (expert < EXPERTS)
    logits = tl.load(logits_ptr + token * EXPERTS + expert, mask=exists, other=-float("inf"))
    if correction_ptr is None:
        peak = tl.max(tl.where(token < num_tokens, logits, 0.0), axis=1)[:, None]
        scores = tl.where(exists, tl.exp(logits - peak), 0.0)
        scores = scores / tl.maximum(tl.sum(scores, axis=1), 1e-30)[:, None]
        ranks = scores
    else:
        scores = tl.where(exists, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
        ranks = scores + tl.load(correction_ptr + expert, mask=expert < EXPERTS, other=0.0)
    ranks = tl.where(exists, ranks, -float("inf"))
    if GROUPS > 1:
        ranks = in_best_groups(ranks, expert, EXPERTS // GROUPS, GROUPS, TOP_GROUPS, correction_ptr is not None)
    taken = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for _ in tl.static_range(CHOSEN):
        best = tl.argmax(ranks, axis=1)[:, None]
        taken = tl.where((expert == best) & exists, 1, taken)
        ranks = tl.where(expert == best, -float("inf"), ranks)
    weights = tl.where(taken == 1, scores, 0.0)
    if NORMALISED:
        weights = weights / (tl.sum(weights, axis=1) + 1e-20)[:, None]
    counts = tl.sum(taken, axis=0)
    ends = tl.cumsum(counts, axis=0)
    row = (ends - counts)[None, :] + tl.cumsum(taken, axis=0) - 1
    place = token * CHOSEN + tl.cumsum(taken, axis=1) - 1
    tl.store(tokens_ptr + row, token + tl.zeros_like(row), mask=taken == 1)
    tl.store(rows_ptr + place, row, mask=taken == 1)
    tl.store(weights_ptr + place, weights * scaling, mask=taken == 1)
    every = tl.arange(0, BLOCK_E)
    tl.store(ends_ptr + every, ends, mask=every < EXPERTS)
    number = tl.cumsum((counts > 0).to(tl.int32), axis=0)  # of busy experts up to each
    slot = tl.where(counts > 0, number - 1, tl.max(number, axis=0) + every - number)
    for part in tl.static_range(3):
        value = every if part == 0 else ends - counts if part == 1 else ends
        tl.store(busy_ptr + part * EXPERTS + slot, value, mask=every < EXPERTS)


@triton.jit
def _combine_kernel(
    results_ptr,
    rows_ptr,
    weights_ptr,
    shared_ptr,
    out_ptr,
    width,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, blocks of columns)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(CHOSEN):
        row = tl.load(rows_ptr + token * CHOSEN + k).to(tl.int64)
        part = tl.load(results_ptr + row * width + cols, mask=mask, other=0.0).to(tl.float32)
        total += part * tl.load(weights_ptr + token * CHOSEN + k)
    for s in tl.static_range(SHARED):
        row = s * tl.num_programs(0) + token
        total += tl.load(shared_ptr + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + cols, total.to(out_ptr.dtype.element_ty), mask=mask)


def score(x: Tensor, router: Tensor) -> Tensor:
    """See :func:`slipstream.kernels.experts.score`."""
    (tokens, hidden), count = x.shape, router.shape[0]
    assert x.is_contiguous() and router.is_contiguous()
    logits = torch.empty((tokens, count), dtype=torch.float32, device=x.device)
    if tokens:
        block = block_size(hidden)
        together = max(1, min(8, SCORE_BLOCK // block))
        _router_kernel[(count, triton.cdiv(tokens, together))](
            x, router, logits, tokens, EXPERTS=count, HIDDEN=hidden, TOKENS=together, BLOCK=block,
            **launch_options(x, num_warps=8),
        )  # fmt: skip
    return logits


def assign(logits: Tensor, correction: Tensor | None, rule: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:class:`slipstream.kernels.experts.Rows` of contiguous logits [T, E]; a token's experts in ascending order."""
    (tokens, count), chosen = logits.shape, rule.num_chosen
    assert tokens and logits.is_contiguous() and logits.dtype == torch.float32

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=logits.device)

    of_rows, rows, ends, busy = numbers(tokens * chosen), numbers(tokens, chosen), numbers(count), numbers(3, count)
    weights = torch.empty((tokens, chosen), dtype=torch.float32, device=logits.device)
    block_t, block_e = block_size(tokens), block_size(count)
    _assign_kernel[(1,)](
        logits, correction, of_rows, ends, busy, rows, weights, tokens, rule.scaling, EXPERTS=count, CHOSEN=chosen,
        GROUPS=rule.num_groups, TOP_GROUPS=rule.top_groups, NORMALISED=rule.normalised,
        BLOCK_T=block_t, BLOCK_E=block_e,
        **launch_options(logits, num_warps=min(16, max(1, block_t * block_e // ASSIGN_PER_WARP))),
    )  # fmt: skip
    return of_rows, ends, busy, rows, weights


def combine(results: Tensor, rows: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """See :func:`slipstream.kernels.experts.combine`. Contiguous tensors."""
    (tokens, num_chosen), width = rows.shape, shared.shape[2]
    assert all(x.is_contiguous() for x in (results, rows, weights, shared))
    out = shared.new_empty((tokens, width))
    if tokens:
        block = min(COMBINE_BLOCK, block_size(width))
        _combine_kernel[(tokens, triton.cdiv(width, block))](
            results, rows, weights, shared, out, width, CHOSEN=num_chosen, SHARED=len(shared), BLOCK=block,
            **launch_options(shared, num_warps=4),
        )  # fmt: skip
    return out
