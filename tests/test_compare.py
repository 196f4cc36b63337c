"""Comparisons: what is run at which budget, what is refused and shown, and what a row says."""

import json
import shutil
from fractions import Fraction

import pytest
import torch

from slipstream import compare, tasks
from slipstream.build import parse_attention
from slipstream.compare import Arm, Method, context_of, index_bytes, parse_budget, parse_methods, pivot, plan
from slipstream.evaluation import Answer, Cell, parse_cell, read_log
from slipstream.types import ModelSpec

NEEDLE = parse_cell("needle_multikey", 1024, 2)
PROGRAM = parse_cell("program:steps=10", None, 2)
SPEC = ModelSpec("tiny", 4, 32, 4, 2, 64, 64, 4096, torch.bfloat16)
ENGINE = {"device": "cpu", "kv_memory": "64MiB"}


# what is asked


@pytest.mark.parametrize("text, budget", [("1/8", Fraction(1, 8)), (" 0.25", Fraction(1, 4)), ("512", 512), ("1", 1)])
def test_budgets(text, budget):
    assert parse_budget(text) == budget and type(parse_budget(text)) is type(budget)


@pytest.mark.parametrize("text", ["0", "-1/8", "3/2", "1/0", "eighth", ""])
def test_bad_budgets(text):
    with pytest.raises(ValueError, match="a budget is a fraction of the context"):
        parse_budget(text)


def test_methods():
    full, quest, two = parse_methods("full, quest:dense_layers=0,two_level:block_score=minmax", {"sink": 8})
    assert full.attention(0) == {"method": "full"} and full.is_dense
    assert quest.attention(256) == {
        "method": "quest", "budget": 256, "min_context": 256, "sink": 8, "dense_layers": 0,
    }  # fmt: skip
    assert two.attention(512)["blocks"] == 64  # candidates are eight budgets
    assert Method.parse("two_level:blocks=40:block=32").attention(512)["blocks"] == 40  # unless they are given
    assert Method.parse("two_level:block=32").attention(512)["blocks"] == 128
    far = Method.parse("asyncspade:cache_device=cuda:1:predictor=last").attention(512)
    assert (far["cache_device"], far["predictor"]) == ("cuda:1", "last")


@pytest.mark.parametrize("text, words", [
    ("qest", "attention method 'qest' is unknown; did you mean 'quest'?"),
    ("quest:blck=4", "has no option 'blck'; did you mean 'block'?"),
    ("quest:budget=64", "a comparison sets budget itself"),
    ("two_level:block_score=min", "block_score 'min' is unknown"),
    ("quest:block", "cannot read 'block' in 'quest:block': write method:option=value"),
    (" , ", "no method is named"),
])  # fmt: skip
def test_bad_methods(text, words):
    with pytest.raises(ValueError) as caught:
        parse_methods(text, {})
    assert words in str(caught.value)


def test_an_option_that_no_method_has():
    with pytest.raises(ValueError, match="none of the methods full,tova has an option 'sink'"):
        parse_methods("full,tova", {"sink": 8})


def test_cells_of_all_lengths_and_protocols():
    found = compare.cells_of("needle_single,program:steps=5,", [256, 512], ["A", "B"], 3)
    assert [cell.name for cell in found] == [
        "needle_single num_tokens=256", "needle_single num_tokens=256 protocol=B", "needle_single num_tokens=512",
        "needle_single num_tokens=512 protocol=B", "program steps=5", "program steps=5 protocol=B",
    ]  # fmt: skip


# what is planned


def test_contexts():
    assert context_of(NEEDLE) == 1024 and context_of(Cell("needle_single")) == 1024
    lengths = [tasks.count_tokens(p.prompt + p.completion) for p in (PROGRAM.problem(i, 0) for i in range(3))]
    assert context_of(PROGRAM) == pytest.approx(sum(lengths) / 3, abs=2)


def test_cells_of_one_budget_share_an_engine():
    half = parse_cell("needle_multikey", 2048, 2)
    arms, skipped = plan(parse_methods("full,window", {}), [Fraction(1, 4), Fraction(1, 8), 256], [NEEDLE, half])
    assert not skipped
    assert [(arm.name, [(cell.name[-4:], asked) for cell, asked in arm.cells]) for arm in arms] == [
        ("full", [("1024", "all"), ("2048", "all")]),
        ("window 256", [("1024", "1/4"), ("2048", "1/8"), ("1024", "256"), ("2048", "256")]),
        ("window 512", [("2048", "1/4")]),
        ("window 128", [("1024", "1/8")]),
    ]


def test_what_cannot_be_is_skipped_with_its_reason():
    methods = parse_methods("full,window,two_level,tova", {})
    arms, skipped = plan(methods, [Fraction(1, 16), 2000], [NEEDLE])
    assert [arm.name for arm in arms] == ["full", "tova 64"]
    assert [(row["method"], row["budget"]) for row in skipped] == [
        ("window", "1/16"), ("window", "2000"), ("two_level", "1/16"), ("two_level", "2000"), ("tova", "2000"),
    ]  # fmt: skip
    assert "budget = 64 cannot hold sink + recent" in skipped[0]["note"]
    assert skipped[1]["note"] == "never sparse: a context of 1024 fits a budget of 2000"
    lines, notes = pivot([*skipped, *({**compare._head(m, "all", 0, NEEDLE), "accuracy": 1.0} for m in methods[:1])],
                         lambda row: f"{row['accuracy']:.1f}")  # fmt: skip
    assert lines[0] == {"cell": NEEDLE.name, "method": "window", "1/16": "(1)", "2000": "(2)", "all": ""}
    assert [line["cell"] for line in lines[1:]] == ["", "", ""] and lines[-1]["all"] == "1.0"
    assert notes[1] == f"(2) skipped: {skipped[1]['note']}" and len(notes) == 2


# what is read


@pytest.mark.parametrize("attention, expected", [
    ("full", 0),
    ({"method": "window"}, 0),
    ({"method": "oracle"}, 2048 * 128),
    ({"method": "double_sparsity"}, 2048 * 20),
    ({"method": "quest"}, 2048 // 16 * 2 * 128),
    ({"method": "two_level", "blocks": 16, "block_score": "mean"}, 2048 // 64 * 128 + 1024 * 20),
    ({"method": "two_level", "blocks": 64, "block_score": "minmax4x16"}, 2048 // 64 * 8 * 128 + 2048 * 20),
    ({"method": "asyncspade", "blocks": 16, "block_score": "mean"}, 2048 // 64 * 128 + 1024 * 20),
    ({"method": "asyncspade", "scoring": "keys", "aggregate": "sum"}, 2048 * 128),
])  # fmt: skip
def test_index_bytes(attention, expected):
    assert index_bytes(parse_attention(attention), 2048, SPEC) == expected


def test_dense_layers_and_dense_steps_count_as_read():
    answers = [Answer("", "", 0, [True], ["stop"], 1000, 3, None, None)]
    found = compare.reading(parse_attention({"method": "quest", "budget": 256}), answers, SPEC)
    assert found["tokens_read"] == pytest.approx((1001.5 * 2 + 256 * 2) / 4)
    assert found["index_read"] == pytest.approx(1001.5 / 16 * 2 * 128 / 256 / 2)
    assert compare.reading(parse_attention("full"), answers, SPEC) == {"tokens_read": 1001.5, "index_read": 0}
    within = compare.reading(parse_attention({"method": "oracle", "budget": 2000}), answers, SPEC)
    assert within == {"tokens_read": 1001.5, "index_read": 0}


# what is run


def test_an_arm_runs_resumes_and_is_probed(tmp_path):
    log, quarter = tmp_path / "log.jsonl", parse_cell("needle_multikey", 512, 2, "B")
    (full, two), _ = plan(parse_methods("full,two_level", {"recent": 16}), [Fraction(1, 4)], [quarter])
    ((dense,), (row,)) = compare.run("slipstream-draft", [full, two], engine=ENGINE, log=log, probe=1)
    assert dense["accuracy"] == 1 and dense["tokens_read"] > 512 and "recall" not in dense
    assert (row["method"], row["budget"], row["tokens"], row["protocol"]) == ("two_level", "1/4", 128, "B")
    assert row["problems"] == 2 and row["tokens_read"] == 128 and 0 < row["index_read"] < 128
    assert row["stats"]["sparse_steps"] > 0 and row["stats"]["density"] == pytest.approx(128 / 525, abs=0.02)
    assert 0.5 < row["recall"] <= 1 and 0.5 < row["mass"] < 1 and list(row["mass_by_layer"]) == [0, 1, 2, 3]
    assert json.loads(json.dumps([dense, row]))
    kept = log.read_text()
    assert len(read_log(log)) == 4
    (again,) = compare.run_arm("slipstream-draft", two, engine=ENGINE, log=log)
    assert log.read_text() == kept and again["accuracy"] == row["accuracy"] and again["stats"]["decode_tokens"] == 0


def test_a_lost_chain_is_cut_off():
    arm = Arm(Method.parse("window:sink=0:recent=1"), 2, ((PROGRAM, "2"),))
    (row,) = compare.run_arm("slipstream-draft", arm, engine=ENGINE)
    ideal = max(tasks.count_tokens(PROGRAM.problem(i, 0).completion) for i in range(5))
    assert row["accuracy"] == 0 and row["output_tokens"] <= ideal * 5 // 4 + 64


# what is shown


def test_the_picture_has_a_panel_per_task_and_protocol(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    rows = [
        {"method": method, "budget": asked, "task": task, "protocol": protocol, "tokens_read": read, "accuracy": right}
        for task in ("needle_single", "program")
        for protocol in "AB"
        for method, asked, read, right in (
            ("full", "all", 2048.0, 1.0), ("quest", "1/8", 256.0, 0.5), ("quest", "1/8", 512.0, 0.7),
            ("quest", "1/4", 512.0, 0.9),
        )
    ]  # fmt: skip
    assert compare._points(rows[:4]) == [(384.0, 0.6, "1/8"), (512.0, 0.9, "1/4"), (2048.0, 1.0, "all")]
    compare.draw([*rows, {"note": "not drawn"}], tmp_path / "new" / "four.png", "four panels")
    compare.draw(rows[:4], tmp_path / "one.png", "one panel")
    four, one = (image.imread(tmp_path / name) for name in ("new/four.png", "one.png"))
    assert four.shape[0] > 1.5 * one.shape[0] and four.shape[1] > 1.5 * one.shape[1]
    shutil.rmtree(tmp_path / "new")
