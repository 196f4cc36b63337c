"""What a step leaves behind for the host: tokens and log-probabilities on their way, tagged with whom they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from slipstream.engine.chain import Chain
from slipstream.engine.scheduler import Plan
from slipstream.overlap import Ticket
from slipstream.types import Logprob


class LogprobRows(NamedTuple):
    """``ops.token_logprobs`` of some rows: the tokens themselves [R], their values and ranks [R], the best k [R, k]."""

    tokens: torch.Tensor
    values: torch.Tensor
    ranks: torch.Tensor
    top_values: torch.Tensor
    top_ids: torch.Tensor

    def entries(self, num_tops: Sequence[int]) -> list[dict[int, Logprob]]:
        """Row ``i`` as a dict: the ``num_tops[i]`` best tokens, and the token itself in any case."""
        rows = zip(*(column.tolist() for column in self), num_tops, strict=True)
        return [_entry(*row) for row in rows]


def _entry(
    token: int, value: float, rank: int, top_values: list[float], top_ids: list[int], num_top: int
) -> dict[int, Logprob]:
    found = {token: Logprob(value, rank)}
    for place in range(min(num_top, len(top_ids))):
        top_rank = top_values.index(top_values[place]) + 1  # equal values share the best rank
        found.setdefault(top_ids[place], Logprob(top_values[place], top_rank))
    return found


class Scored(NamedTuple):
    """``num_rows`` rows of prompt log-probabilities of a chain in some epoch, from prompt index ``start`` on."""

    chain: Chain
    epoch: int
    start: int
    num_rows: int
    num_top: int


@dataclass
class Pending:
    """A step that was launched. ``ticket`` brings its tensors to the host; reading it is the only wait of a step.

    samplers: (chain, epoch) of each sampled token, decodes first. logprob_rows: which of them want log-probabilities,
    with how many alternatives.
    """

    plan: Plan
    ticket: Ticket[dict[str, Any]]
    samplers: list[tuple[Chain, int]]
    logprob_rows: list[tuple[int, int]]
    scored: list[Scored]

    def read(self) -> Results:
        """Block until the step is done."""
        host = self.ticket.block()
        tokens = host["tokens"].tolist() if "tokens" in host else []
        logprobs: list[dict[int, Logprob] | None] = []
        if "sampled" in host:
            logprobs = [None] * len(tokens)
            entries = LogprobRows(*host["sampled"]).entries([k for _, k in self.logprob_rows])
            for (row, _), entry in zip(self.logprob_rows, entries, strict=True):
                logprobs[row] = entry
        prompt: list[dict[int, Logprob]] = []
        if "prompt" in host:
            prompt = LogprobRows(*host["prompt"]).entries([s.num_top for s in self.scored for _ in range(s.num_rows)])
        return Results(tokens, logprobs, prompt)


class Results(NamedTuple):
    """A step as host values. logprobs: per token, empty when nobody asked. prompt: rows of all ``Pending.scored``."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob] | None]
    prompt: list[dict[int, Logprob]]
