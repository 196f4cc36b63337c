"""How one layer attends in one step: the contract between models and every attention method."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from slipstream.types import Batch


class KVView(NamedTuple):
    """Where one layer's keys and values live and where this step's go.

    k, v: [P, Hk, S, D] pages of the layer (head-major: one head's block of a page is one contiguous run).
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
    """

    def plan(self, batch: Batch) -> None: ...

    def view(self, layer: int) -> KVView: ...

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q: [T, Hq, D], after norm and RoPE. Returns [T, Hq, D]; row t sees tokens at positions <= its own."""
        ...
