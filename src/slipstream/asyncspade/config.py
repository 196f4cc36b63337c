"""What AsyncSpade can be told. docs/asyncspade.md says what each choice does to speed and accuracy."""

from __future__ import annotations

from dataclasses import dataclass, fields

from slipstream.kvcache.index import IndexParts
from slipstream.selection.double_sparsity import CALIBRATION_HELP, CHANNELS_HELP
from slipstream.selection.oracle import Oracle
from slipstream.selection.selector import AGGREGATE_HELP, Budgeted, one_of, option
from slipstream.selection.two_level import TwoLevel
from slipstream.types import options

PREDICTORS = ("auto", "ridge", "analog", "last", "mean", "ema", "mlp", "oracle", "residual")
SCORINGS = {"index": TwoLevel, "keys": Oracle}
LANES = ("auto", "inline", "thread", "stream")
TRANSFERS = ("indices", "packed", "delta")
LATE = ("wait", "stale")
REPAIRS = ("select", "dense")
LONGEST_SOLVE = 128  # the window of a ridge: one kernel solves it


@options
@dataclass(frozen=True)
class AsyncSpade(Budgeted):
    """Select for the next step with a predicted query, beside the forward pass (arXiv 2510.07486).

    The fields after ``scoring`` that two_level has too mean the same: its index, asked with the predicted query.
    Raises ``ValueError`` for values that cannot be, naming the way out.
    """

    predictor: str = option(
        "auto",
        "guesses the next query: 'residual' from the layer below; 'ridge', 'analog', 'last', 'mean', 'ema', 'mlp' from "
        "earlier steps; 'oracle'; 'auto': 'residual' on one device, else 'analog'",
    )
    window: int = option(128, "latest queries that a prediction sees, per layer and head")
    ridge: float = option(0.1, "predictor 'ridge': lambda, relative to the mean square of a query")
    beta: float = option(10.0, "predictor 'analog': how sharply it prefers moments like this one")
    decay: float = option(0.5, "predictor 'ema': weight of the average so far, in [0, 1)")
    predictor_file: str | None = option(None, "predictor 'mlp': its weights, from `slipstream train-predictor`")
    rotate: bool = option(True, "predict queries before RoPE, then turn them to their position; False: as they are")
    scoring: str = option("index", "by two_level's 'index', or by every one of the 'keys' as in the paper")
    aggregate: str | None = option(None, AGGREGATE_HELP)
    blocks: int = option(128, "blocks that the first level keeps")
    block: int = option(64, "tokens of a block (quest: 16, two_level: 64 by default)")
    block_score: str = option("minmax", "how a block is scored: 'mean', 'minmax', 'meanstd'; two_level: 'minmax4x16'")
    deviation: float = option(1.0, "weight of the spread in block_score 'meanstd'")
    block_aggregate: str = option("sum", "over the query heads of a KV head, of block scores: 'max' or 'sum'")
    channels: int | None = option(None, CHANNELS_HELP)
    calibration: str | None = option(None, CALIBRATION_HELP)
    confidence: float | None = option(
        None, "a KV head whose query is predicted with a lower cosine is repaired; see compare-predictors"
    )
    repair: str = option(
        "select", "what is repaired selects again, with the true query: 'select'; or reads all: 'dense'"
    )
    measure: int = option(0, "every so many steps compare the sets with those of the true queries; 0: never")
    lane: str = option("auto", "where the work ahead runs: 'stream' (CUDA's default), 'inline' (CPU's), 'thread'")
    cache_device: str | None = option(None, "a device of its own for the cache rank, e.g. 'cuda:1'")
    cache_rank: str | None = option(None, "HOST:PORT of a `slipstream cache-rank`")
    transfer: str = option("indices", "what a cache rank sends back: 'indices', or K and V 'packed' or as a 'delta'")
    late: str = option("wait", "when a cache rank is late: 'wait', or go on with a 'stale' set")
    max_stale: int = option(1, "steps that a stale set may be old")
    rank_timeout: float = option(5.0, "seconds after which a silent cache rank counts as lost")
    rank_key: str | None = option(None, "file with the secret shared with a cache rank on another machine")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("predictor", self.predictor, PREDICTORS)
        if self.predictor == "auto":
            object.__setattr__(self, "predictor", "residual" if self._can_foresee else "analog")
        one_of("scoring", self.scoring, SCORINGS)
        one_of("lane", self.lane, LANES)
        one_of("transfer", self.transfer, TRANSFERS)
        one_of("late", self.late, LATE)
        one_of("repair", self.repair, REPAIRS)
        if self.recent < 1:
            raise ValueError("recent = 0, but the newest token is attended before anything can select it: at least 1")
        if self.predictor == "ridge" and self.window > LONGEST_SOLVE:
            raise ValueError(f"predictor 'ridge' takes a window of at most {LONGEST_SOLVE} queries, got {self.window}")
        if self.decay >= 1:
            raise ValueError(f"decay must be below 1, got {self.decay}")
        is_number = isinstance(self.confidence, (int, float))
        if self.confidence is not None and not (is_number and -1 <= self.confidence <= 1):
            raise ValueError(f"confidence is a cosine, in [-1, 1], got {self.confidence!r}")
        if (self.predictor == "mlp") != (self.predictor_file is not None):
            raise ValueError("predictor 'mlp' and predictor_file go together: it reads what train-predictor wrote")
        if self.predictor == "residual" and not self._can_foresee:
            raise ValueError(
                "predictor 'residual' selects in time for one device only, and nothing checks what it foresees: it "
                "takes neither a confidence nor a cache rank elsewhere"
            )
        if self.predictor == "oracle" and (self.confidence is not None or self.measure):
            raise ValueError("predictor 'oracle' is never wrong: confidence and measure mean nothing to it")
        if self.cache_device is not None and self.cache_rank is not None:
            raise ValueError("cache_device and cache_rank are two places for one thing: give one of them")
        if self.is_remote:
            self._check_rank()
        self.inner(), self.inner(0)

    def _check_rank(self) -> None:
        """What cannot be done from afar."""
        if not self.is_ahead or self.confidence is not None or self.measure:
            raise ValueError(
                "predictor 'oracle', confidence and measure need the keys at hand: drop cache_rank and cache_device"
            )
        if self.cache_device is not None and (self.transfer != "indices" or self.late != "wait"):
            raise ValueError("a cache_device sends indices, in time: transfer and late are for a cache_rank")
        if self.transfer != "indices" and self.dense_layers:
            raise ValueError(
                f"dense_layers = {self.dense_layers} attend to everything, which only the cache rank has when it sends "
                f"{self.transfer!r}: set transfer='indices' or dense_layers=0"
            )
        self.inner(self.spare)

    @property
    def _can_foresee(self) -> bool:
        return self.confidence is None and not self.is_remote

    @property
    def is_ahead(self) -> bool:
        """Whether sets are made a step ahead; the oracle's and the residual's are made in their own step."""
        return self.predictor not in ("oracle", "residual")

    @property
    def is_remote(self) -> bool:
        """Whether the cache rank is a device or a process of its own."""
        return self.cache_device is not None or self.cache_rank is not None

    @property
    def spare(self) -> int:
        """Places of a set that are left for tokens newer than the selection: the next one, and those of stale steps."""
        return int(self.is_ahead) + (self.max_stale if self.is_remote and self.late == "stale" else 0)

    def inner(self, spare: int | None = None) -> Budgeted:
        """The method that selects, from all but the ``spare`` newest tokens of a step (``self.spare`` by default)."""
        spare = self.spare if spare is None else spare
        kind = SCORINGS[self.scoring]
        shared = {option.name: getattr(self, option.name) for option in fields(kind)}
        if self.aggregate is None and kind is Oracle:  # whose own default is another
            shared["aggregate"] = "peak"
        return kind(**shared | {"budget": self.budget - spare, "recent": max(self.recent - spare, 0)})

    @property
    def index(self) -> IndexParts | None:
        return None if self.is_remote else self.inner().index  # it is where the keys are searched

    @property
    def unread(self) -> int:
        # In depth a layer's sets are chosen before its own token is indexed, and the page that this token may fill.
        return self.inner().unread - (self.predictor == "residual")

    def check_page_size(self, page_size: int) -> None:
        self.inner().check_page_size(page_size)
