"""Sampling parameters as rows of device tensors, one row per seat."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from slipstream.types import SamplingParams

_SEED_MASK = 2**63 - 1
PACKED_WIDTH = 5


class SamplingRows(NamedTuple):
    """The parameters of ``ops.sample``: temperature, top_p, min_p [B] fp32; top_k [B] int32; seeds [B] int64."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor

    @classmethod
    def greedy(cls, num_rows: int, device: torch.device) -> SamplingRows:
        """Rows that sample greedily."""
        return cls(
            torch.zeros(num_rows, dtype=torch.float32, device=device),
            torch.zeros(num_rows, dtype=torch.int32, device=device),
            torch.ones(num_rows, dtype=torch.float32, device=device),
            torch.zeros(num_rows, dtype=torch.float32, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
        )

    def pick(self, rows: torch.Tensor) -> SamplingRows:
        """The given rows ([n] int64), in new tensors."""
        return SamplingRows(*(column.index_select(0, rows) for column in self))

    def pick_into(self, rows: torch.Tensor, out: SamplingRows) -> None:
        """The given rows, written into ``out``."""
        for column, target in zip(self, out, strict=True):
            torch.index_select(column, 0, rows, out=target)

    def write(self, rows: torch.Tensor, packed: torch.Tensor) -> None:
        """Set rows ([n] int64) from :func:`pack`'s integers ([n, 5] int64, contiguous)."""
        numbers = packed[:, :3].contiguous().view(torch.float64)
        self.temperature.index_copy_(0, rows, numbers[:, 0].float())
        self.top_p.index_copy_(0, rows, numbers[:, 1].float())
        self.min_p.index_copy_(0, rows, numbers[:, 2].float())
        self.top_k.index_copy_(0, rows, packed[:, 3].int())
        self.seeds.index_copy_(0, rows, packed[:, 4])


def pack(params: SamplingParams, seed: int) -> list[int]:
    """Five int64 of one row: the bits of three doubles, then top_k and the seed."""
    numbers = np.array([params.temperature, params.top_p, params.min_p], dtype=np.float64).view(np.int64)
    return [*numbers.tolist(), params.top_k, seed & _SEED_MASK]
