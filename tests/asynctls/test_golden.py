"""Golden equalities: offload on = off bit for bit; current = two_level; any lane = the inline lane; nothing leaks."""

from __future__ import annotations

import os

import pytest
from engines import JitterLane, check, latent_model, live, make
from tiny_decoder import make_engine, params, prompts, serve, tiny_model

from slipstream import SamplingParams, TwoLevel
from slipstream.asynctls.backend import OffloadBackend
from slipstream.attention.probe import Probe
from slipstream.attention.sparse import SparseBackend
from slipstream.engine.request import Request

MODES = ("previous", "union", "predicted", "current")


@pytest.fixture(params=(tiny_model, latent_model), ids=("heads", "latent"))
def model(request):
    """Makes a model: each engine has its own."""
    return request.param


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guard", ({}, {"drift": 0.3}, {"margin": 0.5}))
def test_offload_changes_no_token(model, mode, guard):
    """Through forks, shared prefixes, cancels, preemption and forced tokens, under a hot buffer that is always full."""
    twins = [make(on, model=model, candidates=mode, **guard) for on in (False, True)]
    near, far = live(twins, 14, seed=MODES.index(mode))
    assert near == far
    stats = twins[1].backend.stats()
    assert isinstance(twins[1].backend, OffloadBackend)
    assert stats["asynctls_bytes_in"] > 0 and stats["asynctls_bytes_out"] > 0
    residency = twins[1].backend.residency
    assert stats["asynctls_misses"] > residency.slots.key_of.numel(), "nothing ever had to give way"
    assert (stats["asynctls_returned"] > 0) == (mode == "union")
    assert stats["asynctls_lost_selections"] > 0 or mode != "union", "no candidate ever had to be fetched again"
    if mode != "current":
        ours = twins[0].backend.stats()
        assert {k: v for k, v in stats.items() if k in ours} == pytest.approx(ours)
        assert (stats["asynctls_drift_selections"] > 0) == bool(guard)


def test_current_without_offload_is_two_level(model):
    one = make(False, model=model, candidates="current")
    assert type(one.backend) is SparseBackend
    other = make(False, model=model, candidates="current")
    config = TwoLevel(11, blocks=4, block=4, channels=8, sink=2, recent=3, min_context=0)
    pool, spec = other.backend.pool, other.spec
    other.backend.selector = config.selector(pool, spec, other.backend.index)
    far = make(True, model=model, candidates="current")
    assert (results := live([one, other, far], 8, seed=9))[0] == results[1] == results[2]


@pytest.mark.parametrize("options", ({"transfer": "pooled"}, {}, {"block": 8}, {"aggregate": "sum"}, {"slots": 1.25}))
def test_however_it_moves(model, options):
    """Without options: by two lanes, each late for itself."""
    plain = {name: value for name, value in options.items() if name != "transfer"}
    lanes = () if options else (JitterLane(3), JitterLane(5))
    twins = [make(False, model=model, **plain), make(True, model=model, lane=lanes[0] if lanes else None, **options)]
    if lanes:
        twins[1].backend._claims = lanes[1]
    near, far = live(twins, 10, seed=4)
    assert near == far
    for lane in lanes:
        lane.close()


@pytest.mark.parametrize("overlap", (False, True))
@pytest.mark.parametrize("gate", (0, 10, 12))
def test_dense_requests_are_dense_in_slots(model, overlap, gate):
    """Within the gate attention is full: the same tokens as a dense backend's, and every form of step occurs."""
    engine = make(True, model=model, gate=gate, overlap=overlap, candidates="previous")
    live([engine], 8, seed=5)
    stats = engine.backend.stats()
    assert stats["sparse_rows"] > 0 and (stats["dense_rows"] > 0) == (gate > 0)


def test_a_budget_of_the_context_is_full_attention(model):
    def requests():
        return [Request(ids, params(i)) for i, ids in enumerate(prompts(6))]

    expected = serve(make_engine(model(), num_pages=64), *requests())
    wide = {"budget": 120, "blocks": 30, "num_pages": 64}
    for gate in (0, 40):
        engine = make(True, model=model, gate=gate, **wide)
        assert serve(engine, *requests()) == expected
        check(engine)
        assert engine.backend.stats()["dense_rows" if gate else "sparse_rows"] > 0


def test_online_calibration_relabels_from_the_host(model):
    """The prompt comes in chunks; with offload calibration ends when the first chain decodes, and this is the first."""
    outs = []
    for on in (False, True):
        engine = make(on, model=model, online=True, num_pages=80, seats=1, candidates="current")
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        request = Request([(5 * i) % 61 for i in range(150)], params)
        engine.add(request)
        while engine.has_work():
            engine.step()
        outs.append((request.completions[0].token_ids, engine.backend.index.labels(1).channels.tolist()))
    assert outs[0] == outs[1]


def test_a_probe_sees_what_offload_selects(model):
    engine = make(True, model=model)
    probe = Probe.of(engine.backend, engine.spec, engine.backend.selector._config, every=1)
    serve(
        engine, Request([(7 * i + 3) % 61 for i in range(60)], SamplingParams(max_tokens=12, ignore_eos=True, seed=1))
    )
    assert 0 < probe.report()["recall"] < 1 and engine.backend.stats()["asynctls_misses"] > 0


@pytest.mark.parametrize("mode", ("union", "previous"))
def test_any_number_of_requests_leaks_nothing(model, mode):
    """20 of each by default; ``SLIPSTREAM_FUZZ=5000`` for 10,000 in all."""
    engine = make(True, model=model, candidates=mode, overlap=True, lane=JitterLane(1))
    live([engine], int(os.environ.get("SLIPSTREAM_FUZZ", "20")), seed=11, every=10)


@pytest.mark.parametrize("bad", (29, 30))  # one that its step waits for, and one ahead
def test_a_copy_that_fails_takes_its_step_and_no_more(model, bad):
    """The requests of the step die with a clear error; what others had in slots is not trusted any more."""
    engine, twin = make(True, model=model), make(True, model=model)
    load, calls = engine.backend._load, []

    def fail(*args):
        calls.append(args)
        if len(calls) == bad:
            raise RuntimeError("the bus is down (as a test would have it)")
        load(*args)

    engine.backend._load = fail
    prompt = [(7 * i + 3) % 61 for i in range(40)]
    first, second = (Request(prompt, SamplingParams(max_tokens=12, ignore_eos=True, seed=1)) for _ in range(2))
    serve(engine, first)
    assert "the bus is down" in str(first.error) and len(calls) < bad + 4
    serve(engine, second)
    assert second.error is None
    (expected,) = serve(twin, Request(prompt, SamplingParams(max_tokens=12, ignore_eos=True, seed=1)))
    assert [c.token_ids for c in second.completions] == expected
    check(engine)
