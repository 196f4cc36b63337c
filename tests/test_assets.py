"""The models that ship with the package are ordinary Hugging Face directories: plain transformers reads them."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slipstream import LLM
from slipstream.build import ASSETS, embedded_models

MEGABYTE = 10**6
QWEN, LATENT = "Qwen3ForCausalLM", "Glm4MoeLiteForCausalLM"
# transformers' class, parameters
MODELS = {
    "slipstream-target": (QWEN, 12e6, 16e6),
    "slipstream-draft": (QWEN, 1.5e6, 3e6),
    "slipstream-mla": (LATENT, 6e6, 8e6),
}


@pytest.fixture(params=sorted(embedded_models()))
def name(request):
    return request.param


def test_the_models_are_there():
    assert set(embedded_models()) == set(MODELS)


def test_plain_transformers_loads_it(name):
    path = embedded_models()[name]
    model = AutoModelForCausalLM.from_pretrained(path)
    architecture, low, high = MODELS[name]
    assert type(model).__name__ == architecture and model.dtype == torch.bfloat16
    assert low < sum(parameter.numel() for parameter in model.parameters()) < high
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert model.get_input_embeddings().weight.data_ptr() == model.lm_head.weight.data_ptr()
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = AutoConfig.from_pretrained(path)
    assert len(tokenizer) <= config.vocab_size and config.max_position_embeddings >= 65536
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1+2"}], add_generation_prompt=True)
    tokens = model.generate(torch.tensor([prompt["input_ids"]]), max_new_tokens=3)[0]
    assert tokenizer.decode(tokens[len(prompt["input_ids"]) :]).startswith("<think>")


def test_files_are_small(name):
    shards = sorted(embedded_models()[name].glob("*.safetensors"))
    assert shards and all(shard.stat().st_size < 16 * MEGABYTE for shard in shards)
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 50 * MEGABYTE
    assert not [file for file in ASSETS.rglob("*") if file.suffix in (".bin", ".pt", ".pth")]


def test_tokenizer(name):
    path = embedded_models()[name]
    tokenizer = AutoTokenizer.from_pretrained(path)
    digits = tokenizer.encode("9041 + 7")
    assert [tokenizer.decode([i]).strip() for i in digits if tokenizer.decode([i]).strip()] == [*"9041", "+", "7"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == end
    for file in ("config.json", "generation_config.json"):
        assert json.loads((path / file).read_text())["eos_token_id"] == end
    assert LLM(name, device="cpu", max_model_len=64, kv_memory="4MiB").spec.eos_token_ids == (end,)
    text = "L12 : add A:B,C|07;12>A=19\n<think>\nwhat é 漢 😀 is [A]?\n</think>\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_all_speak_the_same_tokens():
    assert len({(path / "tokenizer.json").read_bytes() for path in embedded_models().values()}) == 1


def test_labels_are_calibrated(name):
    """Of this model: another's would be refused. Half of a latent cache's row, a latent and its rotary key."""
    llm = LLM(name, attention="two_level", device="cpu", max_model_len=512, kv_memory="4MiB")
    own = llm.engine.backend.index.labels(0).channels
    assert llm.engine.backend._online is None and own.shape == (llm.spec.num_kv_heads, own.shape[1])
    assert own.shape[1] == (32 if llm.spec.value_dim is None else llm.spec.head_dim // 4 * 2)


def test_chat_template(name):
    tokenizer = AutoTokenizer.from_pretrained(embedded_models()[name])
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    assert shown == turns + "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == turns
    ids = tokenizer.encode(shown, add_special_tokens=False)
    assert tokenizer.decode(ids) == shown and ids.count(tokenizer.eos_token_id) == 3
