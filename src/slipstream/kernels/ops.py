"""The catalogue: every op a model step needs. CUDA tensors go to the Triton kernels, all others to the reference
(decode attention in fp32 on a CPU to :mod:`slipstream.kernels.cpu_decode`, which does the same in place).

Shapes, dtypes and semantics are those of :mod:`slipstream.kernels.reference`, which is the definition. Triton is
imported on the first CUDA call, because it need not be installed where there is no GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels import cpu_decode, reference, reference_mla

token_logprobs = reference.token_logprobs
copy_pages = reference.copy_pages
shares_rows = reference.shares_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, H], weight: [H] -> [T, H]."""
    if x.is_cuda:
        from slipstream.kernels import triton_norm

        return triton_norm.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, H], weight: [H] -> (norm of x + residual, x + residual)."""
    if x.is_cuda:
        from slipstream.kernels import triton_norm

        return triton_norm.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2I] -> [T, I]: silu of the first half times the second."""
    if gate_up.is_cuda:
        from slipstream.kernels import triton_norm

        return triton_norm.silu_mul(gate_up)
    return reference.silu_mul(gate_up)


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Tensor:
    """qkv: [T, (Hq + 2 Hk) * D] -> q: [T, Hq, D]; K and V go into the pages at ``slots``."""
    args = (qkv, q_weight, k_weight, eps, cos_sin, positions, slots, k_pages, v_pages)
    if qkv.is_cuda:
        from slipstream.kernels import triton_rope

        return triton_rope.qk_norm_rope_store(*args)
    return reference.qk_norm_rope_store(*args)


def mla_rope_store(
    heads: Tensor,
    latent: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
) -> Tensor:
    """heads: [T, Hq, Dn + R], latent: [T, Dv + R] -> q: [T, Hq, Dv + R], its rotary columns; rows into pages."""
    args = (heads, latent, weight, eps, cos_sin, positions, slots, k_pages)
    if heads.is_cuda:
        from slipstream.kernels import triton_mla_rope

        return triton_mla_rope.mla_rope_store(*args)
    return reference_mla.mla_rope_store(*args)


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


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    until: Tensor | None = None,
    banned: Tensor | None = None,
) -> Tensor:
    """logits: [B, V] and per-row parameters [B] -> tokens [B] int64, without host synchronisation on CUDA."""
    args = (logits, temperature, top_k, top_p, min_p, seeds, positions, until, banned)
    if logits.is_cuda:
        from slipstream.kernels import triton_sample

        return triton_sample.sample(*args)
    return reference.sample(*args)


def list_pages(page_table: Tensor, lengths: Tensor, page_size: int, indices: Tensor, last_page_len: Tensor) -> None:
    """page_table: [B, N], lengths: [B] -> flat page ids in ``indices`` and tokens of the last pages, in place."""
    if lengths.is_cuda:
        from slipstream.kernels import triton_pages

        triton_pages.list_pages(page_table, lengths, page_size, indices, last_page_len)
    else:
        reference.list_pages(page_table, lengths, page_size, indices, last_page_len)
