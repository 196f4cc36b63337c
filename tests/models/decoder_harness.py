"""Runs our decoder the way an engine would (paged, ragged, chunked) and transformers the way its users do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from slipstream.attention.dense import DenseBackend
from slipstream.kvcache.pool import KVPool
from slipstream.models.decoder import CausalLM
from slipstream.types import Batch, ModelSpec

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "rope_theta": 1000.0,
}


def small_config(model_type: str, num_heads: int, num_kv_heads: int, **fields: Any) -> PretrainedConfig:
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    return CONFIG_MAPPING[model_type].from_dict(SMALL | heads | fields)


def random_reference(config: PretrainedConfig, seed: int = 0) -> Any:
    """A transformers model in fp32 whose biases and norm weights are random too: constants would hide mistakes."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def save(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


@torch.no_grad()
def reference_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] of one sequence in one forward pass."""
    return model(torch.tensor([list(tokens)])).logits[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected).abs().max() / expected.abs().max())


class PagedRun:
    """A model with a pool of small pages; requests own interleaved pages, so that a wrong page shows."""

    def __init__(self, model: CausalLM, spec: ModelSpec, num_requests: int, page_size: int = 4, num_pages: int = 200):
        shape = (spec.num_layers, num_pages, spec.num_kv_heads, page_size, spec.head_dim)
        self.pool = KVPool(*shape, spec.dtype, model.device, value_dim=spec.value_dim)
        for pages in (self.pool.k, self.pool.v):
            pages.fill_(float("nan"))
            pages[:, 0] = 0
        self.backend = DenseBackend(self.pool, spec)
        self.model, self.page_size = model, page_size
        each = (num_pages - 1) // num_requests
        self.pages = [[1 + request + num_requests * i for i in range(each)] for request in range(num_requests)]
        self.lengths = [0] * num_requests

    def step(self, new_tokens: dict[int, Sequence[int]]) -> list[torch.Tensor]:
        """Feeds tokens to some requests in one batch; returns the logits [t, V] of each, in the same order."""
        batch = self._batch(new_tokens)
        self.backend.plan(batch)
        logits = self.model.logits(self.model.forward(batch, self.backend))
        return list(logits.split([len(tokens) for tokens in new_tokens.values()]))

    def _batch(self, new_tokens: dict[int, Sequence[int]]) -> Batch:
        positions, slots, starts, lengths, pages = [], [], [0], [], []
        for request, tokens in new_tokens.items():
            span = range(self.lengths[request], self.lengths[request] + len(tokens))
            self.lengths[request] += len(tokens)
            positions += list(span)
            slots += [self.pages[request][p // self.page_size] * self.page_size + p % self.page_size for p in span]
            starts.append(len(positions))
            lengths.append(self.lengths[request])
            pages.append(self.pages[request][: -(-lengths[-1] // self.page_size)])
        widest = max(map(len, pages))
        padded = [row + [0] * (widest - len(row)) for row in pages]
        return Batch(
            tokens=torch.tensor([token for tokens in new_tokens.values() for token in tokens]),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            page_table=torch.tensor(padded, dtype=torch.int32),
            lengths=torch.tensor(lengths, dtype=torch.int32),
            query_start=torch.tensor(starts, dtype=torch.int32),
            logit_rows=torch.arange(len(positions)),
            seats=torch.tensor(list(new_tokens)) + 1,
            lengths_host=lengths,
            query_start_host=starts,
            pages_host=pages,
            num_decodes=len(lengths) if all(len(tokens) == 1 for tokens in new_tokens.values()) else 0,
        )
