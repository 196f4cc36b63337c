"""The vocabulary of Slipstream: what every room may name, and nothing that computes.

Shape legend, used in every docstring of the package:

====  =======================================================================
``B``   requests in a step (rows of a batch)
``T``   tokens of a step, over all its requests
``L``   layers
``Hq``  query heads;  ``Hk`` KV heads;  ``G = Hq // Hk`` heads that share one KV head
``D``   head dimension
``P``   pages in the pool;  ``S`` slots in one page (the page size)
``N``   pages (or blocks) of one request
``K``   budget: most tokens attended;  ``W`` query window;  ``V`` vocabulary
====  =======================================================================

One word, one meaning: *token* is a logical position, *slot* a physical KV row, *page* the unit of allocation, *seat* a
row of the engine's device state that a running chain holds, *chain* one reasoning sample, *step* one engine iteration.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

FinishReason = Literal["stop", "length", "abort"]


C = TypeVar("C", bound=type)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def nearest(word: str, valid: Iterable[str]) -> str:
    """A half-sentence for error messages: the closest valid word, or all of them."""
    valid = list(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(valid))}"


def reject_unknown(owner: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Raise ``TypeError`` for the first option that ``owner`` does not have, naming the nearest one it has."""
    valid = list(valid)
    for name in given:
        if name not in valid:
            raise TypeError(f"{owner} has no option {name!r}; {nearest(name, valid)}")


def options(cls: C) -> C:
    """Decorate a dataclass of options: an unknown keyword argument raises ``TypeError`` naming the nearest one."""
    names = [f.name for f in dataclasses.fields(cls)]
    original = cls.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        reject_unknown(cls.__name__, kwargs, names)
        original(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[misc]
    return cls


@options
@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens; the words and defaults are vLLM's.

    n: chains per prompt (they share the prompt's KV). Chain ``i`` uses ``seed + i``.
    temperature: 0 is greedy. top_p in (0, 1]; top_k 0 or -1 means all; min_p in [0, 1], relative to the best token.
    max_tokens: most tokens to generate; ``None`` means up to the model's length.
    stop: strings that end the text (cut off the output); stop_token_ids: ids that end it (kept in ``token_ids``).
    seed: same seed, same tokens (fp32), whatever else is in the batch; ``None`` draws a fresh one.
    logprobs / prompt_logprobs: how many alternatives to report beside the token itself; ``None`` reports nothing.
    ignore_eos: go on after the model's end token.
    min_tokens: no end token, stop token or stop string before so many tokens are generated.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, Iterable), f"{name} must be a list, got {value!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        for name in ("n", "top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(
                value is None or (isinstance(value, int) and not isinstance(value, bool)),
                f"{name} must be an integer, got {value!r}",
            )
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(number and math.isfinite(value), f"{name} must be a finite number, got {value!r}")
            object.__setattr__(self, name, float(value))  # 0 and 0.0 are one setting
        _require(self.n is not None and self.n >= 1, f"n must be at least 1, got {self.n}")
        _require(self.temperature >= 0, f"temperature must be >= 0 (0 is greedy), got {self.temperature}")
        _require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        _require(
            self.top_k is not None and self.top_k >= -1, f"top_k must be >= 1, or 0 / -1 for all, got {self.top_k}"
        )
        _require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}")
        _require(
            self.max_tokens is None or self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}"
        )
        most = math.inf if self.max_tokens is None else self.max_tokens
        _require(
            self.min_tokens is not None and 0 <= self.min_tokens <= most,
            f"min_tokens must be in 0..max_tokens, got {self.min_tokens} and {self.max_tokens}",
        )
        _require(all(isinstance(s, str) and s for s in stop), "stop strings must be non-empty text")
        _require(
            all(isinstance(t, int) and t >= 0 for t in self.stop_token_ids),
            "stop_token_ids must be non-negative integers",
        )
        _require(self.seed is None or 0 <= self.seed < 2**63, f"seed must be in [0, 2**63), got {self.seed}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 20, f"{name} must be in 0..20, got {value}")


@dataclass(frozen=True)
class Logprob:
    """One candidate token: natural-log probability under the model (before temperature), rank from 1, its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class Completion:
    """One chain as token ids: what the engine returns, before there is text.

    logprobs: one dict per generated token, token id -> :class:`Logprob`; the sampled token is always in it.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass
class CompletionOutput(Completion):
    """One chain with its text, as vLLM's users know it."""

    text: str = ""
    cumulative_logprob: float | None = None


@dataclass
class RequestMetrics:
    """Wall-clock times of one request in seconds (``time.perf_counter`` clock) and what the prefix cache saved."""

    arrival_s: float
    first_token_s: float | None = None
    finished_s: float | None = None
    num_generated: int = 0
    num_cached_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, averaged over the request's longest chain."""
        if self.finished_s is None or self.first_token_s is None or self.num_generated < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.num_generated - 1)


@dataclass
class RequestOutput:
    """What ``LLM.generate`` returns for one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True
    metrics: RequestMetrics | None = None


class Selection(NamedTuple):
    """The tokens that one layer attends to in a decode step, per request and KV head.

    indices: [B, Hk, K] int32, ascending, padded with -1.  counts: [B, Hk] int32, how many of them are tokens.
    rows: [B] int64, which row of both each request uses, where that is not its own (there may be any number of rows).
    """

    indices: torch.Tensor
    counts: torch.Tensor
    rows: torch.Tensor | None = None


def at_once(work: Callable[[], object]) -> None:
    """``Batch.between`` of a step that is not being captured."""
    work()


@dataclass
class Batch:
    """One step as the device sees it. All index tensors live on the model's device.

    tokens: [T] int64 input ids.  positions: [T] int64 logical positions.
    slots: [T] int64 physical KV rows that these tokens write (page * S + offset).
    page_table: [B, N] int32 page ids, 0-padded (page 0 is the null page and belongs to nobody).
    lengths: [B] int32 KV tokens of each request *including* this step's.
    query_start: [B + 1] int32: request ``b`` owns tokens ``query_start[b]:query_start[b + 1]``.
    logit_rows: [R] int64: which of the T rows need logits.
    seats: [B] int64 the engine's seat of each request; 0 for padding rows.
    lengths_host / query_start_host / pages_host: the same facts on the host, for planning without synchronisation.
    num_decodes: the first so many requests have exactly one token each and attend as decode steps do.
    is_decode: every request does.
    variant: which of the backend's forms the decode rows need (see ``AttentionBackend.variant``).
    graph_key: set when the tensors are the static buffers of a captured graph: (bucket, variant); None when eager.
    heirs: (b, seat) for each seat that goes on from request ``b``'s KV after this step, its own seat first unless it
    decoded there already; only for a backend that uses seats. seated: seats whose chain is new; nothing that the
    backend keeps there is of use any more.
    between: runs a piece of host code in the middle of the step: now, and where the step is captured in each replay of
    it, between two graphs.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    page_table: torch.Tensor
    lengths: torch.Tensor
    query_start: torch.Tensor
    logit_rows: torch.Tensor
    seats: torch.Tensor
    lengths_host: Sequence[int]
    query_start_host: Sequence[int]
    pages_host: Sequence[Sequence[int]]
    num_decodes: int
    variant: int = 0
    graph_key: tuple[int, int] | None = None
    heirs: Sequence[tuple[int, int]] = ()
    seated: Sequence[int] = ()
    between: Callable[[Callable[[], object]], object] = at_once

    @property
    def is_decode(self) -> bool:
        return self.num_decodes == self.num_requests

    @property
    def num_requests(self) -> int:
        return len(self.lengths_host)

    @property
    def max_query(self) -> int:
        starts = self.query_start_host
        return max(b - a for a, b in zip(starts, starts[1:], strict=False))


@dataclass(frozen=True)
class ModelSpec:
    """What the rest of the house needs to know of a model: shapes, never names of layers.

    value_dim: None where values have rows of their own, as wide as keys. A number where they are the first so many
    columns of the keys: a latent cache (MLA), of one row for all heads. softmax_scale: None means head_dim ** -0.5.
    own_heads: where several ranks have the same latent cache, the query heads, first and end, that this one attends
    with; it selects with all of them. None: with all.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...] = ()
    value_dim: int | None = None
    softmax_scale: float | None = None
    own_heads: tuple[int, int] | None = field(default=None, repr=False)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, Hq, D] of all query heads -> of those that this rank attends with, contiguous."""
        return x if self.own_heads is None else x[:, slice(*self.own_heads)].contiguous()

    @property
    def scale(self) -> float:
        """Softmax scale of attention."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        stores = 2 if self.value_dim is None else 1
        return stores * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Delta:
    """New tokens of one chain on a stream; ``finish_reason`` is set on the chain's last delta."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class PeerLost(RuntimeError):
    """A process that holds part of a request is gone, and the request with it; it may be asked again."""


@runtime_checkable
class Generator(Protocol):
    """Tokens in, tokens out, asynchronously: the one face that ``atts`` and ``server`` know.

    Every method takes token ids (no text, no template, no separators added). A bad request raises ``ValueError`` before
    any work; an unexpected death of the engine raises ``RuntimeError``. Cancelling the task cancels the request.
    """

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncIterator[Delta]:
        """New tokens as they come, of all ``params.n`` chains interleaved."""
        ...

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None
    ) -> list[Completion]:
        """``params.n`` finished chains."""
        ...

    async def score(self, prompt_ids: Sequence[int], continuation_ids: Sequence[int]) -> list[float]:
        """Natural-log probability of every token of the continuation, the first included; prefix KV is reused."""
        ...

    async def extend(self, ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None) -> Completion:
        """Continue one chain exactly where ``ids`` ends (KV left by ``score`` or ``generate`` is reused)."""
        ...

    def cancel(self, request_id: str) -> bool:
        """Stop a request now and free its pages; False when it is unknown or already over."""
        ...
