"""Around the grouped products of a mixture of experts: the choice of rows before them, the weighted sum after them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options

COMBINE_BLOCK = 1024


@triton.jit
def _assign_kernel(
    logits_ptr,
    correction_ptr,
    tokens_ptr,
    ends_ptr,
    rows_ptr,
    weights_ptr,
    num_tokens,
    scaling,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
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
    tl.store(ends_ptr + tl.arange(0, BLOCK_E), ends, mask=tl.arange(0, BLOCK_E) < EXPERTS)


@triton.jit
def _combine_kernel(
    results_ptr,
    rows_ptr,
    weights_ptr,
    shared_ptr,
    out_ptr,
    width,
    CHOSEN: tl.constexpr,
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
    total += tl.load(shared_ptr + token * width + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + cols, total.to(out_ptr.dtype.element_ty), mask=mask)


def assign(
    logits: Tensor, correction: Tensor | None, num_chosen: int, normalised: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:class:`slipstream.kernels.experts.Rows` of contiguous logits [T, E]; a token's experts in ascending order."""
    tokens, experts = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32
    device = logits.device
    of_rows = torch.empty((tokens * num_chosen,), dtype=torch.int32, device=device)
    ends = torch.zeros((experts,), dtype=torch.int32, device=device)
    rows = torch.empty((tokens, num_chosen), dtype=torch.int32, device=device)
    weights = torch.empty((tokens, num_chosen), dtype=torch.float32, device=device)
    if tokens:
        block_t, block_e = block_size(tokens), block_size(experts)
        _assign_kernel[(1,)](
            logits, correction, of_rows, ends, rows, weights, tokens, scaling, EXPERTS=experts, CHOSEN=num_chosen,
            NORMALISED=normalised, BLOCK_T=block_t, BLOCK_E=block_e,
            **launch_options(logits, num_warps=min(16, max(1, block_t * block_e // 512))),
        )  # fmt: skip
    return of_rows, ends, rows, weights


def combine(results: Tensor, rows: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """See :func:`slipstream.kernels.experts.combine`. Contiguous tensors."""
    (tokens, num_chosen), width = rows.shape, shared.shape[1]
    assert all(x.is_contiguous() for x in (results, rows, weights, shared))
    out = torch.empty_like(shared)
    if tokens:
        block = min(COMBINE_BLOCK, block_size(width))
        _combine_kernel[(tokens, triton.cdiv(width, block))](
            results, rows, weights, shared, out, width, CHOSEN=num_chosen, BLOCK=block,
            **launch_options(shared, num_warps=4),
        )  # fmt: skip
    return out
