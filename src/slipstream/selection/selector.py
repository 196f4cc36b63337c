"""Which tokens matter, given a query: the contract of every policy, and what all their configs share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Protocol, Self, get_args, get_type_hints

from torch import Tensor

from slipstream.kvcache.index import IndexParts, KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec, Selection, nearest

CHANNELS, LATENT_CHANNELS = 32, 256  # of labels by default; at most half of a latent cache's row
AGGREGATES = ("sum", "max")  # of block scores, over the query heads of a KV head
TOKEN_AGGREGATES = ("sum", "max", "peak")  # of softmax weights; peak: the largest logit, without a softmax
AGGREGATE_HELP = (
    "over a KV head's query heads: 'sum' or 'max' of weights; tokens also 'peak' logit, two_level's default except on "
    "latent caches"
)


class Selector(Protocol):
    """Laws: ``plan`` once per step, before any layer; ``select`` once per layer. Both are pure but for their memory.

    Every request of length n gets min(budget, n) tokens per KV head or, where blocks are the unit, what
    :meth:`attended` says. Sinks, recent tokens and the newest are always among them. In a captured step ``lengths`` is
    a static buffer that is filled after ``plan`` and before ``select``.
    """

    def plan(self, batch: Batch, lengths: Tensor) -> None:
        """batch: decode rows only. lengths: [B] int32, 0 for the requests that nothing is selected for."""
        ...

    def select(self, layer: int, query: Tensor) -> Selection:
        """query: [B, Hq, D] after norm and RoPE; the index and the keys already hold this step's token."""
        ...

    def attended(self, length: int) -> int:
        """How many tokens per KV head a request of this length attends to: the same number, counted on the host."""
        ...


class Planned:
    """The memory of a step that most selectors need."""

    def __init__(self, pool: KVPool, spec: ModelSpec) -> None:
        self._pool, self._scale, self._num_kv = pool, spec.scale, spec.num_kv_heads

    def plan(self, batch: Batch, lengths: Tensor) -> None:
        self._table, self._lengths = batch.page_table, lengths


MAY_BE_ZERO = ("sink", "recent", "dense_layers", "min_context", "deviation", "measure", "ridge", "beta", "decay")


def option(default: Any, text: str) -> Any:
    """A field of a method's config; ``text`` is its help on the command line."""
    return field(default=default, metadata={"help": text})


def one_of(name: str, value: Any, valid: Iterable[str]) -> None:
    if value not in valid:
        raise ValueError(f"{name} {value!r} is unknown; {nearest(str(value), valid)}")


def check_numbers(config: Any) -> None:
    """``ValueError`` for a field that is not of its type, negative, or 0 where that means nothing."""
    for name, hint in get_type_hints(type(config)).items():
        value, valid = getattr(config, name), get_args(hint) or (hint,)
        if hint is bool and value not in (True, False):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        if str in valid and not isinstance(value, (*valid, PathLike)):
            raise ValueError(f"{name} must be text, got {value!r}")
        if hint not in (int, float, int | None) or (value is None and hint == int | None):
            continue
        least = 0 if name in MAY_BE_ZERO else 1
        kinds = (int, float) if hint is float else int
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value < float("inf"):
            what = "a number" if hint is float else "an integer"
            raise ValueError(f"{name} must be {what} of at least {least}, got {value!r}")


@dataclass(frozen=True)
class Budgeted:
    """What every sparse method can be told. Raises ``ValueError`` for values that cannot be, naming the way out."""

    budget: int = option(1024, "most tokens attended per KV head; sinks, recent and the newest are inside it")
    sink: int = option(4, "first tokens of the context that are always attended")
    recent: int = option(64, "last tokens of the context that are always attended")
    dense_layers: int = option(0, "first layers that attend to everything (quest, double_sparsity: 2 by default)")
    min_context: int | None = option(
        None, "attend densely up to this many tokens; default: the crossover measured on this machine, or a guess"
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.budget < self.sink + self.recent + 1:
            raise ValueError(
                f"budget = {self.budget} cannot hold sink + recent + the newest token "
                f"= {self.sink} + {self.recent} + 1: raise budget, or lower sink or recent"
            )

    @property
    def index(self) -> IndexParts | None:
        """The index that the method reads; None when it needs none."""
        return None

    @property
    def unread(self) -> int:
        """So many newest tokens are attended whatever the index says of them: it may lack them."""
        return max(self.recent, 1)

    def check_page_size(self, page_size: int) -> None:
        """``ValueError`` unless the method's blocks divide a page."""
        if self.index is not None:
            self.index.check_page_size(page_size)

    def check_model(self, spec: ModelSpec) -> None:
        """``ValueError`` where the method does not fit a model's shape."""
        if self.dense_layers > spec.num_layers:
            raise ValueError(f"dense_layers = {self.dense_layers} of a model of {spec.num_layers} layers: lower it")
        if self.index is not None:
            self.index.check_model(spec)

    def seat_bytes(self, spec: ModelSpec) -> int:
        """What the method remembers of a chain, beside its keys and values and their index."""
        return 0

    def for_model(self, spec: ModelSpec) -> Self:
        """This config with what depends on the model filled in: ``channels`` and ``aggregate`` where none was given."""
        is_latent, half = spec.value_dim is not None, spec.head_dim // 4 * 2
        # The one set of a latent cache serves all query heads, whose logits do not compare; their weights do.
        best: dict[str, Any] = {
            "channels": min(LATENT_CHANNELS, half) if is_latent else CHANNELS,
            "aggregate": "sum" if is_latent else "peak",
        }
        return replace(self, **{name: value for name, value in best.items() if getattr(self, name, value) is None})

    def selector(self, pool: KVPool, spec: ModelSpec, index: KeyIndex | None) -> Selector:
        raise NotImplementedError


def check_blocks(budget_name: str, num_blocks: int, block: int, sink: int, recent: int) -> None:
    """``ValueError`` when the blocks of the sinks and of the recent tokens may be more than all that are kept."""
    forced = -(-sink // block) + (max(recent, 1) - 2) // block + 2  # the recent ones may begin anywhere in a block
    if num_blocks < forced:
        raise ValueError(
            f"{budget_name} = {num_blocks} blocks of {block} tokens, but {sink} sinks and {recent} recent tokens may "
            f"lie in {forced}: raise it, or lower sink or recent"
        )


def in_blocks(length: int, num_blocks: int, block: int) -> int:
    """Tokens in the ``num_blocks`` chosen blocks of a context of this length, whose last block is among them."""
    if length <= num_blocks * block:
        return length
    return num_blocks * block - -length % block
