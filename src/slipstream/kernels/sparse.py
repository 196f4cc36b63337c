"""The catalogue of sparse attention: index, scores, selection, attention over a selection. CUDA goes to Triton.

All tensors are of one layer; B requests with one query token each; a row of length 0 is skipped. No op synchronises on
CUDA, its grid depends on shapes only, and what a docstring calls undefined may hold anything, NaN too. Definitions:
:mod:`slipstream.kernels.reference_index` (up to the logits) and :mod:`slipstream.kernels.reference_select`.
"""

from __future__ import annotations

from torch import Tensor

from slipstream.kernels import cpu_decode, reference, reference_index, reference_select
from slipstream.kernels.dispatch import op

NUM_STATS = reference_index.NUM_STATS
GROUP_SHIFT = reference_index.GROUP_SHIFT
extend_index = op(reference_index.extend_index, "triton_index", by=3)  # by its lengths: keys may be on the host
score_blocks = op(reference_index.score_blocks, "triton_score")
label_logits = op(reference_index.label_logits, "triton_logits")
key_logits = op(reference_index.key_logits, "triton_logits")
top_blocks = op(reference_select.top_blocks, "triton_blocks")
top_tokens = op(reference_select.top_tokens, "triton_topk")
block_tokens = op(reference_select.block_tokens, "triton_blocks")
tova_attention = op(reference_select.tova_attention, "triton_tova")
lowest_slots = op(reference_select.lowest_slots, "triton_tova")


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
    unread: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`top_tokens` of :func:`label_logits`, in fewer passes on a device.

    aggregate: "sum" or "max" of softmax weights, or "peak": the largest logit of the group, which needs no softmax.
    unread: so many of the newest tokens, all of them recent ones, need no labels yet: no softmax sees them.
    """
    assert unread <= max(recent, 1), "who is in no softmax is taken anyway"
    args = (q, channels, labels, scales, page_table, lengths, blocks, block_size, scale)
    rule = (lengths, labels.shape[1], block_size, budget, sink, recent, aggregate)
    if q.is_cuda:
        from slipstream.kernels import triton_logits, triton_peaks, triton_topk

        if aggregate == "peak" and blocks is not None and triton_peaks.suits(labels, scales, blocks, block_size):
            images = triton_peaks.label_images(*args[:6], blocks, block_size, scale, sink, recent)
            return triton_topk.top_images(images, blocks, lengths, block_size, budget)
        logits, partials = triton_logits.label_logits_and_partials(*args, peak=aggregate == "peak", unread=unread)
        return triton_topk.top_tokens(logits, blocks, *rule, partials)
    logits = _joined(reference_index.label_logits(*args), *rule)
    return reference_select.top_tokens(logits, blocks, *rule, unread=unread)


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
    unread: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`top_tokens` of :func:`key_logits`: what the labels should have found. unread: whose keys are not read."""
    assert unread <= max(recent, 1), "who is in no softmax is taken anyway"
    args = (q, k_pages, page_table, lengths, scale)
    rule = (lengths, k_pages.shape[1], 1, budget, sink, recent, aggregate)
    if q.is_cuda:
        from slipstream.kernels import triton_logits, triton_topk

        logits, partials = triton_logits.key_logits_and_partials(*args, peak=aggregate == "peak", unread=unread)
        return triton_topk.top_tokens(logits, None, *rule, partials)
    logits = _joined(reference_index.key_logits(*args), *rule)
    return reference_select.top_tokens(logits, None, *rule, unread=unread)


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
