"""Paged caches for tests: pages out of order, NaN in every slot that no token owns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PagedCache:
    """k_pages, v_pages: [P, Hk, S, D]. page_table: [B, N] int32. lengths: [B] int32. keys, values: [n, Hk, D] each."""

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.k_pages, self.v_pages, self.page_table


def make_cache(
    lengths: Sequence[int], num_kv: int, page: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PagedCache:
    """A cache whose requests hold random keys and values; table entries beyond a request name a page full of NaN."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page) for length in lengths]
    total = sum(counts) + 2
    order = (torch.randperm(total - 2, generator=generator) + 1).tolist()
    poison = total - 1
    shape = (total, num_kv, page, dim)
    k_pages, v_pages = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    table = torch.full((len(lengths), max(counts) + 1), poison, dtype=torch.int32)
    keys, values = [], []
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        pages = [order.pop() for _ in range(count)]
        table[b, :count] = torch.tensor(pages, dtype=torch.int32)
        for pool, store in ((k_pages, keys), (v_pages, values)):
            tokens = torch.randn(length, num_kv, dim, generator=generator).to(dtype)
            padded = torch.full((count * page, num_kv, dim), torch.nan)
            padded[:length] = tokens
            pool[pages] = padded.view(count, page, num_kv, dim).transpose(1, 2)
            store.append(tokens.to(device))
    return PagedCache(
        k_pages.to(device, dtype),
        v_pages.to(device, dtype),
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        keys,
        values,
    )


def oracle(op: Callable[..., Tensor], q: Tensor, *args: Any) -> Tensor:
    """The reference where it is the product's own path: on the CPU, in fp32 so that it rounds once; as q in the end."""

    def to_host(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.cpu().float() if x.is_floating_point() else x.cpu()

    return op(*map(to_host, (q, *args))).to(q.device, q.dtype)


def naive_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One query token. q: [Hq, D], keys, values: [length, Hk, D] -> [Hq, D] fp32, head by head in fp64."""
    group = q.shape[0] // keys.shape[1]
    rows = []
    for h in range(q.shape[0]):
        k, v = keys[:, h // group].double(), values[:, h // group].double()
        rows.append(torch.softmax(k @ q[h].double() * scale, dim=0) @ v)
    return torch.stack(rows).float()
