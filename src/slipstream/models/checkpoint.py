"""Model directories: finding one (local or on the Hugging Face hub) and reading its tensors, safetensors only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from slipstream.models.parallel import Ranks
from slipstream.models.parameters import Parameter, Source

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONFIG_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
WEIGHT_FILES = ("model*.safetensors", INDEX)
SOURCE_DTYPES = ("F32", "BF16", "F16")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def locate(path_or_id: str | Path, with_weights: bool = True) -> Path:
    """The directory of a model: a local one that has a config.json, or the snapshot of a hub id such as Qwen/Qwen3-8B.

    with_weights: False downloads the configuration and tokenizer only.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: it is not a Hugging Face model directory")
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; give the model's directory")
    if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(path_or_id):
        raise ValueError(f"there is no model directory {path} (a hub id looks like 'Qwen/Qwen3-8B')")
    patterns = [*CONFIG_FILES, *(WEIGHT_FILES if with_weights else ())]
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=patterns, ignore_patterns=["original/*"]))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, those about the id ValueErrors
        raise ValueError(
            f"{path_or_id!r} is no directory here and could not be fetched as a hub id "
            f"({type(error).__name__}: {error})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ``ValueError`` naming the file when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


class Checkpoint:
    """The safetensors files of one directory: every tensor's file, checked before anything is allocated.

    Files stay memory-mapped while the object lives; a tensor's pages are read when it is copied to its place, so no
    second copy of the model exists at any time.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open_files: dict[Path, Any] = {}
        self.files = self._find_files()

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def copy(self, parameter: Parameter, destination: torch.Tensor, ranks: Ranks) -> None:
        """Fills ``destination`` (the shape of this rank's part, any device, fp32/bf16) from the parameter's sources."""
        fill(parameter, destination, self._read, ranks)

    def refuse_unread(self, prefixes: Iterable[str], read: set[str]) -> None:
        """``ValueError`` for a tensor under one of the prefixes that no parameter takes: ignoring it changes logits."""
        starts = tuple(prefixes)
        for name, file in self.files.items():
            # Old checkpoints store the rotary frequencies, which the config defines.
            if name.startswith(starts) and name not in read and not name.endswith("rotary_emb.inv_freq"):
                raise ValueError(f"{file}: nothing in this architecture takes tensor {name}; does config.json fit it?")

    def _read(self, source: Source, cut: tuple[slice, ...]) -> torch.Tensor:
        """The tensor, or that part of it, on the host, after its header was compared with what the config expects.

        A whole one is memory-mapped; of a part, no other bytes are read.
        """
        if source.name not in self.files:
            raise ValueError(f"{self.directory}: tensor {source.name} of shape {source.shape} is missing")
        path = self.files[source.name]
        file = self._open(path)
        try:
            header = file.get_slice(source.name)
        except SafetensorError as error:
            raise ValueError(f"{path}: tensor {source.name} is missing, although {INDEX} lists it here") from error
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != source.shape:
            raise ValueError(f"{path}: tensor {source.name} has shape {shape}, config.json asks for {source.shape}")
        if dtype not in SOURCE_DTYPES:
            raise ValueError(f"{path}: tensor {source.name} has dtype {dtype}; supported: {', '.join(SOURCE_DTYPES)}")
        if cut[0].stop - cut[0].start == 0:
            return torch.empty(0, *shape[1:])
        whole = all(place == slice(0, size) for place, size in zip(cut, shape, strict=False))
        return file.get_tensor(source.name) if whole else header[cut]

    def _find_files(self) -> dict[str, Path]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.is_file():
            shards = read_json(index).get("weight_map", {})
            for name, shard in shards.items():
                if not (self.directory / shard).is_file():
                    raise ValueError(f"shard {self.directory / shard} is missing (it holds tensor {name})")
            return {name: self.directory / shard for name, shard in shards.items()}
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        pickles = sorted(path.name for pattern in PICKLES for path in self.directory.glob(pattern))
        if pickles:
            raise ValueError(
                f"{self.directory} has only pickled weights ({pickles[0]}), which can run code when loaded and are "
                "never read here; convert them to safetensors (transformers: model.save_pretrained)"
            )
        raise ValueError(f"{self.directory} has neither {SINGLE} nor {INDEX}")

    def _open(self, path: Path) -> Any:
        if path not in self._open_files:
            try:
                self._open_files[path] = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is not a readable safetensors file (cut off, or a git-lfs pointer?): {error}"
                ) from error
        return self._open_files[path]


def fill(
    parameter: Parameter,
    destination: torch.Tensor,
    read: Callable[[Source, tuple[slice, ...]], torch.Tensor],
    ranks: Ranks,
) -> None:
    """This rank's part of a parameter, from the cuts of its sources that ``read`` gives; missing rows become zeros."""
    start = 0
    for source, own in zip(parameter.sources, parameter.part(ranks).sources, strict=True):
        place = destination.narrow(parameter.axis, start, own.shape[parameter.axis])
        start += own.shape[parameter.axis]
        piece = read(source, parameter.cut(source, ranks))
        place[: len(piece)].copy_(piece)
        place[len(piece) :].zero_()
