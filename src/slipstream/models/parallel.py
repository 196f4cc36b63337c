"""Tensor parallelism as the model sees it: the ranks that share it, and the projections that end with a word to them.

Heads, MLP columns and vocabulary are split (Megatron-LM, arXiv 1909.08053): a layer's first projections give each rank
its own heads or columns, its last ones are summed over the ranks; that is all they tell each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from slipstream.models.config import DecoderConfig
from slipstream.models.linear import Linear


class Ranks:
    """The processes that share a model, seen from one of them. Here: one that is alone, the definition.

    index: of this rank, from 0; count: of all. Law: every rank calls the same methods in the same order.
    """

    index = 0
    count = 1

    def place(self, device: torch.device) -> torch.device:
        """The device of this rank, where rank 0 has ``device``."""
        return device

    def share(self, size: int) -> slice:
        """This rank's part of so many rows: all parts are equal, but that the last ones end with the rows."""
        part = -(-size // self.count)
        return slice(min(self.index * part, size), min((self.index + 1) * part, size))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors added up, the same bits on all; ``x`` may be overwritten with it."""
        return x

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """[R, C] of every rank side by side: [R, count * C]."""
        return x

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return number

    def close(self) -> None:
        """Let go of the others. Closing twice is fine."""


class SummedLinear(Linear):
    """A projection whose inputs are spread over the ranks; one rank has the bias, the others zeros."""

    __slots__ = ("_ranks",)

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, ranks: Ranks) -> None:
        super().__init__(weight, bias)
        self._ranks = ranks

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._ranks.sum(super().__call__(x))


class JoinedLinear(Linear):
    """A projection whose ``width`` outputs are spread over the ranks, padding at their end."""

    __slots__ = ("_ranks", "_width")

    def __init__(self, weight: torch.Tensor, width: int, ranks: Ranks) -> None:
        super().__init__(weight)
        self._ranks, self._width = ranks, width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._ranks.join(super().__call__(x))[:, : self._width].contiguous()


def summed(weight: torch.Tensor, bias: torch.Tensor | None, ranks: Ranks) -> Linear:
    return Linear(weight, bias) if ranks.count == 1 else SummedLinear(weight, bias, ranks)


def joined(weight: torch.Tensor, width: int, ranks: Ranks) -> Linear:
    return Linear(weight) if ranks.count == 1 else JoinedLinear(weight, width, ranks)


def embedding(weight: torch.Tensor, ranks: Ranks) -> Callable[[torch.Tensor], torch.Tensor]:
    """tokens [T] -> [T, H]. weight: this rank's rows of the vocabulary."""
    if ranks.count == 1:
        return partial(F.embedding, weight=weight)
    first, count = ranks.index * weight.shape[0], weight.shape[0]

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        row = tokens - first
        is_ours = (row >= 0) & (row < count)
        return ranks.sum(F.embedding(row * is_ours, weight) * is_ours.unsqueeze(1))

    return embed


def own_part(config: DecoderConfig, count: int) -> DecoderConfig:
    """The decoder that one of so many ranks computes. ``ValueError`` for one that cannot be split so."""
    if count == 1:
        return config
    experts = config.experts
    sizes = {name: getattr(config, name) for name in ("num_heads", "num_kv_heads", "intermediate_size")}
    if experts is not None:
        del sizes["num_kv_heads"]
        sizes["moe_intermediate_size"] = experts.width
    for name, size in sizes.items():
        if size % count:
            raise ValueError(f"tensor_parallel_size = {count} does not divide the model's {name} = {size}")
    if experts is None:
        return replace(config, **{name: size // count for name, size in sizes.items()})
    # All heads are there to select by, one latent serves them all, and nothing reads widths but weights.
    return config
