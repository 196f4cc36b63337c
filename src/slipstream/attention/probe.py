"""How good is a selection? Measured beside it, from all keys, on some of the steps; eager steps only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slipstream.attention.sparse import SparseBackend
from slipstream.kernels import sparse
from slipstream.kvcache.pool import KVPool
from slipstream.selection.selector import Selector
from slipstream.types import Batch, ModelSpec, Selection


class Probe:
    """A ``Selector`` that hands on what another one selects, and on every ``every``-th sparse step looks at it.

    Per layer, as means over steps, requests and heads: *recall*, the share of the true best ``budget`` tokens (sinks
    and recent ones inside, by softmax weights summed over the group, per KV head) that were selected; *mass*, the
    softmax weight over all keys, per query head, that lies on the selected tokens.
    """

    def __init__(self, inner: Selector, pool: KVPool, spec: ModelSpec, budget: int, sink: int, recent: int, every: int):
        self._inner, self._pool, self._spec = inner, pool, spec
        self._rule = (budget, sink, recent)
        self._every = every
        self.reset()

    @classmethod
    def of(cls, backend: Any, spec: ModelSpec, config: Any, every: int = 4) -> Probe | None:
        """Put a probe into a backend; None where there is nothing to look at (dense; TOVA, whose keys are gone)."""
        if not isinstance(backend, SparseBackend):
            return None
        probe = cls(backend.selector, backend.pool, spec, config.budget, config.sink, config.recent, every)
        backend.selector = probe
        return probe

    def reset(self) -> None:
        """Forget what was measured."""
        self._steps, self._is_new, self._is_active = 0, False, False
        self._sums: dict[int, Tensor] = {}  # layer -> [recall, mass, rows]

    def plan(self, batch: Batch, lengths: Tensor) -> None:
        assert batch.graph_key is None, "a probe looks at the host: cuda_graphs=False"
        self._table, self._lengths, self._is_new = batch.page_table, lengths, True
        self._inner.plan(batch, lengths)

    def select(self, layer: int, query: Tensor) -> Selection:
        selection = self._inner.select(layer, query)
        if self._is_new:  # the first sparse layer of a step: here, and not in plan(), the lengths are known
            self._is_new, is_sparse = False, bool(self._lengths.any())
            self._is_active = is_sparse and self._steps % self._every == 0
            self._steps += is_sparse
        if self._is_active:
            indices = selection.indices
            self._measure(layer, query, indices if selection.rows is None else indices[selection.rows])
        return selection

    def attended(self, length: int) -> int:
        return self._inner.attended(length)

    def _measure(self, layer: int, query: Tensor, indices: Tensor) -> None:
        live = self._lengths.nonzero().squeeze(1)
        query, table, lengths = query[live], self._table[live], self._lengths[live]
        logits = sparse.key_logits(query, self._pool.k[layer], table, lengths, self._spec.scale)
        num_kv, tokens = self._spec.num_kv_heads, torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(tokens >= lengths.view(-1, 1, 1), -torch.inf)
        best, _ = sparse.top_tokens(logits, None, lengths, num_kv, 1, *self._rule, "sum")
        chosen, wanted = (_members(x, logits.shape[-1]) for x in (indices[live], best))
        recall = (chosen & wanted).sum(-1) / wanted.sum(-1)
        weights = logits.softmax(-1).unflatten(1, (num_kv, -1))
        mass = (weights * chosen.unsqueeze(2)).sum(-1)
        found = torch.stack((recall.mean(1).sum(), mass.mean((1, 2)).sum(), torch.ones_like(live).sum()))
        self._sums[layer] = self._sums.get(layer, 0) + found.double().cpu()

    def report(self) -> dict[str, Any]:
        """recall and mass, the means over the sparse layers, and each by layer. Empty without a step."""
        if not self._sums:
            return {}
        layers = {layer: (sums[:2] / sums[2]).tolist() for layer, sums in sorted(self._sums.items())}
        report: dict[str, Any] = {"probed_steps": -(-self._steps // self._every)}
        for i, name in enumerate(("recall", "mass")):
            report[name] = sum(values[i] for values in layers.values()) / len(layers)
            report[f"{name}_by_layer"] = {layer: round(values[i], 4) for layer, values in layers.items()}
        return report


def _members(indices: Tensor, size: int) -> Tensor:
    """[B, Hk, K] token indices, -1 padded -> [B, Hk, size] bool."""
    flags = torch.zeros((*indices.shape[:2], size + 1), dtype=torch.bool, device=indices.device)
    return flags.scatter_(2, indices.long().remainder(size + 1), True)[..., :size]
