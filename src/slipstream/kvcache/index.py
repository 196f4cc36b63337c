"""What selection reads instead of the keys: summaries of blocks, and a 4-bit copy of a few channels of every key.

Both are indexed by page, beside the pool's K and V: whoever shares, copies or frees a page shares, copies or frees its
index with it. Prefixes, forks and preemption need no line of code here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.kernels import ops, sparse
from slipstream.kernels.sparse import GROUP_SHIFT, NUM_STATS
from slipstream.kvcache.pool import KVPool
from slipstream.types import ModelSpec

SCALE_BYTES = 4  # of the labels of one token and head: an fp16 scale and an fp16 zero point
_MOST_PAGES = 1 << 14  # relabelled by one launch: device grids have limits


@dataclass(frozen=True)
class IndexParts:
    """Which parts an index has. kind: of the block summaries, None for none; block: tokens that one of them covers.

    num_channels: channels of a key that its label holds, 0 for no labels.
    """

    kind: str | None = None
    block: int = 0
    num_channels: int = 0

    def check_page_size(self, page_size: int) -> None:
        """``ValueError`` unless blocks divide a pool's pages."""
        if self.kind is not None and page_size % self.block:
            raise ValueError(
                f"blocks of {self.block} tokens do not divide a page of {page_size}: set page_size to a multiple"
            )

    def check_model(self, spec: ModelSpec) -> None:
        """``ValueError`` for labels wider than the model's heads."""
        if self.num_channels > spec.head_dim:
            raise ValueError(f"channels = {self.num_channels} exceeds the head dimension {spec.head_dim}: lower it")

    def bytes_per_token(self, spec: ModelSpec) -> int:
        """Bytes of all layers' index for one token, rounded up."""
        heads = spec.num_layers * spec.num_kv_heads
        groups = 1 if spec.value_dim is None else 2
        total = heads * (self.num_channels // 2 + groups * SCALE_BYTES) if self.num_channels else 0
        if self.kind is not None:
            row = spec.head_dim * spec.dtype.itemsize
            total += -(-heads * NUM_STATS[self.kind] * row // self.block)
        return total


class TokenLabels(NamedTuple):
    """Labels of tokens, and what they mean.

    channels: [Hk, r] int32, ascending. labels: [P, Hk, S, r // 2] uint8, channel j in the low and channel j + r / 2 in
    the high half of byte j. scales: [P, Hk, S, 2 * groups] fp16, scale and zero point of each group of channels.
    A latent cache has two groups, latent and rotary channels, whose numbers differ in size; a channel then carries its
    group above its number (``kernels.reference_index.GROUP_SHIFT``).
    """

    channels: Tensor
    labels: Tensor
    scales: Tensor


class KeyIndex:
    """The index of every layer over the pages of one pool.

    A block's summary is written when its last token is stored; a block that is not full yet has none. Labels are
    written token by token, for the channels that :meth:`set_channels` names. channels: [L, Hk, r] int32, or None for
    the first r of every head until then.
    """

    def __init__(self, pool: KVPool, parts: IndexParts, channels: Tensor | None = None) -> None:
        self.parts, self._page_size = parts, pool.page_size
        self._summaries: Tensor | None = None
        self._labels: TokenLabels | None = None  # with [L, ...] in front
        self._border = pool.v.shape[-1] if ops.shares_rows(pool.k, pool.v) else None  # where the second group begins
        num_layers, num_pages, num_kv, page_size, dim = pool.k.shape
        if parts.kind is not None:
            assert page_size % parts.block == 0, "parts.check_page_size comes first"
            blocks, rows = page_size // parts.block, NUM_STATS[parts.kind]
            whole = (num_layers, num_pages, num_kv, blocks, rows, dim)
            self._summaries = torch.zeros(whole, dtype=pool.k.dtype, device=pool.device)
            pool.attach(self._summaries)
        if parts.num_channels:
            shape = (num_layers, num_pages, num_kv, page_size)
            first = torch.arange(parts.num_channels, dtype=torch.int32, device=pool.device)
            self._labels = TokenLabels(
                self._grouped(first.repeat(num_layers, num_kv, 1) if channels is None else channels.to(pool.device)),
                torch.zeros((*shape, parts.num_channels // 2), dtype=torch.uint8, device=pool.device),
                torch.zeros((*shape, 2 if self._border is None else 4), dtype=torch.float16, device=pool.device),
            )
            pool.attach(self._labels.labels)
            pool.attach(self._labels.scales)

    def _grouped(self, channels: Tensor) -> Tensor:
        if self._border is None:
            return channels
        return channels | ((channels >= self._border).int() << GROUP_SHIFT)

    @property
    def bytes(self) -> int:
        """Size of all page-indexed tensors in bytes."""
        stores = [self._summaries, *(self._labels or ())[1:]]
        return sum(store.numel() * store.element_size() for store in stores if store is not None)

    def summaries(self, layer: int) -> Tensor:
        """[P, Hk, S // block, C, D] of one layer; the C vectors are those of ``kernels.sparse.NUM_STATS``."""
        assert self._summaries is not None, "an index without summaries"
        return self._summaries[layer]

    def labels(self, layer: int) -> TokenLabels:
        """Those of one layer."""
        assert self._labels is not None, "an index without labels"
        return TokenLabels(*(store[layer] for store in self._labels))

    def extend(
        self, layer: int, k_pages: Tensor, page_table: Tensor, query_start: Tensor, lengths: Tensor, max_query: int,
        key_table: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Index the newest tokens of some requests, whose keys are in ``k_pages`` [P, Hk, S, D] already.

        page_table: [B, N] int32. query_start: [B + 1] int32, counts of new tokens as in ``Batch``. lengths: [B] int32
        with them. max_query: most new tokens of one request, a host int. key_table: [B, N] int32 pages of the keys,
        where these are elsewhere than what the index calls by ``page_table``.
        """
        summaries = None if self._summaries is None else self._summaries[layer]
        channels, labels, scales = (None, None, None) if self._labels is None else self.labels(layer)
        kind = self.parts.kind or "mean"
        sparse.extend_index(
            k_pages, page_table, query_start, lengths, max_query, summaries, kind, labels, scales, channels, key_table
        )

    def set_channels(self, layer: int, channels: Tensor, k_pages: Tensor, pages: Iterable[int]) -> None:
        """From now on labels hold other channels ([Hk, r] int32); those of the tokens in ``pages`` are written anew."""
        own, labels, scales = self.labels(layer)
        own.copy_(self._grouped(channels))
        rows = torch.tensor(sorted(pages), dtype=torch.int32)
        for table in rows.to(own.device).view(-1, 1).split(_MOST_PAGES):
            # Each page as a request of its own, all of whose tokens are new.
            size, count = self._page_size, table.shape[0]
            starts = torch.arange(0, (count + 1) * size, size, dtype=torch.int32, device=table.device)
            lengths = torch.full((count,), size, dtype=torch.int32, device=table.device)
            sparse.extend_index(k_pages, table, starts, lengths, size, None, "mean", labels, scales, own)
