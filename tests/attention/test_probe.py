"""A probe measures what a selection gets, and changes nothing."""

import pytest
import torch

from slipstream import SamplingParams
from slipstream.attention.probe import Probe
from slipstream.build import parse_attention
from slipstream.types import Selection

SMALL = {"budget": 24, "sink": 2, "recent": 4, "min_context": 24}
PROMPTS = [[(7 * i * j + j) % 60 for j in range(40 + 30 * i)] for i in range(1, 3)]


class Fixed:
    """A selector that always selects the same."""

    def __init__(self, selection):
        self.selection = selection

    def plan(self, batch, lengths):
        pass

    def select(self, layer, query):
        return self.selection

    def attended(self, length):
        return length


def test_recall_and_mass_are_what_they_say(tiny):
    """Against loops over heads: the true best tokens, sinks and recent ones inside, and the softmax on the chosen."""
    llm = tiny(page_size=4)
    pool, spec = llm.pool, llm.spec
    generator = torch.Generator().manual_seed(0)
    pool.k.copy_(torch.randn(pool.k.shape, generator=generator))
    lengths, table = torch.tensor([0, 11], dtype=torch.int32), torch.tensor([[0, 0, 0], [5, 2, 7]], dtype=torch.int32)
    chosen = [0, 3, 4, 9, 10]
    indices = torch.tensor([[[-1] * 6], [[*chosen, -1]]], dtype=torch.int32)
    probe = Probe(Fixed(Selection(indices, torch.tensor([[0], [5]]))), pool, spec, 6, 1, 2, every=2)
    query = torch.randn((2, spec.num_heads, spec.head_dim), generator=generator)

    class Batch:
        page_table, graph_key = table, None

    keys = pool.k[1][[5, 2, 7]][:, 0].reshape(-1, spec.head_dim)[:11]
    weights = (query[1] @ keys.T * spec.scale).softmax(-1)
    free = [t for t in weights.sum(0).argsort(descending=True).tolist() if t not in (0, 9, 10)]
    best = {0, 9, 10, *free[:3]}
    for _ in range(2):  # the second step is not looked at
        probe.plan(Batch, lengths)
        assert probe.select(1, query).indices is indices
    report = probe.report()
    assert report["probed_steps"] == 1
    assert report["recall_by_layer"] == {1: pytest.approx(len(best & set(chosen)) / 6, abs=1e-4)}
    assert report["mass"] == pytest.approx(float(weights[:, chosen].sum(1).mean()), abs=1e-5)
    probe.reset()
    assert probe.report() == {}


def watched(tiny, attention):
    """(tokens of all chains, the probe's report) of an engine with a probe in it."""
    llm = tiny(attention=attention, cuda_graphs=False, page_size=16)
    probe = Probe.of(llm.engine.backend, llm.spec, parse_attention(attention), every=3)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs], probe.report()


def test_no_method_captures_more_than_the_oracle_and_tokens_stay(tiny):
    reports = {}
    keys = {"scoring": "keys", "aggregate": "sum", "window": 8}
    more = {"quest": {"dense_layers": 0, "block": 4}, "asyncspade": keys}  # the latter's sets are kept by seat
    for method in ("oracle", "window", "quest", "asyncspade"):
        attention = {"method": method, **SMALL, **more.get(method, {})}
        tokens, reports[method] = watched(tiny, attention)
        plain = tiny(attention=attention, page_size=16).generate(
            PROMPTS, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        )
        assert tokens == [output.outputs[0].token_ids for output in plain], method
    assert reports["oracle"]["recall"] == 1.0 and reports["oracle"]["probed_steps"] == 7
    for method in ("window", "quest", "asyncspade"):
        assert 0 < reports[method]["recall"] < 1
        for layer, mass in reports["oracle"]["mass_by_layer"].items():
            assert reports[method]["mass_by_layer"][layer] < mass <= 1


def test_nothing_to_probe(tiny):
    for attention in ("full", {"method": "tova", "budget": 24}):
        llm = tiny(attention=attention)
        assert Probe.of(llm.engine.backend, llm.spec, parse_attention(attention)) is None
