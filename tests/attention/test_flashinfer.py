"""FlashInferBackend: refusals anywhere; on a GPU, the attention of the definition, eager and captured."""

from __future__ import annotations

import pytest
import torch
from steps import Requests, make_spec

from slipstream.attention.flashinfer import FlashInferBackend, flashinfer_supports
from slipstream.kvcache.pool import KVPool


def _make(num_q=32, num_kv=8, dim=128, page=64, requests=3, width=12, dtype=torch.bfloat16):
    spec = make_spec(num_q, num_kv, dim, dtype)
    pool = KVPool(spec.num_layers, 1 + requests * width, num_kv, page, dim, dtype, "cuda")
    return FlashInferBackend(pool, spec), Requests(pool, spec, requests, width)


@pytest.mark.parametrize("dim, dtype, word", [(96, torch.bfloat16, "96"), (128, torch.float32, "float32")])
def test_refusals_say_why(dim, dtype, word):
    spec = make_spec(8, 2, dim, dtype)
    assert word in str(flashinfer_supports(spec))
    pool = KVPool(2, 3, 2, 4, dim, dtype, "cpu")
    with pytest.raises(ValueError, match=word):
        FlashInferBackend(pool, spec)


def test_supported_shapes():
    assert all(flashinfer_supports(make_spec(8, 2, dim, torch.bfloat16)) is None for dim in (64, 128, 256))


@pytest.mark.gpu
@pytest.mark.parametrize("num_q, num_kv, dim", [(32, 8, 128), (14, 2, 64)])
def test_eager_steps(num_q, num_kv, dim):
    backend, requests = _make(num_q, num_kv, dim)
    for counts in ((300, 0, 64), (1, 500, 1), (0, 100, 1), (1, 1, 1), (200, 1, 0), (1, 1, 1)):
        requests.run(backend, counts)


class _Captured:
    """A decode step of one layer pair captured the way the engine does it: lengths and slots are computed inside."""

    def __init__(self, backend, requests, batch):
        self.backend, self.batch, self.requests = backend, batch, requests
        spec, rows = requests.spec, batch.num_requests
        self.before = batch.lengths - 1
        self.q, self.k, self.v = (
            [torch.zeros_like(requests.random(rows, heads)) for _ in range(spec.num_layers)]
            for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        )
        for _ in range(2):
            backend.plan(batch)
            self._compute()
        backend.plan(batch)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._compute()

    def _compute(self):
        batch, size = self.batch, self.requests.pool.page_size
        torch.add(self.before, 1, out=batch.lengths)
        page = batch.page_table.gather(1, (self.before.long() // size)[:, None]).squeeze(1)
        torch.add(self.before % size, page, alpha=size, out=batch.slots)
        self.out = []
        for layer in range(self.requests.spec.num_layers):
            k_pages, v_pages, slots = self.backend.view(layer)
            k_pages[slots // size, :, slots % size] = self.k[layer]
            v_pages[slots // size, :, slots % size] = self.v[layer]
            self.out.append(self.backend.attend(layer, self.q[layer]))

    def step(self, counts):
        requests, batch = self.requests, self.batch
        fresh = requests.grow(counts)
        rows = fresh.num_requests
        batch.lengths_host, batch.pages_host = fresh.lengths_host, fresh.pages_host
        batch.page_table.copy_(fresh.page_table)
        self.before.copy_(fresh.lengths - 1)
        for store, heads in ((self.q, requests.spec.num_heads), (self.k, 0), (self.v, 0)):
            for layer in range(requests.spec.num_layers):
                store[layer].copy_(requests.random(rows, heads or requests.spec.num_kv_heads))
        self.backend.plan(batch)
        self.graph.replay()
        for layer in range(requests.spec.num_layers):
            requests.store(self.backend, layer, fresh, counts, self.k[layer], self.v[layer])
            requests.check(layer, fresh, counts, self.q[layer], self.out[layer])


@pytest.mark.gpu
@pytest.mark.parametrize("num_q, num_kv, dim", [(32, 8, 128), (4, 4, 64)])
def test_captured_steps(num_q, num_kv, dim):
    """130 replays cross page borders at different times; the plan is redone only then."""
    backend, requests = _make(num_q, num_kv, dim)
    requests.run(backend, (300, 1, 64))
    requests.run(backend, (1, 500, 40))
    counts = (1, 1, 1)
    start = requests.grow(counts, graph_key=(3, 0))
    requests.lengths = [length - 1 for length in requests.lengths]
    captured = _Captured(backend, requests, start)
    plans = []
    wrapper = backend._decodes[3, 0].wrapper
    original = wrapper.plan
    wrapper.plan = lambda *args, **kwargs: (plans.append(args[0].tolist()), original(*args, **kwargs))
    for _ in range(130):
        captured.step(counts)
    crossings = sum((length - i) % 64 == 1 for length in requests.lengths for i in range(130))
    assert 0 < len(plans) <= crossings + 1


@pytest.mark.gpu
def test_planning_does_not_wait_for_the_device():
    backend, requests = _make()
    requests.run(backend, (300, 1, 64))
    before, chunk, after = (
        requests.grow((1, 1, 1), graph_key=(3, 0)),
        requests.grow((64, 64, 64)),
        requests.grow((1, 1, 1), graph_key=(3, 0)),
    )
    for batch in (before, chunk):
        backend.plan(batch)
        backend.view(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for batch in (after, chunk, before):
        backend.plan(batch)
        backend.view(0)
    torch.cuda.set_sync_debug_mode("default")
