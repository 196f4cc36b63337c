"""The engine with a real (tiny, random) decoder on the CPU: one answer alone, batched, chunked, preempted, or late."""

import pytest
import torch

from slipstream.attention.dense import DenseBackend
from slipstream.engine.engine import Engine, EngineConfig
from slipstream.engine.request import Request
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


@pytest.fixture(scope="module")
def model():
    return load_model(CONFIG, device="cpu", dtype="float32", load_format="dummy", seed=3)


def make_pool(spec, num_pages=64):
    return KVPool(spec.num_layers, num_pages, spec.num_kv_heads, 8, spec.head_dim, spec.dtype)


def make_engine(model, num_pages=64, **config):
    network, spec = model
    pool = make_pool(spec, num_pages)
    return Engine(network, spec, pool, DenseBackend(pool, spec), EngineConfig(**config))


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
        lengths_host=[num_tokens],
        query_start_host=[0, num_tokens],
        pages_host=[pages],
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


@pytest.fixture(scope="module")
def alone(model):
    return [serve(make_engine(model), Request(ids, params(i)))[0] for i, ids in enumerate(prompts(6))]


def test_greedy_is_the_argmax_of_a_full_forward_pass(model, alone):
    for i in (0, 2, 4):
        ids = prompts(6)[i] + alone[i][0]
        logits = all_logits(model, ids[:-1])[len(prompts(6)[i]) - 1 :]
        assert logits.argmax(-1).tolist() == alone[i][0]
    assert len({token for chains in alone for token in chains[0]}) > 10  # the model is not stuck on one token


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget, num_pages", [(1, 64), (7, 64), (64, 64), (64, 11)])
def test_tokens_do_not_depend_on_the_batch(model, alone, overlap, budget, num_pages):
    engine = make_engine(model, num_pages, overlap=overlap, max_batch_tokens=budget, max_num_seqs=4)
    requests = [Request(ids, params(i)) for i, ids in enumerate(prompts(6))]
    assert serve(engine, *requests) == alone
    assert (engine.stats()["preemptions"] > 0) == (num_pages == 11)
    assert serve(engine, *[Request(ids, params(i)) for i, ids in enumerate(prompts(6))]) == alone
    assert engine.stats()["cached_tokens"] > 0


def test_chains_of_one_request_equal_single_requests(model):
    ids = prompts(3)[2]
    own = SamplingParams(n=4, temperature=1.0, seed=70, max_tokens=10, ignore_eos=True)
    (together,) = serve(make_engine(model), Request(ids, own))
    for i in range(4):
        single = SamplingParams(temperature=1.0, seed=70 + i, max_tokens=10, ignore_eos=True)
        assert serve(make_engine(model), Request(ids, single)) == [[together[i]]]


def test_score_and_prompt_logprobs_are_those_of_a_full_forward_pass(model):
    ids = prompts(6)[5]
    expected = all_logits(model, ids).log_softmax(-1)
    wanted = [expected[at - 1, ids[at]].item() for at in range(1, len(ids))]
    engine = make_engine(model, max_batch_tokens=16)
    for again in range(2):
        score = Request.to_score(ids[:20], ids[20:])
        serve(engine, score)
        assert score.scores == pytest.approx(wanted[19:], abs=1e-4)
        assert score.metrics.num_cached_tokens == (19 if again else 0)
    whole = Request(ids, SamplingParams(prompt_logprobs=1, logprobs=1, temperature=0, max_tokens=1))
    serve(engine, whole)
    found = [entry[token].logprob for entry, token in zip(whole.prompt_logprobs[1:], ids[1:], strict=True)]
    assert found == pytest.approx(wanted, abs=1e-4)
    (entry,) = whole.completions[0].logprobs
    assert entry[whole.completions[0].token_ids[0]].logprob == pytest.approx(expected[-1].max().item(), abs=1e-4)
