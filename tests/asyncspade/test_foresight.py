"""Queries foreseen from the residual stream: the synchronous method's tokens where an MLP adds nothing, in any lane."""

import pytest
import torch
from test_backend import BOTH, BY_INDEX, JitterLane, logprobs, twin_engine, work_of
from test_backend import cuda_engine as spade_on_cuda
from test_capture import requests as cuda_requests
from test_capture import serve as serve_cuda
from tiny_decoder import make_engine, serve, tiny_model

from slipstream import LLM, AsyncSpade
from slipstream.asyncspade.foresight import ForesightBackend
from slipstream.attention.dense import DenseBackend
from slipstream.engine.engine import Engine, EngineConfig
from slipstream.kvcache.index import KeyIndex
from slipstream.overlap import InlineLane, StreamLane, ThreadLane

OWN = {name: value for name, value in BY_INDEX.items() if name != "window"} | {"predictor": "residual"}
MODEL = tiny_model()
CHOICES = [{"aggregate": "peak"}, {"aggregate": "sum"}]
AGGREGATES = pytest.mark.parametrize("more", CHOICES)


def engine_of(config, model=MODEL, lane=None, gate=0, num_pages=64, **options):
    def wrap(pool, spec, dense):
        index = KeyIndex(pool, config.index) if config.index else None
        gate_at = max(gate, config.budget)
        return ForesightBackend(pool, spec, index, config, dense, gate_at, model[0].foresight(), None, lane)

    return make_engine(model, num_pages, wrap, max_num_seqs=6, **options)


@pytest.fixture
def without_mlps():
    """The tiny model, whose MLPs add nothing for the time of a test."""
    scales = [layer.down.weight for layer in MODEL[0].layers]
    saved = [weight.to_dense().clone() if weight.is_mkldnn else weight.clone() for weight in scales]
    for layer in MODEL[0].layers:
        layer.down = type(layer.down)(torch.zeros_like(layer.down.dense_weight()))
    yield MODEL
    for layer, weight in zip(MODEL[0].layers, saved, strict=True):
        layer.down = type(layer.down)(weight)


@BOTH
@AGGREGATES
def test_without_mlps_it_is_the_synchronous_method(without_mlps, more, overlap, monkeypatch):
    """Golden equality 3: then what is foreseen is true, and the measured overlap is all."""
    import test_backend

    monkeypatch.setattr(test_backend, "MODEL", without_mlps)
    config = AsyncSpade(**OWN, **more, measure=1)
    expected, work = work_of(6), work_of(6)
    tokens = serve(twin_engine(config.inner(0), overlap=overlap, max_batch_tokens=24), *expected)
    engine = engine_of(config, without_mlps, overlap=overlap, max_batch_tokens=24)
    assert serve(engine, *work) == tokens and logprobs(work) == logprobs(expected)
    stats = engine.stats()
    assert stats["asyncspade_overlap"] == 1.0 and stats["asyncspade_predictions"] > 50


@BOTH
@pytest.mark.parametrize("more", [*CHOICES, {"scoring": "keys", "aggregate": "sum"}])
def test_any_lane_gives_the_tokens_of_the_inline_lane(more, overlap):
    """Golden equality 4. With MLPs some of what is foreseen is wrong."""
    config, found = AsyncSpade(**OWN, **more, measure=2), []
    for lane in (InlineLane(), ThreadLane(), JitterLane()):
        work, engine = work_of(6), engine_of(config, lane=lane, overlap=overlap, max_batch_tokens=24)
        serve(engine, *work)
        found.append((logprobs(work), engine.stats()["asyncspade_overlap"]))
        lane.close()
    assert found[0] == found[1] == found[2] and 0.3 < found[0][1] < 1


@BOTH
def test_nobody_in_the_batch_changes_anybodys_tokens(overlap):
    config, alone = AsyncSpade(**OWN), []
    for request in work_of(6):
        alone += serve(engine_of(config, gate=20), request)
    together = engine_of(config, gate=20, overlap=overlap, max_batch_tokens=24)
    assert serve(together, *work_of(6)) == alone
    assert together.stats()["sparse_rows"] > 50


@BOTH
def test_a_budget_of_the_context_is_full_attention(overlap):
    """Golden equality 2."""
    config = AsyncSpade(**OWN | {"budget": 200, "blocks": 60})
    plain, work = work_of(6), work_of(6)
    tokens = serve(make_engine(MODEL, max_num_seqs=6), *plain)
    engine = engine_of(config, overlap=overlap, max_batch_tokens=24)
    engine.backend.gate = 0
    assert serve(engine, *work) == tokens and engine.stats()["sparse_rows"] > 50
    for one, other in zip(logprobs(work), logprobs(plain), strict=True):
        for a, b in zip(one, other, strict=True):
            assert all(abs(a[token].logprob - b[token].logprob) < 1e-5 for token in a if token in b)


def test_a_step_that_dies_takes_nobody_else_along():
    config, lane = AsyncSpade(**OWN), JitterLane()
    engine, (victim, other) = engine_of(config, lane=lane), work_of(2)
    expected = serve(engine_of(config), *work_of(2)[1:])
    engine.add(victim)
    for _ in range(4):
        engine.step()
    choose = engine.backend._choose
    engine.backend._choose = lambda *args: (_ for _ in ()).throw(RuntimeError("no memory"))
    while engine.has_work():
        engine.step()
    assert "no memory" in str(victim.error)
    engine.backend._choose = choose
    assert serve(engine, other) == expected
    lane.close()


def test_what_it_cannot_be_told():
    for more in ({"confidence": 0.5}, {"cache_rank": "127.0.0.1:9"}):
        with pytest.raises(ValueError, match="residual"):
            AsyncSpade(predictor="residual", **more)


def test_the_embedded_draft():
    llm = LLM("slipstream-draft", attention={"method": "asyncspade", "budget": 96})
    assert isinstance(llm.engine.backend, ForesightBackend)


@pytest.mark.gpu
@pytest.mark.parametrize("measure", [0, 3])
def test_captured_steps_give_the_tokens_of_eager_ones_and_of_any_lane(measure):
    own = {"budget": 24, "sink": 2, "recent": 4, "block": 16, "blocks": 6, "channels": 16, "measure": measure}
    config = AsyncSpade(**own, predictor="residual")

    def make(lane=None, capture=True, overlap=True):
        engine = spade_on_cuda(AsyncSpade(**own | {"measure": 0}, predictor="oracle"))
        network, pool, spec = engine.runner._model, engine.runner._pool, engine.spec
        index, dense = KeyIndex(pool, config.index), DenseBackend(pool, spec)
        backend = ForesightBackend(pool, spec, index, config, dense, 40, network.foresight(), None, lane)
        return Engine(network, spec, pool, backend, EngineConfig(max_num_seqs=12, cuda_graphs=capture, overlap=overlap))

    expected = serve_cuda(make(InlineLane(), False, False), cuda_requests(11))
    for lane, capture, overlap in ((None, False, False), (InlineLane(), True, True), (None, True, True)):
        engine = make(lane, capture, overlap)
        assert isinstance(engine.backend.lane, StreamLane) == (lane is None)
        assert serve_cuda(engine, cuda_requests(11)) == expected
        assert (engine.stats()["graph_replays"] > 20) == capture and engine.stats()["sparse_rows"] > 100
        assert ("asyncspade_overlap" in engine.stats()) == bool(measure)
