"""``load_model``: a Hugging Face directory, hub id or config to a :class:`CausalLM` with its weights on the device."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PretrainedConfig

from slipstream.models.checkpoint import Checkpoint, fill, locate, read_json
from slipstream.models.config import DecoderConfig, normalise, read_config
from slipstream.models.decoder import CausalLM
from slipstream.models.parallel import Ranks, own_part
from slipstream.models.parameters import HEAD, LAYER_PREFIX, Parameter, Source, parameters
from slipstream.models.rope import longest_position
from slipstream.types import ModelSpec

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOAD_FORMATS = ("auto", "dummy")

ModelSource: TypeAlias = str | Path | PretrainedConfig | Mapping[str, Any]


def load_model(
    path_or_id: ModelSource,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype = "auto",
    load_format: str = "auto",
    max_model_len: int | None = None,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> tuple[CausalLM, ModelSpec]:
    """Builds the decoder of a config and fills it, tensor by tensor, straight on the device.

    path_or_id: a Hugging Face directory, a hub id, or (dummy weights only) a config as an object or a dict.
    dtype: "auto" is the config's dtype on CUDA (bfloat16 for fp16 models) and float32, the reference, on a CPU.
    load_format: "dummy" makes random weights of the config on the device (normal with the config's
    ``initializer_range``, norms 1), the same for the same seed, dtype and kind of device; no weight file is read.
    max_model_len: longest request in tokens; None means the config's ``max_position_embeddings``.
    ranks: who shares the model; this rank's part is loaded and described, of the same weights whatever their number.
    Raises ``ValueError``, naming file, tensor and shapes, for everything that does not fit together.
    """
    _require_option("load_format", load_format, LOAD_FORMATS)
    config, directory = _find_config(path_or_id, load_format)
    device = torch.device(device)
    torch_dtype = _choose_dtype(dtype, config, device)
    num_positions = _choose_length(max_model_len, config)
    ranks = ranks or Ranks()
    part = own_part(config, ranks.count)
    if directory is None or load_format == "dummy":
        weights = _random_weights(config, torch_dtype, device, seed, ranks)
    else:
        weights = _stored_weights(Checkpoint(directory), config, torch_dtype, device, ranks)
    model = CausalLM(part, weights, num_positions, ranks)
    return model, _describe(part, torch_dtype, num_positions, ranks)


def check_split(path_or_id: ModelSource, load_format: str, count: int) -> None:
    """``ValueError`` for a model that so many ranks cannot share. Fetches what a hub id needs, once for all of them."""
    own_part(_find_config(path_or_id, load_format)[0], count)


def _find_config(path_or_id: ModelSource, load_format: str) -> tuple[DecoderConfig, Path | None]:
    """The decoder's config and the directory it came from; no directory when the config itself was given."""
    if not isinstance(path_or_id, (str, Path)):
        if load_format != "dummy":
            raise ValueError("a config alone has no weights: give a directory or hub id, or load_format='dummy'")
        return read_config(normalise(path_or_id)), None
    directory = locate(path_or_id, with_weights=load_format == "auto")
    fields = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        fields["eos_token_id"] = fields.get("eos_token_id") if eos is None else eos
    try:
        return read_config(normalise(fields)), directory
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error


def _stored_weights(
    checkpoint: Checkpoint, config: DecoderConfig, dtype: torch.dtype, device: torch.device, ranks: Ranks
) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    read: set[str] = set()
    for parameter in parameters(config):
        kept = torch.float32 if parameter.wide else dtype
        weights[parameter.name] = torch.empty(parameter.part(ranks).shape, dtype=kept, device=device)
        checkpoint.copy(parameter, weights[parameter.name], ranks)
        read.update(source.name for source in parameter.sources)
    checkpoint.refuse_unread((LAYER_PREFIX.format(index=i) for i in range(config.num_layers)), read)
    if config.tied and HEAD in checkpoint:
        _keep_own_head(checkpoint, weights, config, ranks)
    return weights


def _keep_own_head(
    checkpoint: Checkpoint, weights: dict[str, torch.Tensor], config: DecoderConfig, ranks: Ranks
) -> None:
    """A tied config beside a stored head of other values: transformers trusts the stored head, so do we."""
    embedding, shape = weights["embedding"], (config.vocab_size, config.hidden_size)
    head = torch.empty_like(embedding)
    checkpoint.copy(Parameter("head", (Source(HEAD, shape),), 0, "normal", share="rows"), head, ranks)
    if not torch.equal(head, embedding):
        weights["head"] = head


def _random_weights(
    config: DecoderConfig, dtype: torch.dtype, device: torch.device, seed: int, ranks: Ranks
) -> dict[str, torch.Tensor]:
    """Drawn on the device in the target dtype: an 8B model takes seconds and no host memory.

    Every rank draws each whole parameter, one at a time, and keeps its part.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for parameter in parameters(config):
        tensor = torch.empty(parameter.shape, dtype=torch.float32 if parameter.wide else dtype, device=device)
        if parameter.fill != "normal":
            tensor.fill_(1.0 if parameter.fill == "ones" else 0.0)
        else:
            tensor.normal_(0.0, config.initializer_range, generator=generator)
        weights[parameter.name] = tensor if ranks.count == 1 else _part_of(tensor, parameter, ranks)
    return weights


def _part_of(whole: torch.Tensor, parameter: Parameter, ranks: Ranks) -> torch.Tensor:
    sizes = [source.shape[parameter.axis] for source in parameter.sources]
    names = [source.name for source in parameter.sources]
    pieces = dict(zip(names, whole.split(sizes, parameter.axis), strict=True))
    own = whole.new_empty(parameter.part(ranks).shape)
    fill(parameter, own, lambda source, cut: pieces[source.name][cut], ranks)
    return own


def _choose_dtype(dtype: str | torch.dtype, config: DecoderConfig, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    _require_option("dtype", dtype, ("auto", *DTYPES))
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.float32 if config.dtype is torch.float32 else torch.bfloat16


def _choose_length(max_model_len: int | None, config: DecoderConfig) -> int:
    if max_model_len is None:
        return config.max_position
    limit = longest_position(config.rope, config.max_position)
    if not isinstance(max_model_len, int) or not 1 <= max_model_len <= limit:
        raise ValueError(
            f"max_model_len must be in 1..{limit}, the positions that this model's RoPE was made for, "
            f"got {max_model_len!r}; for longer requests put yarn scaling into its config.json"
        )
    return max_model_len


def _describe(config: DecoderConfig, dtype: torch.dtype, num_positions: int, ranks: Ranks) -> ModelSpec:
    own = ranks.share(config.num_heads)
    return ModelSpec(
        architecture=config.architecture,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position=num_positions,
        dtype=dtype,
        eos_token_ids=config.eos_token_ids,
        value_dim=None if config.latent is None else config.latent.kv_lora,
        softmax_scale=None if config.latent is None else config.latent.scale,
        own_heads=None if config.latent is None or ranks.count == 1 else (own.start, own.stop),
    )


def _require_option(name: str, value: object, options: Iterable[str]) -> None:
    """``ValueError`` naming the nearest valid option."""
    known = list(options)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)
    raise ValueError(f"{name} {value!r} is not known; did you mean {near[0]!r}? Valid: {', '.join(known)}")
