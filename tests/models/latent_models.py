"""Small random models with latent attention and experts, of every shape that the three families have."""

from __future__ import annotations

from typing import Any

from decoder_harness import SMALL, random_reference
from transformers import CONFIG_MAPPING, PretrainedConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MSCALE = YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16, "beta_slow": 2}
SHAPE: dict[str, Any] = {
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
    "q_lora_rank": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
}
# name -> (model type, other fields)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("glm4_moe_lite", {}),
    "glm, full query, groups, no interleaving": (
        "glm4_moe_lite", {"q_lora_rank": None, "n_group": 4, "topk_group": 2, "rope_interleave": False},
    ),
    "glm, tied, all sparse, not normalised": (
        "glm4_moe_lite", {"tie_word_embeddings": True, "norm_topk_prob": False, "mlp_layer_types": ["sparse"] * 3},
    ),
    "v2, yarn": ("deepseek_v2", {"rope_scaling": MSCALE, "hidden_size": 60, "n_shared_experts": 2}),
    "v2, full query, groups": (
        "deepseek_v2",
        {"q_lora_rank": None, "hidden_size": 60, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
         "routed_scaling_factor": 2.5, "first_k_dense_replace": 2},
    ),
    "v3, yarn": ("deepseek_v3", {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "rope_scaling": MSCALE}),
    "v3, yarn without mscale": (
        "deepseek_v3", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 3, "rope_scaling": YARN},
    ),
}  # fmt: skip


def latent_config(name: str, **fields: Any) -> PretrainedConfig:
    model_type, own = CASES[name]
    return CONFIG_MAPPING[model_type].from_dict(SMALL | SHAPE | own | fields)


def latent_reference(config: PretrainedConfig, seed: int = 0) -> Any:
    """Random corrections too: with zeros, choosing by them and choosing without are the same."""
    model = random_reference(config, seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.3)
    return model
