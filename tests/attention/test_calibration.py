"""Calibration of label channels: sums over all samples, a file, and the refusal of a file of another model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from slipstream import calibrate
from slipstream.attention.calibration import Calibration, ModelIdentity

IDENTITY = ModelIdentity("toy", "ToyForCausalLM", 2, 2, 4, "abc")
PROMPTS = [[5, 9, 13, 2, 2, 7], [1] * 40, [(i * i) % 60 for i in range(30)]]


def observed(*parts, identity=IDENTITY):
    calibration = Calibration(identity)
    for q, k in parts:
        for layer in range(2):
            calibration.observe(layer, q[layer], k[layer])
        calibration.num_tokens += q.shape[1]
    return calibration


def draw(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, tokens, heads, 4, generator=generator) for heads in (6, 2))


def test_sums_are_of_absolute_products_over_all_samples():
    parts = [draw(5, 1), draw(3, 2)]
    q, k = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    expected = torch.zeros(2, 2, 4)
    for head in range(6):
        expected[:, head // 3] += (q[:, :, head] * k[:, :, head // 3]).abs().sum(1)
    torch.testing.assert_close(observed(*parts).sums, expected)


def test_channels_are_the_largest_and_the_first_of_equals():
    calibration = Calibration(IDENTITY)
    calibration.sums[:] = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert calibration.channels(2)[1, 1].tolist() == [1, 2] and calibration.channels(4)[0, 0].tolist() == [0, 1, 2, 3]
    calibration.sums[:] = 7.0
    assert calibration.channels(2).tolist() == [[[0, 1]] * 2] * 2 and calibration.channels(2).dtype == torch.int32


def test_a_file_comes_back(tmp_path):
    path, calibration = tmp_path / "c.safetensors", observed(draw(7, 3))
    calibration.save(path)
    loaded = Calibration.load(path, replace(IDENTITY, name="/elsewhere/toy"))
    torch.testing.assert_close(loaded.sums, calibration.sums)
    assert loaded.num_tokens == 7 and torch.equal(loaded.channels(2), calibration.channels(2))


@pytest.mark.parametrize("change", [
    {"architecture": "Other"}, {"num_layers": 3}, {"num_kv_heads": 1}, {"head_dim": 8}, {"weights": "def"},
])  # fmt: skip
def test_another_model_is_refused_by_name(tmp_path, change):
    path = tmp_path / "c.safetensors"
    observed(draw(7, 3)).save(path)
    with pytest.raises(ValueError) as caught:
        Calibration.load(path, replace(IDENTITY, name="mine", **change))
    assert "is the calibration of toy (ToyForCausalLM, 2 layers of 2 KV heads of 4, weights abc)" in str(caught.value)
    assert "not of mine (" in str(caught.value)


def test_what_is_no_calibration(tmp_path):
    with pytest.raises(ValueError, match="there is no calibration file .*: write one with `slipstream calibrate`"):
        Calibration.load(tmp_path / "nothing", IDENTITY)
    weights, text, old = (tmp_path / name for name in ("w", "t", "o"))
    save_file({"x": torch.ones(2)}, weights)
    text.write_text("hello")
    for path in (weights, text):
        with pytest.raises(ValueError, match="is no calibration file"):
            Calibration.load(path, IDENTITY)
    save_file({"importance": torch.ones(2, 2, 4)}, old, {"calibration": json.dumps({"schema": 0})})
    with pytest.raises(ValueError, match="has schema 0, this version reads 1"):
        Calibration.load(old, IDENTITY)


def test_a_model_is_calibrated_on_all_its_prompts(tiny, tmp_path):
    options = {"page_size": 8, "prefix_cache": False}
    found = calibrate(tiny(attention="window", **options, max_batch_tokens=16), PROMPTS)
    assert found.num_tokens == sum(map(len, PROMPTS)) and (found.sums > 0).all()
    apart = [calibrate(tiny(attention="oracle", **options), [prompt]) for prompt in PROMPTS]
    torch.testing.assert_close(found.sums, sum(one.sums for one in apart), rtol=1e-4, atol=1e-4)
    path = tmp_path / "c.safetensors"
    found.save(path)
    method = {"method": "double_sparsity", "channels": 8, "budget": 128, "calibration": str(path)}
    llm = tiny(attention=method, **options)
    assert torch.equal(llm.engine.backend.index.labels(1).channels, found.channels(8)[1])
    llm.generate(PROMPTS)
    assert torch.equal(llm.engine.backend.index.labels(1).channels, found.channels(8)[1])
    with pytest.raises(ValueError, match="is the calibration of Qwen3ForCausalLM .*, not of Qwen3ForCausalLM"):
        tiny(attention=method, seed=1, **options)
    tiny(attention=method, dtype="bfloat16", **options)  # the same weights, whatever their precision


def test_what_cannot_be_calibrated(tiny):
    with pytest.raises(ValueError, match="needs an attention method that selects"):
        calibrate(tiny(), PROMPTS)
    with pytest.raises(ValueError, match="no prompt token was computed"):
        calibrate(tiny(attention="window"), [])
