"""The loading rules as data: which checkpoint tensors make up each of our parameters, and along which axis.

A later tensor-parallel loader reads the same table: merged projections split along axis 0, ``output`` and ``down``
along axis 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from slipstream.models.config import DecoderConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint and the shape that the config gives it."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Parameter:
    """One tensor of ours: its sources concatenated along ``axis``, in order. ``fill``: how dummy weights are made."""

    name: str
    sources: tuple[Source, ...]
    axis: int
    fill: Literal["normal", "ones"]

    @property
    def shape(self) -> Shape:
        shapes = [source.shape for source in self.sources]
        merged = list(shapes[0])
        merged[self.axis] = sum(shape[self.axis] for shape in shapes)
        return tuple(merged)


@dataclass(frozen=True)
class Rule:
    """How a layer's parameter is named in a checkpoint, and the axis along which its sources are merged."""

    name: str
    sources: tuple[str, ...]
    fill: Literal["normal", "ones"] = "normal"
    axis: int = 0
    present: Callable[[DecoderConfig], bool] = lambda config: True


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def _suffixed(names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    return tuple(f"{name}.{suffix}" for name in names)


LAYER: tuple[Rule, ...] = (
    Rule("input_norm", ("input_layernorm.weight",), fill="ones"),
    Rule("qkv", _suffixed(_QKV, "weight")),
    Rule("qkv_bias", _suffixed(_QKV, "bias"), present=lambda config: config.qkv_bias),
    Rule("q_norm", ("self_attn.q_norm.weight",), fill="ones", present=lambda config: config.qk_norm),
    Rule("k_norm", ("self_attn.k_norm.weight",), fill="ones", present=lambda config: config.qk_norm),
    Rule("output", ("self_attn.o_proj.weight",)),
    Rule("output_bias", ("self_attn.o_proj.bias",), present=lambda config: config.output_bias),
    Rule("mlp_norm", ("post_attention_layernorm.weight",), fill="ones"),
    Rule("gate_up", _suffixed(_GATE_UP, "weight")),
    Rule("gate_up_bias", _suffixed(_GATE_UP, "bias"), present=lambda config: config.mlp_bias),
    Rule("down", ("mlp.down_proj.weight",)),
    Rule("down_bias", ("mlp.down_proj.bias",), present=lambda config: config.mlp_bias),
)
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
LAYER_PREFIX = "model.layers.{index}."


def parameters(config: DecoderConfig) -> Iterator[Parameter]:
    """Every parameter of a decoder, in the order of the forward pass (and so of most checkpoints)."""
    vocabulary = (config.vocab_size, config.hidden_size)
    yield Parameter("embedding", (Source(EMBEDDING, vocabulary),), 0, "normal")
    shapes = _layer_shapes(config)
    for index in range(config.num_layers):
        prefix = LAYER_PREFIX.format(index=index)
        for rule in LAYER:
            if rule.present(config):
                sources = tuple(Source(prefix + name, shapes[name]) for name in rule.sources)
                yield Parameter(f"{index}.{rule.name}", sources, rule.axis, rule.fill)
    yield Parameter("final_norm", (Source(FINAL_NORM, (config.hidden_size,)),), 0, "ones")
    if not config.tied:
        yield Parameter("head", (Source(HEAD, vocabulary),), 0, "normal")


def pop_layer(weights: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Takes the parameters of one layer out of ``weights``, by the names of their rules."""
    named = {rule.name: weights.pop(f"{index}.{rule.name}", None) for rule in LAYER}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _layer_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Checkpoint name inside a layer -> shape ([out, in] for projections, as torch stores them)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, Shape] = {f"{name}.weight": shape for name, shape in projections.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in projections.items()}
    shapes |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    shapes |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    return shapes
