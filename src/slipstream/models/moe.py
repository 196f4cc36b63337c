"""A gated MLP, and a mixture of experts that are gated MLPs: some for everybody, the others chosen token by token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slipstream.kernels import experts, ops
from slipstream.models.latent_config import Experts
from slipstream.models.linear import Linear
from slipstream.models.parallel import Ranks, summed


class GatedMlp:
    """``down(silu(gate(x)) * up(x))``."""

    __slots__ = ("gate_up", "down")

    def __init__(self, weights: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
        self.gate_up, self.down = Linear(weights["gate_up"]), summed(weights["down"], None, ranks)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(ops.silu_mul(self.gate_up(x)))


class Mixture:
    """Shared experts (one gated MLP of their joint width) and routed ones.

    weights: ``router`` [E, H] and ``correction`` [E] in fp32 (absent for softmax scoring), ``experts_gate_up``
    [E * 2I, H], ``experts_down`` [E * H, I], and the shared ones' ``gate_up`` and ``down``.
    On a device all experts' products are one launch; on a CPU each expert that was chosen is a projection of its own,
    so that a token's result does not depend on who else is there.
    Ranks choose alike and have some columns of every expert each, the shared ones too: one sum is all they tell.
    """

    __slots__ = ("rule", "router", "shared", "weights", "each", "_ranks")

    def __init__(self, config: Experts, weights: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
        self._ranks = ranks
        self.rule = experts.Routing(config.chosen, config.groups, config.top_groups, config.normalised, config.scaling)
        self.router, self.shared = Linear(weights["router"]), GatedMlp(weights, Ranks())  # summed with the others
        gate_up = weights["experts_gate_up"].unflatten(0, (config.count, -1))
        down = weights["experts_down"].unflatten(0, (config.count, -1))
        self.each: list[tuple[Linear, Linear]] = []
        if gate_up.device.type == "cpu":
            self.each = [(Linear(a), Linear(b)) for a, b in zip(gate_up, down, strict=True)]
            gate_up = down = torch.empty(0)  # a packed projection keeps its own copy
        self.weights = experts.Weights(
            self.router.weight, weights.get("correction"), gate_up, down, self.shared.gate_up.weight, self.down.weight
        )

    @property
    def down(self) -> Linear:
        return self.shared.down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, H] -> [T, H]."""
        if self.each:
            choice = experts.route(self.router(x.float()), self.weights.correction, self.rule)
            own = self._one_by_one(x, *choice).add_(self.shared(x))
        else:
            own = experts.mixture(x, self.weights, self.rule)
        return self._ranks.sum(own)

    def _one_by_one(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        taken = x.new_empty((chosen.numel(), x.shape[1]))
        for expert in chosen.unique().tolist():
            rows = (chosen.flatten() == expert).nonzero().squeeze(1)
            gate_up, down = self.each[expert]
            taken.index_copy_(0, rows, down(ops.silu_mul(gate_up(x[rows // chosen.shape[1]]))))
        return (taken.view(*chosen.shape, -1).float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)
