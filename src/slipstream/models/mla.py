"""Latent attention (MLA, DeepSeek-V2, arXiv 2405.04434) in its absorbed form, and the layer around it.

Keys and values of all heads are projections of one latent per token. Those projections are moved to the query's side
and to the output's: queries of ``kv_lora + rope`` dimensions meet the cached rows, and what comes back is a weighted
sum of latents. So a backend sees one KV head of that width, many query heads, and values that are columns of the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from slipstream.attention.backend import AttentionBackend
from slipstream.kernels import ops
from slipstream.models.config import DecoderConfig
from slipstream.models.latent_config import LORA_NORM_EPS, Latent
from slipstream.models.linear import Linear
from slipstream.models.moe import GatedMlp, Mixture
from slipstream.models.parallel import Ranks, summed


class PromptForm(Protocol):
    """Who attends to prompts in expanded form, see :class:`slipstream.attention.expanded.ExpandedPrompts`."""

    def offer(self, query: tuple[torch.Tensor, torch.Tensor], key_up: torch.Tensor, value_up: torch.Tensor) -> None: ...

    def take(self, values: torch.Tensor) -> torch.Tensor: ...


class LatentAttention:
    """Attention of one layer. weights: those of ``models.parameters.LATENT_ATTENTION`` and one of the two queries.

    Every rank has all latents and makes the queries of all heads, so that all select the same tokens and tell each
    other nothing about it; it attends with its ``own`` heads, whose outputs are summed.
    """

    __slots__ = (
        "index", "latent", "q_kv", "q_norm", "q_up", "kv_norm", "key_up", "value_up", "output", "num_heads", "own",
        "prompts",
    )  # fmt: skip

    def __init__(self, index: int, config: DecoderConfig, weights: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
        assert config.latent is not None, "a config without latent attention"
        self.index, self.num_heads, self.latent = index, config.num_heads, config.latent
        self.own = ranks.share(self.num_heads)
        if self.latent.interleaved:
            _halve_pairs(weights, self.num_heads, self.latent)
        self.q_kv = Linear(weights["q_kv"])
        self.q_norm = weights.get("q_norm")
        self.q_up = Linear(weights["q_up"]) if self.q_norm is not None else None
        self.kv_norm = weights["kv_norm"]
        up = weights["kv_up"].view(self.num_heads, -1, self.latent.kv_lora)
        self.key_up = up[:, : self.latent.nope]  # [Hq, nope, kv_lora]
        self.value_up = up[self.own, self.latent.nope :].transpose(1, 2)  # [own, kv_lora, value]
        self.output = summed(weights["output"], None, ranks)
        self.prompts: PromptForm | None = None

    def __call__(
        self, normed: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, backend: AttentionBackend
    ) -> torch.Tensor:
        """normed: [T, H] -> [T, H]."""
        k_pages, _, slots = backend.view(self.index)
        heads, latent = self.q_kv(normed).tensor_split([-self.latent.row], dim=1)
        heads = self._heads(heads)
        q = ops.mla_rope_store(heads, latent, self.kv_norm, LORA_NORM_EPS, cos_sin, positions, slots, k_pages)
        if self.prompts is not None:
            unabsorbed = heads[:, self.own, : self.latent.nope], q[:, self.own, self.latent.kv_lora :]
            self.prompts.offer(unabsorbed, self.key_up[self.own], self.value_up)
        attended = backend.attend(self.index, self._absorb(heads, q))
        values = torch.empty((*attended.shape[:2], self.latent.value), dtype=q.dtype, device=q.device)
        torch.bmm(attended.transpose(0, 1), self.value_up, out=values.transpose(0, 1))
        if self.prompts is not None:
            values = self.prompts.take(values)
        return self.output(values.flatten(1))

    def foresight(self, cos_sin: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """(normed [T, H], positions [T]) -> the absorbed queries [T, Hq, row] that a call would attend with."""
        down = self.q_kv.first_rows(self.q_kv.num_outputs - self.latent.row)

        def foresee(normed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            heads = self._heads(down(normed))
            return self._absorb(heads, ops.mla_rope(heads, cos_sin, positions, self.latent.row))

        return foresee

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """The queries, or their latent, as [T, Hq, nope + rope]."""
        if self.q_up is not None:
            assert self.q_norm is not None
            x = self.q_up(ops.rms_norm(x, self.q_norm, LORA_NORM_EPS))
        return x.unflatten(1, (self.num_heads, -1))

    def _absorb(self, heads: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """q [T, Hq, row], of which the rotary columns are there, with the others: what meets the latents."""
        nope = heads[..., : self.latent.nope].transpose(0, 1)
        torch.bmm(nope, self.key_up, out=q[..., : self.latent.kv_lora].transpose(0, 1))
        return q


class LatentLayer:
    """What :class:`slipstream.models.layers.DecoderLayer` is to the other families; its MLP may be a mixture."""

    __slots__ = ("index", "eps", "input_norm", "attention", "mlp_norm", "mlp")

    def __init__(self, index: int, config: DecoderConfig, weights: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
        self.index, self.eps = index, config.norm_eps
        self.input_norm = weights["input_norm"]
        self.attention = LatentAttention(index, config, weights, ranks)
        self.mlp_norm = weights["mlp_norm"]
        self.mlp: GatedMlp | Mixture
        if "router" in weights:
            assert config.experts is not None, "a router without experts"
            self.mlp = Mixture(config.experts, weights, ranks)
        else:
            self.mlp = GatedMlp(weights, ranks)

    @property
    def output(self) -> Linear:
        return self.attention.output

    @property
    def down(self) -> Linear:
        """The last projection that every token passes through."""
        return self.mlp.down

    def forward(
        self,
        normed: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        backend: AttentionBackend,
        next_norm: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """normed, residual: [T, H]; returns the same pair for the next layer, normed by ``next_norm`` [H]."""
        mixed = self.attention(normed, positions, cos_sin, backend)
        normed, residual = ops.add_rms_norm(mixed, residual, self.mlp_norm, self.eps)
        backend.foresee(self.index, residual)
        return ops.add_rms_norm(self.mlp(normed), residual, next_norm, self.eps)

    def foresight(
        self, config: DecoderConfig, cos_sin: torch.Tensor
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """As :meth:`slipstream.models.layers.DecoderLayer.foresight`."""
        query = self.attention.foresight(cos_sin)
        return lambda residual, positions: query(ops.rms_norm(residual, self.input_norm, self.eps), positions)


def _halve_pairs(weights: Mapping[str, torch.Tensor], num_heads: int, latent: Latent) -> None:
    """Reorders the rows that make rotary dimensions, once, so that pairs (2i, 2i + 1) become (i, i + R / 2).

    Queries and keys alike, so no product of theirs changes, and RoPE is that of every other family.
    """
    q_rows = weights["q_up"] if "q_up" in weights else weights["q_kv"][: -latent.row]
    rotary = q_rows.view(num_heads, latent.nope + latent.rope, -1)[:, latent.nope :]
    for rows in (rotary, weights["q_kv"][None, -latent.rope :]):
        rows.copy_(torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1))
