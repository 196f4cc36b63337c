"""The composition root: options, names and devices become parts that fit together; mistakes are found before work."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from slipstream import LLM, Full, SamplingParams, build
from slipstream.attention.dense import DenseBackend
from slipstream.build import Options
from slipstream.types import ModelSpec


def test_every_option_says_what_it_is_and_has_a_default():
    for option in fields(Options):
        assert option.metadata["help"].strip() and getattr(Options(), option.name) == option.default
    with pytest.raises(TypeError, match="Options has no option 'kv_memry'; did you mean 'kv_memory'"):
        Options(kv_memry="1GiB")


def test_attention_in_three_spellings():
    assert build.parse_attention("full") == build.parse_attention({"method": "full"}) == build.parse_attention(Full())


def test_devices():
    assert build.choose_device("cpu") == build.choose_device(torch.device("cpu")) == torch.device("cpu")
    assert build.choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_models_by_name_path_or_config(tmp_path, monkeypatch):
    assert build.find_model("slipstream-draft") == build.embedded_models()["slipstream-draft"]
    for other in (str(tmp_path), tmp_path, "Qwen/Qwen3-8B", {"model_type": "qwen3"}):
        assert build.find_model(other) is other
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert build.find_model("mine") == "mine"


@pytest.mark.parametrize("given", [
    {"kernels": "triton"}, {"kv_memory": "lots"}, {"attention": "ful"}, {"device": "tpu"}, {"page_size": 0},
])  # fmt: skip
def test_mistakes_are_found_before_weights_are_read(given, monkeypatch):
    monkeypatch.setattr(build, "load_model", lambda *args, **more: pytest.fail("weights were read"))
    with pytest.raises(ValueError):
        LLM("slipstream-target", **({"device": "cpu"} | given))


def test_parts_fit_together(tiny):
    options = {"page_size": 8, "max_num_seqs": 5, "max_batch_tokens": 33, "max_model_len": 77, "seed": 4}
    llm = tiny(**options, kv_memory="128KiB", dtype="bfloat16", prefix_cache=False, cuda_graphs=False)
    assert llm.spec.max_position == 77 and llm.spec.dtype == llm.pool.k.dtype == llm.model.dtype == torch.bfloat16
    assert llm.memory.page_size == llm.pool.page_size == 8 and llm.pool.bytes == llm.memory.bytes == 128 << 10
    config = llm.engine.config
    assert (config.max_num_seqs, config.max_batch_tokens, config.seed, config.prefix_cache) == (5, 33, 4, False)
    assert llm.engine.limits.max_model_len == 77 and not llm.engine.overlap and not config.cuda_graphs
    assert llm.device == torch.device("cpu") and not llm.engine.table.reuse
    assert tiny(overlap=True).engine.overlap


def test_the_cpu_has_one_backend():
    for kernels in ("auto", "reference"):
        chosen = Options(device="cpu", kernels=kernels, max_model_len=64, kv_memory="1MiB")
        parts = build.build("slipstream-draft", chosen)
        assert isinstance(parts.backend, DenseBackend) and parts.codec is not None and parts.name == "slipstream-draft"


def test_the_seed_decides_requests_that_bring_none():
    params = SamplingParams(temperature=5.0, max_tokens=8, ignore_eos=True)
    options = {"device": "cpu", "max_model_len": 64, "kv_memory": "1MiB"}
    first, same, other = (
        [o.outputs[0].token_ids for o in LLM("slipstream-draft", seed=seed, **options).generate([[5, 6]] * 2, params)]
        for seed in (8, 8, 9)
    )
    assert first == same != other and first[0] != first[1]


def test_a_step_keeps_memory_for_itself():
    small, large = (ModelSpec("x", 2, size, 8, 2, 16, 1000, 128, torch.bfloat16) for size in (64, 4096))
    assert 512 << 20 < build.activation_bytes(small, 512) < build.activation_bytes(large, 512)
    assert build.activation_bytes(large, 512) < build.activation_bytes(large, 4096) < 2 << 30
