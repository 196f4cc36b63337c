"""The upper bound: score every key exactly, keep the best. Reads all keys, so it saves nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slipstream.kernels import sparse
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.selection.selector import AGGREGATE_HELP, TOKEN_AGGREGATES, Budgeted, Planned, Selector, one_of, option
from slipstream.types import ModelSpec, Selection, options


@options
@dataclass(frozen=True)
class Oracle(Budgeted):
    """The tokens of the largest true attention weights, summed (or maximised) over the heads of a group."""

    aggregate: str = option("sum", AGGREGATE_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("aggregate", self.aggregate, TOKEN_AGGREGATES)

    def selector(self, pool: KVPool, spec: ModelSpec, index: KeyIndex | None) -> Selector:
        return OracleSelector(self, pool, spec)


class OracleSelector(Planned):
    """unread: so many of the newest keys are in no softmax, for they may not be there yet."""

    def __init__(self, config: Oracle, pool: KVPool, spec: ModelSpec, unread: int = 0) -> None:
        super().__init__(pool, spec)
        self._config, self._unread = config, unread

    def select(self, layer: int, query: Tensor) -> Selection:
        own = self._config
        return Selection(
            *sparse.key_tokens(
                query, self._pool.k[layer], self._table, self._lengths, self._scale, own.budget, own.sink, own.recent,
                own.aggregate, self._unread,
            )
        )  # fmt: skip

    def attended(self, length: int) -> int:
        return min(self._config.budget, length)
