"""The sets of tokens that chains attend to, made one step ahead and kept by seat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.kernels import predict
from slipstream.selection.selector import Selector
from slipstream.types import Batch, ModelSpec, Selection


class StoredSets(Selector):
    """A ``Selector`` that hands out what was stored for a row's seat, whatever the query.

    One buffer is enough: a layer's set is stored by work that is ordered after the attention that reads the last one.

    indices: [L, M + 1, Hk, K] int32, counts: [L, M + 1, Hk] int32, as in ``Selection``, by seat. made_for: [M + 1]
    int64, the length (this step's token included) that a seat's sets are for; 0: none. inner: selects one step earlier,
    among one token fewer. Padding rows have seat 0 and a set of one token.
    """

    def __init__(self, inner: Selector, spec: ModelSpec, budget: int, num_seats: int, device: torch.device) -> None:
        self._inner = inner
        shape = (spec.num_layers, num_seats + 1, spec.num_kv_heads, budget)
        self.indices = torch.zeros(shape, dtype=torch.int32, device=device)
        self.counts = torch.zeros(shape[:-1], dtype=torch.int32, device=device)
        self.made_for = torch.zeros(num_seats + 1, dtype=torch.int64, device=device)
        self.counts[:, 0] = 1

    @staticmethod
    def seat_bytes(spec: ModelSpec, budget: int) -> int:
        """Memory of one seat."""
        return spec.num_layers * spec.num_kv_heads * 4 * (budget + 1) + 8

    def plan(self, batch: Batch, lengths: Tensor) -> None:
        self._rows = batch.seats

    def select(self, layer: int, query: Tensor) -> Selection:
        return Selection(self.indices[layer], self.counts[layer], self._rows)

    def attended(self, length: int) -> int:
        return self._inner.attended(length - 1) + 1

    def reset(self, seats: Sequence[int]) -> None:
        """Forget what is there."""
        for seat in seats:
            self.counts[:, seat].zero_()
            self.made_for[seat].zero_()

    def store(self, layer: int, selection: Selection, seats: Tensor, lengths: Tensor) -> None:
        """Sets for the next step, with its token (number ``lengths[b]``) appended. seats, lengths: [B] int64 and int32.

        A row of length 0 gets an empty set.
        """
        predict.store_sets(selection.indices, selection.counts, seats, lengths, self.indices[layer], self.counts[layer])

    def store_part(self, layers: range, indices: Tensor, counts: Tensor, seats: Tensor) -> None:
        """What :meth:`store` made elsewhere of some layers: [l, B, Hk, K] and [l, B, Hk] int32. seats: [B] int64."""
        for own, part in ((self.indices, indices), (self.counts, counts)):
            own[layers.start : layers.stop].index_copy_(1, seats, part)

    def inherit(self, source: Tensor, target: Tensor) -> None:
        """Copies for other seats. source, target: [n] int64."""
        for store in (self.indices, self.counts):
            store.index_copy_(1, target, store.index_select(1, source))
        self.made_for.index_copy_(0, target, self.made_for.index_select(0, source))


def count_shared(made: Selection, true: Selection, real: Tensor) -> Tensor:
    """[2] int64: how many tokens of ``true`` are in ``made``, of how many, over the rows that are ``real`` [B] bool."""
    width = made.indices.shape[-1]
    made_place, true_place = (torch.arange(one.indices.shape[-1], device=real.device) for one in (made, true))
    tokens = made.indices.masked_fill(made_place >= made.counts.unsqueeze(-1), torch.iinfo(torch.int32).max)
    at = torch.searchsorted(tokens, true.indices.contiguous()).clamp_max_(width - 1)
    wanted = (true_place < true.counts.unsqueeze(-1)) & real.view(-1, 1, 1)
    return torch.stack((((tokens.gather(-1, at) == true.indices) & wanted).sum(), wanted.sum()))
