"""What a user may get wrong, and the words that help. Nothing of a refused request may stay in the engine."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream import LLM, SamplingParams, calibrate
from slipstream.build import embedded_models
from slipstream.engine.request import Request

NAN, INFINITY = float("nan"), float("inf")


def refusal(call, *args, kind=ValueError, **kwargs):
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def endless(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


# prompts


@pytest.mark.parametrize("prompt, words", [
    ([[]], "the prompt is empty"),
    ({"prompt_token_ids": []}, "the prompt is empty"),
    ([3, 64], "token id 64 is outside the vocabulary of 64"),
    ([-1], "token id -1 is outside the vocabulary"),
    ([[1, 2], [64]], "prompt 1: token id 64 is outside"),
    ([[1, 2], 7], "prompt 1: a prompt of token ids must be a sequence of integers"),
    ([[1, 2], [1.5]], "prompt 1: a prompt of token ids must be a sequence of integers"),
    ([[1, 2], "text"], "prompt 1: Qwen3ForCausalLM has no tokenizer: give prompts as token ids"),
    ({"promt": "text"}, "a prompt dict needs 'prompt' (text) or 'prompt_token_ids'"),
    ({"prompt": 5}, "a prompt dict needs 'prompt' (text) or 'prompt_token_ids'"),
    ([1] * 100, "the prompt has 100 tokens, but at most 99 fit max_model_len = 100"),
    ([1] * 65, "the prompt has 65 tokens, but the whole KV cache holds 64: raise kv_memory"),
    ([1] * 60, "need the KV of 75 tokens, but the whole KV cache holds 64: lower max_tokens or raise kv_memory"),
])  # fmt: skip
def test_prompts(tiny, prompt, words):
    llm = tiny(max_model_len=100, page_size=16, kv_memory=5 * 16 * 256)
    assert words in refusal(llm.generate, prompt)
    if not words.startswith("prompt 1"):
        assert words in refusal(llm.stream, prompt[0] if prompt == [[]] else prompt)  # at once, not in the loop
    assert llm.stats()["finished_requests"] == llm.stats()["steps"] == 0
    assert llm.generate([1] * 49)[0].outputs[0].token_ids  # what fits is served


def test_empty_text(target):
    assert "the prompt is empty" in refusal(target.generate, "")
    assert "prompt 1: the prompt is empty" in refusal(target.generate, ["a", ""])
    assert "at least one prompt token and one continuation" in refusal(target.score, [], [1])
    assert "at least one prompt token and one continuation" in refusal(target.score, [1], [])
    assert "outside the vocabulary" in refusal(target.score, [1], [-5])


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"content": "hello"}], "hello", [["a"]]])
def test_messages(target, messages):
    assert "the chat template cannot take these messages" in refusal(target.chat, messages)


# sampling


@pytest.mark.parametrize("given, words", [
    ({"temperature": -0.1}, "temperature must be >= 0"),
    ({"temperature": NAN}, "temperature must be a finite number, got nan"),
    ({"temperature": INFINITY}, "temperature must be a finite number, got inf"),
    ({"temperature": "hot"}, "temperature must be a finite number, got 'hot'"),
    ({"top_p": 0}, "top_p must be in (0, 1], got 0"),
    ({"top_p": 1.1}, "top_p must be in (0, 1]"),
    ({"top_p": NAN}, "top_p must be a finite number, got nan"),
    ({"top_k": -2}, "top_k must be >= 1, or 0 / -1 for all, got -2"),
    ({"top_k": 1.0}, "top_k must be an integer, got 1.0"),
    ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1"),
    ({"min_p": NAN}, "min_p must be a finite number, got nan"),
    ({"n": 0}, "n must be at least 1, got 0"),
    ({"n": -1}, "n must be at least 1, got -1"),
    ({"n": True}, "n must be an integer, got True"),
    ({"n": None}, "n must be at least 1, got None"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ({"max_tokens": -3}, "max_tokens must be at least 1, got -3"),
    ({"stop": ""}, "stop strings must be non-empty text"),
    ({"stop": ["a", ""]}, "stop strings must be non-empty text"),
    ({"stop": [1]}, "stop strings must be non-empty text"),
    ({"stop": 5}, "stop must be a list, got 5"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a list, got 5"),
    ({"stop_token_ids": [-1]}, "stop_token_ids must be non-negative integers"),
    ({"seed": -1}, "seed must be in [0, 2**63), got -1"),
    ({"seed": 2**63}, "seed must be in [0, 2**63)"),
    ({"logprobs": 21}, "logprobs must be in 0..20, got 21"),
    ({"prompt_logprobs": -1}, "prompt_logprobs must be in 0..20, got -1"),
])  # fmt: skip
def test_sampling_values(given, words):
    assert words in refusal(SamplingParams, **given)


def test_more_chains_than_seats(tiny):
    llm = tiny(max_num_seqs=3)
    assert "n = 4 chains exceed max_num_seqs = 3" in refusal(llm.generate, [1, 2], SamplingParams(n=4))
    assert len(llm.generate([1, 2], SamplingParams(n=3))[0].outputs) == 3


def test_params_of_another_kind(tiny):
    words = "params must be SamplingParams, got dict"
    assert words in refusal(tiny().generate, [1, 2], [{"temperature": 0}], kind=TypeError)
    assert words in refusal(tiny().stream, [1, 2], {"temperature": 0}, kind=TypeError)


# models


@pytest.mark.parametrize("model, words", [
    ("slipstream-taget", "no embedded model and no directory 'slipstream-taget'; did you mean 'slipstream-target'?"),
    ("slipsteam-draft", "did you mean 'slipstream-draft'?"),
    ("zzz", f"no embedded model and no directory 'zzz'; valid: {', '.join(embedded_models())}"),
    ("./no/such/directory", "there is no model directory no/such/directory"),
])  # fmt: skip
def test_model_names(model, words):
    assert words in refusal(LLM, model)


@pytest.fixture
def copy(tmp_path):
    """The embedded target's directory, to be spoilt."""
    for file in embedded_models()["slipstream-target"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_missing_shard(copy):
    (copy / "model-00002-of-00002.safetensors").unlink()
    message = refusal(LLM, str(copy), device="cpu")
    assert "model-00002-of-00002.safetensors is missing (it holds tensor model." in message


def test_wrong_shape(copy):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    file = copy / index["weight_map"]["model.norm.weight"]
    save_file(load_file(file) | {"model.norm.weight": torch.ones(383)}, file)
    message = refusal(LLM, str(copy), device="cpu")
    assert f"{file}: tensor model.norm.weight has shape (383,), config.json asks for (384,)" in message


def test_unsupported_architecture(copy):
    config = json.loads((copy / "config.json").read_text())
    other = config | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (copy / "config.json").write_text(json.dumps(other))
    message = refusal(LLM, str(copy), device="cpu")
    assert "architecture GPT2LMHeadModel is not supported" in message
    assert "supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in message


def test_cut_off_weights(copy):
    file = copy / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    assert f"{file} is not a readable safetensors file (cut off" in refusal(LLM, str(copy), device="cpu")


# options


@pytest.mark.parametrize("given, words", [
    ({"kv_memory": "lots"}, "cannot read 'lots' as a size: write bytes as an integer, or e.g. '16GiB'"),
    ({"kv_memory": "16XB"}, "cannot read '16XB' as a size"),
    ({"kv_memory": 0}, "a size must be positive, got 0"),
    ({"kv_memory": "1KiB"}, "the KV cache needs at least 2 pages"),
    ({"device": "tpu"}, "use 'cpu', 'cuda' or 'cuda:N'"),
    ({"device": "meta"}, "device 'meta' is not supported; use 'cpu', 'cuda' or 'cuda:N'"),
    ({"device": "cuda:99"}, "device 'cuda:99' is not there: torch sees"),
    ({"kernels": "triton"}, "kernels='triton' needs an NVIDIA GPU; this engine runs on cpu"),
    ({"kernels": "flashinfer"}, "kernels='flashinfer' needs an NVIDIA GPU"),
    ({"kernels": "tritn"}, "kernels 'tritn' is unknown; did you mean 'triton'?"),
    ({"attention": "ful"}, "attention method 'ful' is unknown; did you mean 'full'?"),
    ({"attention": 3}, "attention must be a name, a dict with 'method', or a config object, got 3"),
    ({"attention": {"budget": 3}}, "attention must be a name, a dict with 'method'"),
    ({"dtype": "float16"}, "dtype 'float16' is not known; did you mean 'bfloat16'?"),
    ({"load_format": "dumy"}, "load_format 'dumy' is not known; did you mean 'dummy'?"),
    ({"max_model_len": 0}, "max_model_len must be a positive integer, got 0"),
    ({"max_model_len": 10**6}, "max_model_len must be in 1..65536"),
    ({"max_num_seqs": True}, "max_num_seqs must be a positive integer, got True"),
    ({"page_size": 1.5}, "page_size must be a positive integer, got 1.5"),
])  # fmt: skip
def test_engine_options(given, words):
    assert words in refusal(LLM, "slipstream-target", **({"device": "cpu"} | given))


def test_options_of_an_attention_method():
    message = refusal(LLM, attention={"method": "full", "budget": 8}, kind=TypeError)
    assert "attention method 'full' has no option 'budget': it has none" in message
    message = refusal(LLM, attention={"method": "two_level", "bugdet": 8}, kind=TypeError)
    assert "attention method 'two_level' has no option 'bugdet'; did you mean 'budget'?" in message
    message = refusal(LLM, attention={"method": "window", "channels": 8}, kind=TypeError)
    assert "attention method 'window' has no option 'channels'; valid: budget, dense_layers, min_context" in message


@pytest.mark.parametrize("attention, words", [
    ("two_levle", "attention method 'two_levle' is unknown; did you mean 'two_level'?"),
    ({"method": "oracle", "budget": 68}, "budget = 68 cannot hold sink + recent + the newest token = 4 + 64 + 1"),
    ({"method": "window", "budget": 0}, "budget must be an integer of at least 1, got 0"),
    ({"method": "tova", "budget": -1}, "budget must be an integer of at least 1, got -1"),
    ({"method": "quest", "budget": "512"}, "budget must be an integer of at least 1, got '512'"),
    ({"method": "quest", "block_score": "minmx"}, "block_score 'minmx' is unknown; did you mean 'minmax'?"),
    ({"method": "quest", "block": 48}, "blocks of 48 tokens do not divide a page of 64: set page_size to a multiple"),
    ({"method": "two_level", "block": 128}, "blocks of 128 tokens do not divide a page of 64"),
    ({"method": "two_level", "blocks": 4}, "4 blocks of 64 tokens hold fewer than budget = 1024: raise blocks"),
    ({"method": "two_level", "channels": 66}, "channels = 66 exceeds the head dimension 64: lower it"),
    ({"method": "double_sparsity", "channels": 7}, "channels must be even (two share a byte), got 7"),
    ({"method": "double_sparsity", "calibration": "none.safetensors"}, "there is no calibration file none.safetensors"),
    ({"method": "oracle", "dense_layers": 9}, "dense_layers = 9 of a model of 8 layers: lower it"),
    ({"method": "oracle", "min_context": -1}, "min_context must be an integer of at least 0, got -1"),
])  # fmt: skip
def test_values_of_an_attention_method(attention, words):
    options = {"device": "cpu", "max_model_len": 128, "kv_memory": "8MiB"}
    assert words in refusal(LLM, "slipstream-target", attention=attention, **options)


def test_a_calibration_of_another_model(tmp_path):
    options = {"device": "cpu", "max_model_len": 128, "kv_memory": "8MiB"}
    calibrate(LLM("slipstream-draft", attention="window", **options), [[1, 2, 3]]).save(tmp_path / "draft")
    attention = {"method": "two_level", "calibration": str(tmp_path / "draft")}
    message = refusal(LLM, "slipstream-target", attention=attention, **options)
    assert "is the calibration of slipstream-draft (Qwen3ForCausalLM, 4 layers" in message
    assert "not of slipstream-target (Qwen3ForCausalLM, 8 layers" in message


# a cache that is too small


def small_cache(tiny):
    """Eleven pages of four tokens: one chain of 40 tokens fits, two do not."""
    return tiny(page_size=4, kv_memory=12 * 4 * 256, prefix_cache=False)


def test_two_requests_take_turns(tiny):
    llm = small_cache(tiny)
    prompts = [[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]]
    alone = [llm.generate(prompt, endless(34))[0].outputs[0].token_ids for prompt in prompts]
    assert llm.stats()["preemptions"] == 0
    together = [output.outputs[0] for output in llm.generate(prompts, endless(34))]
    assert llm.stats()["preemptions"] > 0
    assert [chain.token_ids for chain in together] == alone
    assert [chain.finish_reason for chain in together] == ["length", "length"]


def test_a_request_cancelled_while_preempted(tiny):
    llm = small_cache(tiny)
    expected = llm.generate([1, 2, 3, 4, 5, 6], endless(34))[0].outputs[0].token_ids
    engine = llm.engine
    first, second = Request([1, 2, 3, 4, 5, 6], endless(34)), Request([9, 8, 7, 6, 5, 4], endless(34))
    engine.add(first)
    engine.add(second)
    while not engine.stats()["preemptions"]:
        engine.step()
    stats = engine.stats()
    assert (stats["running"], stats["waiting"]) == (1, 1)
    written = list(second.completions[0].token_ids)
    assert len(written) > 5 and engine.cancel(second.request_id) and not engine.cancel(second.request_id)
    events = []
    while engine.has_work():
        events += engine.step()
        engine.table.check_integrity()
    assert second.completions[0].finish_reason == "abort" and second.completions[0].token_ids == written
    assert first.completions[0].token_ids == expected
    assert [event.request for event in events if event.finished] == [second, first]
