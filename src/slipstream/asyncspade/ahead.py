"""What a step does ahead: whose queries it remembers, and for whom it selects. Host facts and views of the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.attention.sparse import decode_part
from slipstream.types import Batch


@dataclass
class Ahead:
    """One step's work, by rows of its q.

    pushed: rows that only enter the windows; seats, positions: [m] int64, theirs. chosen: rows that tokens are selected
    for; next: those as decode rows of a batch of their own, None where there is none. sources, heirs: [k] int64 seats,
    who gets a copy of whose state when the step is over.
    """

    pushed: list[slice]
    seats: Tensor
    positions: Tensor
    chosen: list[slice]
    next: Batch | None
    sources: Tensor | None = None
    heirs: Tensor | None = None

    @classmethod
    def of_decodes(cls, batch: Batch, selects: bool) -> Ahead:
        """A step of decode rows: it selects for all of them or for none."""
        rows = [slice(0, batch.num_requests)]
        work = cls([] if selects else rows, batch.seats, batch.positions, rows * selects, batch if selects else None)
        work._copy_to(batch)  # a prompt may end with forced rows
        return work

    @classmethod
    def of_mixed(cls, batch: Batch, selects: bool, gate: int, window: int) -> Ahead:
        """Decode rows as above; of each prompt its latest queries, and a set where it ends with ``gate`` tokens."""
        count, starts, seats = batch.num_decodes, batch.query_start_host, batch.seats
        ending = sorted({b for b, _ in batch.heirs if b >= count and batch.lengths_host[b] >= gate})
        selects = selects or bool(ending)
        pushed = [
            slice(max(starts[b], starts[b + 1] - window), starts[b + 1]) for b in range(count, batch.num_requests)
        ]
        owners = [seats[b : b + 1].expand(rows.stop - rows.start) for b, rows in enumerate(pushed, count)]
        if count and not selects:
            pushed, owners = [slice(0, count), *pushed], [seats[:count], *owners]
        chosen = [slice(0, count)] * bool(count) + [slice(starts[b + 1] - 1, starts[b + 1]) for b in ending]
        work = cls(
            pushed,
            torch.cat(owners) if owners else seats[:0],
            torch.cat([batch.positions[rows] for rows in pushed]) if pushed else seats[:0],
            chosen if selects else [],
            _as_decodes(batch, ending, chosen) if selects else None,
        )
        work._copy_to(batch)
        return work

    def _copy_to(self, batch: Batch) -> None:
        """Whoever goes on from another's KV: all heirs but those that computed it in their own seat."""
        first: set[int] = set(range(batch.num_decodes))
        pairs = []
        for b, seat in batch.heirs:
            if b in first:
                pairs.append((b, seat))
            first.add(b)
        if pairs:
            self.sources = torch.cat([batch.seats[b : b + 1] for b, _ in pairs])
            self.heirs = _to_device([seat for _, seat in pairs], batch.seats.device)

    def take(self, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """q: [T, Hq, D] of the step -> the rows that are pushed and the chosen ones, contiguous; None for none."""
        return _rows(q, self.pushed), _rows(q, self.chosen)


def _rows(q: Tensor, slices: list[slice]) -> Tensor | None:
    if len(slices) == 1:
        return q[slices[0]].contiguous()
    return torch.cat([q[rows] for rows in slices]) if slices else None


def _as_decodes(batch: Batch, ending: Sequence[int], rows: Sequence[slice]) -> Batch:
    """The decode rows of a mixed step and, behind them, the last rows of some of its prompts."""
    part, count = decode_part(batch), batch.num_decodes
    chosen = [slice(0, count), *(slice(b, b + 1) for b in ending)]
    num = count + len(ending)
    return dataclasses.replace(
        part,
        positions=torch.cat([batch.positions[at] for at in rows]),
        page_table=torch.cat([batch.page_table[at] for at in chosen]),
        lengths=torch.cat([batch.lengths[at] for at in chosen]),
        seats=torch.cat([batch.seats[at] for at in chosen]),
        query_start=torch.arange(num + 1, dtype=torch.int32, device=batch.seats.device),
        lengths_host=[*part.lengths_host, *(batch.lengths_host[b] for b in ending)],
        query_start_host=range(num + 1),
        pages_host=[*part.pages_host, *(batch.pages_host[b] for b in ending)],
        num_decodes=num,
    )


def _to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """[n] int64, without blocking the host."""
    found = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return found.to(device, non_blocking=True)
