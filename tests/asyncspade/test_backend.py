"""AsyncSpade through whole engines: the tokens of its definition in any life, and those of its synchronous twin."""

import dataclasses
import random
import time
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_chain import MODEL, truth
from test_capture import CONFIG as CUDA_CONFIG
from test_capture import requests as cuda_requests
from test_capture import serve as serve_cuda
from tiny_decoder import make_engine, params, prompts, serve

from slipstream import AsyncSpade, Oracle, SamplingParams, TwoLevel
from slipstream.asyncspade.backend import AHEAD, MEASURE, AsyncSpadeBackend, make_lane
from slipstream.asyncspade.predictor import Predictor
from slipstream.attention.dense import DenseBackend
from slipstream.attention.probe import Probe
from slipstream.attention.sparse import DENSE, INDEXING, MIXED, SPARSE, SparseBackend
from slipstream.engine.decode import DecodeStep
from slipstream.engine.engine import Engine, EngineConfig
from slipstream.engine.request import Request
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.models.weights import load_model
from slipstream.overlap import InlineLane, StreamLane, ThreadLane

BOTH = pytest.mark.parametrize("overlap", [False, True])
BY_KEYS = {"budget": 12, "sink": 2, "recent": 4, "scoring": "keys", "aggregate": "sum", "window": 8}
BY_INDEX = {"budget": 12, "sink": 2, "recent": 4, "block": 4, "blocks": 8, "channels": 8, "window": 8}


def spade(**given):
    """In time, where a test does not say otherwise; :mod:`test_foresight` has prediction by depth."""
    return AsyncSpade(**{"predictor": "ridge"} | given)


class JitterLane(ThreadLane):
    """A thread that takes its time, now more, now less."""

    def submit(self, work, *args):
        return super().submit(lambda: (time.sleep(random.random() * 0.002), work(*args))[1])


def backend_of(network, config, gate, num_seats, pool, spec, dense, lane=None):
    index = KeyIndex(pool, config.index) if config.index else None
    predictor = Predictor(config, spec, num_seats, network.cos_sin, pool.device)
    backend = AsyncSpadeBackend(pool, spec, index, config, dense, gate, num_seats, predictor, None, lane)
    for state in (predictor.windows, backend.sets.indices[:, 1:], *([backend.predicted] if config.confidence else [])):
        state.fill_(float("nan") if state.is_floating_point() else 10**6)  # what nobody wrote shows
    backend.sets.counts[:, 1:] = config.budget
    backend.sets.made_for.fill_(10**6)
    predictor.next.fill_(3)
    return backend


def spade_engine(config, gate=0, num_pages=64, max_num_seqs=6, lane=None, **options):
    gate = max(gate, config.budget)

    def wrap(pool, spec, dense):
        return backend_of(MODEL[0], config, gate, max_num_seqs, pool, spec, dense, lane)

    return make_engine(MODEL, num_pages, wrap, max_num_seqs=max_num_seqs, **options)


def twin_engine(config, num_pages=64, max_num_seqs=6, **options):
    """The synchronous method, with the same gate."""

    def wrap(pool, spec, dense):
        index = KeyIndex(pool, config.index) if config.index else None
        return SparseBackend(
            pool, spec, index, config.selector(pool, spec, index), dense, config.budget, 0, config.unread
        )

    return make_engine(MODEL, num_pages, wrap, max_num_seqs=max_num_seqs, **options)


def work_of(count, **more):
    return [Request(ids, dataclasses.replace(params(i), logprobs=2), **more) for i, ids in enumerate(prompts(count))]


def logprobs(work):
    return [c.logprobs for request in work for c in request.completions]


@cache
def truth_of(config, gate, ids, own, index, dense):
    return truth(config, gate, ids, own, index, dense)


def truths(request, config, gate):
    own, ids = dataclasses.replace(request.params, logprobs=None), tuple(request.prompt_ids)
    return [truth_of(config, gate, ids, own, i, request.dense_tokens)[0] for i in range(own.n)]


# -- golden equalities


@BOTH
@pytest.mark.parametrize("scoring", ["keys", "index"])
def test_the_oracle_is_the_synchronous_method_bit_for_bit(scoring, overlap):
    """Golden equality 3, and 4: through any lane."""
    config = spade(**(BY_KEYS if scoring == "keys" else BY_INDEX), predictor="oracle")
    twin = config.inner()
    assert (type(twin), twin.budget, twin.recent) == (Oracle if scoring == "keys" else TwoLevel, 12, 4)
    expected = work_of(6)
    tokens = serve(twin_engine(twin, overlap=overlap, max_batch_tokens=24), *expected)
    for lane in (InlineLane(), ThreadLane(), JitterLane()):
        work, engine = work_of(6), spade_engine(config, lane=lane, overlap=overlap, max_batch_tokens=24)
        assert serve(engine, *work) == tokens and logprobs(work) == logprobs(expected)
        assert engine.stats()["sparse_rows"] > 50 and engine.stats()["asyncspade_predictions"] == 0
        lane.close()


@BOTH
@pytest.mark.parametrize("more", [BY_KEYS, BY_INDEX | {"measure": 2, "confidence": 0.7}], ids=["keys", "index"])
def test_any_lane_gives_the_tokens_of_the_inline_lane(more, overlap):
    """Golden equality 4."""
    config, found = spade(**more), []
    for lane in (InlineLane(), ThreadLane(), JitterLane()):
        work, engine = work_of(6), spade_engine(config, lane=lane, overlap=overlap, max_batch_tokens=24)
        serve(engine, *work)
        stats = engine.stats()
        found.append(
            (logprobs(work), {k: v for k, v in stats.items() if k.startswith("asyncspade") and "stall" not in k})
        )
        assert stats["asyncspade_stalls"] == 0 or isinstance(lane, ThreadLane)
        lane.close()
    assert found[0] == found[1] == found[2]


@BOTH
@pytest.mark.parametrize("scoring", ["keys", "index"])
@pytest.mark.parametrize("gate", [0, 30])
def test_a_budget_of_the_context_is_full_attention(scoring, gate, overlap):
    """Golden equality 2: every token is in the set, the one that was appended unseen among them."""
    more = {"budget": 200, "blocks": 60, "block": 4, "channels": 8} if scoring == "index" else {"budget": 200}
    config = spade(**more, sink=2, recent=4, scoring=scoring, window=8)
    plain, work = work_of(6), work_of(6)
    expected = serve(make_engine(MODEL, max_num_seqs=6), *plain)
    engine = spade_engine(config, max_num_seqs=6, overlap=overlap, max_batch_tokens=24)
    engine.backend.gate = gate
    assert serve(engine, *work) == expected
    stats = engine.stats()
    assert stats["sparse_rows"] > 40 and stats["density"] == 1 and stats["asyncspade_late"] == 0
    assert (stats["dense_rows"] > 0) == (gate > 0)
    for one, other in zip(logprobs(work), logprobs(plain), strict=True):
        for a, b in zip(one, other, strict=True):
            assert {k: v.logprob for k, v in a.items()} == pytest.approx({k: v.logprob for k, v in b.items()}, abs=1e-5)


# -- the definition


@BOTH
@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("more", [
    {}, {"predictor": "analog", "window": 20}, {"predictor": "last"}, {"predictor": "last", "rotate": False},
    {"predictor": "mean"}, {"predictor": "ema"}, {"confidence": 0.8}, {"confidence": 0.8, "repair": "dense"},
], ids=str)  # fmt: skip
def test_tokens_are_those_of_the_definition(more, chunk, overlap):
    config = spade(**BY_KEYS | more)
    engine, work = spade_engine(config, overlap=overlap, max_batch_tokens=chunk), work_of(6)
    assert serve(engine, *work) == [truths(one, config, 12) for one in work]
    stats = engine.stats()
    chains = [truth_of(config, 12, tuple(r.prompt_ids), dataclasses.replace(r.params, logprobs=None), 0, None)[1]
              for r in work]  # fmt: skip
    assert stats["sparse_rows"] == sum(chain.sparse_steps for chain in chains) / 2 > 50
    assert stats["asyncspade_repaired"] == sum(chain.repaired for chain in chains)
    assert (stats["asyncspade_repaired"] > 0) == ("confidence" in more) and stats["asyncspade_late"] == 0
    # a set for each sparse step, and for the step after the last
    assert stats["asyncspade_predictions"] == 2 * (stats["sparse_rows"] + 6)


def test_predictors_differ():
    config = spade(**BY_KEYS)
    work = work_of(6)
    found = {
        kind: str([truths(one, dataclasses.replace(config, predictor=kind), 12) for one in work])
        for kind in ("ridge", "analog", "last", "mean", "ema")
    }
    assert len(set(found.values())) > 3


@BOTH
@pytest.mark.parametrize("gate", [12, 27])
def test_forced_rows_and_siblings(overlap, gate):
    """Protocol B: the rest of the prompt runs as decode rows; the first one's sets are made as the dense part ends."""
    config = spade(**BY_KEYS)
    ids = prompts(6)[5]
    own = SamplingParams(temperature=1, seed=1, n=3, max_tokens=20, ignore_eos=True)
    for dense in (1, 11, 12, 13, 39, 40, None):
        engine = spade_engine(config, gate, overlap=overlap, max_batch_tokens=16)
        one, other = Request(ids, own, dense_tokens=dense), Request(prompts(6)[3], params(1))
        found = serve(engine, one, other)
        assert found == [truths(one, config, gate), truths(other, config, gate)], dense
        assert engine.stats()["asyncspade_late"] == 0


@BOTH
def test_seats_are_taken_over_without_a_trace(overlap):
    """One seat, many chains: shorter after longer, the same after the same, with and without the prefix cache."""
    config = spade(**BY_KEYS)
    for reuse in (True, False):
        engine = spade_engine(config, max_num_seqs=1, overlap=overlap, max_batch_tokens=16, prefix_cache=reuse)
        for ids in (prompts(6)[5], prompts(6)[1], prompts(6)[5], prompts(6)[5][:33], prompts(6)[2], prompts(6)[4]):
            for i in (0, 1):
                one = Request(ids, params(i))
                assert serve(engine, one) == [truths(one, config, 12)]
        assert (engine.stats()["cached_tokens"] > 0) == reuse


@BOTH
def test_cancelled_and_preempted_chains(overlap):
    config = spade(**BY_KEYS)
    engine = spade_engine(config, max_num_seqs=2, overlap=overlap, max_batch_tokens=16)
    first, second, third = (
        Request(ids, params(i, 25)) for i, ids in enumerate((prompts(6)[4], prompts(6)[5], prompts(6)[3]))
    )
    for one in (first, second, third):
        engine.add(one)
    for _ in range(8):
        engine.step()
    assert engine.cancel(first.request_id)
    for _ in range(5):
        engine.step()
    chain = next(c for c in engine.scheduler.running if c.request is second)
    engine.scheduler.preempt(chain)
    serve(engine)
    for one in (second, third):  # the tokens that it had are decoded again
        assert one.completions[0].token_ids == truths(one, config, 12)[0]


STEM = tuple(prompts(6)[5])
ACTION = st.one_of(
    st.tuples(
        st.just("generate"), st.integers(1, 30), st.integers(1, 12), st.integers(1, 3), st.none() | st.integers(1, 30)
    ),
    st.tuples(st.just("score"), st.integers(1, 18), st.integers(1, 8)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("preempt"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.integers(1, 4)),
)


def act(engine, work, kind, *args):
    if kind == "generate":
        length, max_tokens, n, dense = args
        own = SamplingParams(n=n, seed=length % 2, temperature=1.0, max_tokens=max_tokens, ignore_eos=True)
        work.append(Request(STEM[:length], own, dense_tokens=dense and min(dense, length)))
        engine.add(work[-1])
    elif kind == "score":
        work.append(Request.to_score(STEM[: args[0]], STEM[args[0] : sum(args)]))
        engine.add(work[-1])
    elif kind == "cancel" and work:
        engine.cancel(work[args[0] % len(work)].request_id)
    elif kind == "preempt" and engine.scheduler.running:
        engine.scheduler.preempt(engine.scheduler.running[args[0] % len(engine.scheduler.running)])
    elif kind == "step":
        for _ in range(args[0]):
            engine.step()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(ACTION, min_size=5, max_size=25),
    st.sampled_from([12, 16, 25]),
    st.integers(8, 14),
    st.integers(3, 5),
    st.sampled_from([1, 9, 64]),
    st.booleans(),
)
def test_any_life(actions, gate, num_pages, seats, chunk, overlap):
    """Chunks, forks, copies on write, forced rows, preemption by hand and for want of pages, recycled seats."""
    config = spade(**BY_KEYS | {"window": 5, "predictor": "analog"})
    engine = spade_engine(config, gate, num_pages, seats, max_batch_tokens=chunk, overlap=overlap)
    scheduler, work, left = engine.scheduler, [], 4000
    for kind, *args in actions:
        act(engine, work, kind, *args)
        engine.table.check_integrity()
    while engine.has_work():
        engine.step()
        engine.table.check_integrity()
        left -= 1
        assert left, "the engine does not come to an end"
    for one in work:
        assert one.error is None
        if not one.generate:
            continue
        for completion, expected in zip(one.completions, truths(one, config, gate), strict=True):
            if completion.finish_reason == "abort":
                expected = expected[: len(completion.token_ids)]
            assert completion.token_ids == expected
    assert engine.stats()["asyncspade_late"] == 0
    assert engine.table.num_used == 0 and engine.table.num_available == num_pages - 1
    assert sorted(scheduler._seats) == list(range(1, seats + 1)) and not scheduler.running


# -- edges


@pytest.mark.parametrize("page_size", [1, 8])
@pytest.mark.parametrize("length", [31, 32, 33])
def test_the_appended_token_at_edges(page_size, length):
    """Of a page, and of the model's length: its page is not there yet when the set is made, or never will be."""
    network, spec = MODEL
    config = spade(**BY_KEYS)
    pool = KVPool(spec.num_layers, 700 // page_size, spec.num_kv_heads, page_size, spec.head_dim, spec.dtype)
    backend = backend_of(network, config, 12, 4, pool, spec, DenseBackend(pool, spec))
    engine = Engine(network, spec, pool, backend, EngineConfig(max_num_seqs=4, max_model_len=40))
    one = Request([i % 61 for i in range(length)], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    expected = truth(config, 12, one.prompt_ids, SamplingParams(temperature=0, max_tokens=40 - length))[0]
    assert serve(engine, one) == [[expected]]


@BOTH
def test_padding_rows_disturb_nobody(overlap):
    """As captured steps are padded, but not captured."""
    config = spade(**BY_INDEX, confidence=0.7, measure=1)
    expected, work = work_of(6), work_of(6)
    plain = spade_engine(config, gate=20, overlap=overlap)
    serve(plain, *expected)
    engine = spade_engine(config, gate=20, overlap=overlap)
    engine.runner._buckets = [4, 6]
    serve(engine, *work)
    assert logprobs(work) == logprobs(expected)
    own, other = ({k: v for k, v in e.stats().items() if "asyncspade" in k} for e in (engine, plain))
    assert own == other and own["asyncspade_repaired"] > 0 and 0 < own["asyncspade_overlap"] < 1


def test_static_buffers_of_captured_steps(monkeypatch):
    """Steps that are told that they are captured: same tokens, and planning allocates nothing twice."""
    config = spade(**BY_INDEX, confidence=0.7, measure=2)
    expected, work = work_of(6), work_of(6)
    serve(spade_engine(config, gate=20), *expected)

    def choose(step, variant):
        step.batch.variant, step.batch.graph_key = variant, (step.bucket, variant)

    monkeypatch.setattr(DecodeStep, "_choose", choose)
    engine = spade_engine(config, gate=20)
    engine.runner._buckets, seen = [4, 6], {}
    plan = engine.backend.plan

    def note(batch):
        plan(batch)
        if batch.graph_key is not None and engine.backend._work.next is not None:
            seen.setdefault(batch.graph_key, set()).add(engine.backend._next_lengths.data_ptr())

    engine.backend.plan = note
    serve(engine, *work)
    assert logprobs(work) == logprobs(expected)
    assert len(seen) > 3 and all(len(buffers) == 1 for buffers in seen.values())


@BOTH
@pytest.mark.parametrize("more", [BY_KEYS, BY_INDEX], ids=["keys", "index"])
def test_the_confidence_gate_at_its_ends(more, overlap):
    """Nothing trusted is full attention, or the synchronous method; everything trusted is no gate."""
    plain = serve(make_engine(MODEL, max_num_seqs=6), *work_of(6))
    free, work = work_of(6), work_of(6)
    serve(spade_engine(spade(**more), overlap=overlap, max_batch_tokens=24), *free)
    never = spade_engine(spade(**more, confidence=-1), overlap=overlap, max_batch_tokens=24)
    serve(never, *work)
    assert logprobs(work) == logprobs(free) and never.stats()["asyncspade_repaired"] == 0
    config = spade(**more, confidence=1)
    twin, work = work_of(6), work_of(6)
    serve(twin_engine(config.inner(0), overlap=overlap, max_batch_tokens=24), *twin)
    always = spade_engine(config, overlap=overlap, max_batch_tokens=24)
    always.backend._threshold.fill_(1.1)
    serve(always, *work)
    assert logprobs(work) == logprobs(twin) != logprobs(free)
    always = spade_engine(dataclasses.replace(config, repair="dense"), overlap=overlap, max_batch_tokens=24)
    always.backend._threshold.fill_(1.1)
    tokens = serve(always, *work_of(6))
    assert tokens == plain != [[c.token_ids for c in request.completions] for request in free]
    rows = always.stats()["sparse_rows"]
    assert always.stats()["asyncspade_repaired"] == rows * 2 * 2 > 0  # in each layer, for each KV head


def test_repaired_heads_attend_to_everything():
    """To the last bits of what full attention makes of them; the others keep theirs."""
    engine = spade_engine(spade(**BY_KEYS, confidence=0.8, repair="dense"))
    backend, seen = engine.backend, []
    repair = backend._repair

    def look(layer, q, out):
        before, kept = out.clone(), backend._decodes
        repair(layer, q, out)
        dense = DenseBackend(backend.pool, backend.spec)
        dense.plan(kept)
        is_flagged = (backend._flagged > 0).view(len(q), 2, 1).expand(-1, -1, 2).reshape(len(q), 4)
        exact = dense.attend(layer, q)
        torch.testing.assert_close(out[is_flagged], exact[is_flagged], rtol=1e-6, atol=1e-6)
        assert torch.equal(out[~is_flagged], before[~is_flagged])
        seen.append(is_flagged.float().mean())

    backend._repair = look
    serve(engine, *work_of(6))
    assert 0.05 < float(torch.stack(seen).mean()) < 0.95


def test_measured_overlap():
    """All of the truth where sets are everything or the model asks the same again; less where it is not."""
    whole = spade_engine(spade(budget=200, sink=2, recent=4, scoring="keys", window=8, measure=1))
    whole.backend.gate = 20
    serve(whole, *work_of(6))
    assert whole.stats()["asyncspade_overlap"] == 1
    found = {}
    for every in (0, 1, 3):
        engine = spade_engine(spade(**BY_KEYS, measure=every))
        serve(engine, *work_of(6))
        found[every] = engine.stats().get("asyncspade_overlap")
        found[every, "wanted"] = int(engine.backend._counters[3])
    assert found[0] is None and 0.4 < found[1] < 0.95 and found[3] == pytest.approx(found[1], abs=0.1)
    rows = engine.stats()["sparse_rows"]
    assert found[1, "wanted"] == rows * 12 * 2 * 2 and found[3, "wanted"] < 0.5 * found[1, "wanted"]


def test_a_probe_looks_at_the_stored_sets():
    for budget, least in ((200, 1.0), (12, 0.3)):
        engine = spade_engine(spade(budget=budget, sink=2, recent=4, scoring="keys", window=8))
        engine.backend.gate = 20
        probe = Probe.of(engine.backend, engine.spec, engine.backend.config, every=1)
        serve(engine, *work_of(6))
        report = probe.report()
        assert report["recall"] >= least and report["mass"] >= least - 1e-6
        assert (report["recall"] == 1) == (budget == 200) and set(report["mass_by_layer"]) == {0, 1}


def test_windows_are_seeded_from_the_prompt():
    """The first set of a chain comes from as many queries as the window holds, whatever the chunks and the cache."""
    config, ids = spade(**BY_KEYS), prompts(6)[5]
    states = []
    for chunk, warm in ((64, False), (16, False), (5, False), (64, True)):
        engine = spade_engine(config, max_num_seqs=2, max_batch_tokens=chunk, overlap=False)
        if warm:
            serve(engine, Request(ids, params(0, 2)))
        engine.add(Request(ids, params(0)))
        while not (engine.scheduler.running and engine.scheduler.running[0].decoding):
            engine.step()
        seat, predictor = engine.scheduler.running[0].seat, engine.backend.predictor
        assert predictor.next[seat] == len(ids) and len(ids) - predictor.first[seat] >= config.window
        states.append(torch.cat([predictor.windows[:, seat].flatten(), engine.backend.sets.indices[:, seat].flatten()]))
        assert engine.backend.sets.made_for[seat] == len(ids) + 1
        serve(engine)
    assert engine.stats()["cached_tokens"] == len(ids) - config.window
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-5, atol=1e-5)


def test_a_step_that_dies_takes_nobody_else_along():
    """Its work on a lane is over before its seats are given out again."""
    config = spade(**BY_KEYS)
    engine = spade_engine(config, max_num_seqs=2, lane=JitterLane(), overlap=True)
    network, forward = engine.runner._model, engine.runner._model.forward
    first, second = Request(prompts(6)[4], params(0)), Request(prompts(6)[5], params(1))
    engine.add(first)
    for _ in range(4):
        engine.step()

    class Failing:
        logits = network.logits

        def forward(self, batch, backend):
            forward(batch, backend)
            raise RuntimeError("out of memory (as a test would have it)")

    step = engine.runner._steps[1]
    step._model = Failing()
    engine.step()
    step._model = network
    assert serve(engine, second) == [truths(second, config, 12)] and "out of memory" in str(first.error)
    engine.backend.lane.close()


def test_ragged_lengths_are_gated_each_on_its_own(tiny, monkeypatch):
    more = {"budget": 128, "recent": 16, "min_context": 1000, "predictor": "last", "scoring": "keys", "window": 8}
    options = {"attention": spade(**more), "max_model_len": 9100, "kv_memory": "16MiB"}
    monkeypatch.setitem(tiny.__globals__["TINY"], "max_position_embeddings", 9200)
    prompts = [[(7 * i + 3 * j) % 60 + 1 for j in range(n)] for i, n in enumerate((17, 4096, 9000))]
    own = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1)
    llm = tiny(**options)
    together = [_numbers(output) for output in llm.generate(prompts, own)]
    stats = llm.stats()
    assert stats["asyncspade_late"] == 0 and stats["asyncspade_predictions"] == 2 * 2 * 4
    assert (stats["dense_rows"], stats["sparse_rows"]) == (3, 6)
    assert stats["tokens_attended"] == 18 + 19 + 20 + 6 * 128
    alone = tiny(**options)
    for prompt, found in zip(prompts, together, strict=True):
        for entry, expected in zip(_numbers(alone.generate(prompt, own)[0]), found, strict=True):
            assert entry == pytest.approx(expected, abs=1e-5)


def _numbers(output):
    return [{token: entry.logprob for token, entry in row.items()} for row in output.outputs[0].logprobs]


def test_variants():
    """Forms of attention as in SparseBackend; beside the dense one, one that selects for whoever is sparse next."""
    backend = spade_engine(spade(**BY_KEYS), gate=20).backend
    assert [backend.variant(n) for n in ([19, 3], [20, 3], [21, 30], [20, 21])] == [DENSE, DENSE + AHEAD, SPARSE, MIXED]
    assert sorted(backend.variants) == [DENSE, SPARSE, MIXED, DENSE + AHEAD]
    backend = spade_engine(spade(**BY_INDEX, measure=3), gate=20).backend
    assert backend.variant([21, 30]) == SPARSE + INDEXING + MEASURE and backend.variant([256]) in backend.variants
    forms = {DENSE, DENSE + AHEAD, SPARSE, MIXED, SPARSE + MEASURE, MIXED + MEASURE}
    assert set(backend.variants) == {form + INDEXING for form in forms}
    assert tuple(spade_engine(spade(**BY_KEYS), gate=256).backend.variants) == (DENSE,)  # the longest position
    assert spade(**BY_KEYS, predictor="oracle") and backend.spec.max_position == 256


def test_lanes_that_a_device_does_not_have():
    with pytest.raises(ValueError, match="lane='stream' needs an NVIDIA GPU"):
        make_lane("stream", torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot be part of a captured step"):
        make_lane("thread", torch.device("cuda"))


# -- through an LLM


def test_an_llm_says_what_it_did(tiny):
    method = {"method": "asyncspade", "predictor": "ridge", "min_context": 0, "measure": 1}
    llm = tiny(attention=method | BY_INDEX, page_size=8)
    own = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    llm.generate([[1 + i, 2, 3] * 9 for i in range(3)], own)
    stats = llm.stats()
    assert stats["sparse_rows"] == 3 * 29 and stats["tokens_attended"] == 12 * 3 * 29
    assert stats["asyncspade_predictions"] == 2 * 3 * 30 and 0 < stats["asyncspade_overlap"] < 1
    assert stats["asyncspade_bytes_out"] == stats["asyncspade_bytes_in"] == stats["asyncspade_stalls"] == 0
    seats = 65 * AsyncSpadeBackend.seat_bytes(llm.engine.backend.config, llm.spec)
    backend = llm.engine.backend
    held = [backend.sets.indices, backend.sets.counts, backend.sets.made_for]
    assert llm.memory.fixed_bytes == seats == backend.predictor.bytes + sum(x.numel() * x.element_size() for x in held)


def test_the_embedded_draft(draft):
    """A budget of everything changes nothing; an eighth of the context is what is attended."""
    from slipstream import LLM, tasks

    problem = tasks.make("needle_single", 3, num_tokens=700)
    prompt = draft.encode(problem.prompt, chat=True)
    own = SamplingParams(temperature=0, max_tokens=24)
    options = {"device": "cpu", "max_model_len": 2048, "kv_memory": "96MiB", "max_num_seqs": 4}
    full = [c.token_ids for c in draft.generate(prompt, own)[0].outputs]
    config = spade(budget=2048, sink=4, recent=32, blocks=32, channels=32, min_context=0)
    everything = LLM("slipstream-draft", attention=config, **options)
    everything.engine.backend.gate = 0
    assert [c.token_ids for c in everything.generate(prompt, own)[0].outputs] == full
    assert everything.stats()["density"] == 1 and everything.stats()["sparse_rows"] > 10
    little = LLM("slipstream-draft", attention=dataclasses.replace(config, budget=96, blocks=8), **options)
    little.generate(prompt, own)
    stats = little.stats()
    assert stats["tokens_attended"] == 96 * stats["sparse_rows"] > 0 and stats["dense_rows"] == 0


# -- on a GPU


def cuda_engine(config, lane=None, capture=True, **options):
    network, spec = load_model(CUDA_CONFIG, device="cuda", dtype="float32", load_format="dummy", seed=1)
    pool = KVPool(spec.num_layers, 600, spec.num_kv_heads, 16, spec.head_dim, spec.dtype, "cuda")
    backend = backend_of(network, config, 40, 12, pool, spec, DenseBackend(pool, spec), lane)
    return Engine(network, spec, pool, backend, EngineConfig(max_num_seqs=12, cuda_graphs=capture, **options))


ON_CUDA = {
    "keys": {"budget": 24, "sink": 2, "recent": 4, "scoring": "keys", "window": 16},
    "index": {"budget": 24, "sink": 2, "recent": 4, "block": 16, "blocks": 6, "channels": 16, "window": 16},
    "dense": {
        "budget": 24,
        "sink": 2,
        "recent": 4,
        "scoring": "keys",
        "window": 16,
        "confidence": 0.7,
        "repair": "dense",
    },
    "select": {
        "budget": 24,
        "sink": 2,
        "recent": 4,
        "block": 16,
        "blocks": 6,
        "channels": 16,
        "window": 16,
        "confidence": 0.7,
        "measure": 3,
    },
}


@pytest.mark.gpu
@pytest.mark.parametrize("predictor", ["ridge", "analog", "oracle"])
@pytest.mark.parametrize("more", ON_CUDA.values(), ids=ON_CUDA)
def test_captured_steps_give_the_tokens_of_eager_ones_and_of_any_lane(more, predictor):
    """Golden equality 4: the stream beside the step, inside the graph and outside, and no stream at all."""
    if predictor == "oracle":
        more = {name: value for name, value in more.items() if name not in ("confidence", "measure", "repair")}
    config = spade(**more, predictor=predictor)
    expected = serve_cuda(cuda_engine(config, InlineLane(), capture=False, overlap=False), cuda_requests(11))
    for lane, capture, overlap in (
        (None, False, False),
        (InlineLane(), True, True),
        (None, True, False),
        (None, True, True),
    ):
        engine = cuda_engine(config, lane, capture, overlap=overlap)
        assert isinstance(engine.backend.lane, StreamLane) == (lane is None)
        assert serve_cuda(engine, cuda_requests(11)) == expected
        stats = engine.stats()
        assert (stats["graph_replays"] > 20) == capture and stats["asyncspade_late"] == 0
        assert stats["sparse_rows"] > 100 and stats["dense_rows"] > 20
        if "confidence" in more:
            assert stats["asyncspade_repaired"] > 0 and ("measure" in more) == ("asyncspade_overlap" in stats)


@pytest.mark.gpu
def test_the_cuda_oracle_is_the_synchronous_method():
    config = spade(**ON_CUDA["index"], predictor="oracle")
    engine = cuda_engine(config)
    network, pool, spec = engine.runner._model, engine.runner._pool, engine.spec
    index = KeyIndex(pool, config.index)
    twin = config.inner()
    backend = SparseBackend(
        pool, spec, index, twin.selector(pool, spec, index), DenseBackend(pool, spec), 40, 0, twin.unread
    )
    expected = serve_cuda(Engine(network, spec, pool, backend, EngineConfig(max_num_seqs=12)), cuda_requests(11))
    assert serve_cuda(engine, cuda_requests(11)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("more", ON_CUDA.values(), ids=ON_CUDA)
def test_no_hidden_synchronisation_in_a_step(more):
    """Golden equality 7: launching steps, prompts and captured decodes alike, never waits for the device."""
    engine = cuda_engine(spade(**more), overlap=True)
    serve_cuda(engine, cuda_requests(11))  # compiles and captures what the steps below need
    engine.table.forget()
    for request in cuda_requests(11):
        engine.add(request)
    ticket_type = type(engine.runner._back.submit(dict))
    read = ticket_type.block

    def allowed(ticket):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(ticket)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    patch = pytest.MonkeyPatch()
    patch.setattr(ticket_type, "block", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        while engine.has_work():
            engine.step()
        assert engine.stats()["asyncspade_late"] == 0  # nor does asking for numbers
    finally:
        torch.cuda.set_sync_debug_mode("default")
        patch.undo()
