"""One decoder layer as plain tensors and ten lines of arithmetic: what runs ``L`` times per step.

No ``nn.Module``: at batch 1 on a CPU its attribute look-ups and hooks cost as much as the small matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from slipstream.attention.backend import AttentionBackend
from slipstream.kernels import ops
from slipstream.models.config import DecoderConfig
from slipstream.models.linear import Linear
from slipstream.models.parallel import Ranks, summed


class DecoderLayer:
    """Attention and gated MLP of one layer, pre-norm, with the residual stream carried beside the normed input.

    weights: the layer's merged parameters by their names in ``models.parameters.LAYER``; absent ones (biases, q/k
    norms) are None and stay out of the arithmetic. config, weights: of this rank's part.
    """

    __slots__ = ("index", "eps", "input_norm", "qkv", "q_norm", "k_norm", "output", "mlp_norm", "gate_up", "down")

    def __init__(self, index: int, config: DecoderConfig, weights: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
        self.index = index
        self.eps = config.norm_eps
        self.input_norm = weights["input_norm"]
        self.qkv = Linear(weights["qkv"], weights.get("qkv_bias"))
        self.q_norm = weights.get("q_norm")
        self.k_norm = weights.get("k_norm")
        self.output = summed(weights["output"], weights.get("output_bias"), ranks)
        self.mlp_norm = weights["mlp_norm"]
        self.gate_up = Linear(weights["gate_up"], weights.get("gate_up_bias"))
        self.down = summed(weights["down"], weights.get("down_bias"), ranks)

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
        k_pages, v_pages, slots = backend.view(self.index)
        qkv = self.qkv(normed)
        q = ops.qk_norm_rope_store(qkv, self.q_norm, self.k_norm, self.eps, cos_sin, positions, slots, k_pages, v_pages)
        mixed = self.output(backend.attend(self.index, q).flatten(1))
        normed, residual = ops.add_rms_norm(mixed, residual, self.mlp_norm, self.eps)
        backend.foresee(self.index, residual)
        mixed = self.down(ops.silu_mul(self.gate_up(normed)))
        return ops.add_rms_norm(mixed, residual, next_norm, self.eps)

    def foresight(
        self, config: DecoderConfig, cos_sin: torch.Tensor
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """(residual stream [T, H], positions [T]) -> the queries [T, Hq, D] that this layer would make of it.

        On a CPU the projections are packed once more for it.
        """
        project = self.qkv.first_rows(config.num_heads * config.head_dim)
        nowhere = self.input_norm.new_empty((1, 0, 1, config.head_dim))  # pages of no KV head

        def foresee(residual: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            heads = project(ops.rms_norm(residual, self.input_norm, self.eps))
            args = (self.q_norm, self.k_norm, self.eps, cos_sin, positions, positions, nowhere, nowhere)
            return ops.qk_norm_rope_store(heads, *args)

        return foresee
