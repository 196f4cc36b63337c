"""Chains that decode in seats (TOVA): right tokens whatever happens around them, and their pages go back."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_capture import CONFIG, cuda_engine, requests
from test_capture import serve as serve_cuda
from tiny_decoder import make_engine, params, prompts, serve, tiny_model

from slipstream.attention.backend import AttentionBackend, KVView
from slipstream.attention.dense import DenseBackend
from slipstream.attention.tova import TovaBackend
from slipstream.engine.engine import Engine, EngineConfig
from slipstream.engine.request import Request
from slipstream.kernels import ops
from slipstream.kvcache.pool import KVPool
from slipstream.models.weights import load_model
from slipstream.selection.tova import Tova
from slipstream.types import Batch, SamplingParams

BOTH = pytest.mark.parametrize("overlap", [False, True])
MODEL = tiny_model()


def tova_engine(budget, num_pages=64, max_num_seqs=6, **config):
    def wrap(pool, spec, dense):
        return TovaBackend(pool, spec, dense, Tova(budget=budget), max_num_seqs)

    return make_engine(MODEL, num_pages, wrap, max_num_seqs=max_num_seqs, **config)


class OneChain(AttentionBackend):
    """TOVA by definition, for one chain: a list of keys and values per layer."""

    def __init__(self, spec, budget):
        self.spec, self.budget = spec, budget
        self.kept = [[] for _ in range(spec.num_layers)]

    def view(self, layer):
        count, (heads, dim) = self.count, (self.spec.num_kv_heads, self.spec.head_dim)
        self.new = KVView(*torch.zeros(2, 1, heads, count, dim), torch.arange(count))
        return self.new

    def attend(self, layer, q):
        kept, out = self.kept[layer], []
        for t in range(self.count):
            kept.append((self.new.k[0, :, t].clone(), self.new.v[0, :, t].clone()))
            k, v = (
                torch.stack(x).repeat_interleave(q.shape[1] // self.new.k.shape[1], 1) for x in zip(*kept, strict=True)
            )
            weights = torch.einsum("hd,nhd->hn", q[t], k).mul(self.spec.scale).softmax(-1)
            out.append(torch.einsum("hn,nhd->hd", weights, v))
        weights = weights.mean(0)
        while len(kept) >= self.budget:
            worst = int(weights.argmin())
            del kept[worst]
            weights = torch.cat((weights[:worst], weights[worst + 1 :]))
        return torch.stack(out)


@cache
@torch.inference_mode()
def truth(ids, params, index, budget, dense=None):
    """Tokens of one chain: its prompt densely (or so much of it), then token by token."""
    network, spec = MODEL
    backend, known, done = OneChain(spec, budget), list(ids), 0
    while len(known) < len(ids) + params.max_tokens:
        end = (dense or len(ids)) if done == 0 else done + 1
        none, positions = torch.zeros(0), torch.arange(done, end)
        backend.count, done = end - done, end
        hidden = network.forward(
            Batch(torch.tensor(known)[positions], positions, *[none] * 6, [end], [0, len(positions)], [[]], 0), backend
        )
        if end == len(known):
            one = {"dtype": torch.float32}
            token = ops.sample(
                network.logits(hidden[-1:]),
                torch.tensor([params.temperature], **one),
                torch.tensor([params.top_k], dtype=torch.int32),
                torch.tensor([params.top_p], **one),
                torch.tensor([params.min_p], **one),
                torch.tensor([(params.seed or 0) + index]),
                torch.tensor([len(known)]),
            )
            known.append(int(token))
    return known[len(ids) :]


def truths(request, budget):
    own, ids = request.params, tuple(request.prompt_ids)
    return [truth(ids, own, i, budget, request.dense_tokens) for i in range(own.n)]


@pytest.fixture(scope="module")
def full():
    return serve(make_engine(MODEL), *(Request(ids, params(i)) for i, ids in enumerate(prompts(6))))


@BOTH
@pytest.mark.parametrize("budget", [60, 100])
def test_a_budget_that_is_never_exceeded_is_full_attention(full, overlap, budget):
    """The longest chain attends to 59 tokens."""
    engine = tova_engine(budget, overlap=overlap, max_batch_tokens=24)
    assert serve(engine, *(Request(ids, params(i)) for i, ids in enumerate(prompts(6)))) == full
    assert engine.stats()["tova_evicted_tokens"] == 0


@BOTH
@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("budget", [4, 17])
def test_tokens_are_those_of_the_definition(full, overlap, chunk, budget):
    engine = tova_engine(budget, overlap=overlap, max_batch_tokens=chunk)
    work = [Request(ids, params(i)) for i, ids in enumerate(prompts(6))]
    found = serve(engine, *work)
    assert found == [truths(one, budget) for one in work] and found != full
    lost = sum(len(one.prompt_ids) + 19 - budget for one in work if len(one.prompt_ids) + 19 > budget)
    assert engine.stats()["tova_evicted_tokens"] == lost


@BOTH
def test_pages_go_back_when_the_prompt_is_done_and_stay_in_the_cache(overlap):
    engine = tova_engine(12, overlap=overlap)
    ids = prompts(6)[5]  # 40 tokens: 5 pages of 8
    one = Request(ids, SamplingParams(temperature=1, seed=1, n=3, max_tokens=50, ignore_eos=True))
    engine.add(one)
    for _ in range(4):
        engine.step()
    assert len(engine.scheduler.running) == 3 and engine.table.num_used == 0 and engine.table.num_cached == 5
    assert engine.stats()["pages_left"] == 5
    engine.table.forget()
    for pages in (engine.backend.pool.k, engine.backend.pool.v):
        pages.fill_(torch.nan)
    serve(engine)
    assert [c.token_ids for c in one.completions] == truths(one, 12)


@BOTH
def test_more_chains_run_than_pages_could_hold(overlap):
    engine = tova_engine(8, num_pages=9, overlap=overlap)  # 64 tokens; the chains below have 240
    work = [Request(ids, params(i, 40 - len(ids))) for i, ids in enumerate(prompts(5))]
    work.append(Request(prompts(6)[4], params(5, 7)))
    assert serve(engine, *work) == [truths(one, 8) for one in work]
    assert engine.stats()["preemptions"] == 0
    assert engine.stats()["tova_evicted_tokens"] > 0


@BOTH
@pytest.mark.parametrize("n", [1, 3])
def test_the_rest_of_a_prompt_may_run_in_the_seat(overlap, n):
    engine = tova_engine(9, overlap=overlap)
    own = SamplingParams(temperature=1, seed=4, n=n, max_tokens=12, ignore_eos=True)
    work = [Request(prompts(4)[3], own, dense_tokens=dense) for dense in (1, 8, 25, 26)]
    assert serve(engine, *work) == [truths(one, 9) for one in work]
    # the last dense token runs, even where the cache has it: it decides what is kept
    again = [Request(one.prompt_ids, own, dense_tokens=one.dense_tokens) for one in work]
    assert serve(engine, *again) == [truths(one, 9) for one in work]
    assert engine.stats()["tova_evicted_tokens"] > 0


@BOTH
def test_cancelled_and_preempted_chains_leave_their_seats(overlap):
    engine = tova_engine(10, overlap=overlap, max_num_seqs=2)
    first, second, third = (Request(prompts(5)[i], params(i, 25)) for i in (3, 2, 4))
    for one in (first, second, third):
        engine.add(one)
    for _ in range(8):
        engine.step()
    assert engine.cancel(first.request_id)
    for _ in range(5):
        engine.step()
    engine.scheduler.preempt(next(c for c in engine.scheduler.running if c.request is second))
    serve(engine)
    for one in (second, third):  # the tokens that it had are decoded again
        assert one.completions[0].token_ids == truths(one, 10)[0]
    assert engine.table.num_used == 0 and sorted(engine.scheduler._seats) == [1, 2]


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


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(ACTION, min_size=5, max_size=25),
    st.sampled_from([3, 9, 50]),
    st.integers(7, 12),
    st.integers(3, 5),
    st.sampled_from([1, 9, 64]),
    st.booleans(),
)
def test_any_life(actions, budget, num_pages, seats, chunk, overlap):
    engine = tova_engine(budget, num_pages, seats, max_batch_tokens=chunk, overlap=overlap)
    work, left = [], 4000
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
        for completion, expected in zip(one.completions, truths(one, budget), strict=bool(one.generate)):
            if completion.finish_reason == "abort":
                expected = expected[: len(completion.token_ids)]
            assert completion.token_ids == expected
    assert engine.table.num_used == 0 and engine.table.num_available == num_pages - 1
    assert sorted(engine.scheduler._seats) == list(range(1, seats + 1)) and not engine.scheduler.running


@pytest.mark.gpu
def test_captured_steps_give_the_tokens_of_eager_ones():
    network, spec = load_model(CONFIG, device="cuda", dtype="float32", load_format="dummy", seed=1)

    def make(budget, **config):
        pool = KVPool(spec.num_layers, 200, spec.num_kv_heads, 16, spec.head_dim, spec.dtype, "cuda")
        backend = TovaBackend(pool, spec, DenseBackend(pool, spec), Tova(budget=budget), 12)
        return Engine(network, spec, pool, backend, EngineConfig(max_num_seqs=12, **config))

    assert serve_cuda(make(200), requests(11)) == serve_cuda(cuda_engine(), requests(11))
    expected = serve_cuda(make(40, overlap=False, cuda_graphs=False), requests(11))
    for overlap in (False, True):
        engine = make(40, overlap=overlap)
        assert serve_cuda(engine, requests(11)) == expected
        assert engine.stats()["graph_replays"] > 20 and engine.stats()["pages_left"] > 0
        assert engine.stats()["tova_evicted_tokens"] > 0
