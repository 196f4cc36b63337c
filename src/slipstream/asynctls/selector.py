"""Tokens inside blocks that are there already: the previous step's, predicted ones, and what a chain holds anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from slipstream.asynctls.config import AsyncTLS
from slipstream.asynctls.residency import Residency
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.selection.two_level import TwoLevelSelector
from slipstream.types import Batch, ModelSpec, Selection


class QueryPredictor(Protocol):
    """Guesses a seat's next query from those that it saw: ``asyncspade``'s. All of one device; nothing synchronises."""

    def reset(self, seats: Sequence[int]) -> None: ...

    def advance(self, seats: Tensor, positions: Tensor) -> None:
        """Once per step: row b brings the query at ``positions[b]``. Both [B] int64."""
        ...

    def step(self, layer: int, q: Tensor, seats: Tensor, positions: Tensor) -> Tensor:
        """q: [B, Hq, D] after RoPE -> those of ``positions + 1``."""
        ...


class Mover(Protocol):
    """Brings blocks to where they are attended. Keys: [B, Hk, M] int32, -1 for none."""

    def fetch(self, layer: int, keys: Tensor) -> None:
        """They are attended in this step."""
        ...

    def prefetch(self, layer: int, keys: Tensor) -> None:
        """They are in place when the next step begins."""
        ...


class AsyncTLSSelector(TwoLevelSelector):
    """A ``Selector`` that remembers, by seat, which blocks the next step is to find in place.

    What it selects depends on what the chain itself has wanted before, and neither on where keys and values are nor on
    who else runs: with and without offload, alone and in company, it chooses the same tokens.
    predictor: for ``candidates="predicted"``; sees decoded tokens only.
    """

    def __init__(
        self,
        config: AsyncTLS,
        pool: KVPool,
        spec: ModelSpec,
        index: KeyIndex,
        residency: Residency,
        mover: Mover | None = None,
        predictor: QueryPredictor | None = None,
    ) -> None:
        super().__init__(config, pool, spec, index)
        assert (predictor is not None) == (config.candidates == "predicted"), "a predictor where one is asked for"
        self.residency, self.mover, self._predictor = residency, mover or residency, predictor
        self._mode = "previous" if config.candidates == "predicted" else config.candidates
        self._drift, self._margin = config.drift, config.margin

    def plan(self, batch: Batch, lengths: Tensor) -> None:
        super().plan(batch, lengths)
        self._batch = batch

    def reset(self, seats: Sequence[int]) -> None:
        """Other chains have taken these seats."""
        self.residency.reset(seats)
        if self._predictor is not None:
            self._predictor.reset(seats)

    def select(self, layer: int, query: Tensor) -> Selection:
        scores = None if self._margin is None else self.scores(layer, query)
        blocks = nexts = self.blocks(layer, query) if scores is None else self.best(scores)
        if self._predictor is not None:
            seats, positions = self._batch.seats, self._batch.positions
            if layer == self._config.dense_layers:
                self._predictor.advance(seats, positions)
            nexts = self.blocks(layer, self._predictor.step(layer, query, seats, positions))
        candidates, urgent, later = self.residency.find(
            layer, blocks, nexts, self._batch, self._lengths, self._mode, self._drift, scores, self._margin
        )
        self.mover.fetch(layer, urgent)
        self.mover.prefetch(layer, later)
        return self.tokens(layer, query, candidates)
