"""A tiny random decoder on the CPU behind an engine: what the tests of whole answers share."""

import torch

from slipstream.attention.dense import DenseBackend
from slipstream.engine.engine import Engine, EngineConfig
from slipstream.kvcache.pool import KVPool
from slipstream.models.weights import load_model
from slipstream.types import Batch, SamplingParams

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "hidden_act": "silu",
    "attention_bias": False,
}


def tiny_model():
    """(network, spec), always the same."""
    return load_model(CONFIG, device="cpu", dtype="float32", load_format="dummy", seed=3)


def make_pool(spec, num_pages=64):
    shape = (spec.num_layers, num_pages, spec.num_kv_heads, 8, spec.head_dim)
    return KVPool(*shape, spec.dtype, value_dim=spec.value_dim)


def make_engine(model, num_pages=64, wrap=lambda pool, spec, dense: dense, **config):
    """wrap: makes the attention backend of the dense one."""
    network, spec = model
    pool = make_pool(spec, num_pages)
    return Engine(network, spec, pool, wrap(pool, spec, DenseBackend(pool, spec)), EngineConfig(**config))


def serve(engine, *requests):
    for request in requests:
        engine.add(request)
    while engine.has_work():
        engine.step()
        engine.table.check_integrity()
    return [[c.token_ids for c in request.completions] for request in requests]


@torch.inference_mode()
def all_logits(model, ids):
    """[T, V] logits of a whole sequence in one batch: no engine, no earlier KV."""
    network, spec = model
    pool = make_pool(spec)
    backend, num_tokens = DenseBackend(pool, spec), len(ids)
    pages = list(range(1, 2 + num_tokens // 8))
    positions = torch.arange(num_tokens)
    batch = Batch(
        tokens=torch.tensor(ids),
        positions=positions,
        slots=torch.tensor(pages)[positions // 8] * 8 + positions % 8,
        page_table=torch.tensor([pages], dtype=torch.int32),
        lengths=torch.tensor([num_tokens], dtype=torch.int32),
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        logit_rows=positions,
        seats=torch.ones(1, dtype=torch.int64),
        lengths_host=[num_tokens],
        query_start_host=[0, num_tokens],
        pages_host=[pages],
        num_decodes=0,
    )
    backend.plan(batch)
    return network.logits(network.forward(batch, backend))


def prompts(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 61, (5 + 7 * i,), generator=generator).tolist() for i in range(count)]


def params(i, max_tokens=20):
    if i % 2:
        return SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=i, max_tokens=max_tokens, ignore_eos=True)
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
