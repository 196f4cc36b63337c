"""The catalogue of AsyncSpade (arXiv 2510.07486): query windows, predictors, stored sets. CUDA goes to Triton.

All tensors are of one layer; B requests with one query token each. No op synchronises on CUDA, and its grid depends on
shapes only. Definitions: :mod:`slipstream.kernels.reference_predict`.
"""

from __future__ import annotations

from torch import Tensor

from slipstream.kernels import reference_predict

MLPWeights = reference_predict.MLPWeights
predict_mlp = reference_predict.predict_mlp
LARGEST_SYSTEM = 128
"""Queries in a window for which ``ridge`` can be solved."""
KINDS = ("ridge", "analog", "last", "mean", "ema")


def push_queries(q: Tensor, positions: Tensor, seats: Tensor, cos_sin: Tensor, window: Tensor, rotate: bool) -> None:
    """q: [T, Hq, D], un-rotated if ``rotate``, into slot ``positions % W`` of the seats' windows [M + 1, W, Hq, D]."""
    args = (q, positions, seats, cos_sin, window, rotate)
    if q.is_cuda:
        from slipstream.kernels import triton_predict

        triton_predict.push_queries(*args)
    else:
        reference_predict.push_queries(*args)


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
    """[B, Hq, D]: what ``kind`` expects after ``positions`` [B], of the window's queries since ``first`` [M + 1]."""
    args = (window, seats, positions, first, cos_sin, kind, strength, rotate)
    if window.is_cuda:
        from slipstream.kernels import triton_predict

        return triton_predict.predict_queries(*args)
    return reference_predict.predict_queries(*args)


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
    """q: [B, Hq, D], one per row: :func:`push_queries`, then :func:`predict_queries`, bit for bit, in one launch."""
    args = (q, positions, seats, first, cos_sin, window, kind, strength, rotate)
    if q.is_cuda:
        from slipstream.kernels import triton_predict

        return triton_predict.push_and_predict(*args)
    return reference_predict.push_and_predict(*args)


def store_sets(
    indices: Tensor, counts: Tensor, seats: Tensor, lengths: Tensor, all_indices: Tensor, all_counts: Tensor
) -> None:
    """indices [B, Hk, K - 1] and counts [B, Hk], with token ``lengths`` [B] appended, into the seats' rows of all_*."""
    args = (indices, counts, seats, lengths, all_indices, all_counts)
    if indices.is_cuda:
        from slipstream.kernels import triton_predict

        triton_predict.store_sets(*args)
    else:
        reference_predict.store_sets(*args)


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
    """Lengths of the rows and KV heads whose queries were not as predicted into flagged_lengths [B * Hk], else 0."""
    args = (q, predicted, seats, lengths, num_kv, threshold, flagged_lengths, counter)
    if q.is_cuda:
        from slipstream.kernels import triton_predict

        triton_predict.check_queries(*args)
    else:
        reference_predict.check_queries(*args)
