"""A decode step on static buffers: gathered from the seats, run, sampled, written back; on CUDA captured as graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from slipstream.attention.backend import AttentionBackend
from slipstream.engine.chain import NULL_SEAT
from slipstream.engine.recording import Recording
from slipstream.engine.sampling import SamplingRows
from slipstream.engine.seats import Seats
from slipstream.types import Batch, at_once

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_NULL_PAGES = (0,)


class Model(Protocol):
    """What the engine needs of a model: hidden states [T, H] of a batch, and logits [R, V] of hidden states [R, H]."""

    def forward(self, batch: Batch, backend: AttentionBackend) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class DecodeStep:
    """One token for each of ``bucket`` seats.

    seat_rows: [bucket] int64, the seats to run; padding rows sit on the null seat and write to the null page.
    tokens: [bucket] int64, what was sampled; logits: [bucket, V], valid until the next step.
    Captured once for each variant of the backend that is asked for.
    """

    def __init__(
        self,
        bucket: int,
        model: Model,
        backend: AttentionBackend,
        seats: Seats,
        page_size: int,
        seat_rows: torch.Tensor,
        graph_pool: Any | None,
        capture_stream: torch.cuda.Stream | None,
    ) -> None:
        self.bucket, self._model, self._backend, self._seats = bucket, model, backend, seats
        self._page_size, self._graph_pool, self._capture_stream = page_size, graph_pool, capture_stream
        device = seat_rows.device
        self.seat_rows = seat_rows
        self.tokens = torch.zeros(bucket, dtype=torch.int64, device=device)
        self.logits: torch.Tensor | None = None
        self._graphs: dict[int, tuple[list[Callable[[], object]], torch.Tensor]] = {}  # by variant, with its logits
        self._sampling = SamplingRows.greedy(bucket, device)
        self.batch = Batch(
            tokens=torch.zeros(bucket, dtype=torch.int64, device=device),
            positions=torch.zeros(bucket, dtype=torch.int64, device=device),
            slots=torch.zeros(bucket, dtype=torch.int64, device=device),
            page_table=torch.zeros((bucket, seats.table.shape[1]), dtype=torch.int32, device=device),
            lengths=torch.ones(bucket, dtype=torch.int32, device=device),
            query_start=torch.arange(bucket + 1, dtype=torch.int32, device=device),
            logit_rows=torch.arange(bucket, device=device),
            seats=seat_rows,
            lengths_host=[1] * bucket,
            query_start_host=list(range(bucket + 1)),
            pages_host=[_NULL_PAGES] * bucket,
            num_decodes=bucket,
        )

    def refresh_sampling(self) -> None:
        """The seats or their parameters changed: gather the parameters anew."""
        self._seats.sampling.pick_into(self.seat_rows, self._sampling)

    def run(self, variant: int, lengths: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """One step. lengths, pages: KV tokens (with this step's) and pages of the seats, on the host, unpadded."""
        padding = self.bucket - len(lengths)
        batch = self.batch
        batch.lengths_host = [*lengths, *[1] * padding] if padding else lengths
        batch.pages_host = [*pages, *[_NULL_PAGES] * padding] if padding else pages
        self._choose(variant)
        if self._graph_pool is None:
            self._gather()
            self._backend.plan(batch)
            self._compute()
            return
        self._backend.plan(batch)
        parts, self.logits = self._graphs[variant]
        for part in parts:
            part()

    def needs_capture(self, variant: int) -> bool:
        return self._graph_pool is not None and variant not in self._graphs

    def capture(self, variant: int) -> None:
        """Record the step as CUDA graphs. The seats must be the null seat: the rehearsals before it really run."""
        self.seat_rows.fill_(NULL_SEAT)
        self.refresh_sampling()
        batch = self.batch
        batch.lengths_host, batch.pages_host = [1] * self.bucket, [_NULL_PAGES] * self.bucket
        batch.seated = ()
        self._choose(variant)
        for _ in range(2):  # compile kernels and let libraries allocate, which a capture must not
            self._backend.plan(batch)
            self._gather()
            self._compute()
        self._backend.plan(batch)
        recording = Recording(self._graph_pool, self._capture_stream)
        batch.between = recording.between
        try:
            with recording:
                self._gather()
                self._compute()
        finally:
            batch.between = at_once
        assert self.logits is not None
        self._graphs[variant] = recording.parts, self.logits

    def _choose(self, variant: int) -> None:
        self.batch.variant = variant
        if self._graph_pool is not None:
            self.batch.graph_key = (self.bucket, variant)

    def _gather(self) -> None:
        seats, batch, rows, size = self._seats, self.batch, self.seat_rows, self._page_size
        torch.index_select(seats.last_token, 0, rows, out=batch.tokens)
        torch.index_select(seats.length, 0, rows, out=batch.positions)
        if self._graph_pool is None and not self._backend.holds_kv_in_seats:
            # Nothing forces a fixed width here, and what kernels cost on the CPU grows with it.
            width = max(map(len, batch.pages_host))
            batch.page_table = seats.table[:, :width].index_select(0, rows)
        else:
            torch.index_select(seats.table, 0, rows, out=batch.page_table)
        column = torch.div(batch.positions, size, rounding_mode="floor").unsqueeze(1)
        page = batch.page_table.gather(1, column).squeeze(1)
        torch.add(batch.positions % size, page, alpha=size, out=batch.slots)
        torch.add(batch.positions, 1, out=batch.lengths)

    def _compute(self) -> None:
        batch, seats = self.batch, self._seats
        self.logits = self._model.logits(self._model.forward(batch, self._backend))
        lengths = batch.positions + 1
        # The key of the noise is the index of the token that is drawn, whatever shares the batch.
        tokens = self._sampling.sample(self.logits, lengths)
        self.tokens.copy_(tokens)
        seats.store(self.seat_rows, tokens, lengths)
        seats.length[:1].zero_()
        seats.last_token[:1].zero_()
        self._backend.finish()
