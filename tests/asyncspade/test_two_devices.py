"""The cache rank on a device of its own. On a CPU both are that CPU, with two pools: it tests who knows what, when."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_backend
import torch
from one_chain import MODEL as TINY
from ranks import INDEX, KEYS, METHOD, MODEL, load, params, prompts, tokens
from test_backend import BOTH, BY_INDEX, BY_KEYS, spade, work_of
from tiny_decoder import make_engine, serve

from slipstream import LLM
from slipstream.asyncspade import two_devices
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.far_side import Rooms
from slipstream.asyncspade.lanes import FarLanes
from slipstream.asyncspade.two_devices import TwoDeviceBackend
from slipstream.attention.calibration import Calibration, ModelIdentity
from slipstream.engine.decode import DecodeStep
from slipstream.overlap import InlineLane, ThreadLane

ASKED = [*prompts(150, 30), {"prompt_token_ids": prompts(60)[0], "dense_tokens": 20}]
METHODS = [
    {},
    {"scoring": "index", "aggregate": "peak", **INDEX},
    {"scoring": "index", "aggregate": "sum", **INDEX},
    {"predictor": "ridge", "dense_layers": 1, "min_context": 100},
]


class SlowLane(ThreadLane):
    """A thread that takes its time, now more, now less. ``done``: what it did, in order."""

    most_s = 0.003

    def __init__(self):
        super().__init__()
        self.done = []

    def submit(self, work, *args):
        def slowly():
            time.sleep(random.random() * self.most_s)
            found = work(*args)
            self.done.append(args[1:3])
            return found

        return super().submit(slowly)


@pytest.fixture
def captured(monkeypatch):
    """Decode steps that are told that they are captured, on static tensors: the far side records and replays its work.

    (What is between the graphs runs at once; that CUDA graphs keep the order is for the tests on a GPU.)
    """
    gather = DecodeStep._gather

    def static(step):
        step._graph_pool = "not None"
        gather(step)
        step._graph_pool = None

    def choose(step, variant):
        step.batch.variant, step.batch.graph_key = variant, (step.bucket, variant)

    monkeypatch.setattr(DecodeStep, "_gather", static)
    monkeypatch.setattr(DecodeStep, "_choose", choose)


def far_engine(config, gate=0, num_pages=64, max_num_seqs=6, lane=None, **options):
    """As ``test_backend.spade_engine``, with a cache rank of its own on slow lanes."""
    config = AsyncSpade(**{name: getattr(config, name) for name in config.__match_args__} | {"cache_device": "cpu"})
    network, spec = TINY

    def wrap(pool, spec, dense):
        calibration = Calibration(ModelIdentity.of("tiny", spec, network.digest()), torch.device("cpu"))
        calibration.num_tokens = 1  # of which nothing is known: the first channels, as in test_backend
        lanes = FarLanes(*(SlowLane() if lane is None else lane() for _ in range(3)))
        at = max(gate, config.budget)
        backend = TwoDeviceBackend(
            pool, spec, config, dense, at, max_num_seqs, network.cos_sin, calibration, lanes=lanes
        )
        for state in (backend.predictor.windows, backend.sets.indices[:, 1:], backend.far.replica.k[:, 1:]):
            state.fill_(float("nan") if state.is_floating_point() else 10**6)  # what nobody wrote shows
        backend.sets.counts[:, 1:] = config.budget
        backend.sets.made_for.fill_(10**6)
        backend.predictor.next.fill_(3)
        return backend

    engine = make_engine(TINY, num_pages, wrap, max_num_seqs=max_num_seqs, **options)
    engine.runner._buckets = [*(bucket for bucket in (2, 4) if bucket < max_num_seqs), max_num_seqs]
    return engine


@pytest.mark.parametrize("method", METHODS)
def test_two_devices_are_one(method):
    """Prompts in chunks, siblings whose pages are copied, forced rows, cached prefixes, seats used again."""
    expected, found = (
        [tokens(llm, ASKED, params(n=2)) for _ in range(2)]
        for llm in (load(**method), load(**method, cache_device="cpu"))
    )
    assert found == expected


@pytest.mark.parametrize("parts", [1, 3, 9])
@pytest.mark.parametrize("method", [{}, METHODS[1] | {"dense_layers": 2}], ids=["keys", "index"])
def test_parts_of_one_layer_and_of_many(method, parts, monkeypatch):
    model = MODEL | {"num_hidden_layers": 7}
    expected = tokens(load(model, **method), ASKED, params(n=2))
    monkeypatch.setattr(two_devices, "PARTS", parts)
    llm = load(model, **method, cache_device="cpu")
    backend = llm.engine.backend
    layers = [layer for part in backend._parts for layer in part]
    assert layers == list(range(method.get("dense_layers", 0), 7)) and len(backend._parts) == min(parts, len(layers))
    assert tokens(llm, ASKED, params(n=2)) == expected


def test_the_far_side_has_the_keys_and_no_values():
    llm = load(cache_device="cpu")
    tokens(llm, ASKED, params(n=2))
    backend, stats = llm.engine.backend, llm.stats()
    replica = backend.far.replica
    assert isinstance(backend, TwoDeviceBackend) and stats["copied_pages"]
    assert torch.equal(replica.k[:, 1:], llm.pool.k[:, 1:]) and llm.pool.k[:, 1:].any()
    assert replica.v.data_ptr() == replica.k.data_ptr()
    assert stats["asyncspade_predictions"] and not stats["asyncspade_late"]
    assert stats["asyncspade_bytes_out"] > replica.k[:, 1:].count_nonzero() and stats["asyncspade_bytes_in"]


def test_what_it_does_not_do_is_refused():
    for option in ({"transfer": "packed"}, {"late": "stale"}, {"confidence": 0.5}, {"cache_rank": "127.0.0.1:1"}):
        with pytest.raises(ValueError, match="cache_device"):
            AsyncSpade(cache_device="cpu", **option)
    with pytest.raises(ValueError, match="device 'tpu'"):
        load(cache_device="tpu")


# -- slow lanes: every life of a chain, by definition


@BOTH
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("more", [{}, {"predictor": "last"}], ids=str)
def test_tokens_are_those_of_the_definition(more, parts, overlap, captured, monkeypatch):
    monkeypatch.setattr(two_devices, "PARTS", parts)
    config = spade(**BY_KEYS | more)
    engine, work = far_engine(config, overlap=overlap, max_batch_tokens=16), work_of(6)
    assert serve(engine, *work) == [test_backend.truths(one, config, 12) for one in work]
    stats, backend = engine.stats(), engine.backend
    assert stats["sparse_rows"] > 50 and stats["asyncspade_late"] == 0
    assert stats["asyncspade_predictions"] == 2 * (stats["sparse_rows"] + 6)
    replayed = [record for record in backend.far._recorded._records.values() if record is not None]
    assert len(replayed) >= 2 * parts, "the far side replayed nothing"


@BOTH
@pytest.mark.parametrize("is_captured", [False, True])
def test_an_index_over_there(is_captured, overlap, request):
    """Its pages are indexed when they are full: two variants of each step, and both find the same as one device."""
    if is_captured:
        request.getfixturevalue("captured")
    config, expected, work = spade(**BY_INDEX), work_of(6), work_of(6)
    serve(test_backend.spade_engine(config, gate=20, overlap=overlap), *expected)
    engine = far_engine(config, gate=20, overlap=overlap)
    serve(engine, *work)
    assert test_backend.logprobs(work) == test_backend.logprobs(expected)
    assert engine.stats()["asyncspade_late"] == 0 and engine.stats()["dense_rows"] > 0


@pytest.mark.parametrize("is_captured, overlap", [(False, False), (True, True)])
def test_any_life(is_captured, overlap, request, monkeypatch):
    if is_captured:
        request.getfixturevalue("captured")
    monkeypatch.setattr(SlowLane, "most_s", 0.0002)
    monkeypatch.setattr(test_backend, "spade_engine", far_engine)
    test_backend.test_forced_rows_and_siblings(overlap, 27)
    test_backend.test_seats_are_taken_over_without_a_trace(overlap)
    test_backend.test_cancelled_and_preempted_chains(overlap)


def test_any_life_at_random(captured, monkeypatch):
    monkeypatch.setattr(SlowLane, "most_s", 0.0)
    monkeypatch.setattr(test_backend, "spade_engine", far_engine)
    test_backend.test_any_life()


def test_a_step_that_dies_takes_nobody_else_along(monkeypatch):
    def engine(config, lane, **options):
        found = far_engine(config, **options)
        found.runner._buckets = None
        return found

    monkeypatch.setattr(test_backend, "spade_engine", engine)
    test_backend.test_a_step_that_dies_takes_nobody_else_along()


# -- order


def test_a_part_waits_for_its_own_sets_and_for_no_others(captured, monkeypatch):
    """What is read was stored; and a step ends while the far side is still at work on it."""
    config = spade(**BY_KEYS)
    engine = far_engine(config, max_num_seqs=1)
    backend, log = engine.backend, []
    stored, read, finish = backend.sets.store_part, backend.sets.select, backend.finish

    def store_part(layers, *args):
        stored(layers, *args)
        log.append(("stored", layers.start))

    def select(layer, query):
        log.append(("read", layer))
        return read(layer, query)

    def ended():
        finish()
        log.append(("ended", None))

    backend.sets.store_part, backend.sets.select, backend.finish = store_part, select, ended
    serve(engine, work_of(6)[5])
    is_ahead = 0
    for at, (what, layer) in enumerate(log):
        if what == "read":
            before = [event for event in log[:at] if event == ("stored", layer)]
            reads = [event for event in log[: at + 1] if event == ("read", layer)]
            assert len(before) == len(reads), "a set was read before it came, or replaced before it was read"
        if what == "stored":
            is_ahead += log[:at].count(("ended", None)) >= log[: at + 1].count(("stored", layer))
    assert is_ahead > 10, "no step ended before its last sets came: nothing was hidden"


def test_a_place_of_its_own_for_each_size():
    rooms = Rooms(torch.device("cpu"), 8)
    small, large = (rooms.of("facts", (3 * n + 1,), n, torch.int64) for n in (2, 8))
    assert small.data_ptr() == large.data_ptr() and large.numel() == 25
    assert rooms.of("facts", (4 * 2 + 1,), 2, torch.int64).data_ptr() != small.data_ptr()


def test_inline_lanes_are_slow_ones(captured):
    config, found = spade(**BY_KEYS), []
    for lane in (InlineLane, SlowLane):
        work = work_of(6)
        engine = far_engine(config, lane=lane, overlap=True, max_batch_tokens=24)
        serve(engine, *work)
        engine.backend._settle()
        stats = {k: v for k, v in engine.stats().items() if k.startswith("asyncspade") and "stall" not in k}
        found.append((test_backend.logprobs(work), stats))
    assert found[0] == found[1]


# -- GPUs: each case in a process of its own, so that one which dies takes no other along


CASES = {"eager": False, "captured": True}
FAR = ["cuda:0", pytest.param("cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU"))]


def on_gpus(number, near, far, is_captured):
    """What a child process runs."""
    method = METHODS[number]

    def run(**more):
        attention = {"method": "asyncspade", **METHOD, **KEYS, **method, **more}
        llm = LLM(
            MODEL | {"num_hidden_layers": 6}, device=near, load_format="dummy", page_size=16, kv_memory="64MiB",
            max_num_seqs=8, max_batch_tokens=100, cuda_graphs=is_captured, dtype="float32", attention=attention,
        )  # fmt: skip
        return [tokens(llm, ASKED, params(n=2, temperature=0)) for _ in range(3)], llm

    expected, _ = run()
    found, llm = run(cache_device=far)
    stats, backend = llm.stats(), llm.engine.backend
    assert found == expected
    assert (stats["graph_replays"] > 20) == is_captured and stats["sparse_rows"] > 40, stats
    assert stats["asyncspade_predictions"] > 0 and stats["asyncspade_late"] == 0
    for device in {near, far} - {"cpu"}:
        torch.cuda.synchronize(device)
    layers = slice(method.get("dense_layers", 0), None)
    assert torch.equal(backend.far.replica.k[layers, 1:].cpu(), llm.pool.k[layers, 1:].cpu())
    replayed = [record for record in backend.far._recorded._records.values() if record is not None]
    assert bool(replayed) == is_captured
    print("equal", stats["graph_replays"], stats["eager_steps"], stats["asyncspade_bytes_out"], len(replayed))


@pytest.mark.gpu
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", range(len(METHODS)))
def test_gpus_are_one(number, case, far):
    here = Path(__file__).parent
    paths = [here, here.parent / "engine", here.parent.parent / "src", *os.environ.get("PYTHONPATH", "").split(":")]
    child = subprocess.run(
        [sys.executable, "-c", f"import test_two_devices as t; t.on_gpus({number}, 'cuda:0', {far!r}, {CASES[case]})"],
        env=os.environ | {"PYTHONPATH": ":".join(map(str, paths))},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert child.returncode == 0 and "equal" in child.stdout, child.stdout[-2000:] + child.stderr[-4000:]
