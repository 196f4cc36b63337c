"""The RoPE table against transformers' own functions: the same bits, for every scaling that is supported."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slipstream.models.rope import cos_sin_table, inverse_frequencies, longest_position

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 64},
    "llama3 without its original length": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, older spelling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, no truncation": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False,
    },
    "yarn, betas and factor given": {
        "rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 48,
        "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.25,
    },
    "yarn, mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64,
        "mscale": 1.0, "mscale_all_dim": 0.7,
    },
    "yarn, factor from the lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
}  # fmt: skip


def config_of(scaling: dict, **fields) -> LlamaConfig:
    heads = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256}
    return LlamaConfig(**(heads | fields), rope_theta=10000.0, rope_scaling=dict(scaling))


@pytest.mark.parametrize("name", SCALINGS)
def test_table_has_the_bits_of_transformers(name: str) -> None:
    config = config_of(SCALINGS[name])
    table = cos_sin_table(config.rope_parameters, config.head_dim, 300, config.max_position_embeddings, "cpu")
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(300)[None])
    assert table.dtype == torch.float32 and table.shape == (300, 32)
    assert torch.equal(table[:, :16], cos[0, :, :16]) and torch.equal(table[:, 16:], sin[0, :, :16])


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "default"])
def test_scalings_differ_from_plain_rope(name: str) -> None:
    """Otherwise the equality above would say nothing about the scaling."""
    rope = config_of(SCALINGS[name]).rope_parameters
    plain, _ = inverse_frequencies(rope | {"rope_type": "default"}, 32, 256)
    scaled, _ = inverse_frequencies(rope, 32, 256)
    assert not torch.allclose(plain, scaled, rtol=1e-2)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_partial_rotation(kind: str) -> None:
    config = config_of(SCALINGS[kind], partial_rotary_factor=0.5)
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config)
    found, found_factor = inverse_frequencies(config.rope_parameters, config.head_dim, 256)
    assert torch.equal(found, expected) and found.shape == (8,) and found_factor == factor


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "axial", "nonsense", None])
def test_other_scalings_are_refused_by_name(kind: str | None) -> None:
    with pytest.raises(ValueError, match=f"{kind!r} is not supported; supported: default, linear, llama3, yarn"):
        inverse_frequencies({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}, 32, 256)


def test_missing_fields_are_named() -> None:
    with pytest.raises(ValueError, match="'llama3' needs low_freq_factor, high_freq_factor, original_max"):
        inverse_frequencies({"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}, 32, 256)


@pytest.mark.parametrize("head_dim, partial", [(32, 0.1), (32, 0.0), (1, 1.0)])
def test_odd_rotary_dimensions_are_refused(head_dim: int, partial: float) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}
    with pytest.raises(ValueError, match="even number of rotary dimensions"):
        inverse_frequencies(rope, head_dim, 256)


def test_only_yarn_stretches_the_longest_position() -> None:
    assert longest_position(SCALINGS["yarn"], 64) == 256
    assert longest_position(SCALINGS["yarn"], 512) == 512
    assert longest_position(SCALINGS["linear"], 64) == 64
