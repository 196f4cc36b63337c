"""What the engine is asked, what it answers, and which questions it refuses. Token ids only, no text."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from slipstream.types import Completion, Delta, Logprob, RequestMetrics, SamplingParams

# (chain index, its generated token ids) -> falsy to go on; the stop string (or True) to end the chain
StopCheck = Callable[[int, list[int]], "bool | str | None"]

MAX_BANNED = 8  # end and stop tokens that min_tokens can hold back: the device has a row of so many per seat

_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    """One prompt and what is wanted of it; the engine fills in the second half.

    prompt_ids: token ids. stop_check: asked after each token of each chain, on the engine's thread.
    logprobs_start: first prompt index whose log-probability is wanted (``params.prompt_logprobs`` alone means 0).
    generate: False for a request that only scores its prompt. salt: only requests of equal salt share KV.
    dense_tokens: the first so many prompt tokens are prefilled densely; the rest of the prompt runs one token per step,
    through the attention of decode steps. None: the whole prompt is prefilled.

    completions: one per chain, growing. prompt_logprobs: entry ``i`` is for prompt index ``logprobs_start + i``; None
    for index 0, which nothing precedes. error: what the model raised when the request died in a step.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = field(default_factory=lambda: f"request-{next(_numbers)}")
    stop_check: StopCheck | None = None
    logprobs_start: int | None = None
    generate: bool = True
    salt: Hashable = None
    dense_tokens: int | None = None

    completions: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.perf_counter()))
    error: Exception | None = None
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        try:
            self.prompt_ids = [operator.index(token) for token in self.prompt_ids]
        except TypeError as error:
            raise ValueError(f"a prompt of token ids must be a sequence of integers: {error}") from None
        if self.logprobs_start is None and self.params.prompt_logprobs is not None:
            self.logprobs_start = 0

    @classmethod
    def to_score(cls, prompt_ids: Sequence[int], continuation_ids: Sequence[int]) -> Request:
        """A request for the log-probability of every token of the continuation. ``ValueError`` if one is empty."""
        if len(prompt_ids) == 0 or len(continuation_ids) == 0:
            raise ValueError("score needs at least one prompt token and one continuation token")
        return cls([*prompt_ids, *continuation_ids], logprobs_start=len(prompt_ids), generate=False)

    @property
    def scores(self) -> list[float]:
        """Log-probabilities of the prompt's tokens from ``logprobs_start`` on."""
        found = []
        for token, entry in zip(self.prompt_ids[self.logprobs_start or 0 :], self.prompt_logprobs or (), strict=True):
            assert entry is not None, "index 0 has no log-probability"
            found.append(entry[token].logprob)
        return found


class Event(NamedTuple):
    """News of a request. delta: new tokens of one chain, if any. finished: it is over (see ``request.error``)."""

    request: Request
    delta: Delta | None = None
    finished: bool = False


class Limits(NamedTuple):
    """What a request has to respect. cache_tokens: all tokens that the KV cache can hold. end_ids: the model's."""

    vocab_size: int
    max_model_len: int
    cache_tokens: int
    max_num_seqs: int
    end_ids: tuple[int, ...] = ()

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a chain."""
        return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.end_ids)

    def check(self, request: Request) -> int:
        """Most tokens (prompt and generated) of each chain. Raises ``ValueError``, with numbers, for what cannot be.

        ``max_tokens`` is clipped to the model's length; without it, a chain may grow to the model's or the cache's end.
        """
        ids, params = request.prompt_ids, request.params
        if len(ids) == 0:
            raise ValueError("the prompt is empty: give at least one token")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            bad = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        if params.n > self.max_num_seqs:
            raise ValueError(f"n = {params.n} chains exceed max_num_seqs = {self.max_num_seqs}: lower n or raise that")
        stops = len(self.stop_ids(params))
        if params.min_tokens and stops > MAX_BANNED:
            raise ValueError(f"min_tokens holds back at most {MAX_BANNED} end and stop tokens, but there are {stops}")
        start = request.logprobs_start
        if start is not None and not 0 <= start < len(ids):
            raise ValueError(f"logprobs_start = {start} is outside the prompt of {len(ids)} tokens")
        dense = request.dense_tokens
        if dense is not None and not (type(dense) is int and 1 <= dense <= len(ids)):
            raise ValueError(
                f"dense_tokens = {dense!r} must be an integer in 1..{len(ids)}, for a prompt of {len(ids)} tokens"
            )
        longest = self.max_model_len - (1 if request.generate else 0)
        if len(ids) > longest:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but at most {longest} fit max_model_len = {self.max_model_len}"
            )
        if len(ids) > self.cache_tokens:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but the whole KV cache holds {self.cache_tokens}: raise kv_memory"
            )
        return self._limit(request) if request.generate else len(ids)

    def _limit(self, request: Request) -> int:
        num_prompt, max_tokens = len(request.prompt_ids), request.params.max_tokens
        most = self.cache_tokens + 1  # the last token that is sampled needs no KV
        if max_tokens is None:
            return min(self.max_model_len, most)
        limit = min(num_prompt + max_tokens, self.max_model_len)
        if limit > most:
            raise ValueError(
                f"prompt and max_tokens need the KV of {limit - 1} tokens, but the whole KV cache holds "
                f"{self.cache_tokens}: lower max_tokens or raise kv_memory"
            )
        return limit
