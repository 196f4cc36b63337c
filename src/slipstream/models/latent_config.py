"""The facts of latent attention (MLA) and of experts that a Hugging Face config holds, and what is refused of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from slipstream.models.rope import Rope, yarn_mscale

LORA_NORM_EPS = 1e-6  # of the norms of latents: transformers takes its norm's default there, not rms_norm_eps


@dataclass(frozen=True)
class Latent:
    """Shapes of MLA. nope, rope: dimensions of a query head without and with RoPE; scale: of the softmax.

    q_lora: rank of the query projection, None for a full one. interleaved: whether RoPE turns neighbours (2i, 2i + 1).
    """

    q_lora: int | None
    kv_lora: int
    nope: int
    rope: int
    value: int
    scale: float
    interleaved: bool

    @property
    def row(self) -> int:
        """Width of a token's cache row: the latent and the rotary key."""
        return self.kv_lora + self.rope


@dataclass(frozen=True)
class Experts:
    """Shapes and routing of a mixture of experts.

    is_sparse: of each layer, whether it has experts. shared: how many experts' width everybody passes through.
    scoring: "sigmoid" (with a correction bias that only chooses: noaux_tc) or "softmax". Of ``groups`` groups of
    experts the best ``top_groups`` take part. normalised: the weights of the chosen sum to 1, before ``scaling``.
    """

    is_sparse: tuple[bool, ...]
    count: int
    chosen: int
    width: int
    shared: int
    scoring: str
    groups: int
    top_groups: int
    normalised: bool
    scaling: float

    def __post_init__(self) -> None:
        if self.shared < 1:
            raise ValueError(f"n_shared_experts = {self.shared}: models without shared experts are not supported")
        if not 1 <= self.chosen <= self.count:
            raise ValueError(f"num_experts_per_tok = {self.chosen} of n_routed_experts = {self.count}: lower it")
        if self.count % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"n_routed_experts = {self.count} cannot be cut into n_group = {self.groups} groups of which "
                f"topk_group = {self.top_groups} take part"
            )
        members = self.count // self.groups
        if self.top_groups * members < self.chosen or (self.scoring == "sigmoid" and members < 2):
            raise ValueError(
                f"{self.top_groups} groups of {members} experts are too few to choose num_experts_per_tok = "
                f"{self.chosen} from (and noaux_tc ranks groups by their best two)"
            )


# What the three families could say and transformers' models do not compute, or we do not: name -> allowed values.
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "glm4_moe_lite": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    "deepseek_v2": {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
    },
}


def check_latent(config: PretrainedConfig) -> None:
    """``ValueError`` naming the first thing in an MLA config that the model does not compute."""
    if getattr(config, "attention_bias", False):
        raise ValueError("attention_bias is not supported with latent attention (MLA)")
    if getattr(config, "mlp_bias", False):
        raise ValueError("mlp_bias is not supported with a mixture of experts")
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads = {config.num_key_value_heads} with latent attention (MLA): its heads share one "
            f"latent, so it must be num_attention_heads = {config.num_attention_heads}"
        )
    if getattr(config, "moe_layer_freq", 1) != 1:
        raise ValueError(f"moe_layer_freq = {config.moe_layer_freq} is not supported; supported: 1")
    if getattr(config, "index_topk", None):
        raise ValueError("the config sets index_topk (a trained sparse-attention indexer), which is not supported")
    for name, allowed in _ONLY[config.model_type].items():
        value = getattr(config, name, None)
        if value is not None and value not in allowed:
            supported = ", ".join(map(str, allowed))
            raise ValueError(f"{name} = {value!r} is not supported for {config.model_type}; supported: {supported}")


def read_latent(config: PretrainedConfig) -> Latent:
    rope: Rope = config.rope_parameters
    scale = float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)
    if rope.get("rope_type") != "default" and rope.get("mscale_all_dim"):
        scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return Latent(
        q_lora=config.q_lora_rank,
        kv_lora=config.kv_lora_rank,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        value=config.v_head_dim,
        scale=scale,
        interleaved=bool(getattr(config, "rope_interleave", True)),
    )


def read_experts(config: PretrainedConfig) -> Experts:
    layers = config.num_hidden_layers
    types = getattr(config, "mlp_layer_types", None)
    dense = getattr(config, "first_k_dense_replace", 0) or 0
    is_v2 = config.model_type == "deepseek_v2"
    grouped = not is_v2 or config.topk_method == "group_limited_greedy"
    return Experts(
        is_sparse=tuple((types[i] == "sparse") if types else i >= dense for i in range(layers)),
        count=config.n_routed_experts,
        chosen=config.num_experts_per_tok or 0,
        width=config.moe_intermediate_size,
        shared=config.n_shared_experts or 0,
        scoring="softmax" if is_v2 else "sigmoid",
        groups=(config.n_group or 1) if grouped else 1,
        top_groups=(config.topk_group or 1) if grouped else 1,
        normalised=bool(config.norm_topk_prob) and not is_v2,
        scaling=float(config.routed_scaling_factor),
    )
