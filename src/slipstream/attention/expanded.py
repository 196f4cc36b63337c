"""Prompts over a latent cache in expanded form, where that costs less; everything else by another backend."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.attention.backend import AttentionBackend, KVView
from slipstream.kernels import expanded
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec


class ExpandedPrompts(AttentionBackend):
    """``AttentionBackend`` over ``dense``, which attends where absorbed queries cost less: decode steps, short chunks.

    An absorbed query has lost what expanded attention needs, and values of heads are no latents. So the model offers
    its queries as they were before :meth:`attend`, which answers with anything, and gets the values from :meth:`take`.
    A method that gives its prompt rows to its dense backend (they are a step's last rows) need not know.
    What it attends, it attends with this rank's heads: those are what ``dense`` is for.
    nope, value: of a head, as in the model's config.
    """

    def __init__(self, dense: AttentionBackend, pool: KVPool, spec: ModelSpec, nope: int, value: int) -> None:
        assert spec.value_dim is not None, "only a latent cache is expanded"
        self.dense, self.pool, self.spec = dense, pool, spec
        self._shape = (nope, value, spec.head_dim, spec.value_dim)
        self._batch: Batch | None = None
        self._expands = False
        self._offered: tuple[tuple[Tensor, Tensor], Tensor, Tensor] | None = None
        self._values: Tensor | None = None

    def plan(self, batch: Batch) -> None:
        self._batch, self._offered, self._values = batch, None, None
        self._expands = not batch.is_decode and self._pays(batch)
        if not self._expands:
            self.dense.plan(batch)

    def _pays(self, batch: Batch) -> bool:
        starts = batch.query_start_host
        both = [
            expanded.costs(starts[b + 1] - starts[b], length, *self._shape)
            for b, length in enumerate(batch.lengths_host)
        ]
        return sum(cost for _, cost in both) < sum(cost for cost, _ in both)

    def view(self, layer: int) -> KVView:
        if not self._expands:
            return self.dense.view(layer)
        assert self._batch is not None
        return KVView(self.pool.k[layer], self.pool.v[layer], self._batch.slots)

    def offer(self, query: tuple[Tensor, Tensor], key_up: Tensor, value_up: Tensor) -> None:
        """Before ``attend`` of a layer: the queries of all rows, [T, Hq, nope] and, rotated, [T, Hq, rope], and how to
        expand latents: [Hq, nope, latent], [Hq, latent, value]."""
        if self._expands:
            self._offered = query, key_up, value_up

    def attend(self, layer: int, q: Tensor) -> Tensor:
        q = self.spec.own(q)
        if not self._expands:
            return self.dense.attend(layer, q)
        batch = self._batch
        assert batch is not None and self._offered is not None, "the model offers its queries first"
        parts, key_up, value_up = self._offered
        self._offered = None
        query = torch.cat([part[len(part) - len(q) :] for part in parts], dim=-1)
        self._values = expanded.expanded_attention(
            query, self.pool.k[layer], batch.page_table, batch.query_start_host, batch.lengths_host, key_up, value_up,
            self.spec.scale,
        )  # fmt: skip
        return q.new_zeros((*q.shape[:2], self._shape[3]))

    def take(self, values: Tensor) -> Tensor:
        """After ``attend``: the values [T, Hq, value] of all rows, those of expanded ones put in place."""
        if self._values is not None:
            values[len(values) - len(self._values) :] = self._values
            self._values = None
        return values
