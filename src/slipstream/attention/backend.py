"""How one layer attends in one step: the contract between models and every attention method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from slipstream.types import Batch


class KVView(NamedTuple):
    """Where one layer's keys and values live and where this step's go.

    k, v: [P, Hk, S, D] pages of the layer (head-major: one head's block of a page is one contiguous run). In a latent
    cache (``ModelSpec.value_dim``) v is a view of the first columns of k, and storing a row of k stores both.
    slots: [T] int64 rows (page * S + offset) that this step's tokens write.
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor


class AttentionBackend(Protocol):
    """Laws: ``plan`` is called once per step, before any layer; ``view`` and ``attend`` once per layer, in layer order.

    The model stores the step's K and V through ``view(layer)`` before it calls ``attend(layer, q)``. When
    ``batch.graph_key`` is set, the batch's tensors are the static buffers of a captured graph: ``plan`` runs outside
    the capture, before every replay, and may only update its own static buffers in place; ``view`` and ``attend`` must
    not touch the host.

    A backend whose kernels depend on more than shapes says so with :meth:`variant`: the engine asks before each step
    that has decode rows, sets ``batch.variant``, and captures one graph for each batch size and variant. The backend
    obeys ``batch.variant`` whatever the lengths are: the rehearsals of a capture have lengths of 1.

    Implementations inherit; what is below ``attend`` suits a backend that has one form and keeps nothing of its own.
    """

    def plan(self, batch: Batch) -> None: ...

    def view(self, layer: int) -> KVView: ...

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q: [T, Hq, D], after norm and RoPE. Returns [T, Hq, Dv]; row t sees tokens at positions <= its own.

        Dv is D, or ``ModelSpec.value_dim`` in a latent cache, where q is absorbed and so is what comes back. Of several
        ranks with one latent cache each gets the queries of all heads and answers for its own (``ModelSpec.own``).
        """
        ...

    variants: Sequence[int] = (0,)  # all that variant() may answer
    holds_kv_in_seats: bool = False  # a chain that decodes needs no pages: its KV is with the backend, by seat
    num_fresh: int = 1  # last tokens of a prompt that are computed even where their KV is cached
    prefill_pages: int | None = None  # most pages that the prompts of a step may have together; None: any number
    gate: int | None = None  # tokens from which on a decode step attends otherwise than a prompt does; None: never
    uses_seats: bool = False  # keeps something else by seat: ``Batch.heirs`` says who goes on from whom

    def variant(self, lengths: Sequence[int]) -> int:
        """The form that a decode step over requests of these lengths needs (this step's token counts; no padding)."""
        return 0

    def foresee(self, layer: int, residual: torch.Tensor) -> None:
        """residual: [T, H] behind the attention of ``layer``: all that the layer above will see, but for an MLP."""
        return None

    def finish(self) -> None:
        """The step's tokens are drawn: join what runs beside it. Part of a captured step; called after every step."""
        return None

    def close(self) -> None:
        """Let go of what is outside this process; a later step gets it back."""
        return None

    def stats(self) -> Mapping[str, float]:
        """Counters and gauges, merged into ``Engine.stats()``."""
        return {}


def move_tokens(source: KVView, rows: slice, target: KVView) -> None:
    """K and V of some of the source's slots to the target's, of which there are as many."""
    page, offset = _place(source.slots[rows], source)
    to_page, to_offset = _place(target.slots, target)
    target.k[to_page, :, to_offset] = source.k[page, :, offset]
    target.v[to_page, :, to_offset] = source.v[page, :, offset]


def _place(slots: torch.Tensor, view: KVView) -> tuple[torch.Tensor, torch.Tensor]:
    size = view.k.shape[2]
    return slots // size, slots % size


def prefill_part(batch: Batch) -> Batch:
    """What is behind the decode rows of a mixed step, as a batch of its own (views; nothing is copied)."""
    first, row = batch.num_decodes, batch.query_start_host[batch.num_decodes]
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[row:],
        positions=batch.positions[row:],
        slots=batch.slots[row:],
        page_table=batch.page_table[first:],
        lengths=batch.lengths[first:],
        query_start=batch.query_start[first:] - row,
        seats=batch.seats[first:],
        lengths_host=batch.lengths_host[first:],
        query_start_host=[start - row for start in batch.query_start_host[first:]],
        pages_host=batch.pages_host[first:],
        num_decodes=0,
        heirs=[(b - first, seat) for b, seat in batch.heirs if b >= first],
    )
