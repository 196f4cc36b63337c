"""Decode steps as CUDA graphs: same tokens as eager steps, no hidden synchronisation, little host time."""

import asyncio
import time

import pytest
import torch

from slipstream.attention.backend import AttentionBackend
from slipstream.attention.dense import DenseBackend
from slipstream.engine.asynchronous import AsyncEngine
from slipstream.engine.decode import BUCKETS
from slipstream.engine.engine import Engine, EngineConfig
from slipstream.engine.request import Request
from slipstream.kvcache.pool import KVPool
from slipstream.models.weights import load_model
from slipstream.types import ModelSpec, SamplingParams

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": 997,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "hidden_act": "silu",
    "attention_bias": False,
}


def cuda_engine(**config):
    network, spec = load_model(CONFIG, device="cuda", dtype="float32", load_format="dummy", seed=1)
    pool = KVPool(spec.num_layers, 600, spec.num_kv_heads, 16, spec.head_dim, spec.dtype, "cuda")
    return Engine(network, spec, pool, DenseBackend(pool, spec), EngineConfig(max_num_seqs=12, **config))


def requests(count, max_tokens=40):
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        ids = torch.randint(0, 997, (3 + 11 * i,), generator=generator).tolist()
        temperature = 0.0 if i % 2 else 0.8
        own = SamplingParams(temperature=temperature, top_p=0.9, seed=i, max_tokens=max_tokens - i, ignore_eos=True)
        found.append(Request(ids, own))
    return found


def serve(engine, work):
    for request in work:
        engine.add(request)
    while engine.has_work():
        engine.step()
    engine.table.check_integrity()
    return [request.completions[0].token_ids for request in work]


@pytest.mark.gpu
def test_captured_and_overlapped_steps_give_the_tokens_of_eager_ones():
    plain = cuda_engine(overlap=False, cuda_graphs=False)
    expected = serve(plain, requests(11))
    assert plain.stats()["graph_replays"] == 0
    for overlap in (False, True):
        engine = cuda_engine(overlap=overlap)
        assert serve(engine, requests(11)) == expected
        assert engine.stats()["graph_replays"] > 20
        assert engine.runner.seats.length[0] == 0 and not engine.runner.seats.table[0].any()


@pytest.mark.gpu
def test_warmup_captures_every_bucket_and_disturbs_nobody():
    engine = cuda_engine()
    engine.add(requests(1)[0])
    for _ in range(5):
        engine.step()
    engine.warmup()
    assert set(engine.runner._steps) == {b for b in BUCKETS if b < 12} | {12}
    while engine.has_work():
        engine.step()
    assert serve(engine, requests(1)) == serve(cuda_engine(overlap=False, cuda_graphs=False), requests(1))


class Cutting(DenseBackend):
    """Cuts each step in three, and adds to what it reads there what the host put there in between."""

    def __init__(self, pool, spec):
        super().__init__(pool, spec)
        self.calls, self.sums = [], torch.zeros(spec.num_layers, device="cuda")
        self.told = torch.zeros(1, device="cuda")

    def attend(self, layer, q):
        out = super().attend(layer, q)
        self.sums[layer] += self.told[0]
        self._batch.between(lambda: (self.calls.append(layer), self.told.add_(1)))
        return out

    def plan(self, batch):
        super().plan(batch)
        self._batch = batch


@pytest.mark.gpu
def test_a_step_in_several_graphs():
    """The host's work between them happens in each step, and in the order in which it stands there."""
    expected = serve(cuda_engine(overlap=False, cuda_graphs=False), requests(11))
    network, spec = load_model(CONFIG, device="cuda", dtype="float32", load_format="dummy", seed=1)
    pool = KVPool(spec.num_layers, 600, spec.num_kv_heads, 16, spec.head_dim, spec.dtype, "cuda")
    backend = Cutting(pool, spec)
    engine = Engine(network, spec, pool, backend, EngineConfig(max_num_seqs=12))
    assert serve(engine, requests(11)) == expected
    engine.table.forget()
    before = engine.stats()
    backend.calls.clear()
    backend.told.zero_()
    backend.sums.zero_()
    assert serve(engine, requests(11)) == expected
    stats = engine.stats()
    steps = sum(stats[name] - before[name] for name in ("graph_replays", "eager_steps"))
    assert stats["graph_replays"] - before["graph_replays"] > 20
    assert backend.calls == [0, 1] * steps and backend.told.item() == 2 * steps
    assert backend.sums.tolist() == [steps * (steps - 1), steps * steps]


@pytest.mark.gpu
def test_no_hidden_synchronisation_in_a_step():
    """Golden equality 7: launching steps, prompts and captured decodes alike, never waits for the device."""
    engine = cuda_engine(overlap=True)
    serve(engine, requests(11))  # compiles and captures what the steps below need
    engine.table.forget()
    for request in requests(11):
        engine.add(request)
    read = type(engine.runner._back.submit(dict)).block

    def allowed(ticket):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(ticket)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    patch = pytest.MonkeyPatch()
    patch.setattr(type(engine.runner._back.submit(dict)), "block", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        while engine.has_work():
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        patch.undo()


class Nothing(AttentionBackend):
    """A model and a backend that cost nothing: what is left of a step is the engine's own time."""

    def forward(self, batch, backend):
        return torch.zeros(len(batch.tokens), 4)

    def logits(self, hidden):
        return torch.zeros(len(hidden), 8)

    def plan(self, batch):
        pass


def test_host_time_of_a_decode_step_with_64_chains_is_under_a_millisecond():
    spec = ModelSpec("nothing", 1, 4, 1, 1, 8, 8, 4096, torch.float32)
    pool = KVPool(1, 600, 1, 64, 8, torch.float32)
    engine = Engine(Nothing(), spec, pool, Nothing(), EngineConfig(max_num_seqs=64, overlap=True))
    for _ in range(64):
        engine.add(Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)))
    for _ in range(5):
        engine.step()
    engine.runner._steps[64].run = lambda variant, lengths, pages: (
        None
    )  # as a graph replay: no host work worth mentioning
    best = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(40):
            engine.step()
        best.append((time.perf_counter() - began) / 40)
    assert engine.stats()["running"] == 64 and min(best) < 1e-3


def test_graphs_are_for_cuda_only():
    from slipstream.engine.runner import Runner

    pool = KVPool(1, 4, 1, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="CUDA device only"):
        Runner(Nothing(), pool, Nothing(), max_num_seqs=2, max_model_len=8, capture=True)


@pytest.mark.gpu
def test_engines_with_threads_of_their_own_do_not_share_a_stream():
    """Two of them at once, with prompts between decode steps, each give what it gives alone."""
    prompts = [[(7 * i + j) % 900 for j in range(20 + 60 * (i % 4))] for i in range(24)]
    params = [SamplingParams(seed=i, max_tokens=40 + i, temperature=1.0) for i in range(24)]
    engine = cuda_engine()
    requests = [Request(ids, own) for ids, own in zip(prompts, params, strict=True)]
    for request in requests:
        engine.add(request)
    while engine.has_work():
        engine.step()
    alone = [request.completions[0].token_ids for request in requests]
    streams = []

    async def main(generators):
        for generator in generators:
            generator._jobs.put(lambda: streams.append(torch.cuda.current_stream().cuda_stream))
        asked = [g.generate(ids, own) for ids, own in zip(prompts, params, strict=True) for g in generators]
        return [chains[0].token_ids for chains in await asyncio.gather(*asked)]

    generators = [AsyncEngine(cuda_engine()) for _ in range(2)]
    together = asyncio.run(main(generators))
    for generator in generators:
        generator.close()
    assert together == [ids for ids in alone for _ in generators]
    assert len(set(streams) - {torch.cuda.default_stream().cuda_stream}) == 2
