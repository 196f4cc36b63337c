"""Double Sparsity (arXiv 2408.07092): score every token by the few channels of its key that matter most."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slipstream.kernels import sparse
from slipstream.kvcache.index import IndexParts, KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.selection.selector import (
    AGGREGATE_HELP,
    CHANNELS,
    TOKEN_AGGREGATES,
    Budgeted,
    Planned,
    Selector,
    one_of,
    option,
)
from slipstream.types import ModelSpec, Selection, options

CHANNELS_HELP = "channels of a key in its 4-bit label; default: 32, with latent attention 256 or half of its row"
CALIBRATION_HELP = "file of `slipstream calibrate`; default: the model directory's, else the first prompt decides"


def check_channels(channels: int | None) -> None:
    if channels is not None and channels % 2:
        raise ValueError(f"channels must be even (two share a byte), got {channels}")


@options
@dataclass(frozen=True)
class DoubleSparsity(Budgeted):
    """The best tokens of all, by 4-bit labels of ``channels`` channels; the first two layers are dense by default."""

    dense_layers: int = option(2, "first layers that attend to everything (quest, double_sparsity: 2 by default)")
    aggregate: str = option("sum", AGGREGATE_HELP)
    channels: int | None = option(None, CHANNELS_HELP)
    calibration: str | None = option(None, CALIBRATION_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("aggregate", self.aggregate, TOKEN_AGGREGATES)
        check_channels(self.channels)

    @property
    def unread(self) -> int:
        # A softmax runs over all labels, those of tokens that are attended anyway among them.
        return super().unread if self.aggregate == "peak" else 0

    @property
    def index(self) -> IndexParts:
        return IndexParts(num_channels=self.channels or CHANNELS)

    def selector(self, pool: KVPool, spec: ModelSpec, index: KeyIndex | None) -> Selector:
        assert index is not None, "labels are in the index"
        return DoubleSparsitySelector(self, pool, spec, index)


class DoubleSparsitySelector(Planned):
    def __init__(self, config: DoubleSparsity, pool: KVPool, spec: ModelSpec, index: KeyIndex) -> None:
        super().__init__(pool, spec)
        self._config, self._index = config, index

    def select(self, layer: int, query: Tensor) -> Selection:
        own = self._config
        labels = self._index.labels(layer)
        return Selection(
            *sparse.label_tokens(
                query, *labels, self._table, self._lengths, None, 1, self._scale, own.budget, own.sink, own.recent,
                own.aggregate,
            )
        )  # fmt: skip

    def attended(self, length: int) -> int:
        return min(self._config.budget, length)
