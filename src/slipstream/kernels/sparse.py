"""The catalogue of sparse attention: index, scores, selection, attention over a selection. CUDA goes to Triton.

All tensors are of one layer; B requests with one query token each; a row of length 0 is skipped. No op synchronises on
CUDA, its grid depends on shapes only, and what a docstring calls undefined may hold anything, NaN too. Definitions:
:mod:`slipstream.kernels.reference_index` (up to the logits) and :mod:`slipstream.kernels.reference_select`.
"""

from __future__ import annotations

from torch import Tensor

from slipstream.kernels import cpu_decode, reference, reference_index, reference_select

NUM_STATS = reference_index.NUM_STATS
GROUP_SHIFT = reference_index.GROUP_SHIFT


def extend_index(
    k_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    max_query: int,
    summaries: Tensor | None,
    kind: str,
    labels: Tensor | None,
    scales: Tensor | None,
    channels: Tensor | None,
    key_table: Tensor | None = None,
) -> None:
    """Labels of every request's newest tokens and summaries of the blocks that they complete, written in place."""
    args = (k_pages, page_table, query_start, lengths, max_query, summaries, kind, labels, scales, channels, key_table)
    if lengths.is_cuda:  # the keys may be in pinned host memory
        from slipstream.kernels import triton_index

        triton_index.extend_index(*args)
    else:
        reference_index.extend_index(*args)


def score_blocks(
    q: Tensor,
    summaries: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    kind: str,
    merge: int,
    scale: float,
    aggregate: str,
    deviation: float,
    block_size: int,
) -> Tensor:
    """q: [B, Hq, D] against summaries of ``block_size`` tokens each -> [B, Hk, M] fp32, one score per merged block."""
    args = (q, summaries, page_table, lengths, kind, merge, scale, aggregate, deviation, block_size)
    if q.is_cuda:
        from slipstream.kernels import triton_score

        return triton_score.score_blocks(*args)
    return reference_index.score_blocks(*args)


def label_logits(
    q: Tensor,
    channels: Tensor,
    labels: Tensor,
    scales: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    blocks: Tensor | None,
    block_size: int,
    scale: float,
) -> Tensor:
    """q: [B, Hq, D] against the labels of all tokens, or those of ``blocks`` [B, Hk, M] -> [B, Hq, C] fp32."""
    args = (q, channels, labels, scales, page_table, lengths, blocks, block_size, scale)
    if q.is_cuda:
        from slipstream.kernels import triton_logits

        return triton_logits.label_logits(*args)
    return reference_index.label_logits(*args)


def key_logits(q: Tensor, k_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """q: [B, Hq, D] against every key -> [B, Hq, N * S] fp32."""
    if q.is_cuda:
        from slipstream.kernels import triton_logits

        return triton_logits.key_logits(q, k_pages, page_table, lengths, scale)
    return reference_index.key_logits(q, k_pages, page_table, lengths, scale)


def top_blocks(scores: Tensor, lengths: Tensor, block_size: int, num_blocks: int, sink: int, recent: int) -> Tensor:
    """scores: [B, Hk, M] -> the blocks of sinks and recent tokens and the best others: [B, Hk, num_blocks] int32."""
    args = (scores, lengths, block_size, num_blocks, sink, recent)
    if scores.is_cuda:
        from slipstream.kernels import triton_blocks

        return triton_blocks.top_blocks(*args)
    return reference_select.top_blocks(*args)


def top_tokens(
    logits: Tensor,
    blocks: Tensor | None,
    lengths: Tensor,
    num_kv: int,
    block_size: int,
    budget: int,
    sink: int,
    recent: int,
    aggregate: str,
) -> tuple[Tensor, Tensor]:
    """logits: [B, Hq, C] of the candidates -> (tokens [B, Hk, budget] int32 ascending, -1 padded, counts [B, Hk])."""
    args = (logits, blocks, lengths, num_kv, block_size, budget, sink, recent, aggregate)
    if logits.is_cuda:
        from slipstream.kernels import triton_topk

        return triton_topk.top_tokens(*args)
    return reference_select.top_tokens(*args)


def label_tokens(
    q: Tensor,
    channels: Tensor,
    labels: Tensor,
    scales: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    blocks: Tensor | None,
    block_size: int,
    scale: float,
    budget: int,
    sink: int,
    recent: int,
    aggregate: str,
) -> tuple[Tensor, Tensor]:
    """:func:`top_tokens` of :func:`label_logits`, in fewer passes on a device.

    aggregate: "sum" or "max" of softmax weights, or "peak": the largest logit of the group, which needs no softmax.
    """
    args = (q, channels, labels, scales, page_table, lengths, blocks, block_size, scale)
    rule = (lengths, labels.shape[1], block_size, budget, sink, recent, aggregate)
    if q.is_cuda:
        from slipstream.kernels import triton_logits, triton_topk

        logits, partials = triton_logits.label_logits_and_partials(*args, peak=aggregate == "peak")
        return triton_topk.top_tokens(logits, blocks, *rule, partials)
    return reference_select.top_tokens(_joined(reference_index.label_logits(*args), *rule), blocks, *rule)


def _joined(logits: Tensor, lengths: Tensor, num_kv: int, *rule: int | str) -> Tensor:
    return reference_select.group_peak(logits, num_kv) if rule[-1] == "peak" else logits


def key_tokens(
    q: Tensor,
    k_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    budget: int,
    sink: int,
    recent: int,
    aggregate: str,
) -> tuple[Tensor, Tensor]:
    """:func:`top_tokens` of :func:`key_logits`: what the labels should have found."""
    args = (q, k_pages, page_table, lengths, scale)
    rule = (lengths, k_pages.shape[1], 1, budget, sink, recent, aggregate)
    if q.is_cuda:
        from slipstream.kernels import triton_logits, triton_topk

        logits, partials = triton_logits.key_logits_and_partials(*args, peak=aggregate == "peak")
        return triton_topk.top_tokens(logits, None, *rule, partials)
    return reference_select.top_tokens(_joined(reference_index.key_logits(*args), *rule), None, *rule)


def block_tokens(blocks: Tensor, lengths: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """blocks: [B, Hk, M] -> all their tokens (indices [B, Hk, M * block_size] int32, counts [B, Hk] int32)."""
    if blocks.is_cuda:
        from slipstream.kernels import triton_blocks

        return triton_blocks.block_tokens(blocks, lengths, block_size)
    return reference_select.block_tokens(blocks, lengths, block_size)


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    out: Tensor,
    rows: Tensor | None = None,
) -> None:
    """q: [B, Hq, D] over the first ``counts`` [B, Hk] tokens of ``indices`` [B, Hk, K], into ``out`` [B, Hq, Dv].

    rows: [B] int64, where given: which row of ``indices`` and ``counts`` each request uses, of any number of them.
    Rows of count 0 keep what ``out`` holds. Dv < D where values are columns of the keys.
    """
    args = (q, k_pages, v_pages, page_table, indices, counts, scale, out)
    if q.is_cuda and reference.shares_rows(k_pages, v_pages):
        from slipstream.kernels import triton_mla

        triton_mla.sparse_attention(*args, rows)
    elif q.is_cuda:
        from slipstream.kernels import triton_sparse

        triton_sparse.sparse_attention(*args, rows)
    elif cpu_decode.suits(k_pages):
        cpu_decode.sparse_attention(*args, rows)
    else:
        reference_select.sparse_attention(*args, rows)


def tova_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, filled: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q: [B, Hq, D] over the first ``filled`` slots of seats ``rows`` of k, v [M, Hk, C, D] -> (out, victims [B])."""
    if q.is_cuda:
        from slipstream.kernels import triton_tova

        return triton_tova.tova_attention(q, k, v, rows, filled, scale)
    return reference_select.tova_attention(q, k, v, rows, filled, scale)
