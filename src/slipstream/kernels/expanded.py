"""Latent attention (MLA) of prompts in expanded form: latents become the keys and values of every head first.

Absorbed queries of a prompt pay for a latent's width with every key; expanded ones for a head's, and once for the
expansion of the context. Plain torch on every device, one request at a time; a device's flash attention does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from slipstream.kernels import reference

EXPANDED_BYTES = 256 << 20  # of keys and values that are expanded at once


def costs(queries: int, length: int, nope: int, value: int, row: int, latent: int) -> tuple[int, int]:
    """Multiplications per head of one request: absorbed, expanded. row: of the cache, ``latent`` and rotary columns."""
    pairs = queries * length
    return pairs * (row + latent), pairs * (nope + row - latent + value) + length * latent * (nope + value)


def expanded_attention(
    query: Tensor,
    k_pages: Tensor,
    page_table: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    key_up: Tensor,
    value_up: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of ragged queries over latent pages that hold this step's rows already.

    query: [T, Hq, Dn + R], rotated.  k_pages: [P, 1, S, C + R].  page_table: [B, N] int32.  starts [B + 1], lengths
    [B]: on the host, as in ``Batch``.  key_up: [Hq, Dn, C].  value_up: [Hq, C, Dv].  -> [T, Hq, Dv], zeros where no
    request is.
    """
    num_q, width = key_up.shape[0], key_up.shape[2]
    out = query.new_zeros((len(query), num_q, value_up.shape[2]))
    for b, length in enumerate(lengths):
        mine = slice(starts[b], starts[b + 1])
        if mine.start == mine.stop or not length:
            continue
        rows = k_pages[page_table[b, : -(-length // k_pages.shape[2])].long()].flatten(0, 2)[:length]
        latent, rotary = rows.tensor_split([width], dim=1)
        each = length * (query.shape[2] + out.shape[2]) * query.element_size()
        for first in range(0, num_q, max(1, EXPANDED_BYTES // each)):
            heads = slice(first, first + max(1, EXPANDED_BYTES // each))
            k = torch.matmul(latent, key_up[heads].mT)
            k = torch.cat((k, rotary.expand(len(k), -1, -1)), dim=-1)
            v = torch.matmul(latent, value_up[heads])
            out[mine, heads] = _causal(query[mine, heads].transpose(0, 1), k, v, scale).transpose(0, 1)
    return out


def _causal(query: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """query: [H, M, D] is the end of the sequence k: [H, length, D], v: [H, length, Dv] -> [H, M, Dv]."""
    if not query.is_cuda or query.dtype == torch.float32 or query.shape[1] == k.shape[1]:
        return reference._causal(query, k, v, scale)
    bias = causal_lower_right(query.shape[1], k.shape[1])  # no mask of M x length is made
    return F.scaled_dot_product_attention(query[None], k[None], v[None], attn_mask=bias, scale=scale)[0]
