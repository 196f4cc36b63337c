"""Indexed caches for tests: garbage in every entry that no token or block owns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from paged_cache import PagedCache
from torch import Tensor

from slipstream.kernels import reference_index


class PagedIndex(NamedTuple):
    """summaries: [P, Hk, S // block, C, D]. labels: [P, Hk, S, r // 2]. scales: [P, Hk, S, 2]. channels: [Hk, r]."""

    summaries: Tensor
    labels: Tensor
    scales: Tensor
    channels: Tensor


def empty_index(cache: PagedCache, block: int, kind: str, num_channels: int) -> PagedIndex:
    """NaN summaries and scales, labels of 255, and channels in any order, another for each head."""
    pages, num_kv, page, dim = cache.k_pages.shape
    device, dtype = cache.k_pages.device, cache.k_pages.dtype
    generator = torch.Generator().manual_seed(3)
    channels = torch.stack([torch.randperm(dim, generator=generator)[:num_channels] for _ in range(num_kv)])
    stats = reference_index.NUM_STATS[kind]
    return PagedIndex(
        torch.full((pages, num_kv, page // block, stats, dim), torch.nan, dtype=dtype, device=device),
        torch.full((pages, num_kv, page, num_channels // 2), 255, dtype=torch.uint8, device=device),
        torch.full((pages, num_kv, page, 2), torch.nan, dtype=torch.float16, device=device),
        channels.int().to(device),
    )


def starts(counts: Sequence[int], device: torch.device) -> Tensor:
    """``query_start`` of requests with so many new tokens each: [B + 1] int32."""
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


def make_index(cache: PagedCache, block: int, kind: str, num_channels: int) -> PagedIndex:
    """The index of everything in the cache, by the reference on the CPU."""
    index = PagedIndex(*(x.cpu() for x in empty_index(cache, block, kind, num_channels)))
    k_pages, page_table, lengths = (x.cpu() for x in (cache.k_pages, cache.page_table, cache.lengths))
    counts = lengths.tolist()
    query_start = starts(counts, lengths.device)
    reference_index.extend_index(
        k_pages, page_table, query_start, lengths, max(counts), index.summaries, kind, *index[1:]
    )
    return PagedIndex(*(x.to(cache.k_pages.device) for x in index))


def make_query(batch: int, num_q: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 9) -> Tensor:
    return torch.randn(batch, num_q, dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
