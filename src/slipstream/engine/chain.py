"""One chain of reasoning on its way through the engine: tokens known, tokens in flight, pages and seat. No torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slipstream.kvcache.table import Lease

if TYPE_CHECKING:
    from slipstream.engine.request import Request

NULL_SEAT = 0


@dataclass(eq=False)
class Chain:
    """State of one chain.

    ids: prompt and generated tokens that the host knows. total: those and the ones in flight. limit: most it may have.
    order: (arrival of the request, index): the smaller came first. epoch: counts the times that results on their way
    became worthless (preempted, cancelled, finished); a result of another epoch is dropped.
    lease: its pages, None while it waits and when its KV is in its seat (``in_seat``). seat: its row of device state.
    num_kv: tokens whose KV is stored once the steps scheduled so far are over. decoding: its last token is in its seat.
    num_dense: leading tokens that may run many at a time and come from the cache; the rest run one by one, as decode
    steps, those that it generated before it was preempted included. None: every token known may.
    num_fresh: newest known tokens that run whatever the cache has of them, at the end of the dense ones too.
    siblings: chains of the same request that start with this one's prompt, until it is prefilled.
    wanted_from: first prompt index whose log-probability is still to come; ``num_prompt`` when none is.
    num_cached: leading tokens that came from the prefix cache when it was first admitted; -1 before. step: the last
    step of the scheduler that it is part of.
    """

    request: Request
    index: int
    order: tuple[int, int]
    ids: list[int]
    limit: int
    seed: int = 0
    samples: bool = True
    wanted_from: int = -1
    salt: Hashable = None
    num_dense: int | None = None
    num_fresh: int = 1
    siblings: list[Chain] = field(default_factory=list)
    num_cached: int = -1
    num_prompt: int = 0
    total: int = 0
    epoch: int = 0
    num_kv: int = 0
    lease: Lease | None = None
    in_seat: bool = False
    seat: int = NULL_SEAT
    decoding: bool = False
    step: int = -1

    def __post_init__(self) -> None:
        self.num_prompt = self.total = len(self.ids)
        if self.wanted_from < 0:
            self.wanted_from = self.num_prompt

    @property
    def max_kv_tokens(self) -> int:
        """Tokens whose KV it may need at once: the last token that is sampled needs none."""
        return self.limit - 1 if self.samples else self.limit

    @property
    def reuse_limit(self) -> int:
        """Leading tokens whose KV may come from the cache: the rest must run, for their logits are needed."""
        first_row = len(self.ids) - self.num_fresh
        if self.wants_scores:
            first_row = min(first_row, self.wanted_from - 1)
        if self.num_dense is not None:
            first_row = min(first_row, self.num_dense - self.num_fresh)  # what is dense ends with rows of its own chunk
        return max(first_row, 0)

    @property
    def num_shared(self) -> int:
        """Leading tokens of its prompt that others may take from the cache, once they are there."""
        return self.num_prompt if self.num_dense is None else min(self.num_dense, self.num_prompt)

    @property
    def can_decode(self) -> bool:
        return self.decoding and self.total < self.limit

    @property
    def can_prefill(self) -> bool:
        has_room = self.lease is not None or self.in_seat  # it has neither once it is preempted
        return has_room and not self.decoding and self.num_kv < self.total

    @property
    def is_forced(self) -> bool:
        """Whether its next known token runs as a decode step."""
        return self.num_dense is not None and self.num_kv >= self.num_dense

    @property
    def chunk_end(self) -> int:
        """How far it may be prefilled in one step."""
        if self.num_dense is None:
            return self.total
        return min(self.total, max(self.num_dense, self.num_kv + 1))

    @property
    def wants_scores(self) -> bool:
        return self.wanted_from < self.num_prompt

    @property
    def pages(self) -> list[int]:
        """Pages that a decode step of it needs."""
        return [] if self.in_seat or self.lease is None else self.lease.pages

    def retire(self) -> None:
        """Forget what is in flight; whatever still arrives belongs to an epoch that is over."""
        self.epoch += 1
        self.total = len(self.ids)
        self.num_kv = 0
        self.decoding = self.in_seat = False
        self.lease = None
        self.seat = NULL_SEAT
