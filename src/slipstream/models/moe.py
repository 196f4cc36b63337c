"""A gated MLP, and a mixture of experts that are gated MLPs: some for everybody, the others chosen token by token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slipstream.kernels import experts, ops
from slipstream.models.latent_config import Experts
from slipstream.models.linear import Linear


class GatedMlp:
    """``down(silu(gate(x)) * up(x))``."""

    __slots__ = ("gate_up", "down")

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.gate_up, self.down = Linear(weights["gate_up"]), Linear(weights["down"])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(ops.silu_mul(self.gate_up(x)))


class Mixture:
    """Shared experts (one gated MLP of their joint width) and routed ones.

    weights: ``router`` [E, H] and ``correction`` [E] in fp32 (absent for softmax scoring), ``experts_gate_up``
    [E * 2I, H], ``experts_down`` [E * H, I], and the shared ones' ``gate_up`` and ``down``.
    On a device all experts' products are one grouped product each; on a CPU each expert that was chosen is a
    projection of its own, so that a token's result does not depend on who else is there.
    """

    __slots__ = ("rule", "router", "correction", "shared", "gate_up", "down_all", "each")

    def __init__(self, config: Experts, weights: Mapping[str, torch.Tensor]) -> None:
        self.rule = experts.Routing(config.chosen, config.groups, config.top_groups, config.normalised, config.scaling)
        self.router, self.correction = Linear(weights["router"]), weights.get("correction")
        self.shared = GatedMlp(weights)
        self.gate_up = weights["experts_gate_up"].unflatten(0, (config.count, -1))
        self.down_all = weights["experts_down"].unflatten(0, (config.count, -1))
        self.each: list[tuple[Linear, Linear]] = []
        if self.gate_up.device.type == "cpu":
            self.each = [(Linear(a), Linear(b)) for a, b in zip(self.gate_up, self.down_all, strict=True)]
            self.gate_up = self.down_all = torch.empty(0)  # a packed projection keeps its own copy

    @property
    def down(self) -> Linear:
        return self.shared.down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, H] -> [T, H]."""
        logits, shared = self.router(x.float()), self.shared(x)
        if self.each:
            return self._one_by_one(x, *experts.route(logits, self.correction, self.rule)).add_(shared)
        return experts.mixture(x, logits, self.correction, self.rule, self.gate_up, self.down_all, shared)

    def _one_by_one(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        taken = x.new_empty((chosen.numel(), x.shape[1]))
        for expert in chosen.unique().tolist():
            rows = (chosen.flatten() == expert).nonzero().squeeze(1)
            gate_up, down = self.each[expert]
            taken.index_copy_(0, rows, down(ops.silu_mul(gate_up(x[rows // chosen.shape[1]]))))
        return (taken.view(*chosen.shape, -1).float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)
