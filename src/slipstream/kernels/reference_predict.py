"""Predicting the next query from the latest ones, in plain torch: the definition, the test oracle and the CPU path.

AsyncSpade (arXiv 2510.07486). A *window* holds the W latest queries of a chain, before RoPE, as a ring: the query of
position p lies in slot p % W. Every predictor but the MLP is a sum of the window's queries with weights that add up to
one, in fp32 from the window's own dtype, rotated to the position after the newest. All tensors are of one layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels.reference import _rotate

FEWEST = 3
"""Queries in a window from which there is something to learn; with fewer the next query is the newest."""
FLOOR = 1e-5
"""Least regularisation of ridge, relative to the mean square norm of the queries: rounding is no signal."""
TINY = 1e-30


class MLPWeights(NamedTuple):
    """One layer's MLP, shared by its heads but for the biases.

    mix: [F, W] fp32, features as sums over the window, by age (0 is the newest).  up: [(F + 1) * D, I].
    up_bias: [Hq, I].  down: [I, D].  down_bias: [Hq, D].
    """

    mix: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


def _turn(x: Tensor, positions: Tensor, cos_sin: Tensor, back: bool = False) -> Tensor:
    """x: [T, Hq, D], its last R columns rotated to ``positions`` [T], or from there back.

    R < D in the absorbed queries of a latent cache. Positions beyond the table count as its last.
    The table may hold a factor beside the rotation (yarn): back divides by its square, so that both undo each other.
    """
    rows = cos_sin.index_select(0, positions.clamp_max(len(cos_sin) - 1)).unsqueeze(1)
    cos, sin = rows.chunk(2, dim=-1)
    if back:
        square = cos * cos + sin * sin
        cos, sin = cos / square, -sin / square
    rest = x.shape[-1] - 2 * cos.shape[-1]
    turned = _rotate(x[..., rest:], cos, sin)
    return turned if not rest else torch.cat((x[..., :rest], turned), dim=-1)


def push_queries(q: Tensor, positions: Tensor, seats: Tensor, cos_sin: Tensor, window: Tensor, rotate: bool) -> None:
    """Put queries into the windows of their seats: ``q[t]``, un-rotated, into slot ``positions[t] % W``.

    q: [T, Hq, D] after RoPE.  positions, seats: [T] int64; no (seat, slot) twice, but in seat 0, which holds anything
    afterwards.  cos_sin: [positions, R] fp32, cosines then sines, R <= D.  window: [M + 1, W, Hq, D], in place.
    rotate: False leaves the queries as they are.
    """
    rows = seats * window.shape[1] + positions % window.shape[1]
    plain = _turn(q, positions, cos_sin, back=True) if rotate else q
    window.view(-1, *window.shape[2:]).index_copy_(0, rows, plain.to(window.dtype))


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
    """The query that is expected at ``positions + 1``: [B, Hq, D], rotated to there if ``rotate``.

    window: [M + 1, W, Hq, D].  seats, positions: [B] int64, of each row's newest query, which is in the window.
    first: [M + 1] int64, the position since which the seat's window is unbroken: the n = min(W, position - first + 1)
    latest queries count, and nothing else that the ring holds.  mu is their mean.

    ==========  ===================================================================================================
    ``last``    the newest query
    ``mean``    mu
    ``ema``     mean weighted by ``strength ** age``
    ``ridge``   (P) with X, Y the queries but the newest, and but the oldest, less mu: mu + Y^T a, where
                (X X^T + eps I) a = X (q - mu), eps = max(strength * mean diag X X^T, FLOOR * mean |q|^2)
    ``analog``  (C) Y^T softmax(strength * cos(q - mu, q_i - mu)) over the queries but the newest: what came next
    ==========  ===================================================================================================

    With fewer than FEWEST queries all are ``last``. On a CPU a result depends on its own row only, to the
    last bit.
    """
    size = window.shape[1]
    if kind == "last":
        guess = window[seats, positions % size].float()
        return (_turn(guess, positions + 1, cos_sin) if rotate else guess).to(window.dtype)
    age = (positions.unsqueeze(1) - torch.arange(size, device=window.device)) % size
    num = (positions - first.index_select(0, seats) + 1).clamp(1, size).unsqueeze(1)
    valid = (age < num).unsqueeze(1)
    x = window.index_select(0, seats).float().transpose(1, 2).masked_fill(~valid.unsqueeze(-1), 0)
    newest = (age == 0).unsqueeze(1).float()
    if kind == "mean":
        weights = valid / num.unsqueeze(1)
    elif kind == "ema":
        weights = strength ** age.unsqueeze(1).float() * valid
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        rule = {"ridge": _ridge, "analog": _analog}[kind]
        weights = rule(x, valid, newest, num.view(-1, 1, 1), strength)
    weights = torch.where((num >= FEWEST).unsqueeze(1), weights, newest)
    guess = torch.matmul(weights.unsqueeze(2), x).squeeze(2)  # one row for all heads where weights know no head
    if rotate:
        guess = _turn(guess, positions + 1, cos_sin)
    return guess.to(window.dtype)


def _centred(x: Tensor, valid: Tensor, num: Tensor) -> Tensor:
    """x: [B, Hq, W, D] -> the same less the mean of the ``num`` valid rows, and zeros where no row is valid."""
    return (x - x.sum(2, keepdim=True) / num.unsqueeze(-1)).masked_fill(~valid.unsqueeze(-1), 0)


def _ridge(x: Tensor, valid: Tensor, newest: Tensor, num: Tensor, strength: float) -> Tensor:
    """x: [B, Hq, W, D]; valid, newest: [B, 1, W]; num: [B, 1, 1] -> weights of the slots [B, Hq, W]."""
    centred = _centred(x, valid, num)
    gram = torch.matmul(centred, centred.transpose(2, 3))
    old = (valid & (newest == 0)).float()
    diagonal = gram.diagonal(dim1=2, dim2=3) * old
    norm = x.square().sum((2, 3)).unsqueeze(-1) / num
    mean = diagonal.sum(-1, keepdim=True) / (num - 1).clamp_min(1)
    eps = torch.maximum(strength * mean, FLOOR * norm).clamp_min(TINY)
    right = torch.matmul(gram, newest.expand(-1, x.shape[1], -1).unsqueeze(-1)).squeeze(-1) * old
    # Slots that are no X are unknowns of their own: ones on the diagonal, zeros beside it.
    system = gram.mul_(old.unsqueeze(-1)).mul_(old.unsqueeze(-2))
    system.diagonal(dim1=2, dim2=3).add_(torch.where(old > 0, eps, 1.0))
    # An infinite or NaN query has no factor; what comes of it is as undefined as the query.
    factor = torch.linalg.cholesky_ex(system)[0]
    alpha = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    return alpha.roll(1, -1) + (1 - alpha.sum(-1, keepdim=True)) * valid / num


def _analog(x: Tensor, valid: Tensor, newest: Tensor, num: Tensor, strength: float) -> Tensor:
    """As :func:`_ridge`."""
    centred = _centred(x, valid, num)
    query = torch.matmul(newest.unsqueeze(2), centred)
    scale = centred.norm(dim=-1) * query.norm(dim=-1)
    cosine = torch.matmul(centred, query.transpose(2, 3)).squeeze(-1) / scale.clamp_min(TINY)
    return (strength * cosine).masked_fill(~valid | (newest > 0), -torch.inf).softmax(-1).roll(1, -1)


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
    """:func:`push_queries` of one query per row, then :func:`predict_queries`: [B, Hq, D]."""
    push_queries(q, positions, seats, cos_sin, window, rotate)
    return predict_queries(window, seats, positions, first, cos_sin, kind, strength, rotate)


def predict_mlp(
    window: Tensor,
    seats: Tensor,
    positions: Tensor,
    first: Tensor,
    cos_sin: Tensor,
    weights: MLPWeights,
    rotate: bool,
) -> Tensor:
    """As :func:`predict_queries`, by a small network over the window: :func:`mlp` of what the rows hold, by age.

    The window is as long as ``weights.mix`` says, or longer. Plain torch on every device, without synchronisation; the
    last bits of a result may depend on how many rows there are.
    """
    size, width = window.shape[1], weights.mix.shape[1]
    age = torch.arange(width, device=window.device)
    num = (positions - first.index_select(0, seats) + 1).clamp(1, width).unsqueeze(1)
    valid = age < num
    rows = seats.unsqueeze(1) * size + (positions.unsqueeze(1) - age) % size
    x = window.view(-1, *window.shape[2:]).index_select(0, rows.flatten()).view(*rows.shape, *window.shape[2:])
    x = x.float().masked_fill(~valid.view(*valid.shape, 1, 1), 0).transpose(1, 2)
    guess = torch.where((num >= FEWEST).unsqueeze(1), mlp(x, valid.unsqueeze(1), weights), x[:, :, 0])
    if rotate:
        guess = _turn(guess, positions + 1, cos_sin)
    return guess.to(window.dtype)


def mlp(x: Tensor, valid: Tensor, weights: MLPWeights) -> Tensor:
    """x: [B, Hq, W, D] fp32 by age, zeros where not ``valid`` [B, 1, W] -> [B, Hq, D] fp32.

    The window less its mean, over its root mean square; mixed over ages into F features, with the newest F + 1; two
    linear maps with silu between; times that size, plus the newest query: without weights it predicts ``last``.
    """
    centred = _centred(x, valid, valid.sum(-1, keepdim=True))
    size = (centred.square().sum((2, 3)) / (valid.sum(-1) * x.shape[3])).clamp_min(TINY).sqrt().unsqueeze(-1)
    mixed = torch.cat((centred[:, :, :1], torch.matmul(weights.mix, centred)), 2).flatten(2) / size
    hidden = F.silu(torch.matmul(mixed, weights.up) + weights.up_bias)
    return x[:, :, 0] + (torch.matmul(hidden, weights.down) + weights.down_bias) * size


def store_sets(
    indices: Tensor, counts: Tensor, seats: Tensor, lengths: Tensor, all_indices: Tensor, all_counts: Tensor
) -> None:
    """Keep every row's selection in its seat, and with it the token that comes next, which nothing could select yet.

    indices: [B, Hk, K - 1] int32, of which the first ``counts`` [B, Hk] int32 are tokens.  seats: [B] int64.
    lengths: [B] int32: the tokens that are stored, and so the position of the next; 0: the seat gets counts of 0.
    all_indices: [M + 1, Hk, K] int32, -1 behind the tokens, all_counts: [M + 1, Hk] int32: in place. Seat 0 may be
    named by several rows and holds anything afterwards, though never a token that none of them has.
    """
    live = (lengths > 0).unsqueeze(1)
    place = torch.arange(all_indices.shape[2], device=indices.device)
    ends = counts.unsqueeze(-1)
    whole = F.pad(indices, (0, 1), value=-1).masked_fill(place >= ends, -1)
    whole = torch.where((place == ends) & live.unsqueeze(-1), lengths.view(-1, 1, 1), whole)
    all_indices.index_copy_(0, seats, whole.masked_fill(~live.unsqueeze(-1), -1))
    all_counts.index_copy_(0, seats, torch.where(live, counts + 1, 0))


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
    """Which KV heads were predicted so badly that their selection is not to be trusted.

    q: [B, Hq, D], the true queries.  predicted: [M + 1, Hq, D], what was expected of each seat.  seats: [B] int64.
    lengths: [B] int32.  threshold: fp32, one number or [Hk].  flagged_lengths: [B * Hk] int32, out: the length where
    the mean of cos(expected, true) over the head's group is below the threshold, or no number; else 0.
    counter: [1] int64, raised by how many are flagged.
    """
    expected, true = predicted.index_select(0, seats).float(), q.float()
    scale = (expected.norm(dim=-1) * true.norm(dim=-1)).clamp_min(TINY)
    cosine = ((expected * true).sum(-1) / scale).unflatten(1, (num_kv, -1)).mean(-1)
    flagged = torch.where(cosine >= threshold, 0, lengths.unsqueeze(1))
    flagged_lengths.copy_(flagged.flatten())
    counter.add_((flagged > 0).sum())
