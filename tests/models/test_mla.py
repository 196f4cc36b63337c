"""Golden equality 8 for latent attention and experts, and what is refused of their configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_harness import PagedRun, reference_logits, relative_error, save, small_config
from latent_models import CASES, latent_config, latent_reference

from slipstream.models.weights import load_model

TOLERANCE = 1e-4
LENGTH = 60


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Any]:
    reference = latent_reference(latent_config(request.param))
    return reference, *load_model(save(reference, tmp_path), device="cpu")


def tokens_of(seed: int, length: int = LENGTH) -> list[int]:
    return torch.randint(101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_logits_are_those_of_transformers(pair: tuple[Any, Any, Any]) -> None:
    """Expanded there, absorbed here; in one piece, in chunks, token by token, and two requests at once."""
    reference, model, spec = pair
    tokens, other = tokens_of(1), tokens_of(2, 23)
    expected = reference_logits(reference, tokens)
    assert expected.std() > 0.1, "logits that are all alike would prove nothing"
    assert relative_error(PagedRun(model, spec, 1).step({0: tokens})[0], expected) < TOLERANCE
    run = PagedRun(model, spec, 2)
    chunks = [run.step({0: tokens[:13]}), run.step({0: tokens[13:40], 1: other[:11]})]
    steps = [run.step({0: [token]})[0] for token in tokens[40:]]
    assert relative_error(torch.cat([chunks[0][0], chunks[1][0], *steps]), expected) < TOLERANCE
    both = [chunks[1][1], *(run.step({1: [token]})[0] for token in other[11:])]
    assert relative_error(torch.cat(both), reference_logits(reference, other)) < TOLERANCE


def test_the_spec_is_of_a_latent_cache(pair: tuple[Any, Any, Any]) -> None:
    _, model, spec = pair
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim) == (5, 1, 40, 32)
    assert spec.kv_bytes_per_token() == 3 * 40 * 4
    assert 20**-0.5 <= spec.scale < 1.25 * 20**-0.5
    run = PagedRun(model, spec, 1)
    assert run.pool.v.data_ptr() == run.pool.k.data_ptr() and run.pool.v.shape[-1] == 32
    assert run.pool.bytes == run.pool.num_pages * run.pool.page_size * spec.kv_bytes_per_token()


def test_a_token_does_not_see_its_batch(tmp_path: Path) -> None:
    reference = latent_reference(latent_config("glm, full query, groups, no interleaving"))
    model, spec = load_model(save(reference, tmp_path), device="cpu")
    sequences = {b: tokens_of(b, 9 + b) for b in range(6)}
    together = PagedRun(model, spec, 6).step(sequences)
    for b, tokens in sequences.items():
        alone = PagedRun(model, spec, 6).step({b: tokens})[0]
        assert (together[b] - alone).abs().max() <= 3e-6 * alone.abs().max()


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    reference = latent_reference(latent_config("glm", initializer_range=0.05))
    model, spec = load_model(save(reference, tmp_path), device="cpu", dtype="bfloat16")
    tokens = tokens_of(5)
    assert model.layers[1].mlp.weights.correction.dtype == torch.float32  # type: ignore[union-attr]
    found, expected = PagedRun(model, spec, 1).step({0: tokens})[0], reference_logits(reference, tokens)
    # The mean, not the largest: where two experts are nearly level, rounding chooses the other one.
    assert (found.float() - expected).abs().mean() < 0.03 * expected.abs().max()


def test_dummy_weights(tmp_path: Path) -> None:
    config = latent_config("v3, yarn").to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    model, spec = load_model(config, device="cpu", load_format="dummy", dtype="bfloat16")
    assert bool(PagedRun(model, spec, 1).step({0: [1, 2, 3]})[0].isfinite().all())


def refusal(tmp_path: Path, name: str, **fields: Any) -> str:
    config = latent_config(name).to_dict() | {"architectures": None} | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path, device="cpu", load_format="dummy")
    return str(caught.value)


@pytest.mark.parametrize("name, fields, words", [
    ("glm", {"attention_bias": True}, "attention_bias is not supported with latent attention"),
    ("glm", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("glm", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported for glm4_moe_lite"),
    ("glm", {"n_shared_experts": 0}, "n_shared_experts = 0"),
    ("glm", {"num_key_value_heads": 1}, "num_key_value_heads = 1 with latent attention"),
    ("glm", {"index_topk": 2048}, "index_topk"),
    ("glm", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 of n_routed_experts = 8"),
    ("v3, yarn", {"n_group": 3}, "n_routed_experts = 8 cannot be cut into n_group = 3"),
    ("v3, yarn", {"n_group": 8, "topk_group": 2}, "too few to choose num_experts_per_tok = 3"),
    ("v3, yarn", {"topk_method": "greedy"}, "topk_method = 'greedy' is not supported for deepseek_v3"),
    ("v3, yarn", {"layer_types": ["sliding_attention"] * 3}, "sliding"),
    ("v2, yarn", {"mlp_bias": True}, "mlp_bias"),
    ("v2, yarn", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported for deepseek_v2"),
    ("v2, yarn", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ("v2, yarn", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not supported for deepseek_v2"),
    ("v2, yarn", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
])  # fmt: skip
def test_unsupported_configs_are_refused_by_name(tmp_path: Path, name: str, fields: dict[str, Any], words: str) -> None:
    message = refusal(tmp_path, name, **fields)
    assert words in message and "config.json" in message


def test_latent_attention_of_another_family_is_refused(tmp_path: Path) -> None:
    config = small_config("qwen3", 4, 2, head_dim=16).to_dict() | {"architectures": None, "kv_lora_rank": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="kv_lora_rank \\(latent attention\\)"):
        load_model(tmp_path, device="cpu", load_format="dummy")
