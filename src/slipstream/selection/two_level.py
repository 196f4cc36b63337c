"""Two-level selection (AsyncTLS, arXiv 2604.07815, here synchronous): blocks first, then tokens inside them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slipstream.kernels import sparse
from slipstream.kernels.sparse import NUM_STATS
from slipstream.kvcache.index import IndexParts, KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.selection.double_sparsity import CALIBRATION_HELP, CHANNELS_HELP, check_channels
from slipstream.selection.selector import (
    AGGREGATE_HELP,
    AGGREGATES,
    CHANNELS,
    TOKEN_AGGREGATES,
    Budgeted,
    Planned,
    Selector,
    check_blocks,
    in_blocks,
    one_of,
    option,
)
from slipstream.types import ModelSpec, Selection, options

QUARTERS = "minmax4x16"
BLOCK_SCORES = (*NUM_STATS, QUARTERS)


@options
@dataclass(frozen=True)
class TwoLevel(Budgeted):
    """``blocks`` blocks by their summaries, then the best ``budget`` of their tokens by 4-bit labels.

    block_score ``minmax4x16`` keeps bounds of quarter blocks (16 tokens at the default block) and takes the largest.
    """

    aggregate: str | None = option(None, AGGREGATE_HELP)
    blocks: int = option(128, "blocks that the first level keeps")
    block: int = option(64, "tokens of a block (quest: 16, two_level: 64 by default)")
    block_score: str = option("minmax", "how a block is scored: 'mean', 'minmax', 'meanstd'; two_level: 'minmax4x16'")
    deviation: float = option(1.0, "weight of the spread in block_score 'meanstd'")
    block_aggregate: str = option("sum", "over the query heads of a KV head, of block scores: 'max' or 'sum'")
    channels: int | None = option(None, CHANNELS_HELP)
    calibration: str | None = option(None, CALIBRATION_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregate is not None:
            one_of("aggregate", self.aggregate, TOKEN_AGGREGATES)
        one_of("block_aggregate", self.block_aggregate, AGGREGATES)
        one_of("block_score", self.block_score, BLOCK_SCORES)
        check_channels(self.channels)
        if self.blocks * self.block < self.budget:
            raise ValueError(
                f"{self.blocks} blocks of {self.block} tokens hold fewer than budget = {self.budget}: raise blocks"
            )
        check_blocks("blocks", self.blocks, self.block, self.sink, self.recent)
        if self.merge > 1 and self.block % self.merge:
            raise ValueError(f"block_score {QUARTERS!r} needs a block of quarters, not of {self.block} tokens")

    @property
    def merge(self) -> int:
        """Summaries of one block."""
        return 4 if self.block_score == QUARTERS else 1

    @property
    def index(self) -> IndexParts:
        kind = "minmax" if self.block_score == QUARTERS else self.block_score
        return IndexParts(kind, self.block // self.merge, self.channels or CHANNELS)

    def check_page_size(self, page_size: int) -> None:
        IndexParts("mean", self.block).check_page_size(page_size)  # whole blocks are of one page, not only quarters

    def selector(self, pool: KVPool, spec: ModelSpec, index: KeyIndex | None) -> Selector:
        assert index is not None, "summaries and labels are in the index"
        return TwoLevelSelector(self, pool, spec, index)


class TwoLevelSelector(Planned):
    def __init__(self, config: TwoLevel, pool: KVPool, spec: ModelSpec, index: KeyIndex) -> None:
        super().__init__(pool, spec)
        self._config, self._index = config.for_model(spec), index
        assert index.parts.kind is not None
        self._kind = index.parts.kind

    def select(self, layer: int, query: Tensor) -> Selection:
        return self.tokens(layer, query, self.blocks(layer, query))

    def blocks(self, layer: int, query: Tensor) -> Tensor:
        """Level 1. query: [B, Hq, D] -> [B, Hk, M] int32 blocks, ascending, then -1."""
        return self.best(self.scores(layer, query))

    def scores(self, layer: int, query: Tensor) -> Tensor:
        """[B, Hk, N] fp32, of every block that is complete."""
        own = self._config
        return sparse.score_blocks(
            query, self._index.summaries(layer), self._table, self._lengths, self._kind, own.merge, self._scale,
            own.block_aggregate, own.deviation, own.index.block,
        )  # fmt: skip

    def best(self, scores: Tensor) -> Tensor:
        own = self._config
        # No more than there are: where page tables are narrow, so are the candidates.
        num_blocks = min(own.blocks, scores.shape[-1])
        return sparse.top_blocks(scores, self._lengths, own.block, num_blocks, own.sink, own.recent)

    def tokens(self, layer: int, query: Tensor, blocks: Tensor) -> Selection:
        """Level 2, inside ``blocks`` [B, Hk, M]."""
        own, labels = self._config, self._index.labels(layer)
        assert own.aggregate is not None, "for_model says"
        return Selection(
            *sparse.label_tokens(
                query, *labels, self._table, self._lengths, blocks, own.block, self._scale, own.budget, own.sink,
                own.recent, own.aggregate, own.unread,
            )
        )  # fmt: skip

    def attended(self, length: int) -> int:
        return min(self._config.budget, in_blocks(length, self._config.blocks, self._config.block))
