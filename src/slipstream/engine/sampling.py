"""Sampling parameters as rows of device tensors, one row per seat."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch

from slipstream.engine.request import MAX_BANNED
from slipstream.kernels import ops
from slipstream.types import SamplingParams

_SEED_MASK = 2**63 - 1
_MOST = 2**31 - 1  # more than any vocabulary or chain has
PACKED_WIDTH = 6 + MAX_BANNED


class SamplingRows(NamedTuple):
    """The parameters of ``ops.sample``: temperature, top_p, min_p [B] fp32; top_k [B] int32; seeds, until [B] int64;
    banned [B, MAX_BANNED] int32."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    until: torch.Tensor
    banned: torch.Tensor

    @classmethod
    def greedy(cls, num_rows: int, device: torch.device) -> SamplingRows:
        """Rows that sample greedily."""
        return cls(
            torch.zeros(num_rows, dtype=torch.float32, device=device),
            torch.zeros(num_rows, dtype=torch.int32, device=device),
            torch.ones(num_rows, dtype=torch.float32, device=device),
            torch.zeros(num_rows, dtype=torch.float32, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.full((num_rows, MAX_BANNED), -1, dtype=torch.int32, device=device),
        )

    def sample(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """logits: [B, V]; positions: [B] int64, the index of the token that is drawn -> tokens [B] int64."""
        return ops.sample(logits, *self[:5], positions, self.until, self.banned)

    def pick(self, rows: torch.Tensor) -> SamplingRows:
        """The given rows ([n] int64), in new tensors."""
        return SamplingRows(*(column.index_select(0, rows) for column in self))

    def pick_into(self, rows: torch.Tensor, out: SamplingRows) -> None:
        """The given rows, written into ``out``."""
        for column, target in zip(self, out, strict=True):
            torch.index_select(column, 0, rows, out=target)

    def write(self, rows: torch.Tensor, packed: torch.Tensor) -> None:
        """Set rows ([n] int64) from :func:`pack`'s integers ([n, PACKED_WIDTH] int64, contiguous)."""
        numbers = packed[:, :3].contiguous().view(torch.float64)
        self.temperature.index_copy_(0, rows, numbers[:, 0].float())
        self.top_p.index_copy_(0, rows, numbers[:, 1].float())
        self.min_p.index_copy_(0, rows, numbers[:, 2].float())
        self.top_k.index_copy_(0, rows, packed[:, 3].int())
        self.seeds.index_copy_(0, rows, packed[:, 4])
        self.until.index_copy_(0, rows, packed[:, 5])
        self.banned.index_copy_(0, rows, packed[:, 6:].int())


def pack(params: SamplingParams, seed: int, num_prompt: int, stop_ids: Collection[int]) -> list[int]:
    """The int64 of one row: bits of three doubles, top_k, seed, index of the first token that may be a stop token, and
    the stop tokens, padded with -1."""
    banned = [token for token in stop_ids if token < 2**31] if params.min_tokens else []
    assert len(banned) <= MAX_BANNED, "refused when the request was made"
    numbers = np.array([params.temperature, params.top_p, params.min_p], dtype=np.float64).view(np.int64)
    end = [-1] * (MAX_BANNED - len(banned))
    top_k, until = min(params.top_k, _MOST), min(num_prompt + params.min_tokens, _MOST)  # any integer may be asked
    return [*numbers.tolist(), top_k, seed & _SEED_MASK, until, *banned, *end]
