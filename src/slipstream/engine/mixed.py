"""A step with prompts in it: decode rows first, forced ones behind, then prompt chunks, in one eager batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from slipstream.engine.packet import Packet
from slipstream.engine.results import Scored
from slipstream.engine.scheduler import Chunk, Plan
from slipstream.engine.seats import Seats
from slipstream.types import Batch


class MixedStep:
    """Built on the host from a plan, sent in a packet, landed on the device.

    samplers: (chain, epoch) of each sampled row. scored: prompt rows whose next token's log-probability is wanted.
    After :meth:`land`: ``batch``, and [n] int64 tensors ``sample_seats`` and ``sample_lengths`` (one per sampler),
    ``score_rows`` and ``score_targets`` (one per scored prompt token).
    """

    batch: Batch
    sample_seats: torch.Tensor
    sample_lengths: torch.Tensor
    score_rows: torch.Tensor
    score_targets: torch.Tensor

    def __init__(self, plan: Plan, page_size: int, packet: Packet) -> None:
        self.samplers = list(zip(plan.decodes, plan.epochs, strict=True))
        self.scored: list[Scored] = []
        self._num_sampled = len(plan.decodes)  # rows whose token is on the device already
        self._num_decodes = self._num_sampled + sum(chunk.forced for chunk in plan.chunks)
        chains = [*plan.decodes, *(chunk.chain for chunk in plan.chunks)]
        counts = [1] * self._num_sampled + [chunk.count for chunk in plan.chunks]
        self._pages = [chain.pages for chain in chains[: self._num_decodes]]
        self._pages += [chain.lease.pages for chain in chains[self._num_decodes :] if chain.lease is not None]
        self._lengths = [*plan.lengths, *(chunk.end for chunk in plan.chunks)]
        self._heirs = [(b, heir.seat) for b, chunk in enumerate(plan.chunks, self._num_sampled) for heir in chunk.heirs]
        self._seated = [chain.seat for chain in plan.seated]
        self._query_start = np.concatenate([[0], np.cumsum(counts)]).tolist()
        positions, slots = _places(self._pages, self._lengths, counts, page_size)
        columns: dict[str, Sequence[int] | np.ndarray] = {
            "positions": positions,
            "slots": slots,
            "lengths": self._lengths,
            "query_start": self._query_start,
            "request_seats": [chain.seat for chain in chains],
            **self._prompt_columns(plan.chunks),
            "sample_seats": [chain.seat for chain, _ in self.samplers],
            "sample_lengths": [chain.num_kv for chain, _ in self.samplers],
        }
        self._places = {name: packet.add(values) for name, values in columns.items()}

    def _prompt_columns(self, chunks: Sequence[Chunk]) -> dict[str, list[int]]:
        tokens = [0] * self._num_sampled
        sample_rows = list(range(self._num_sampled))
        score_rows: list[int] = []
        targets: list[int] = []
        for chunk in chunks:
            first_row, chain = len(tokens), chunk.chain
            tokens += chain.ids[chunk.start : chunk.end]
            sample_rows += [len(tokens) - 1] * len(chunk.samplers)
            self.samplers += chunk.samplers
            start, end = max(chain.wanted_from, chunk.start + 1), min(chain.num_prompt, chunk.end + 1)
            if start < end:
                num_top = chain.request.params.prompt_logprobs or 0
                self.scored.append(Scored(chain, chunk.epoch, start, end - start, num_top))
                before = first_row + start - 1 - chunk.start  # the row whose logits are for prompt index ``start``
                score_rows += range(before, before + end - start)
                targets += chain.ids[start:end]
        return {"tokens": tokens, "sample_rows": sample_rows, "score_rows": score_rows, "score_targets": targets}

    def land(self, data: torch.Tensor, seats: Seats, variant: Callable[[Sequence[int]], int]) -> None:
        """The packet is on the device, and the seats are up to date: page rows and decode tokens come from them.

        variant: asked for the form that the decode rows need, if there are any.
        """
        on_device = {name: data[place] for name, place in self._places.items()}
        rows, tokens = on_device["request_seats"], on_device["tokens"]
        if self._num_sampled:
            tokens[: self._num_sampled] = seats.last_token.index_select(0, rows[: self._num_sampled])
        width = max(map(len, self._pages))
        self.batch = Batch(
            tokens=tokens,
            positions=on_device["positions"],
            slots=on_device["slots"],
            page_table=seats.table[:, :width].index_select(0, rows),
            lengths=on_device["lengths"].int(),
            query_start=on_device["query_start"].int(),
            logit_rows=on_device["sample_rows"],
            seats=rows,
            lengths_host=self._lengths,
            query_start_host=self._query_start,
            pages_host=self._pages,
            num_decodes=self._num_decodes,
            variant=variant(self._lengths[: self._num_decodes]) if self._num_decodes else 0,
            heirs=self._heirs,
            seated=self._seated,
        )
        self.sample_seats, self.sample_lengths = on_device["sample_seats"], on_device["sample_lengths"]
        self.score_rows, self.score_targets = on_device["score_rows"], on_device["score_targets"]


def _places(
    pages: Sequence[Sequence[int]], lengths: Sequence[int], counts: Sequence[int], page_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logical positions and physical slots of the last ``counts[b]`` of ``lengths[b]`` tokens of all requests, [T].

    The slots of a request without pages are those of the null page.
    """
    positions, slots = [], []
    for held, length, count in zip(pages, lengths, counts, strict=True):
        at = np.arange(length - count, length, dtype=np.int64)
        first = int(at[0]) // page_size
        column = np.asarray(held[first : (length - 1) // page_size + 1] or [0], dtype=np.int64)
        positions.append(at)
        slots.append(column[at // page_size - first] * page_size + at % page_size)
    return np.concatenate(positions), np.concatenate(slots)
