"""Golden equality 8: logits = transformers, for every family, rope scaling, group size and path through the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_harness import PagedRun, random_reference, reference_logits, relative_error, save, small_config

from slipstream.models.weights import load_model

TOLERANCE = 1e-4

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"type": "linear", "factor": 2.0}

# name -> (model type, query heads, KV heads, other fields); the groups are 1, 4, 5 and 8
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "llama": ("llama", 8, 2, {}),
    "llama llama3, group 1": ("llama", 4, 4, {"rope_scaling": LLAMA3}),
    "llama linear, group 8, tied": ("llama", 8, 1, {"rope_scaling": LINEAR, "tie_word_embeddings": True}),
    "llama yarn, all biases": ("llama", 8, 2, {"rope_scaling": YARN, "attention_bias": True, "mlp_bias": True}),
    "llama head_dim, group 5": ("llama", 5, 1, {"hidden_size": 60, "head_dim": 16}),
    "qwen2": ("qwen2", 8, 2, {}),
    "qwen2 tied, group 1": ("qwen2", 4, 4, {"tie_word_embeddings": True}),
    "qwen2 yarn, group 5": ("qwen2", 10, 2, {"hidden_size": 80, "rope_scaling": YARN}),
    "qwen3 group 8": ("qwen3", 8, 1, {"head_dim": 16}),
    "qwen3 tied, group 5": ("qwen3", 5, 1, {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3 yarn, bias, group 1": ("qwen3", 4, 4, {"head_dim": 32, "rope_scaling": YARN, "attention_bias": True}),
}
LENGTH = 70


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Any]:
    """(transformers' model, ours, its spec), ours loaded from what transformers saved; every second one sharded."""
    model_type, num_heads, num_kv_heads, fields = CASES[request.param]
    reference = random_reference(small_config(model_type, num_heads, num_kv_heads, **fields))
    sharded = list(CASES).index(request.param) % 2
    directory = save(reference, tmp_path, max_shard_size="100KB" if sharded else "1GB")
    assert (directory / "model.safetensors.index.json").exists() == bool(sharded)
    return reference, *load_model(directory, device="cpu")


def tokens_of(seed: int, length: int = LENGTH) -> list[int]:
    return torch.randint(101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_prefill_and_decode(pair: tuple[Any, Any, Any]) -> None:
    """One shot, three chunks, and token by token after a short prompt: the same logits at every position."""
    reference, model, spec = pair
    tokens = tokens_of(1)
    expected = reference_logits(reference, tokens)

    whole = PagedRun(model, spec, 1).step({0: tokens})[0]
    assert relative_error(whole, expected) < TOLERANCE

    run = PagedRun(model, spec, 1)
    chunks = [run.step({0: tokens[a:b]})[0] for a, b in ((0, 13), (13, 32), (32, LENGTH))]
    assert relative_error(torch.cat(chunks), expected) < TOLERANCE

    run = PagedRun(model, spec, 1, page_size=8)
    steps = [run.step({0: tokens[:50]})[0], *(run.step({0: [token]})[0] for token in tokens[50:])]
    assert relative_error(torch.cat(steps), expected) < TOLERANCE


def test_ragged_batch(pair: tuple[Any, Any, Any]) -> None:
    """Three requests of different lengths: prefilled together, decoded together, then a mixed step."""
    reference, model, spec = pair
    sequences = [tokens_of(2, 41), tokens_of(3, 9), tokens_of(4, 26)]
    expected = [reference_logits(reference, tokens) for tokens in sequences]
    run = PagedRun(model, spec, 3)
    ends = [30, 1, 17]
    found = [[logits] for logits in run.step({b: sequences[b][: ends[b]] for b in range(3)})]
    for _ in range(4):
        for b, logits in enumerate(run.step({b: [sequences[b][ends[b]]] for b in range(3)})):
            found[b].append(logits)
        ends = [end + 1 for end in ends]
    for b, logits in enumerate(run.step({b: sequences[b][ends[b] :] for b in range(3)})):
        found[b].append(logits)
    for b in range(3):
        assert relative_error(torch.cat(found[b]), expected[b]) < TOLERANCE


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    reference = random_reference(small_config("qwen3", 8, 2, head_dim=16, initializer_range=0.05))
    directory = save(reference, tmp_path)
    tokens = tokens_of(5)
    expected = reference_logits(reference, tokens)
    model, spec = load_model(directory, device="cpu", dtype="bfloat16")
    assert model.dtype == spec.dtype == torch.bfloat16
    logits = PagedRun(model, spec, 1).step({0: tokens})[0]
    assert logits.dtype == torch.bfloat16
    theirs = reference_logits(reference.to(torch.bfloat16), tokens)
    assert relative_error(logits, expected) < 2 * relative_error(theirs, expected) < 0.1


def test_bfloat16_checkpoint_in_float32(tmp_path: Path) -> None:
    """On a CPU "auto" is float32 whatever is stored; values are those of the checkpoint."""
    reference = random_reference(small_config("llama", 4, 2)).to(torch.bfloat16)
    model, spec = load_model(save(reference, tmp_path), device="cpu")
    assert spec.dtype == torch.float32
    tokens = tokens_of(6)
    logits = PagedRun(model, spec, 1).step({0: tokens})[0]
    # Loaded anew: .float() would leave the rotary frequencies rounded to bfloat16.
    theirs = type(reference).from_pretrained(tmp_path, dtype=torch.float32)
    assert relative_error(logits, reference_logits(theirs, tokens)) < TOLERANCE
