"""The baseline that looks at nothing: the first tokens and the last (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.selection.selector import Budgeted, Planned, Selector
from slipstream.types import Batch, ModelSpec, Selection, options


@options
@dataclass(frozen=True)
class Window(Budgeted):
    """The ``sink`` first and the ``budget - sink`` last tokens."""

    def selector(self, pool: KVPool, spec: ModelSpec, index: KeyIndex | None) -> Selector:
        return WindowSelector(self, pool, spec)


class WindowSelector(Planned):
    def __init__(self, config: Window, pool: KVPool, spec: ModelSpec) -> None:
        super().__init__(pool, spec)
        self._config = config
        self._selection: Selection | None = None

    def plan(self, batch: Batch, lengths: Tensor) -> None:
        super().plan(batch, lengths)
        self._selection = None

    def select(self, layer: int, query: Tensor) -> Selection:
        if self._selection is None:  # the same for all layers of the step
            self._selection = self._of_lengths()
        return self._selection

    def _of_lengths(self) -> Selection:
        budget, lengths = self._config.budget, self._lengths.unsqueeze(1)
        column = torch.arange(budget, dtype=torch.int32, device=lengths.device)
        skipped = (lengths - budget).clamp(min=0) * (column >= self._config.sink)
        tokens = (column + skipped).masked_fill(column >= lengths, -1)
        counts = self._lengths.clamp(max=budget)
        indices = tokens.unsqueeze(1).expand(-1, self._num_kv, -1).contiguous()
        return Selection(indices, counts.unsqueeze(1).expand(-1, self._num_kv).contiguous())

    def attended(self, length: int) -> int:
        return min(self._config.budget, length)
