"""Decode and sparse attention in fp32 on a CPU that read every key and value where it lies.

The definition is :func:`slipstream.kernels.reference.decode_attention`, which gathers the pages first: that costs as
much as attending. Here two ops of torch that follow a list of rows do the work: a sampled matrix product (the scores
that somebody asked for) and a weighted embedding bag (the weighted sum of the values). Any order of pages is as good as
any other, pages may be shared, no slot behind a length is ever read, and the work is that of the tokens there are.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.kernels.reference import shares_rows

with warnings.catch_warnings():  # torch says once per process that its sparse tensors are young
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), [], (0, 0))


class _Reads(NamedTuple):
    """What one step reads in each of its layers, for one query row (request and head) after the other.

    keys: [n] int32 rows of ``pages.view(-1, D)``. starts: [B * Hq + 1] int32, where each query row's keys begin.
    counts: how many of the keys belong to each run of neighbouring requests of equal length; lengths: those lengths.
    """

    keys: Tensor
    starts: Tensor
    counts: list[int]
    lengths: list[int]


def suits(k_pages: Tensor) -> bool:
    """Whether :func:`decode_attention` takes such pages: fp32, on a CPU, with slots that 32 bits can number."""
    return (
        k_pages.dtype == torch.float32 and k_pages.device.type == "cpu" and k_pages.numel() // k_pages.shape[-1] < 2**31
    )


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """:func:`reference.decode_attention` over pages that :func:`suits` takes. q: [B, Hq, D] -> [B, Hq, Dv]."""
    num_q, dim = q.shape[1:]
    num_kv, page_size = k_pages.shape[1:3]
    sizes = tuple(lengths.tolist())
    if not any(sizes):
        return q.new_zeros((*q.shape[:2], v_pages.shape[3]))
    used = page_table[:, : -(-max(sizes) // page_size)]
    reads = _reads(used.numpy().tobytes(), sizes, num_q, num_kv, page_size)
    queries, keys = q.reshape(-1, dim), k_pages.view(-1, dim)
    values = keys if shares_rows(k_pages, v_pages) else v_pages.view(-1, dim)
    shape = (queries.shape[0], keys.shape[0])
    wanted = torch.sparse_csr_tensor(reads.starts, reads.keys, torch.zeros(reads.keys.shape), shape)
    scores = torch.sparse.sampled_addmm(wanted, queries, keys.t(), beta=0, alpha=scale, out=wanted).values()
    runs = zip(scores.split(reads.counts), reads.lengths, strict=True)
    weights = [run.view(-1, length).softmax(-1).view(-1) for run, length in runs]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    out = torch.embedding_bag(values, reads.keys, reads.starts, False, 0, False, weight, include_last_offset=True)[0]
    return out.view(q.shape)[..., : v_pages.shape[3]].contiguous()


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
    """:func:`reference_select.sparse_attention` over pages that :func:`suits` takes, into ``out`` [B, Hq, Dv]."""
    (num_kv, page_size, dim), group = k_pages.shape[1:], q.shape[1] // k_pages.shape[1]
    if rows is not None:
        indices, counts = indices.index_select(0, rows), counts.index_select(0, rows)
    stored = k_pages.view(-1, dim)
    width = min(indices.shape[-1], len(stored))  # torch holds no more entries than a dense matrix has
    indices, live = indices[..., :width], counts.any(-1).nonzero().squeeze(1)
    if len(live) == 0:
        return
    target = out
    if len(live) < len(counts):
        q, page_table, indices, counts, out = (x[live] for x in (q, page_table, indices, counts, out))
    unseen = torch.arange(width, dtype=torch.int32) >= counts.unsqueeze(-1)
    # What stands in for a missing token, with weight 0, is one that is attended: any other may be NaN.
    tokens = torch.where(unseen, indices[..., :1], indices).clamp_min_(0)
    pages = page_table.gather(1, (tokens // page_size).flatten(1).long()).view_as(tokens)
    heads = torch.arange(num_kv, dtype=torch.int32).view(-1, 1)
    keys = ((pages * num_kv + heads) * page_size + tokens % page_size).repeat_interleave(group, 1).flatten()
    starts = torch.arange(0, keys.numel() + 1, width, dtype=torch.int32)
    values = stored if shares_rows(k_pages, v_pages) else v_pages.view(-1, dim)
    wanted = torch.sparse_csr_tensor(starts, keys, torch.zeros(keys.shape), (len(starts) - 1, len(stored)))
    scores = torch.sparse.sampled_addmm(
        wanted, q.reshape(-1, dim), stored.t(), beta=0, alpha=scale, out=wanted
    ).values()
    weights = scores.view(len(q), num_kv, group, width).masked_fill_(unseen.unsqueeze(2), -torch.inf).softmax(-1)
    attended = torch.embedding_bag(values, keys, starts, False, 0, False, weights.view(-1), include_last_offset=True)[0]
    attended = attended.view(q.shape)[..., : v_pages.shape[3]]
    result = torch.where((counts > 0).repeat_interleave(group, 1).unsqueeze(-1), attended, out)
    if target is out:
        out.copy_(result)
    else:
        target[live] = result


@lru_cache(maxsize=1)
def _reads(pages: bytes, sizes: tuple[int, ...], num_q: int, num_kv: int, page_size: int) -> _Reads:
    """pages: the int32 page table [B, N] as bytes. Remembered by value, because all layers of a step ask the same."""
    table = torch.frombuffer(bytearray(pages), dtype=torch.int32).view(len(sizes), -1, 1)
    offsets = torch.arange(page_size, dtype=torch.int32)
    heads = torch.arange(num_q, dtype=torch.int32).div(num_q // num_kv, rounding_mode="floor").unsqueeze(1) * page_size
    keys, lengths, first = [], [], 0
    for length, run in groupby(sizes):
        last = first + len(list(run))
        if length:
            slots = table[first:last, : -(-length // page_size)] * (num_kv * page_size) + offsets
            keys.append((slots.view(last - first, 1, -1)[..., :length] + heads).view(-1))
            lengths.append(length)
        first = last
    starts = accumulate((length for length in sizes for _ in range(num_q)), initial=0)
    counts = [part.numel() for part in keys]
    return _Reads(torch.cat(keys), torch.tensor(list(starts), dtype=torch.int32), counts, lengths)
