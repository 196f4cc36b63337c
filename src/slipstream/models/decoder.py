"""The decoder of every supported family: tokens to hidden states to logits; attention is an argument."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from slipstream.attention.backend import AttentionBackend
from slipstream.kernels import ops
from slipstream.models.config import DecoderConfig
from slipstream.models.layers import DecoderLayer
from slipstream.models.linear import Linear
from slipstream.models.mla import LatentLayer
from slipstream.models.parameters import pop_layer
from slipstream.models.rope import cos_sin_table
from slipstream.types import Batch


class CausalLM:
    """A stack of layers between an embedding and a vocabulary projection.

    config: the decoder's facts. weights: every tensor of ``models.parameters.parameters(config)`` by name, on one
    device in one dtype; the dict is emptied on the way, so that a weight which gets another layout is never held twice.
    num_positions: rows of the RoPE table, the longest request that this model will serve.
    """

    def __init__(self, config: DecoderConfig, weights: dict[str, torch.Tensor], num_positions: int) -> None:
        self.config = config
        self.embedding = weights.pop("embedding")
        self.head = Linear(weights.pop("head", self.embedding))
        self.layers = [_layer(config, index, pop_layer(weights, index)) for index in range(config.num_layers)]
        self.first_norm = self.layers[0].input_norm
        # Each layer ends with the norm that its successor starts with: one fused add and norm instead of two ops.
        self.next_norms = [layer.input_norm for layer in self.layers[1:]] + [weights.pop("final_norm")]
        self.cos_sin = cos_sin_table(
            config.rope, config.rope_dim, num_positions, config.max_position, self.embedding.device
        )

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @torch.inference_mode()
    def forward(self, batch: Batch, backend: AttentionBackend) -> torch.Tensor:
        """[T, H] hidden states after the final norm. The caller has called ``backend.plan(batch)``."""
        positions, cos_sin = batch.positions, self.cos_sin
        residual = F.embedding(batch.tokens, self.embedding)
        normed = ops.rms_norm(residual, self.first_norm, self.config.norm_eps)
        for layer, next_norm in zip(self.layers, self.next_norms, strict=True):
            normed, residual = layer.forward(normed, residual, positions, cos_sin, backend, next_norm)
        return normed

    def foresight(self) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
        """(layer, residual stream [T, H], positions [T]) -> the queries [T, Hq, D] that the layer would make of it.

        Not for latent attention. On a CPU the projections are packed once more for it.
        """
        config, layers = self.config, [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        projections = [layer.qkv.first_rows(config.num_heads * config.head_dim) for layer in layers]
        nowhere = self.embedding.new_empty((1, 0, 1, config.head_dim))  # pages of no KV head

        def foresee(index: int, residual: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            layer = layers[index]
            heads = projections[index](ops.rms_norm(residual, layer.input_norm, layer.eps))
            args = (layer.q_norm, layer.k_norm, layer.eps, self.cos_sin, positions, positions, nowhere, nowhere)
            return ops.qk_norm_rope_store(heads, *args)

        return foresee

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, H] hidden states to [R, V] logits in the model's dtype."""
        return self.head(hidden)


def _layer(config: DecoderConfig, index: int, weights: dict[str, torch.Tensor]) -> DecoderLayer | LatentLayer:
    return (DecoderLayer if config.latent is None else LatentLayer)(index, config, weights)
