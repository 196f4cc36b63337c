"""Recorded queries are those that decode steps make, and the comparison of predictors says what it should."""

import pytest
import torch

from slipstream import LLM, SamplingParams, predictors
from slipstream.asyncspade.traces import QueryTrace, record
from slipstream.kernels import predict
from slipstream.models.rope import cos_sin_table
from slipstream.predictors import Candidate, Rule, measure, positions, rows_of

SHAPE = {"rope_type": "default", "rope_theta": 10000.0}
COS_SIN = cos_sin_table(SHAPE, 16, 512, 512, "cpu")
RULE = Rule(sink=1, recent=8, points=20)


def chain(period=12, length=300, layers=1, seed=0):
    """Queries that repeat themselves before RoPE, and random keys: the best guess is what came a period ago."""
    generator = torch.Generator().manual_seed(seed)
    once = torch.randn(period, 4, 16, generator=generator)
    pre = once.repeat(-(-length // period), 1, 1)[:length]
    at = torch.arange(length)
    turned = predict.predict_queries(
        pre.unsqueeze(1), at, at - 1, at, COS_SIN, "last", 0.0, True
    )  # a window of one query each, predicted to be the same one position on
    keys = torch.randn(length, 2, 16, generator=generator)
    return QueryTrace([turned] * layers, [keys] * layers, 100)


def compared(text, trace=None):
    trace = trace or chain()
    candidates = predictors.parse_candidates(text)
    found = [measure(trace, candidates, RULE, COS_SIN, 0.5, positions(trace, RULE.points))]
    return {(row["predictor"], row["budget"]): row for row in rows_of(found, "cell", RULE)}


def test_recorded_queries_are_those_of_decode_steps(tiny):
    llm = tiny(attention="window", prefix_cache=False)
    ids = list(range(1, 41))
    trace = record(llm, ids, 30)
    assert trace.num_tokens == 40 and len(trace.q) == len(trace.k) == llm.spec.num_layers
    seen = []
    backend = llm.engine.backend
    attend = backend.attend
    backend.attend = lambda layer, q: (seen.append((layer, q.clone())), attend(layer, q))[1]
    llm.generate({"prompt_token_ids": ids, "dense_tokens": 30}, SamplingParams(temperature=0, max_tokens=1))
    decoded = [q for layer, q in seen if layer == 1 and len(q) == 1]
    assert len(decoded) == 10
    torch.testing.assert_close(torch.cat(decoded), trace.q[1][30:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(trace.foreseen[0], trace.q[0])
    assert trace.foreseen[1].shape == trace.q[1].shape and not torch.equal(trace.foreseen[1], trace.q[1])
    assert "foresee" not in vars(backend)
    slots = trace.k[1].shape
    assert slots == (40, llm.spec.num_kv_heads, llm.spec.head_dim)


def test_foreseen_queries_are_those_that_the_method_chooses_with(tiny):
    ids, seen = list(range(1, 41)), []
    trace = record(tiny(attention="window", prefix_cache=False), ids, 30)
    llm = tiny(attention={"method": "asyncspade", "budget": 64, "recent": 16, "channels": 16})
    llm.engine.backend.gate = 16  # sparse, and yet with room for all tokens
    inner = llm.engine.backend.selector.inner
    select = inner.select
    inner.select = lambda layer, q: (seen.append((layer, q.clone())), select(layer, q))[1]
    llm.generate({"prompt_token_ids": ids, "dense_tokens": 39}, SamplingParams(temperature=0, max_tokens=1))
    (chosen_with,) = [q for layer, q in seen if layer == 1]
    torch.testing.assert_close(chosen_with, trace.foreseen[1][39:], atol=1e-5, rtol=1e-4)


def test_a_true_foresight_is_the_oracle():
    trace = chain()
    rows = compared("oracle,residual", QueryTrace(trace.q, trace.k, 100, trace.q))
    own, bound = rows["residual", "1/8"], rows["oracle", "1/8"]
    assert own["overlap"] == 1 and own["mass"] >= bound["mass"] and own["cosine"] == pytest.approx(1)


def test_what_cannot_be_recorded_is_refused(tiny):
    for options in ({"attention": "full", "prefix_cache": False}, {"attention": "window"}):
        with pytest.raises(ValueError, match="queries are recorded with"):
            record(tiny(**options), [1, 2, 3], 1)


def test_bounds_and_a_chain_that_repeats_itself():
    rows = compared("oracle,window,last,mean:window=24,analog:window=24,ridge:window=32:ridge=0.0001,analog:window=8")
    for budget in ("1/8", "1/16"):
        mass = {name: rows[name, budget]["mass"] for name, of in rows if of == budget}
        assert max(mass["window"], mass["last"]) < mass["oracle"] - 0.1  # the latest query says nothing of the next
        assert mass["analog:window=24"] == pytest.approx(mass["oracle"], abs=1e-3)  # the window covers the period
        assert mass["ridge:window=32:ridge=0.0001"] == pytest.approx(mass["oracle"], abs=0.02)
        assert mass["analog:window=8"] < mass["oracle"] - 0.05  # and here it does not
    best, worst = rows["analog:window=24", "1/8"], rows["last", "1/8"]
    assert best["cosine"] > 0.99 and best["overlap"] > 0.95 and best["overlap_free"] > 0.95
    assert worst["overlap_free"] < worst["overlap"] < 0.8
    assert worst["mass"] <= worst["mass_gate_2"] <= worst["mass_gate_5"] < worst["mass_gate_10"]
    assert worst["confidence_2"] <= worst["confidence_5"] <= worst["confidence_10"] < 1


def test_rotating_on_is_better_than_not():
    rows = compared("analog:window=24,analog:window=24:rotate=0")
    assert rows["analog:window=24", "1/8"]["mass"] > rows["analog:window=24:rotate=0", "1/8"]["mass"]


def test_guesses_see_nothing_of_the_future():
    whole = chain()
    cut = QueryTrace([q[:201].clone() for q in whole.q], [k[:201].clone() for k in whole.k], 100)
    at = torch.tensor([120, 150, 180])
    candidate = Candidate.parse("ridge:window=32")
    guesses = [candidate.queries(0, trace.q[0], at, COS_SIN) for trace in (whole, cut)]
    assert torch.equal(*guesses)


@pytest.mark.parametrize("text, words", [
    ("rigde", "predictor 'rigde' is unknown; did you mean 'ridge'?"),
    ("ridge:windw=4", "predictor 'ridge' has no option 'windw'; did you mean 'window'?"),
    ("last:beta=4", "predictor 'last' has no option 'beta'"),
    ("ridge:window=500", "takes a window of at most 128"),
    ("mlp", "'mlp' and predictor_file go together"),
    (" , ", "no predictor is named"),
])  # fmt: skip
def test_bad_predictors(text, words):
    with pytest.raises(ValueError) as caught:
        predictors.parse_candidates(text)
    assert words in str(caught.value)


def test_a_budget_that_holds_nothing():
    with pytest.raises(ValueError, match="cannot hold sink"):
        Rule().tokens(RULE.budgets[1], 500)


def test_a_comparison_of_the_embedded_draft(tmp_path):
    llm = LLM(
        "slipstream-draft", attention="window", prefix_cache=False, device="cpu", max_model_len=2048, kv_memory="64MiB"
    )
    cells = predictors.cells_of("program:steps=10,needle_single", 512, 2)
    assert [cell.protocol for cell in cells] == ["A", "B"]
    rule = Rule(recent=16, points=4)
    candidates = predictors.parse_candidates("oracle,last,ridge,residual")
    rows = [row for cell in cells for row in predictors.compare(llm, cell, candidates, rule, 0, False)]
    assert len(rows) == 2 * 2 * 4 and all(row["chains"] == 2 and 0 < row["mass"] <= 1 for row in rows)
    lines = predictors.pivot(rows, "1/8")
    assert [line["predictor"] for line in lines] == ["oracle", "last", "ridge", "residual"] and len(lines[0]) == 3
    predictors.draw(rows, tmp_path / "p.png", "test")
    assert (tmp_path / "p.png").stat().st_size > 10_000
