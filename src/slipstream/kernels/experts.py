"""A mixture of experts: who is chosen, and the products of all chosen experts at once.

Plain torch, without a look at the host: the same code on every device, inside captured steps too. On a GPU, steps of
few tokens score, choose and combine in :mod:`slipstream.kernels.triton_experts`, one launch each, and the products
between are those of :mod:`slipstream.kernels.triton_few_rows`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels import ops

FEW_TOKENS = 128  # up to which a GPU multiplies with kernels of ours: above, experts have enough rows for a library's
FEW_SCORES = 16384  # tokens times experts up to which one program assigns all rows


class Routing(NamedTuple):
    """How a model chooses: see :func:`route`."""

    num_chosen: int
    num_groups: int
    top_groups: int
    normalised: bool
    scaling: float


class Rows(NamedTuple):
    """The rows of a grouped product: every token once for each of its K experts, expert after expert.

    tokens: [T * K] int32, the token of each row. ends: [E] int32, where each expert's rows end. busy: [3, E] int32,
    the experts, their first rows and ends, those without rows last. rows: [T, K] int32, of each token; weights: [T, K]
    fp32, of those rows.
    """

    tokens: Tensor
    ends: Tensor
    busy: Tensor
    rows: Tensor
    weights: Tensor


class Weights(NamedTuple):
    """router: [E, H] fp32. correction: [E] fp32 or None. gate_up: [E, 2I, H], down: [E, H, I] of the chosen experts.

    shared_gate_up: [2SI, H], all gates before all ups, and shared_down: [H, SI] of the S that everybody passes through.
    """

    router: Tensor
    correction: Tensor | None
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor
    shared_down: Tensor


def score(x: Tensor, router: Tensor) -> Tensor:
    """x: [T, H], router: [E, H] fp32 -> logits [T, E] in fp32 arithmetic."""
    if x.is_cuda and len(x) <= FEW_TOKENS:
        from slipstream.kernels import triton_experts

        return triton_experts.score(x, router)
    return F.linear(x.float(), router)


def route(logits: Tensor, correction: Tensor | None, rule: Routing) -> tuple[Tensor, Tensor]:
    """logits: [T, E] fp32 -> experts [T, K] int64 and their weights [T, K] fp32.

    correction: [E] fp32 makes scores sigmoids and is added where experts are chosen, not where they are weighed
    (noaux_tc); a group of experts is then ranked by its two best. None: scores are a softmax (DeepSeek-V2), groups are
    ranked by their best. Only experts of the ``top_groups`` best groups are chosen. normalised: the weights of a token
    are divided by their sum before they are multiplied with ``scaling``.
    """
    scores = logits.softmax(-1) if correction is None else logits.sigmoid()
    ranks = scores if correction is None else scores + correction
    if rule.num_groups > 1:
        grouped = ranks.unflatten(1, (rule.num_groups, -1))
        best = grouped.amax(-1) if correction is None else grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best).scatter_(1, best.topk(rule.top_groups, dim=-1, sorted=False).indices, 1.0)
        ranks = grouped.masked_fill(kept.unsqueeze(-1) == 0, -torch.inf).flatten(1)
    chosen = ranks.topk(rule.num_chosen, dim=-1, sorted=False).indices
    weights = scores.gather(1, chosen)
    if rule.normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * rule.scaling


def assign(logits: Tensor, correction: Tensor | None, rule: Routing) -> Rows:
    """:func:`route`, and its rows sorted by expert, tokens ascending."""
    if logits.is_cuda and 0 < logits.numel() <= FEW_SCORES:
        from slipstream.kernels import triton_experts

        return Rows(*triton_experts.assign(logits, correction, rule))
    chosen, weights = route(logits, correction, rule)
    order = chosen.flatten().argsort(stable=True)
    owners = chosen.flatten().index_select(0, order)
    experts = torch.arange(logits.shape[1], device=logits.device)
    ends = torch.searchsorted(owners, experts, right=True, out_int32=True)
    firsts = torch.searchsorted(owners, experts, out_int32=True)
    idle_last = (ends == firsts).int().argsort(stable=True)
    busy = torch.stack((experts.int(), firsts, ends))[:, idle_last]
    rows = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return Rows((order // rule.num_chosen).int(), ends, busy, rows.view_as(chosen).int(), weights)


def combine(results: Tensor, rows: Rows, shared: Tensor) -> Tensor:
    """results: [T * K, H] of all rows, shared: [S, T, H] -> [T, H]: each token's weighted sum, and the shared."""
    if results.is_cuda:
        from slipstream.kernels import triton_experts

        return triton_experts.combine(results, rows.rows, rows.weights, shared)
    taken = results.index_select(0, rows.rows.flatten()).unflatten(0, rows.rows.shape)
    return ((taken.float() * rows.weights.unsqueeze(-1)).sum(1) + shared.float().sum(0)).to(shared.dtype)


def mixture(x: Tensor, weights: Weights, rule: Routing) -> Tensor:
    """Weighted sum of the gated MLPs that each token chose, and of the shared ones. x: [T, H] -> [T, H].

    On a GPU few tokens take kernels of ours; more of them, in bfloat16, two grouped products of a library; elsewhere
    every expert sees every token.
    """
    logits = score(x, weights.router)
    if _has_few_rows(x):
        from slipstream.kernels import triton_few_rows

        rows = assign(logits, weights.correction, rule)
        results, shared = triton_few_rows.products(x, rows, weights)
        return combine(results, rows, shared)
    shared = F.linear(ops.silu_mul(F.linear(x, weights.shared_gate_up)), weights.shared_down)
    if not _has_grouped(x):
        chosen, parts = route(logits, weights.correction, rule)
        return _all_experts(x, weights.gate_up, weights.down, chosen, parts, shared)
    rows = assign(logits, weights.correction, rule)
    inner = torch._grouped_mm(x.index_select(0, rows.tokens), weights.gate_up.transpose(1, 2), offs=rows.ends)
    results = torch._grouped_mm(ops.silu_mul(inner), weights.down.transpose(1, 2), offs=rows.ends)
    return combine(results, rows, shared.unsqueeze(0))


def _has_few_rows(x: Tensor) -> bool:
    return x.is_cuda and 0 < len(x) <= FEW_TOKENS


def _has_grouped(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")


def _all_experts(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """The definition; what an expert that was not chosen computes counts nothing, whatever it is."""
    inner = torch.matmul(x, gate_up.transpose(1, 2))
    inner = ops.silu_mul(inner.flatten(0, 1)).unflatten(0, inner.shape[:2])
    results = torch.matmul(inner, down.transpose(1, 2)).transpose(0, 1)
    taken = results.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[1]))
    return ((taken.float() * weights.unsqueeze(-1)).sum(1) + shared.float()).to(x.dtype)
