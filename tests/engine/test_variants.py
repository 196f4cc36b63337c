"""A backend with several forms: the engine asks for each step which one it needs, and runs (on CUDA: captures) that."""

from collections import Counter

import pytest
import torch
from test_capture import CONFIG, requests, serve
from toy_engine import SPEC, ToyBackend, ToyModel, greedy, prompt, request, run, tokens_of, truth

from slipstream.attention.dense import DenseBackend
from slipstream.engine.engine import Engine, EngineConfig
from slipstream.engine.request import Request
from slipstream.kvcache.pool import KVPool
from slipstream.models.weights import load_model
from slipstream.types import SamplingParams

GATE = 14


class Gated(ToyBackend):
    """Form 1 as soon as a decode row is longer than the gate; notes what it was asked and what it was given."""

    variants = (0, 1)

    def __init__(self, pool):
        super().__init__(pool)
        self.asked, self.planned = [], []

    def variant(self, lengths):
        self.asked.append(list(lengths))
        return int(max(lengths) > GATE)

    def plan(self, batch):
        super().plan(batch)
        decodes = batch.lengths_host[: batch.num_decodes]
        real = [n for n, pages in zip(decodes, batch.pages_host, strict=False) if list(pages) != [0]]
        self.planned.append((real, batch.variant))
        assert batch.graph_key is None and batch.is_decode == (batch.num_decodes == batch.num_requests)
        assert batch.seats.shape == (batch.num_requests,)

    def stats(self):
        return {"gated_steps": sum(variant for _, variant in self.planned)}


@pytest.mark.parametrize("overlap", [False, True])
def test_every_step_with_decode_rows_has_the_variant_of_their_lengths(overlap):
    pool = KVPool(1, 64, 1, 4, 2, torch.float32)
    backend = Gated(pool)
    engine = Engine(ToyModel(), SPEC, pool, backend, EngineConfig(overlap=overlap, max_num_seqs=8, max_batch_tokens=9))
    engine.runner._buckets = [3, 8]  # padded as captured steps are
    work = run(engine, *(request(prompt(i, 3 + 5 * i), greedy(8)) for i in range(4)))
    for one in work:
        assert tokens_of(one) == [truth(one.prompt_ids, one.params)]
    assert all(variant == int(bool(real) and max(real) > GATE) for real, variant in backend.planned)
    assert backend.asked == [
        real for real, _ in backend.planned if real
    ]  # real rows only, and only where there are any
    assert {variant for _, variant in backend.planned} == {0, 1}
    assert engine.stats()["gated_steps"] == sum(max(lengths) > GATE for lengths in backend.asked)


def test_the_batch_names_the_seats_of_its_rows():
    pool = KVPool(1, 64, 1, 4, 2, torch.float32)
    backend = ToyBackend(pool)
    engine = Engine(ToyModel(), SPEC, pool, backend, EngineConfig(overlap=False, max_num_seqs=8))
    engine.runner._buckets = [8]
    engine.add(request(prompt(0, 5), greedy(4, n=3)))
    engine.step()
    seats = [chain.seat for chain in engine.scheduler.running]
    assert backend.batch.seats.tolist() == seats[:1]
    engine.step()
    assert backend.batch.seats.tolist() == seats + [0] * 5 and backend.batch.num_decodes == 8


class Seated(ToyBackend):
    """Notes who is new in its seat and who goes on from whom; counts the ends of steps."""

    uses_seats, num_fresh = True, 6

    def __init__(self, pool):
        super().__init__(pool)
        self.seated, self.heirs, self.finished = [], [], 0

    def plan(self, batch):
        super().plan(batch)
        seats = batch.seats.tolist()
        self.seated += batch.seated
        self.heirs += [(batch.lengths_host[b], seats[b], heir) for b, heir in batch.heirs]

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("overlap", [False, True])
def test_a_backend_that_uses_seats_is_told_who_goes_on_from_whom(overlap):
    def serve_one(engine, *work):
        engine.backend.heirs, engine.backend.seated = [], []
        for one in run(engine, *work):
            assert tokens_of(one) == [truth(one.prompt_ids, one.params, i) for i in range(one.params.n)]
        return engine.backend.heirs, engine.backend.seated

    pool = KVPool(1, 64, 1, 4, 2, torch.float32)
    config = EngineConfig(overlap=overlap, max_num_seqs=4, max_batch_tokens=7)
    engine = Engine(ToyModel(), SPEC, pool, Seated(pool), config)
    heirs, (own, *others) = serve_one(engine, request(prompt(0, 20), greedy(5, n=3)))
    assert heirs == [(20, own, own), *((20, own, other) for other in others)] and len(others) == 2
    assert all(chain.lease is None and not chain.in_seat for chain in engine.scheduler.running)
    # forced rows begin where the dense part ends; the last one's seat is its own already
    heirs, (own, *others) = serve_one(engine, request(prompt(1, 20), greedy(5, n=3), dense_tokens=9))
    assert heirs == [(9, own, own), *((20, own, other) for other in others)]
    assert engine.stats()["cached_tokens"] == 0
    serve_one(engine, request(prompt(0, 20), greedy(5)))
    assert engine.stats()["cached_tokens"] == 20 - 6, "the last tokens run although they are cached"
    assert engine.backend.finished == engine.stats()["steps"]


class Counting(DenseBackend):
    """Counts on the device how often each form ran."""

    variants = (0, 1)

    def __init__(self, pool, spec):
        super().__init__(pool, spec)
        self.runs, self.asked = torch.zeros(2, dtype=torch.int64, device=pool.device), Counter()

    def variant(self, lengths):
        found = int(max(lengths) > 60)
        self.asked[found] += 1
        return found

    def attend(self, layer, q):
        if layer == 0 and self._batch.num_decodes:
            self.runs[self._batch.variant] += 1
        return super().attend(layer, q)


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [False, True])
def test_each_variant_is_a_graph_of_its_own(warm):
    network, spec = load_model(CONFIG, device="cuda", dtype="float32", load_format="dummy", seed=1)

    def make(**config):
        pool = KVPool(spec.num_layers, 600, spec.num_kv_heads, 16, spec.head_dim, spec.dtype, "cuda")
        return Engine(network, spec, pool, Counting(pool, spec), EngineConfig(max_num_seqs=12, **config))

    expected = serve(make(overlap=False, cuda_graphs=False), requests(11))
    engine = make(overlap=True)
    if warm:
        engine.warmup()
        assert all(set(step._graphs) == {0, 1} for step in engine.runner._steps.values())
    else:
        assert serve(engine, requests(11)) == expected  # captures what it needs on the way
        engine.table.forget()
    engine.backend.runs.zero_()
    engine.backend.asked.clear()
    assert serve(engine, requests(11)) == expected
    assert engine.backend.runs.tolist() == [engine.backend.asked[0], engine.backend.asked[1]]
    assert min(engine.backend.asked.values()) > 1


@pytest.mark.gpu
def test_rows_that_stay_get_their_parameters_in_the_other_variant_too():
    """The same rows cross the gate: the graph behind it samples with their parameters, not its capture's."""
    network, spec = load_model(CONFIG, device="cuda", dtype="float32", load_format="dummy", seed=1)
    tokens = []
    for graphs in (False, True):
        pool = KVPool(spec.num_layers, 60, spec.num_kv_heads, 16, spec.head_dim, spec.dtype, "cuda")
        engine = Engine(network, spec, pool, Counting(pool, spec), EngineConfig(max_num_seqs=2, cuda_graphs=graphs))
        engine.warmup()
        own = SamplingParams(temperature=1.0, seed=3, max_tokens=70, ignore_eos=True)
        tokens.append(serve(engine, [Request([1, 2, 3], own)]))
    assert tokens[0] == tokens[1]
