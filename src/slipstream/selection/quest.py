"""Quest (arXiv 2406.10774): score small blocks by a bound on their keys, attend to the best blocks whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slipstream.kernels import sparse
from slipstream.kernels.sparse import NUM_STATS
from slipstream.kvcache.index import IndexParts, KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.selection.selector import (
    AGGREGATE_HELP,
    AGGREGATES,
    Budgeted,
    Planned,
    Selector,
    check_blocks,
    in_blocks,
    one_of,
    option,
)
from slipstream.types import ModelSpec, Selection, options


@options
@dataclass(frozen=True)
class Quest(Budgeted):
    """``budget // block`` blocks by the sum (or maximum) of the group's bounds; the first two layers are dense."""

    dense_layers: int = option(2, "first layers that attend to everything (quest, double_sparsity: 2 by default)")
    aggregate: str = option("sum", AGGREGATE_HELP)
    block: int = option(16, "tokens of a block (quest: 16, two_level: 64 by default)")
    block_score: str = option("minmax", "how a block is scored: 'mean', 'minmax', 'meanstd'; two_level: 'minmax4x16'")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("aggregate", self.aggregate, AGGREGATES)
        one_of("block_score", self.block_score, NUM_STATS)
        check_blocks("budget", self.num_blocks, self.block, self.sink, self.recent)

    @property
    def num_blocks(self) -> int:
        return self.budget // self.block

    @property
    def index(self) -> IndexParts:
        return IndexParts(self.block_score, self.block)

    def selector(self, pool: KVPool, spec: ModelSpec, index: KeyIndex | None) -> Selector:
        assert index is not None, "summaries are in the index"
        return QuestSelector(self, pool, spec, index)


class QuestSelector(Planned):
    def __init__(self, config: Quest, pool: KVPool, spec: ModelSpec, index: KeyIndex) -> None:
        super().__init__(pool, spec)
        self._config, self._index = config, index

    def select(self, layer: int, query: Tensor) -> Selection:
        own, lengths = self._config, self._lengths
        summaries = self._index.summaries(layer)
        scores = sparse.score_blocks(
            query, summaries, self._table, lengths, own.block_score, 1, self._scale, own.aggregate, 1.0, own.block
        )
        blocks = sparse.top_blocks(scores, lengths, own.block, own.num_blocks, own.sink, own.recent)
        return Selection(*sparse.block_tokens(blocks, lengths, own.block))

    def attended(self, length: int) -> int:
        return in_blocks(length, self._config.num_blocks, self._config.block)
