"""Muon for the matrices of the blocks (momentum, then the nearest orthogonal matrix), Adam for the rest."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """[n, rows, columns] -> about U V^T of each matrix: Newton-Schulz in bfloat16 (Jordan et al., 2024)."""
    a, b, c = _COEFFICIENTS
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon:
    """Matrices of one shape are stacked and orthogonalised together."""

    def __init__(self, model: nn.Module, lr: float, adam_lr: float = 3e-3, momentum: float = 0.95) -> None:
        self.lr, self.momentum = lr, momentum
        groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        rest: list[nn.Parameter] = []
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and not name.endswith(".gate.weight"):  # a router
                groups[tuple(weight.shape)].append(weight)
            else:
                rest.append(weight)
        self.groups = list(groups.values())
        self.moments = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        fused = rest[0].is_cuda
        self.adam = torch.optim.Adam(rest, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, fused=fused)
        self.adam_lr = adam_lr

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step with the learning rates multiplied by ``scale``; clears the gradients."""
        for weights, moment in zip(self.groups, self.moments, strict=True):
            grad = torch.stack([w.grad for w in weights])
            moment.lerp_(grad, 1 - self.momentum)
            update = orthogonalise(grad.lerp_(moment, self.momentum)).float()
            rows, columns = update.shape[-2:]
            rate = -self.lr * scale * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(weights, list(update.unbind(0)), alpha=rate)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.clear()

    def clear(self) -> None:
        for weights in self.groups:
            for weight in weights:
                weight.grad = None
        self.adam.zero_grad(set_to_none=True)
