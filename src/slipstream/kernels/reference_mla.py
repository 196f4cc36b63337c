"""What latent attention (MLA, DeepSeek-V2, arXiv 2405.04434) needs beside the common ops, in plain torch.

A token's cache row is its latent, normed, and one rotary key for all heads: ``D = Dv + R`` numbers. The values are the
first Dv columns of that same row, so ``v_pages`` is a view of ``k_pages`` [P, 1, S, D] and no store of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels import reference


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
    """RMSNorm of the latents, RoPE of the last R columns of queries and keys, and the store of the cache rows.

    heads: [T, Hq, Dn + R].  latent: [T, Dv + R] with contiguous rows, the latent and the key's rotary part.
    weight: [Dv].  cos_sin: [max_position, R] fp32, cosines then sines; pairs are halves (neox).  positions, slots: [T]
    int64.  k_pages: [P, 1, S, Dv + R], written in place at ``slots``.
    Returns q: [T, Hq, Dv + R], whose last R columns are the rotated ones of ``heads``; whoever absorbs the key
    projection fills the others, which are undefined.
    """
    width, rotary = k_pages.shape[3], cos_sin.shape[1]
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    both = torch.cat((heads[..., -rotary:], latent[:, None, -rotary:]), dim=1)
    turned = reference._rotate(both, cos, sin)
    normed = reference.rms_norm(latent[:, : width - rotary], weight, eps)
    k_pages.view(-1, width).index_copy_(0, slots, torch.cat((normed, turned[:, -1]), dim=-1))
    q = heads.new_empty((*heads.shape[:2], width))
    q[..., -rotary:] = turned[:, :-1]
    return q


def mla_rope(heads: Tensor, cos_sin: Tensor, positions: Tensor, width: int) -> Tensor:
    """The queries of :func:`mla_rope_store` alone, bit for bit: nothing is stored. width: Dv + R of a row."""
    rotary = cos_sin.shape[1]
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    q = heads.new_empty((*heads.shape[:2], width))
    q[..., -rotary:] = reference._rotate(heads[..., -rotary:], cos, sin)
    return q
