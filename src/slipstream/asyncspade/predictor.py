"""The state of AsyncSpade's predictors: what every seat asked for lately, and since when.

A window survives changes of the batch, because it belongs to a seat. It is of use only while it is unbroken: every
query of the chain since position ``first`` was pushed, the last of them at ``next - 1``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.mlp import QueryMLP
from slipstream.kernels import predict
from slipstream.types import ModelSpec

NEVER = -1  # the position that comes next in a seat whose window is of no use


class Predictor:
    """Windows of all seats and layers, and the op that reads them; all on one device, nothing synchronises.

    windows: [L, M + 1, W, Hq, D] in the model's dtype, before RoPE where ``config.rotate``.
    first, next: [M + 1] int64.  cos_sin: the model's table, on the device.  mlp: what "mlp" has learned, on the device.
    With predictor "oracle" there is no window, and every query is its own prediction, for its own step.
    """

    def __init__(
        self,
        config: AsyncSpade,
        spec: ModelSpec,
        num_seats: int,
        cos_sin: Tensor,
        device: torch.device | str,
        mlp: QueryMLP | None = None,
    ) -> None:
        self.kind, self.rotate, self._cos_sin, self._mlp = config.predictor, config.rotate, cos_sin, mlp
        self._strength = {"ridge": config.ridge, "analog": config.beta, "ema": config.decay}.get(self.kind, 0.0)
        assert self.kind in (*predict.KINDS, "mlp", "oracle") and (self.kind == "mlp") == (mlp is not None)
        assert mlp is None or mlp.window <= config.window, "the window is shorter than the one that was learned"
        size = 0 if self.kind == "oracle" else config.window
        shape = (spec.num_layers, num_seats + 1, size, spec.num_heads, spec.head_dim)
        self.windows = torch.zeros(shape, dtype=spec.dtype, device=device)
        self.first = torch.zeros(num_seats + 1, dtype=torch.int64, device=device)
        self.next = torch.full_like(self.first, NEVER)

    @staticmethod
    def seat_bytes(config: AsyncSpade, spec: ModelSpec) -> int:
        """Memory of one seat, in bytes; there is one seat more than chains, that of padding rows."""
        if config.predictor == "oracle":
            return 16
        return spec.num_layers * config.window * spec.num_heads * spec.head_dim * spec.dtype.itemsize + 16

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.windows, self.first, self.next))

    # -- once per step, before layer 0

    def reset(self, seats: Sequence[int]) -> None:
        """New chains sit in ``seats``: what these hold is of no use. Host integers; no copy to the device."""
        for seat in seats:
            self.next[seat].fill_(NEVER)

    def advance(self, seats: Tensor, positions: Tensor, counts: Tensor | int = 1) -> None:
        """Row b brings queries at ``positions[b]`` (the first of them) and on, ``counts`` of them. All [B] int64.

        Where that is not what comes next in the seat, its window begins anew. Seats are distinct, but for seat 0.
        """
        broken = self.next.index_select(0, seats) != positions
        self.first.index_copy_(0, seats, torch.where(broken, positions, self.first.index_select(0, seats)))
        self.next.index_copy_(0, seats, positions + counts)

    # -- once per layer

    def push_prompt(self, layer: int, q: Tensor, positions: Tensor, seats: Tensor) -> None:
        """The last queries of prompt chunks, at most W of a seat. q: [T, Hq, D] after RoPE; positions, seats: [T]."""
        if self.kind != "oracle":
            predict.push_queries(q, positions, seats, self._cos_sin, self.windows[layer], self.rotate)

    def step(self, layer: int, q: Tensor, seats: Tensor, positions: Tensor) -> Tensor:
        """Push every row's query and predict its next. q: [B, Hq, D] after RoPE -> [B, Hq, D], at ``positions + 1``."""
        window = self.windows[layer]
        if self.kind == "oracle":
            return q
        if self._mlp is None:
            return predict.push_and_predict(
                q, positions, seats, self.first, self._cos_sin, window, self.kind, self._strength, self.rotate
            )
        predict.push_queries(q, positions, seats, self._cos_sin, window, self.rotate)
        weights = self._mlp.layer(layer)
        return predict.predict_mlp(window, seats, positions, self.first, self._cos_sin, weights, self.rotate)

    # -- after a step

    def inherit(self, source: Tensor, target: Tensor) -> None:
        """Seats ``target`` go on from what seats ``source`` hold. Both [n] int64, no target twice or among sources."""
        for state, dim in ((self.windows, 1), (self.first, 0), (self.next, 0)):
            state.index_copy_(dim, target, state.index_select(dim, source))
