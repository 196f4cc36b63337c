"""Decode attention in fp32 on a CPU that reads every key and value where it lies.

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
    """:func:`reference.decode_attention` over pages that :func:`suits` takes. q: [B, Hq, D] -> [B, Hq, D]."""
    num_q, dim = q.shape[1:]
    num_kv, page_size = k_pages.shape[1:3]
    sizes = tuple(lengths.tolist())
    if not any(sizes):
        return torch.zeros_like(q)
    used = page_table[:, : -(-max(sizes) // page_size)]
    reads = _reads(used.numpy().tobytes(), sizes, num_q, num_kv, page_size)
    queries, keys, values = q.reshape(-1, dim), k_pages.view(-1, dim), v_pages.view(-1, dim)
    shape = (queries.shape[0], keys.shape[0])
    wanted = torch.sparse_csr_tensor(reads.starts, reads.keys, torch.zeros(reads.keys.shape), shape)
    scores = torch.sparse.sampled_addmm(wanted, queries, keys.t(), beta=0, alpha=scale, out=wanted).values()
    runs = zip(scores.split(reads.counts), reads.lengths, strict=True)
    weights = [run.view(-1, length).softmax(-1).view(-1) for run, length in runs]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    out = torch.embedding_bag(values, reads.keys, reads.starts, False, 0, False, weight, include_last_offset=True)[0]
    return out.view(q.shape)


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
