"""A timeline puts every call in its row, step and layer, and its numbers add up."""

import json

import pytest

from slipstream import LLM, timeline
from slipstream.timeline import Span, span, summary


@pytest.mark.parametrize("name, kind, row", [
    ("_split_kernel", "attend", "main"), ("void flashinfer::BatchDecodeWithPagedKVCacheKernel<x>", "attend", "main"),
    ("nvjet_tst_128x64_TNT", "linear", "main"), ("_qk_norm_rope_store_kernel", "rope", "main"),
    ("_label_kernel", "select", "ahead"), ("_union_kernel", "select", "ahead"), ("store_sets", "select", "ahead"),
    ("_extend_kernel", "index", "ahead"), ("push_and_predict", "predict", "ahead"), ("check_queries", "check", "main"),
    ("Memcpy PtoP (Device -> Device)", "transfer", "link"), ("_rms_norm_kernel", "other", "main"),
])  # fmt: skip
def test_names(name, kind, row):
    found = span(name, 0.0, 1.0)
    assert (found.kind, found.row) == (kind, row)


def test_hidden_time_and_stalls():
    spans = [
        Span("sparse_attention", "attend", "main", 0.0, 10.0, 0, 0),
        Span("linear", "linear", "main", 20.0, 10.0, 0, 0),
        Span("push_and_predict", "predict", "ahead", 5.0, 20.0, 0, 0),  # 5 to 25: with the main row 5 + 5 of 20
    ]
    found = summary(spans + timeline._stalls(spans))
    assert found["hidden"] == 0.5 and found["stalls"] == 1 and found["stall_us"] == 10.0
    assert found["us_by_kind"] == {"attend": 10.0, "linear": 10.0, "predict": 20.0, "stall": 10.0}
    assert found["by_layer"] == [{"layer": 0, "attend_us": 10.0, "ahead_us": 20.0}]


@pytest.mark.parametrize("attention, ahead", [
    ({"method": "asyncspade", "budget": 64, "min_context": 64, "recent": 16}, {"predict", "select"}),
    ({"method": "two_level", "budget": 64, "min_context": 64, "recent": 16}, {"select"}),
    ("full", set()),
])  # fmt: skip
def test_a_timeline_on_a_cpu(attention, ahead, tmp_path):
    llm = LLM("slipstream-draft", attention=attention, device="cpu", max_model_len=1024, kv_memory="64MiB")
    spans = timeline.trace(llm, 2, 200, 3)
    layers = llm.spec.num_layers
    attends = [one for one in spans if one.kind == "attend"]
    assert [(one.step, one.layer) for one in attends] == [(step, layer) for step in range(3) for layer in range(layers)]
    assert {one.kind for one in spans if one.row == "ahead"} - {"index"} == ahead
    chosen = [one for one in spans if one.row == "ahead" and one.kind != "index"]
    assert {(one.step, one.layer) for one in chosen} in (set(), {(s, n) for s in range(3) for n in range(layers)})
    assert {one.kind for one in spans} >= {"attend", "linear", "rope"}
    facts = summary(spans)
    assert facts["steps"] == 3 and len(facts["by_layer"]) == layers
    timeline.write_chrome(spans, tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(spans)
    timeline.draw(spans, tmp_path / "t.png", "test")
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_tracing_leaves_nothing_behind(tiny):
    from slipstream.kernels import ops, sparse
    from slipstream.models.linear import Linear

    before = (ops.decode_attention, sparse.sparse_attention, Linear.__call__)
    timeline.trace(tiny(), 1, 20, 2)
    assert before == (ops.decode_attention, sparse.sparse_attention, Linear.__call__)
