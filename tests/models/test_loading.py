"""Loading: what is read, what is described, and every refusal with the words that a user needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from decoder_harness import PagedRun, random_reference, reference_logits, relative_error, save, small_config
from safetensors.torch import load_file, save_file

from slipstream.models import checkpoint
from slipstream.models.config import normalise
from slipstream.models.weights import load_model

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(random_reference(small_config("qwen3", 4, 2, head_dim=16)), tmp_path)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces tensors of the single file (``__`` stands for a dot); None removes one."""
    stored = load_file(directory / SINGLE) | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in stored.items() if value is not None}, directory / SINGLE)


def refusal(path_or_id: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(path_or_id, **({"device": "cpu"} | options))
    return str(caught.value)


def all_weights(model: Any) -> dict[str, torch.Tensor]:
    tensors = {"embedding": model.embedding, "head": model.head.dense_weight(), "norm": model.next_norms[-1]}
    for layer in model.layers:
        for name in ("qkv", "output", "gate_up", "down"):
            tensors[f"{layer.index}.{name}"] = getattr(layer, name).dense_weight()
        for name in ("input_norm", "q_norm", "k_norm", "mlp_norm"):
            tensors[f"{layer.index}.{name}"] = getattr(layer, name)
    return tensors


def test_spec(directory: Path) -> None:
    edit_json(directory / "config.json", eos_token_id=7)
    (directory / "generation_config.json").unlink(missing_ok=True)
    _, spec = load_model(directory, device="cpu", max_model_len=99)
    assert spec.architecture == "Qwen3ForCausalLM"
    shape = (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size)
    assert shape == (3, 64, 4, 2, 16, 101)
    assert (spec.max_position, spec.dtype, spec.eos_token_ids) == (99, torch.float32, (7,))
    assert load_model(directory, device="cpu")[1].max_position == 128


def test_generation_config_has_the_last_word_on_end_tokens(directory: Path) -> None:
    edit_json(directory / "config.json", eos_token_id=7)
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert load_model(directory, device="cpu")[1].eos_token_ids == (3, 5)
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    assert load_model(directory, device="cpu")[1].eos_token_ids == (7,)


def test_tied_embeddings_share_memory(tmp_path: Path) -> None:
    """In bfloat16; a float32 head on a CPU has a layout of its own."""
    directory = save(random_reference(small_config("llama", 4, 2, tie_word_embeddings=True)), tmp_path)
    model, _ = load_model(directory, device="cpu", dtype="bfloat16")
    assert model.head.weight is model.embedding


def test_stored_head_of_a_tied_config(tmp_path: Path) -> None:
    """As in transformers: an equal copy is tied, a different one is kept."""
    reference = random_reference(small_config("llama", 4, 2, tie_word_embeddings=True))
    save(reference, tmp_path)
    embedding = reference.get_input_embeddings().weight.detach()
    edit_tensors(tmp_path, lm_head__weight=embedding.clone())
    model, _ = load_model(tmp_path, device="cpu", dtype="bfloat16")
    assert model.head.weight is model.embedding
    edit_tensors(tmp_path, lm_head__weight=embedding.flip(0).contiguous())
    model, spec = load_model(tmp_path, device="cpu")
    again = type(reference).from_pretrained(tmp_path)
    tokens = list(range(20))
    assert relative_error(PagedRun(model, spec, 1).step({0: tokens})[0], reference_logits(again, tokens)) < 1e-4


# dummy weights


def test_dummy_is_decided_by_its_seed() -> None:
    config = small_config("qwen3", 4, 2, head_dim=16, initializer_range=0.02)
    first, same, other = (
        all_weights(load_model(config, device="cpu", load_format="dummy", seed=seed)[0]) for seed in (3, 3, 4)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, same[name])
        if name.endswith("norm"):
            assert bool((tensor == 1).all())
        else:
            assert not torch.equal(tensor, other[name])
            assert abs(float(tensor.std()) - 0.02) < 0.002 and abs(float(tensor.mean())) < 0.002


def test_dummy_of_a_dict_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a file was asked for")

    fields = small_config("qwen2", 8, 2).to_dict() | {"eos_token_id": [1, 2]}
    normalise(fields)  # transformers imports the family's module on first use
    with monkeypatch.context() as patch:
        for name in ("open", "read_text", "is_file", "is_dir"):
            patch.setattr(Path, name, fail)
        for name in ("safe_open", "snapshot_download"):
            patch.setattr(checkpoint, name, fail)
        patch.setattr("builtins.open", fail)
        model, spec = load_model(fields, device="cpu", load_format="dummy", dtype="bfloat16", max_model_len=64)
    assert spec.architecture == "Qwen2ForCausalLM" and spec.eos_token_ids == (1, 2) and spec.head_dim == 8
    assert model.dtype == torch.bfloat16 and model.layers[0].qkv.bias is not None and len(model.layers) == 3


def test_dummy_of_a_directory_needs_no_weights(directory: Path) -> None:
    (directory / SINGLE).unlink()
    _, spec = load_model(directory, device="cpu", load_format="dummy")
    assert spec.num_layers == 3


def test_dummy_runs(tmp_path: Path) -> None:
    model, spec = load_model(small_config("llama", 4, 1), device="cpu", load_format="dummy")
    assert bool(PagedRun(model, spec, 1).step({0: [1, 2, 3]})[0].isfinite().all())


def test_a_config_has_no_weights_of_its_own() -> None:
    assert "load_format='dummy'" in refusal(small_config("llama", 4, 2))


# options


def test_unknown_options_name_the_nearest(directory: Path) -> None:
    assert "did you mean 'dummy'?" in refusal(directory, load_format="dumy")
    assert "did you mean 'bfloat16'?" in refusal(directory, dtype="float16")
    assert "'float64' is not known" in refusal(directory, dtype=torch.float64)


def test_max_model_len(directory: Path) -> None:
    assert "must be in 1..128" in refusal(directory, max_model_len=129)
    assert "got 0" in refusal(directory, max_model_len=0)
    assert "got '64'" in refusal(directory, max_model_len="64")
    edit_json(directory / "config.json", rope_parameters=YARN | {"rope_theta": 1e4}, max_position_embeddings=32)
    assert load_model(directory, device="cpu")[1].max_position == 32
    assert load_model(directory, device="cpu", max_model_len=128)[1].max_position == 128
    assert "1..128" in refusal(directory, max_model_len=129)


# directories and files


def test_unknown_directory(tmp_path: Path) -> None:
    assert "there is no model directory" in refusal(tmp_path / "nowhere")
    assert "there is no model directory" in refusal(str(tmp_path / "nowhere"))
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "is a file" in refusal(tmp_path / "file")


def test_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("Qwen/Qwen3-not-there")
    assert "'Qwen/Qwen3-not-there' is no directory here and could not be fetched" in message


def test_hub_id_asks_for_safetensors_only(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    asked: list[list[str]] = []

    def snapshot(repo: str, allow_patterns: list[str], **options: Any) -> str:
        assert repo == "Qwen/Qwen3-0.6B"
        asked.append(allow_patterns)
        return str(directory)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    load_model("Qwen/Qwen3-0.6B", device="cpu")
    load_model("Qwen/Qwen3-0.6B", device="cpu", load_format="dummy")
    assert len(asked) == 2
    assert "model*.safetensors" in asked[0] and "*.json" in asked[0]
    assert not any("safetensors" in pattern for pattern in asked[1])


def test_pickles_are_refused(directory: Path) -> None:
    (directory / SINGLE).rename(directory / "pytorch_model.bin")
    message = refusal(directory)
    assert "pytorch_model.bin" in message and "never read" in message and "safetensors" in message


def test_no_weights_at_all(directory: Path) -> None:
    (directory / SINGLE).unlink()
    assert f"neither {SINGLE} nor {INDEX}" in refusal(directory)


def test_missing_shard(tmp_path: Path) -> None:
    save(random_reference(small_config("llama", 4, 2)), tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = refusal(tmp_path)
    assert shard.name in message and "is missing (it holds tensor " in message


def test_tensor_missing_from_its_shard(tmp_path: Path) -> None:
    save(random_reference(small_config("llama", 4, 2)), tmp_path, max_shard_size="100KB")
    files = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    file = tmp_path / files["model.norm.weight"]
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    message = refusal(tmp_path)
    assert file.name in message and "model.norm.weight is missing" in message


def test_missing_tensor(directory: Path) -> None:
    edit_tensors(directory, model__layers__1__mlp__up_proj__weight=None)
    message = refusal(directory)
    assert "tensor model.layers.1.mlp.up_proj.weight of shape (96, 64) is missing" in message


def test_wrong_shape(directory: Path) -> None:
    edit_tensors(directory, model__layers__2__self_attn__k_proj__weight=torch.zeros(32, 60))
    message = refusal(directory)
    assert SINGLE in message and "model.layers.2.self_attn.k_proj.weight has shape (32, 60)" in message
    assert "asks for (32, 64)" in message


def test_wrong_dtype(directory: Path) -> None:
    edit_tensors(directory, model__norm__weight=torch.zeros(64, dtype=torch.int32))
    assert "model.norm.weight has dtype I32; supported: F32, BF16, F16" in refusal(directory)


def test_tensor_that_nothing_reads(directory: Path) -> None:
    """A bias beside a config without biases would change the logits silently."""
    edit_tensors(directory, model__layers__0__self_attn__q_proj__bias=torch.zeros(64))
    assert "nothing in this architecture takes tensor model.layers.0.self_attn.q_proj.bias" in refusal(directory)


def test_harmless_extra_tensors(directory: Path) -> None:
    """Stored rotary frequencies and layers beyond the config's count (a cut-down config) are no mistake."""
    edit_tensors(directory, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    edit_json(directory / "config.json", num_hidden_layers=2, layer_types=None)
    assert load_model(directory, device="cpu")[1].num_layers == 2


def test_file_that_is_not_safetensors(directory: Path) -> None:
    (directory / SINGLE).write_text("version https://git-lfs.github.com/spec/v1")
    assert "not a readable safetensors file" in refusal(directory)


@pytest.mark.parametrize("text, words", [("{", "not valid JSON"), ("[]", "must hold a JSON object")])
def test_broken_config_file(directory: Path, text: str, words: str) -> None:
    (directory / "config.json").write_text(text)
    message = refusal(directory)
    assert words in message and "config.json" in message


# configs that the decoder would compute wrongly


@pytest.mark.parametrize("fields, words", [
    ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
     "MistralForCausalLM is not supported; supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
    ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "supported: LlamaForCausalLM"),
    ({"architectures": None, "model_type": "unheard_of"}, "model_type 'unheard_of' is not supported"),
    ({"model_type": "llama"}, "model_type 'llama' does not belong to architecture Qwen3ForCausalLM"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None},
     "sliding_attention"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"num_experts": 8}, "mixture of experts"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads (3)"),
])  # fmt: skip
def test_unsupported_configs(directory: Path, fields: dict[str, Any], words: str) -> None:
    edit_json(directory / "config.json", **fields)
    message = refusal(directory)
    assert words in message and "config.json" in message
