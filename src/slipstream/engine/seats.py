"""Persistent device state: one row per running chain, so that a decode step needs next to nothing from the host."""

from __future__ import annotations

from typing import NamedTuple

import torch

from slipstream.engine.packet import Packet
from slipstream.engine.sampling import PACKED_WIDTH, SamplingRows, pack
from slipstream.engine.scheduler import Plan


class SeatUpdate(NamedTuple):
    """Where in a packet the news for the seats are: rows with their parameters, page-table cells with their pages."""

    rows: slice
    params: slice
    cells: slice
    pages: slice


class Seats:
    """Rows of the running chains; row 0 is the null seat of padding rows and stays all zero.

    last_token: [M + 1] int64, the token to run next.  length: [M + 1] int64, tokens whose KV is stored.
    table: [M + 1, N] int32 page ids, 0-padded.  sampling: parameters of ``ops.sample``.
    """

    def __init__(self, max_num_seqs: int, num_columns: int, device: torch.device) -> None:
        rows = max_num_seqs + 1
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.table = torch.zeros((rows, num_columns), dtype=torch.int32, device=device)
        self.sampling = SamplingRows.greedy(rows, device)
        self._num_sent = [0] * rows

    def stage(self, plan: Plan, packet: Packet) -> SeatUpdate:
        """Put what changed into the packet: the rows of new chains, and pages that the device has not seen."""
        params: list[int] = []
        for chain in plan.seated:
            params += pack(chain.request.params, chain.seed, chain.num_prompt, chain.request.stop_ids)
            self._num_sent[chain.seat] = 0
        cells: list[int] = []
        pages: list[int] = []
        for chain in plan.grown:
            assert chain.lease is not None
            held, row = chain.lease.pages, chain.seat * self.table.shape[1]
            # A copy-on-write may have replaced the last page that was sent, and only that one.
            first = max(0, self._num_sent[chain.seat] - 1)
            cells += range(row + first, row + len(held))
            pages += held[first:]
            self._num_sent[chain.seat] = len(held)
        rows = [chain.seat for chain in plan.seated]
        return SeatUpdate(packet.add(rows), packet.add(params), packet.add(cells), packet.add(pages))

    def apply(self, update: SeatUpdate, data: torch.Tensor) -> None:
        """Write the staged news, ordered before the step that needs them."""
        rows, cells = data[update.rows], data[update.cells]
        if rows.numel():
            self.table.index_fill_(0, rows, 0)
            self.sampling.write(rows, data[update.params].view(-1, PACKED_WIDTH))
        if cells.numel():
            self.table.view(-1).index_copy_(0, cells, data[update.pages].int())

    def store(self, rows: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """After a step: the rows' new last tokens and lengths, all [n] int64."""
        self.last_token.index_copy_(0, rows, tokens)
        self.length.index_copy_(0, rows, lengths)
