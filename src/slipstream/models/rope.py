"""Rotary position embeddings: the cosine and sine of every position, as transformers 5.17 computes them.

``rope`` is always the ``rope_parameters`` dict of a transformers v5 config (older ``rope_theta`` + ``rope_scaling``
files are normalised into it by the config class). Golden equality 8 rests on the same order of fp32 operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Rope = Mapping[str, Any]


def cos_sin_table(
    rope: Rope, head_dim: int, num_positions: int, max_position: int, device: torch.device | str
) -> torch.Tensor:
    """[num_positions, R] fp32 on ``device``: columns [:R/2] are cosines, [R/2:] sines, both times the attention factor.

    R is ``head_dim * partial_rotary_factor``. max_position: the config's ``max_position_embeddings``, which yarn needs
    when its ``factor`` is null. Computed on the host, so that every device gets the same bits.
    """
    frequencies, attention_factor = inverse_frequencies(rope, head_dim, max_position)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return (torch.cat((angles.cos(), angles.sin()), dim=1) * attention_factor).to(device)


def inverse_frequencies(rope: Rope, head_dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    """([R/2] fp32 radians per position, attention factor); ``ValueError`` for a scaling that is not supported."""
    check_rope(rope)
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if dim < 2 or dim % 2:
        raise ValueError(f"RoPE needs an even number of rotary dimensions, got {dim} of head_dim {head_dim}")
    return _SCALINGS[rope["rope_type"]](rope, dim, max_position)


def check_rope(rope: Rope) -> None:
    """``ValueError`` unless the scaling is one of those that :func:`inverse_frequencies` computes."""
    kind = rope.get("rope_type")
    if kind not in _SCALINGS:
        raise ValueError(f"RoPE scaling {kind!r} is not supported; supported: {', '.join(_SCALINGS)}")
    missing = [key for key in _REQUIRED[kind] if key not in rope]
    if missing:
        raise ValueError(f"RoPE scaling {kind!r} needs {', '.join(missing)} in the config's rope_parameters")


def longest_position(rope: Rope, max_position: int) -> int:
    """Positions that the frequencies were made for: yarn stretches its original length by its factor."""
    if rope.get("rope_type") != "yarn":
        return max_position
    stretched = int(rope["original_max_position_embeddings"] * (rope["factor"] or 1.0))
    return max(max_position, stretched)


def _default(rope: Rope, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    return 1.0 / _position_frequencies(rope, dim), 1.0


def _linear(rope: Rope, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    return 1.0 / _position_frequencies(rope, dim) / rope["factor"], 1.0


def _llama3(rope: Rope, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, a linear blend between."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    frequencies = 1.0 / _position_frequencies(rope, dim)
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, scaled), 1.0


def _yarn(rope: Rope, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate the slow dimensions, keep the fast ones, warm the logits a little."""
    original = rope["original_max_position_embeddings"]
    factor = rope["factor"] if rope["factor"] is not None else max_position / original
    low = _yarn_dimension(rope.get("beta_fast") or 32, dim, rope["rope_theta"], original)
    high = _yarn_dimension(rope.get("beta_slow") or 1, dim, rope["rope_theta"], original)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001  # as transformers: no division by zero when the ramp is a step
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    bases = _position_frequencies(rope, dim)
    return 1.0 / (factor * bases) * (1 - keep) + 1.0 / bases * keep, _yarn_attention_factor(rope, factor)


def _yarn_dimension(rotations: float, dim: int, theta: float, original: int) -> float:
    """The (fractional) dimension that turns ``rotations`` times over the original length."""
    return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_attention_factor(rope: Rope, factor: float) -> float:
    given, mscale, mscale_all = rope.get("attention_factor"), rope.get("mscale"), rope.get("mscale_all_dim")
    if given is not None:
        return float(given)
    if mscale and mscale_all:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all)
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, scale: float) -> float:
    """YaRN's warming of the logits for a context that is ``factor`` times as long."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _position_frequencies(rope: Rope, dim: int) -> torch.Tensor:
    """[dim / 2] fp32: theta ** (2i / dim), the inverse of the plain frequencies."""
    return rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


_SCALINGS: dict[str, Callable[[Rope, int, int], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
}
