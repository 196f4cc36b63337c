"""The catalogue: every op a model step needs. CUDA tensors go to the Triton kernels, all others to the reference
(decode attention in fp32 on a CPU to :mod:`slipstream.kernels.cpu_decode`, which does the same in place).

Shapes, dtypes and semantics are those of :mod:`slipstream.kernels.reference`, which is the definition. Triton is
imported on the first CUDA call, because it need not be installed where there is no GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels import cpu_decode, reference, reference_mla
from slipstream.kernels.dispatch import op

token_logprobs = reference.token_logprobs
copy_pages = reference.copy_pages
shares_rows = reference.shares_rows
stored = reference.stored
rms_norm = op(reference.rms_norm, "triton_norm")
add_rms_norm = op(reference.add_rms_norm, "triton_norm")
silu_mul = op(reference.silu_mul, "triton_norm")
qk_norm_rope_store = op(reference.qk_norm_rope_store, "triton_rope")
mla_rope_store = op(reference_mla.mla_rope_store, "triton_mla_rope")
mla_rope = op(reference_mla.mla_rope, "triton_mla_rope")
sample = op(reference.sample, "triton_sample")
list_pages = op(reference.list_pages, "triton_pages", by=1)  # whose first tensor may be on the host


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """q: [B, Hq, D] over the pages of B requests -> [B, Hq, Dv]; Dv < D where values are columns of the keys.

    out: written where given; requests of length 0 keep what it holds (without it they get zeros).
    """
    if out is not None and not q.is_cuda:
        found = decode_attention(q, k_pages, v_pages, page_table, lengths, scale)
        return out.copy_(torch.where(lengths.view(-1, 1, 1) > 0, found, out))
    if q.is_cuda and shares_rows(k_pages, v_pages):
        from slipstream.kernels import triton_mla

        return triton_mla.decode_attention(q, k_pages, v_pages, page_table, lengths, scale, out)
    if q.is_cuda:
        from slipstream.kernels import triton_decode

        return triton_decode.decode_attention(q, k_pages, v_pages, page_table, lengths, scale, out)
    if cpu_decode.suits(k_pages):
        return cpu_decode.decode_attention(q, k_pages, v_pages, page_table, lengths, scale)
    return reference.decode_attention(q, k_pages, v_pages, page_table, lengths, scale)


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    scale: float,
    max_query: int,
) -> Tensor:
    """q: [T, Hq, D], ragged and causal over the pages of B requests -> [T, Hq, Dv]."""
    args = (q, k_pages, v_pages, page_table, query_start, lengths, scale, max_query)
    if q.is_cuda and shares_rows(k_pages, v_pages):
        from slipstream.kernels import triton_mla_prefill

        return triton_mla_prefill.prefill_attention(*args)
    if q.is_cuda:
        from slipstream.kernels import triton_prefill

        return triton_prefill.prefill_attention(*args)
    return reference.prefill_attention(*args)
