"""SparseBackend: what it attends to, per request and step; through steps of a tiny cache, and through whole models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from steps import Requests, make_spec

from slipstream import DoubleSparsity, Oracle, Quest, SamplingParams, TwoLevel, Window, calibrate
from slipstream.attention.calibration import Calibration, ModelIdentity
from slipstream.attention.dense import DenseBackend
from slipstream.attention.sparse import DENSE, INDEXING, MIXED, SPARSE, SparseBackend
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool

COMMON = {"sink": 2, "recent": 3, "min_context": 0}
METHODS = {
    "window": lambda budget, **more: Window(budget, **COMMON, **more),
    "oracle": lambda budget, **more: Oracle(budget, **COMMON, **more),
    "quest": lambda budget, **more: Quest(budget, **COMMON, block=4, **{"dense_layers": 0, **more}),
    "double_sparsity": lambda budget, **more: DoubleSparsity(
        budget, **COMMON, channels=8, **{"dense_layers": 0, **more}
    ),
    "two_level": lambda budget, **more: TwoLevel(budget, **COMMON, block=8, blocks=2 + budget // 4, channels=8, **more),
    "two_level sum": lambda budget, **more: METHODS["two_level"](budget, aggregate="sum", **more),
}


class Steps(Requests):
    """Requests whose decode rows come first, as the engine orders them, and whose batches know their variant."""

    backend: SparseBackend

    def grow(self, counts, graph_key=None):
        batch = super().grow(counts, graph_key)
        starts = batch.query_start_host
        news = [end - start for start, end in zip(starts, starts[1:], strict=False)]
        num_decodes = next((b for b, count in enumerate(news) if count > 1), len(news))
        lengths = batch.lengths_host[:num_decodes]
        return dataclasses.replace(
            batch, num_decodes=num_decodes, variant=self.backend.variant(lengths) if lengths else 0
        )


def _make(config, gate, shape=(4, 2, 16), page=8, width=10, num_requests=3, layers=2, pages=None, online=False):
    spec = make_spec(*shape, torch.float32, layers)
    pool = KVPool(layers, pages or 1 + num_requests * width, shape[1], page, shape[2], torch.float32)
    for store in (pool.k, pool.v):
        store.fill_(torch.nan)
    index = KeyIndex(pool, config.index) if config.index else None
    selector = config.selector(pool, spec, index)
    sums = Calibration(ModelIdentity.of("tiny", spec, "")) if online else None
    dense = DenseBackend(pool, spec)
    backend = SparseBackend(pool, spec, index, selector, dense, gate, config.dense_layers, config.unread, sums)
    steps = Steps(pool, spec, num_requests, width)
    steps.backend = backend
    return backend, steps


STEPS = ((9, 0, 3), (1, 5, 1), (0, 17, 1), (1, 1, 1), (1, 8, 0), (1, 1, 1), (0, 1, 1), (1, 1, 30), (1, 1, 1))


@pytest.mark.parametrize("gate", (0, 12))
@pytest.mark.parametrize("dense_layers", (0, 1))
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_the_context_is_full_attention(method, dense_layers, gate):
    """At fp32 1e-5, through prompts, chunks, mixed and decode steps, every form among them; checked by ``run``."""
    backend, steps = _make(METHODS[method](80, dense_layers=dense_layers), gate)
    forms = set()
    variant = backend.variant
    backend.variant = lambda lengths: forms.add(variant(lengths) % INDEXING) or variant(lengths)
    for counts in STEPS:
        steps.run(backend, counts)
    assert forms == ({SPARSE} if gate == 0 else {DENSE, SPARSE, MIXED})
    stats = backend.stats()
    assert stats["sparse_rows"] > 0 and stats["density"] == 1
    assert (stats["dense_rows"] > 0) == (gate > 0)


@pytest.mark.parametrize("gate", (0, 12))
@pytest.mark.parametrize("method", ("quest", "double_sparsity", "two_level", "two_level sum"))
def test_an_index_that_grows_by_the_page_is_the_same_index(method, gate):
    """Where recent tokens cover a page that is not full, it is indexed when it fills: same outputs, fewer launches."""
    outputs, launches = [], []
    config = dataclasses.replace(METHODS[method](40), recent=7)
    if method == "double_sparsity":
        assert config.unread == 0  # its softmax reads the labels of all tokens, so it never lacks any
        config = dataclasses.replace(config, aggregate="peak")
    for by_page in (False, True):
        backend, steps = _make(config, gate)
        assert backend._by_page
        backend._by_page = by_page
        steps.check = lambda *_: None  # not full attention: the twins are compared with each other
        extend, count = backend.index.extend, []
        backend.index.extend = lambda layer, *args, extend=extend, count=count: (
            count.append(layer),
            extend(layer, *args),
        )
        seen = []
        attend = backend.attend
        backend.attend = lambda layer, q, attend=attend, seen=seen: seen.append(attend(layer, q)) or seen[-1]
        for counts in (*STEPS, *[(1, 1, 1)] * 20):
            steps.run(backend, counts)
        outputs.append(seen)
        launches.append(len(count))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert launches[1] < launches[0]


def _decode_once(config, lengths, gate, members=None, seed=5):
    """Fill a cache of long requests, then one decode step of some of them: (out [B, Hq, D] of layer 1, backend)."""
    backend, steps = _make(config, gate, (2, 1, 16), page=64, width=142, num_requests=len(lengths), pages=430)

    def draw(key, rows, heads):
        """The same for the same key, whoever else is in the step."""
        generator = torch.Generator().manual_seed(seed + 31 * key + rows)
        return torch.randn(rows, heads, 16, generator=generator)

    for b, length in enumerate(lengths):
        counts = [0] * len(lengths)
        counts[b] = length - 1
        _attend(backend, steps, counts, draw)
    members = range(len(lengths)) if members is None else members
    return _attend(backend, steps, [int(b in members) for b in range(len(lengths))], draw), backend, steps


def _attend(backend, steps, counts, draw):
    batch = steps.grow(counts)
    backend.plan(batch)
    for layer in range(2):
        k, v, q = (torch.cat([draw(b + 100 * (layer + 2 * i), n, heads) for b, n in enumerate(counts) if n])
                   for i, heads in enumerate((1, 1, 2)))  # fmt: skip
        steps.store(backend, layer, batch, counts, k, v)
        if batch.is_decode:
            out, last = backend.attend(layer, q), (layer, batch, counts, q)
        else:
            # The prompt's own attention is the dense backend's business: only its index matters here.
            backend.dense.attend = lambda layer, q: q
            backend.attend(layer, q)
            del backend.dense.attend
    return (out, last) if batch.is_decode else None


@pytest.mark.parametrize("method", METHODS)
def test_ragged_lengths_are_gated_each_on_its_own(method):
    lengths, config = (17, 4096, 9000), METHODS[method](128)
    (out, last), backend, steps = _decode_once(config, lengths, gate=1000)
    stats = backend.stats()
    assert (stats["dense_rows"], stats["sparse_rows"], stats["sparse_steps"]) == (1, 2, 1)
    assert stats["tokens_in_context"] == sum(lengths)
    assert stats["tokens_attended"] == 17 + 2 * 128 and stats["density"] < 0.03
    alone = DenseBackend(backend.pool, backend.spec)
    layer, batch, counts, q = last
    alone.plan(batch)
    exact = alone.attend(layer, q)
    assert torch.equal(out[0], exact[0])
    assert (out[1:] - exact[1:]).abs().amax((1, 2)).min() > 1e-3
    for b in (1, 2):
        (own, _), other, _ = _decode_once(config, lengths, gate=1000, members=(b,))
        torch.testing.assert_close(own[0], out[b], rtol=0, atol=0)
        assert other.stats()["sparse_rows"] == 1


def test_dense_layers_read_everything():
    (_, (_, _, _, _)), backend, _ = _decode_once(METHODS["oracle"](128, dense_layers=1), (900, 500), gate=128)
    assert backend.stats()["tokens_attended"] == (900 + 500) / 2 + 128


def test_variants():
    backend, _ = _make(METHODS["window"](8), gate=20)
    assert [backend.variant(lengths) for lengths in ([20, 3], [21, 30], [20, 21])] == [DENSE, SPARSE, MIXED]
    assert set(backend.variants) == {DENSE, SPARSE, MIXED}
    assert tuple(_make(METHODS["window"](8), gate=4096)[0].variants) == (DENSE,)  # make_spec: 4096 positions


def test_plan_comes_first():
    backend, _ = _make(METHODS["window"](8), gate=20)
    for call in (lambda: backend.view(0), lambda: backend.attend(0, torch.zeros(1, 4, 16))):
        with pytest.raises(AssertionError, match="plan"):
            call()


def test_the_first_prompts_calibrate():
    """Channels follow the prompts until there are 128 tokens, labels follow the channels, and then they stay."""
    backend, steps = _make(METHODS["double_sparsity"](320), 0, width=40, online=True)
    seen = []
    for counts in ((5, 0, 0), (1, 0, 0), (1, 40, 0), (1, 1, 90), (1, 1, 1), (1, 1, 60), (1, 1, 1)):
        steps.run(backend, counts)
        channels, labels, _ = backend.index.labels(1)
        seen.append(channels.clone())
        fresh = KeyIndex(backend.pool, backend.index.parts)
        pages = {page for b, held in enumerate(steps.pages) for page in held[: -(-steps.lengths[b] // 8)]}
        fresh.set_channels(1, channels, backend.pool.k[1], pages)
        for b, length in enumerate(steps.lengths):
            for at in range(length):
                place = (steps.pages[b][at // 8], slice(None), at % 8)
                assert torch.equal(labels[place], fresh.labels(1).labels[place])
    assert not torch.equal(seen[0], seen[2]) and torch.equal(seen[0], seen[1])
    assert torch.equal(seen[3], seen[5]), "135 prompt tokens fix them"


# through models

PROMPTS = [[(7 * i + 3 * j) % 60 + 1 for j in range(n)] for i, n in enumerate((3, 50, 21, 90))]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def _ids(outputs):
    return [chain.token_ids for output in outputs for chain in output.outputs]


def _tiny(tiny, config, **options):
    return tiny(attention=config, page_size=8, max_model_len=160, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_tiny_model_with_a_budget_of_the_context_says_the_same(tiny, method):
    llm = _tiny(tiny, METHODS[method](160))
    assert llm.engine.backend.gate == 160  # below the budget everything would be dense
    llm.engine.backend.gate = 0
    assert _ids(llm.generate(PROMPTS, GREEDY)) == _ids(_tiny(tiny, "full").generate(PROMPTS, GREEDY))
    assert llm.stats()["sparse_rows"] == 4 * 23 and llm.stats()["density"] == 1


def test_preempted_chains_come_back(tiny):
    config = METHODS["two_level"](160)
    llm = _tiny(tiny, config, kv_memory=18 * _tiny(tiny, config).memory.page_bytes)
    llm.engine.backend.gate = 0
    params = dataclasses.replace(GREEDY, max_tokens=60)
    prompts = [prompt[:20] for prompt in PROMPTS[1:]]
    assert _ids(llm.generate(prompts, params)) == _ids(_tiny(tiny, "full").generate(prompts, params))
    assert llm.stats()["preemptions"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_tokens_do_not_depend_on_the_rest_of_the_batch(tiny, tmp_path, method):
    more = {}
    if method in ("double_sparsity", "two_level", "two_level sum"):  # channels of the first prompt would depend on it
        more["calibration"] = str(tmp_path / "channels.safetensors")
        calibrate(_tiny(tiny, "window"), PROMPTS).save(more["calibration"])
    config = METHODS[method](16, **more)
    together = _tiny(tiny, config)
    ids = _ids(together.generate(PROMPTS, GREEDY))
    stats = together.stats()
    assert stats["sparse_rows"] > 70 and stats["dense_rows"] > 0 and 0.1 < stats["density"] < 0.5
    alone = _tiny(tiny, config, prefix_cache=False)
    assert [chains for prompt in PROMPTS for chains in _ids(alone.generate(prompt, GREEDY))] == ids
    # Shared prefixes, and several chains of a prompt. (A preempted chain is not the same: it comes back densely.)
    again = _ids(together.generate(PROMPTS, GREEDY))
    assert again == ids and together.stats()["cached_tokens"] > 0
    forks = _ids(together.generate(PROMPTS[1], dataclasses.replace(GREEDY, n=3)))
    assert forks == [ids[1]] * 3


def test_below_the_gate_a_sparse_method_is_full_attention_to_the_bit(tiny):
    params = dataclasses.replace(GREEDY, logprobs=3)
    config = dataclasses.replace(METHODS["two_level"](16), min_context=160)
    pair = [_tiny(tiny, attention).generate(PROMPTS, params) for attention in (config, "full")]
    first, second = ([chain.logprobs for output in outputs for chain in output.outputs] for outputs in pair)
    assert first == second


def test_the_question_runs_sparse_where_the_context_is_dense(tiny):
    llm = _tiny(tiny, METHODS["oracle"](16))
    llm.generate({"prompt_token_ids": PROMPTS[3], "dense_tokens": 60}, GREEDY)
    assert llm.stats()["sparse_rows"] == 30 + 23


def test_the_embedded_draft(draft):
    """A budget of everything changes nothing; one of a tenth of the context is what is attended, and deterministic."""
    from slipstream import LLM, tasks

    problem = tasks.make("needle_single", 3, num_tokens=700)
    prompt = draft.encode(problem.prompt, chat=True)
    params = SamplingParams(temperature=0, max_tokens=24)
    options = {"device": "cpu", "max_model_len": 2048, "kv_memory": "64MiB"}
    full = _ids(draft.generate(prompt, params))
    config = TwoLevel(2048, sink=4, recent=32, blocks=32, channels=32, min_context=0)
    everything = LLM("slipstream-draft", attention=config, **options)
    everything.engine.backend.gate = 0
    assert _ids(everything.generate(prompt, params)) == full
    assert everything.stats()["density"] == 1 and everything.stats()["sparse_rows"] > 10
    little = LLM("slipstream-draft", attention=dataclasses.replace(config, budget=96, blocks=8), **options)
    assert _ids(little.generate(prompt, params)) == _ids(little.generate(prompt, params))
    stats = little.stats()
    assert stats["tokens_attended"] == 96 * stats["sparse_rows"] > 0 and stats["dense_rows"] == 0
    assert 0 < stats["index_bytes"] and stats["density"] < 0.15


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_captured_steps_say_what_eager_ones_say(method):
    """Lengths on both sides of the gate, so that graphs of every variant run."""
    from slipstream import LLM

    config = dataclasses.replace(METHODS[method](64, dense_layers=1), min_context=100)
    options = {"device": "cuda", "dtype": "float32", "kv_memory": "64MiB", "max_model_len": 512, "attention": config}
    prompts = [[(7 * i + 3 * j) % 400 + 1 for j in range(n)] for i, n in enumerate((30, 90, 200))]
    params = dataclasses.replace(GREEDY, max_tokens=40)
    both = []
    for graphs in (True, False):
        llm = LLM("slipstream-draft", cuda_graphs=graphs, **options)
        both.append([_ids(llm.generate(prompts, params)), _ids(llm.generate(prompts[2], params))])
        stats = llm.stats()
        assert (stats["graph_replays"] > 0) == graphs and stats["sparse_rows"] > 80 and stats["dense_rows"] > 40
    assert both[0] == both[1]
