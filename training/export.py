"""Turn a training run into ordinary Hugging Face directories.

``python -m training.export RUN ASSETS --draft 065`` writes ASSETS/slipstream-target and ASSETS/slipstream-draft.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from . import latent
from .latent import LatentConfig, latent_config
from .model import ModelConfig, draft_config, target_config
from .tokenizer import IM_END, MAX_LENGTH, PAD, save
from .weights import load_draft, load_target, shards, stored


def hugging_face_config(config: ModelConfig) -> dict:
    """config.json of ``Qwen3ForCausalLM``, or of ``Glm4MoeLiteForCausalLM``."""
    fields = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": IM_END,
        "pad_token_id": PAD,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp,
        "max_position_embeddings": MAX_LENGTH,
        "max_window_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.eps,
        "rope_scaling": None,
        "rope_theta": config.theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab,
    }
    if not isinstance(config, LatentConfig):
        return fields
    of_qwen = ("max_window_layers", "sliding_window", "use_sliding_window")
    return {k: v for k, v in fields.items() if k not in of_qwen} | latent.hugging_face_config(config)


def export(directory: Path, state: dict[str, Tensor], config: ModelConfig) -> None:
    """Write config, generation config, bfloat16 shards below 16 MB with their index, and the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    save(directory)
    _write(directory / "config.json", hugging_face_config(config))
    generation = {"do_sample": False, "eos_token_id": IM_END, "pad_token_id": PAD}
    _write(directory / "generation_config.json", generation)
    if isinstance(config, LatentConfig):
        state = latent.in_format(state, config)
    parts = shards(state)
    index: dict[str, str] = {}
    for i, part in enumerate(parts):
        name = "model.safetensors" if len(parts) == 1 else f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(stored(part), directory / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, name))
    if len(parts) > 1:
        total = sum(2 * tensor.numel() for tensor in state.values())
        _write(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--draft", default="100", help="which snapshot becomes the draft, in percent of the run")
    parser.add_argument("--latent", action="store_true", help="the run was of the latent model: write slipstream-mla")
    options = parser.parse_args()
    if options.latent:
        state = load_target(options.run)
        export(options.assets / "slipstream-mla", state, latent_config(state["model.embed_tokens.weight"].shape[0]))
        return
    target, draft = load_target(options.run), load_draft(options.run, options.draft)
    vocab = target["model.embed_tokens.weight"].shape[0]
    export(options.assets / "slipstream-target", target, target_config(vocab))
    export(options.assets / "slipstream-draft", draft, draft_config(vocab))


if __name__ == "__main__":
    main()
