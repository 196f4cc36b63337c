"""The loading rules as data: which checkpoint tensors make up each of our parameters, and along which axis.

The same table says how ranks share a parameter (``models.parallel``), so that each reads its part of the files only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from slipstream.models.config import DecoderConfig
from slipstream.models.latent_config import Experts
from slipstream.models.parallel import Ranks

Shape = tuple[int, ...]
Fill = Literal["normal", "ones", "zeros"]
# What one of several ranks holds: everything, its rows, its columns, or everything if it is the first and else zeros.
Share = Literal["whole", "rows", "columns", "first"]


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint and the shape that the config gives it."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Parameter:
    """One tensor of ours: its sources concatenated along ``axis``, in order. ``fill``: how dummy weights are made.

    wide: kept in float32 whatever the model's dtype is. share: what one of several ranks holds of each source.
    """

    name: str
    sources: tuple[Source, ...]
    axis: int
    fill: Fill
    wide: bool = False
    share: Share = "whole"

    @property
    def shape(self) -> Shape:
        shapes = [source.shape for source in self.sources]
        merged = list(shapes[0])
        merged[self.axis] = sum(shape[self.axis] for shape in shapes)
        return tuple(merged)

    def part(self, ranks: Ranks) -> Parameter:
        """What a rank allocates: rows are padded to the same number on all ranks."""
        if self.share in ("whole", "first"):
            return self
        split = int(self.share == "columns")
        sources = []
        for source in self.sources:
            shape = list(source.shape)
            shape[split] = -(-shape[split] // ranks.count)
            sources.append(Source(source.name, tuple(shape)))
        return replace(self, sources=tuple(sources))

    def cut(self, source: Source, ranks: Ranks) -> tuple[slice, ...]:
        """What a rank reads of one source."""
        if self.share == "rows":
            return (ranks.share(source.shape[0]),)
        if self.share == "columns":
            return slice(0, source.shape[0]), ranks.share(source.shape[1])
        return (slice(0, source.shape[0] if self.share == "whole" or ranks.index == 0 else 0),)


@dataclass(frozen=True)
class Rule:
    """How a layer's parameter is named in a checkpoint, and the axis along which its sources are merged."""

    name: str
    sources: tuple[str, ...]
    fill: Fill = "normal"
    axis: int = 0
    present: Callable[[DecoderConfig], bool] = lambda config: True
    wide: bool = False
    share: Share = "whole"


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def _suffixed(names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    return tuple(f"{name}.{suffix}" for name in names)


LAYER: tuple[Rule, ...] = (
    Rule("input_norm", ("input_layernorm.weight",), fill="ones"),
    Rule("qkv", _suffixed(_QKV, "weight"), share="rows"),
    Rule("qkv_bias", _suffixed(_QKV, "bias"), present=lambda config: config.qkv_bias, share="rows"),
    Rule("q_norm", ("self_attn.q_norm.weight",), fill="ones", present=lambda config: config.qk_norm),
    Rule("k_norm", ("self_attn.k_norm.weight",), fill="ones", present=lambda config: config.qk_norm),
    Rule("output", ("self_attn.o_proj.weight",), share="columns"),
    Rule("output_bias", ("self_attn.o_proj.bias",), present=lambda config: config.output_bias, share="first"),
    Rule("mlp_norm", ("post_attention_layernorm.weight",), fill="ones"),
    Rule("gate_up", _suffixed(_GATE_UP, "weight"), share="rows"),
    Rule("gate_up_bias", _suffixed(_GATE_UP, "bias"), present=lambda config: config.mlp_bias, share="rows"),
    Rule("down", ("mlp.down_proj.weight",), share="columns"),
    Rule("down_bias", ("mlp.down_proj.bias",), present=lambda config: config.mlp_bias, share="first"),
)
LATENT_ATTENTION: tuple[Rule, ...] = (
    Rule("input_norm", ("input_layernorm.weight",), fill="ones"),
    Rule("kv_norm", ("self_attn.kv_a_layernorm.weight",), fill="ones"),
    Rule("kv_up", ("self_attn.kv_b_proj.weight",)),
    Rule("output", ("self_attn.o_proj.weight",), share="columns"),
    Rule("mlp_norm", ("post_attention_layernorm.weight",), fill="ones"),
)
# What reads the layer's input is one product: the queries, or their latent, and the latent of keys and values.
LATENT_QUERY: tuple[Rule, ...] = (Rule("q_kv", ("self_attn.q_proj.weight", "self_attn.kv_a_proj_with_mqa.weight")),)
LATENT_LOW_RANK_QUERY: tuple[Rule, ...] = (
    Rule("q_kv", ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight")),
    Rule("q_norm", ("self_attn.q_a_layernorm.weight",), fill="ones"),
    Rule("q_up", ("self_attn.q_b_proj.weight",)),
)
DENSE_MLP: tuple[Rule, ...] = (
    Rule("gate_up", _suffixed(_GATE_UP, "weight"), share="rows"),
    Rule("down", ("mlp.down_proj.weight",), share="columns"),
)
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
LAYER_PREFIX = "model.layers.{index}."


def parameters(config: DecoderConfig) -> Iterator[Parameter]:
    """Every parameter of a decoder, in the order of the forward pass (and so of most checkpoints)."""
    vocabulary = (config.vocab_size, config.hidden_size)
    yield Parameter("embedding", (Source(EMBEDDING, vocabulary),), 0, "normal", share="rows")
    shapes = _layer_shapes(config) if config.latent is None else _latent_shapes(config)
    for index in range(config.num_layers):
        prefix = LAYER_PREFIX.format(index=index)
        for rule in _rules(config, index):
            if rule.present(config):
                sources = tuple(Source(prefix + name, shapes[name]) for name in rule.sources)
                yield Parameter(f"{index}.{rule.name}", sources, rule.axis, rule.fill, rule.wide, rule.share)
    yield Parameter("final_norm", (Source(FINAL_NORM, (config.hidden_size,)),), 0, "ones")
    if not config.tied:
        yield Parameter("head", (Source(HEAD, vocabulary),), 0, "normal", share="rows")


def pop_layer(weights: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Takes the parameters of one layer out of ``weights``, by the names of their rules."""
    prefix = f"{index}."
    return {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}


def _rules(config: DecoderConfig, index: int) -> tuple[Rule, ...]:
    if config.latent is None:
        return LAYER
    assert config.experts is not None, "latent attention comes with experts"
    attention = LATENT_ATTENTION + (LATENT_QUERY if config.latent.q_lora is None else LATENT_LOW_RANK_QUERY)
    return attention + (_expert_rules(config.experts) if config.experts.is_sparse[index] else DENSE_MLP)


def _expert_rules(experts: Experts) -> tuple[Rule, ...]:
    """The matrices of all experts below each other: [E * 2I, H] and [E * H, I], which is [E, 2I, H] and [E, H, I]."""
    each, shared = [f"mlp.experts.{i}." for i in range(experts.count)], "mlp.shared_experts."
    rules = (
        Rule("router", ("mlp.gate.weight",), wide=True),
        Rule("experts_gate_up", tuple(f"{e}{p}_proj.weight" for e in each for p in ("gate", "up")), share="rows"),
        Rule("experts_down", tuple(f"{e}down_proj.weight" for e in each), share="columns"),
        Rule("gate_up", tuple(f"{shared}{p}_proj.weight" for p in ("gate", "up")), share="rows"),
        Rule("down", (f"{shared}down_proj.weight",), share="columns"),
    )
    if experts.scoring == "softmax":
        return rules
    return (*rules, Rule("correction", ("mlp.gate.e_score_correction_bias",), fill="zeros", wide=True))


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


def _latent_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """:func:`_layer_shapes` of latent attention and experts."""
    latent, experts, hidden = config.latent, config.experts, config.hidden_size
    assert latent is not None and experts is not None, "latent attention comes with experts"
    q_size = config.num_heads * (latent.nope + latent.rope)
    q_rank = latent.q_lora or hidden
    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.q_a_proj.weight": (q_rank, hidden),
        "self_attn.q_a_layernorm.weight": (q_rank,),
        "self_attn.q_b_proj.weight": (q_size, q_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (latent.row, hidden),
        "self_attn.kv_a_layernorm.weight": (latent.kv_lora,),
        "self_attn.kv_b_proj.weight": (config.num_heads * (latent.nope + latent.value), latent.kv_lora),
        "self_attn.o_proj.weight": (hidden, config.num_heads * latent.value),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate.weight": (experts.count, hidden),
        "mlp.gate.e_score_correction_bias": (experts.count,),
    }
    widths = {"mlp.": config.intermediate_size, "mlp.shared_experts.": experts.shared * experts.width}
    widths |= {f"mlp.experts.{i}.": experts.width for i in range(experts.count)}
    for prefix, inner in widths.items():
        shapes |= {f"{prefix}{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}down_proj.weight"] = (hidden, inner)
    return shapes
