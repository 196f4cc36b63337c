"""The vocabulary: parameters that check themselves, small sums, and errors that name the nearest word."""

import dataclasses
import pickle

import pytest
import torch

from slipstream.types import Batch, ModelSpec, RequestMetrics, SamplingParams, nearest, options, reject_unknown


def test_sampling_params_are_values():
    params = SamplingParams(stop="end", stop_token_ids=[3, 4], seed=7)
    assert params.stop == ("end",) and params.stop_token_ids == (3, 4)
    assert params == SamplingParams(stop=["end"], stop_token_ids=(3, 4), seed=7)
    assert hash(params) == hash(dataclasses.replace(params)) and pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, n=2).n == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 3
    assert SamplingParams(stop=None, stop_token_ids=None, top_k=-1, top_p=1, min_p=1, logprobs=20, max_tokens=None)
    assert repr(SamplingParams(temperature=0, top_p=1)) == repr(SamplingParams(temperature=0.0, top_p=1.0))
    assert SamplingParams(3, 0.5) == SamplingParams(n=3, temperature=0.5)


def test_nearest():
    assert nearest("tempurature", ["top_k", "temperature"]) == "did you mean 'temperature'?"
    assert nearest("zzz", ["b", "a"]) == "valid: a, b"


def test_reject_unknown():
    reject_unknown("X", {"a": 1}, ["a", "b"])
    with pytest.raises(TypeError, match="X has no option 'modle'; did you mean 'model'"):
        reject_unknown("X", {"modle": 1}, ["model", "b"])


def test_options_decorator_keeps_positions_and_defaults():
    @options
    @dataclasses.dataclass(frozen=True)
    class Chosen:
        first: int
        second: int = 2

    assert Chosen(1) == Chosen(first=1, second=2) and Chosen(1, 5).second == 5
    with pytest.raises(TypeError, match="Chosen has no option 'secnd'; did you mean 'second'"):
        Chosen(1, secnd=3)
    with pytest.raises(TypeError, match="first"):
        Chosen()


def test_model_spec():
    spec = ModelSpec("x", 3, 64, 8, 2, 16, 100, 128, torch.bfloat16)
    assert spec.kv_bytes_per_token() == 2 * 3 * 2 * 16 * 2 and spec.scale == 0.25


def test_metrics():
    metrics = RequestMetrics(10.0)
    assert metrics.ttft_s is None and metrics.tpot_s is None
    metrics.first_token_s, metrics.finished_s, metrics.num_generated = 10.5, 12.5, 1
    assert metrics.ttft_s == 0.5 and metrics.tpot_s is None
    metrics.num_generated = 5
    assert metrics.tpot_s == 0.5


def test_batch_knows_its_longest_query():
    none = torch.zeros(0)
    batch = Batch(*[none] * 8, [9, 4, 7], [0, 2, 3, 8], [[1], [2], [3]], num_decodes=0)
    assert batch.max_query == 5 and batch.num_requests == 3 and not batch.is_decode


def test_a_latent_cache_has_one_row_a_token():
    shape = {"num_layers": 3, "hidden_size": 8, "num_heads": 20, "num_kv_heads": 1, "vocab_size": 9, "max_position": 9}
    plain = ModelSpec(architecture="a", head_dim=576, dtype=torch.bfloat16, **shape)
    latent = dataclasses.replace(plain, value_dim=512, softmax_scale=1 / 16)
    assert plain.kv_bytes_per_token() == 2 * latent.kv_bytes_per_token() == 2 * 3 * 1152
    assert plain.scale == 576**-0.5 and latent.scale == 1 / 16
