"""What the decoder needs of a Hugging Face config, and the refusal of every config that it would compute wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from slipstream.models.latent_config import Experts, Latent, check_latent, read_experts, read_latent
from slipstream.models.rope import check_rope


@dataclass(frozen=True)
class Family:
    """How one architecture differs from plain Llama; ``None`` means that the config's ``attention_bias`` decides."""

    model_type: str
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    qk_norm: bool = False
    is_latent: bool = False  # latent attention (MLA) and a mixture of experts


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, output_bias=False),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True),
    "Glm4MoeLiteForCausalLM": Family("glm4_moe_lite", is_latent=True),
    "DeepseekV2ForCausalLM": Family("deepseek_v2", is_latent=True),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", is_latent=True),
}

# Attributes that change the logits in ways the decoder does not compute: refused by name instead of ignored.
REFUSED_ATTRIBUTES: dict[str, str] = {
    "quantization_config": "quantised weights",
    "final_logit_softcapping": "soft-capped logits",
    "attn_logit_softcapping": "soft-capped attention",
    "is_encoder_decoder": "an encoder",
}
# Refused of a family that does not have them, for the same reason.
LATENT_ATTRIBUTES: dict[str, str] = {
    "num_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "kv_lora_rank": "latent attention",
}


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder, whichever family it is of. ``rope`` is the v5 ``rope_parameters`` dict; ``dtype`` as stored.

    latent, experts: None but for latent attention; then num_kv_heads is 1 and head_dim the width of a cache row.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    initializer_range: float
    rope: Mapping[str, Any]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    dtype: torch.dtype | None
    eos_token_ids: tuple[int, ...]
    latent: Latent | None = None
    experts: Experts | None = None

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that RoPE is made for."""
        return self.head_dim if self.latent is None else self.latent.rope

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )


def normalise(config: PretrainedConfig | Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config object of a ``config.json`` dict; unsupported architectures raise before it is built."""
    if isinstance(config, PretrainedConfig):
        return config
    family = FAMILIES[find_architecture(config)]
    try:
        # from_dict of a class that transformers ships: no file is read and no code of a model's repository can run.
        return CONFIG_MAPPING[family.model_type].from_dict(dict(config))
    except (StrictDataclassError, KeyError) as error:
        raise ValueError(f"the config is not a valid {family.model_type} config: {error}") from error


def find_architecture(fields: Mapping[str, Any]) -> str:
    """The supported architecture that a config names, by ``architectures`` or else by ``model_type``."""
    model_type = fields.get("model_type")
    of_type = [name for name, family in FAMILIES.items() if family.model_type == model_type]
    named = fields.get("architectures") or of_type
    found = [name for name in named if name in FAMILIES]
    if not found:
        what = ", ".join(named) or f"model_type {model_type!r}"
        raise ValueError(f"architecture {what} is not supported; supported: {', '.join(FAMILIES)}")
    if model_type not in (None, FAMILIES[found[0]].model_type):
        raise ValueError(f"model_type {model_type!r} does not belong to architecture {found[0]}")
    return found[0]


def read_config(config: PretrainedConfig) -> DecoderConfig:
    """Picks the decoder's facts out of a transformers config; ``ValueError`` names what is not supported."""
    architecture = find_architecture({"architectures": config.architectures, "model_type": config.model_type})
    family = FAMILIES[architecture]
    _refuse_unsupported(config, family)
    latent = read_latent(config) if family.is_latent else None
    bias = bool(getattr(config, "attention_bias", False))
    return DecoderConfig(
        architecture=architecture,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads if latent is None else 1,
        head_dim=latent.row
        if latent is not None
        else getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        rope=dict(config.rope_parameters),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=bias if family.output_bias is None else family.output_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=family.qk_norm,
        tied=bool(config.tie_word_embeddings),
        dtype=config.dtype,
        eos_token_ids=token_ids(config.eos_token_id),
        latent=latent,
        experts=read_experts(config) if family.is_latent else None,
    )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """``eos_token_id`` as Hugging Face writes it (nothing, one id or a list) as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _refuse_unsupported(config: PretrainedConfig, family: Family) -> None:
    refused = REFUSED_ATTRIBUTES if family.is_latent else REFUSED_ATTRIBUTES | LATENT_ATTRIBUTES
    for name, meaning in refused.items():
        if getattr(config, name, None):
            raise ValueError(f"the config sets {name} ({meaning}), which is not supported")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            "sliding-window layers (layer_types: sliding_attention) are not supported; "
            "set use_sliding_window to false only if the model was trained with full attention"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; supported: silu")
    check_rope(config.rope_parameters or {})
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        # transformers ignores it in these families for plain RoPE and fails for scaled RoPE: nothing to be equal to.
        raise ValueError("partial_rotary_factor other than 1 is not supported for these architectures")
    if family.is_latent:
        check_latent(config)
