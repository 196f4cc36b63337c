"""The decoder of every supported family: tokens to hidden states to logits; attention is an argument."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from slipstream.attention.backend import AttentionBackend
from slipstream.kernels import ops
from slipstream.models.config import DecoderConfig
from slipstream.models.layers import DecoderLayer
from slipstream.models.mla import LatentLayer, PromptForm
from slipstream.models.parallel import Ranks, embedding, joined
from slipstream.models.parameters import pop_layer
from slipstream.models.rope import cos_sin_table
from slipstream.types import Batch


class CausalLM:
    """A stack of layers between an embedding and a vocabulary projection.

    config: the decoder's facts. weights: every tensor of ``models.parameters.parameters(config)`` by name, on one
    device in one dtype; the dict is emptied on the way, so that a weight which gets another layout is never held twice.
    num_positions: rows of the RoPE table, the longest request that this model will serve. ranks: who shares the model;
    config and weights are of this rank's part.
    """

    def __init__(
        self, config: DecoderConfig, weights: dict[str, torch.Tensor], num_positions: int, ranks: Ranks
    ) -> None:
        self.config, self._ranks = config, ranks
        self.embedding = weights.pop("embedding")
        self.embed = embedding(self.embedding, ranks)
        self.head = joined(weights.pop("head", self.embedding), config.vocab_size, ranks)
        self.layers = [_layer(config, index, pop_layer(weights, index), ranks) for index in range(config.num_layers)]
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
        residual = self.embed(batch.tokens)
        normed = ops.rms_norm(residual, self.first_norm, self.config.norm_eps)
        for layer, next_norm in zip(self.layers, self.next_norms, strict=True):
            normed, residual = layer.forward(normed, residual, positions, cos_sin, backend, next_norm)
        return normed

    def foresight(self) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
        """(layer, residual stream [T, H], positions [T]) -> the queries [T, Hq, D] that the layer would make of it."""
        each = [layer.foresight(self.config, self.cos_sin) for layer in self.layers]
        return lambda index, residual, positions: each[index](residual, positions)

    @torch.inference_mode()
    def digest(self) -> str:
        """Tells models of one shape apart by some of their weights, whatever precision and number of ranks they have.

        The first rank has the first rows of the vocabulary, and each some columns of the other matrix.
        """
        digest = hashlib.sha256()
        for weight, width in ((self.embedding, self.embedding.shape[1]), (self.layers[-1].down.dense_weight(), None)):
            rows = self._ranks.join(weight[:8])[:, :width]
            digest.update(rows.bfloat16().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def set_prompt_form(self, prompts: PromptForm) -> None:
        """Of a model with latent attention: who may attend to prompts in expanded form."""
        for layer in self.layers:
            assert isinstance(layer, LatentLayer)
            layer.attention.prompts = prompts

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, H] hidden states to [R, V] logits in the model's dtype."""
        return self.head(hidden)


def _layer(
    config: DecoderConfig, index: int, weights: dict[str, torch.Tensor], ranks: Ranks
) -> DecoderLayer | LatentLayer:
    if config.latent is not None:
        return LatentLayer(index, config, weights, ranks)
    return DecoderLayer(index, config, weights, ranks)
