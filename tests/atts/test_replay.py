"""Streams of scores from files, and what is measured on them."""

import json
import math
import random
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from slipstream.atts.conformal import Conformal
from slipstream.atts.replay import Test as Row
from slipstream.atts.replay import agreement, read_tests, replay, summary
from slipstream.cli_scale import app


def rows(count=600, seed=0):
    draw = np.random.default_rng(seed)
    return [Row(i // 60, i % 60 % 12, i % 60 // 12, float(draw.normal(i // 60, 1))) for i in range(count)]


def write_lines(path, tests):
    names = ("question", "sample", "turn", "nll")
    path.write_text("".join(json.dumps(dict(zip(names, test, strict=True))) + "\n" for test in tests))
    return path


def write_arrays(path, tests, prefix="", **more):
    columns = zip(*tests, strict=True)
    names = ("problem", "sample", "turn", "ppl")
    arrays = {prefix + n: np.array(c) for n, c in zip(names, columns, strict=True)}
    arrays[prefix + "ppl"] = np.exp(arrays[prefix + "ppl"])
    np.savez(path, **arrays, **{prefix + n: v for n, v in more.items()})
    return path


def test_lines_and_arrays_are_one_stream(tmp_path):
    tests = rows()
    lines = read_tests(write_lines(tmp_path / "a.jsonl", tests))
    arrays = read_tests(write_arrays(tmp_path / "a.npz", tests))
    assert lines == tests
    assert [t[:3] for t in arrays] == [t[:3] for t in tests]
    assert np.allclose([t.nll for t in arrays], [t.nll for t in tests])
    config = Conformal(alpha=0.4)
    assert replay(lines, config)[0] == replay(tests, config)[0]


def test_rows_with_an_answer_are_no_tests_and_streams_have_names(tmp_path):
    tests = rows(100)
    found = np.arange(100) % 4 == 0
    path = write_arrays(tmp_path / "a.npz", tests, "pair__", answer_found=found)
    assert len(read_tests(path, "pair")) == 75
    with pytest.raises(ValueError, match="it has the streams pair"):
        read_tests(path)


def test_agreement_with_the_ranking_that_waits():
    """One group of five, alpha 0.4: the ranking takes the two most doubtful; a group of four is not looked at."""
    tests = [Row("q", s, 0, x) for s, x in enumerate([5.0, 4.0, 3.0, 2.0, 1.0])]
    assert agreement(tests, [True, True, False, False, False], 0.4) == 1.0
    assert agreement(tests, [False, True, True, False, False], 0.4) == pytest.approx(0.6)
    assert agreement(tests[:4], [True] * 4, 0.4) is None
    equal = [test._replace(nll=1.0) for test in tests]  # any two are the most doubtful, a third is not
    assert agreement(equal, [False, False, True, False, True], 0.4) == 1.0
    assert agreement(equal, [False, True, True, False, True], 0.4) == pytest.approx(0.8)


def test_summary_measures_what_it_says():
    tests = rows()
    found = summary(tests, Conformal(alpha=0.4))
    rejected, certificate = replay(tests, Conformal(alpha=0.4))
    assert found["rate"] == sum(rejected) / len(rejected)
    windows = [sum(rejected[i : i + 200]) / 200 for i in range(len(rejected) - 199)]
    assert found["worst_window"] == pytest.approx(max(abs(w - 0.4) for w in windows))
    first = [r for t, r in zip(tests, rejected, strict=True) if t.turn == 0]
    assert found["rate_per_turn"]["0"] == pytest.approx(sum(first) / len(first))
    ninth = [r for t, r in zip(tests, rejected, strict=True) if t.question == 9]
    assert found["rate_per_question"]["9"] == pytest.approx(sum(ninth) / len(ninth))
    assert found["agreement"] > 0.75 and certificate.holds


def test_the_question_is_centred_out():
    """Questions differ by far more than turns do: raw ranks take whole questions over, centred ones do not."""
    worst = {mode: summary(rows(), Conformal(alpha=0.4, mode=mode, gamma_turn=0))["question_deviation"] for mode in
             ("per-question", "static")}  # fmt: skip
    assert worst["per-question"] < 0.06 < 0.2 < worst["static"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"question": 1, "sample": 0, "turn": 0}', "line 2.*nll"),
        ('{"question": 1, "sample": 0, "turn": 0, "nll": NaN}', "line 2.*NaN"),
        ('{"question": [1], "sample": 0, "turn": 0, "nll": 1}', "line 2"),
        ("[1, 2]", "line 2"),
        ("[" * 100_000, "line 2"),
        ('{"question": 1, "sample": 0, "turn": 0, "nll": true}', "line 2"),
        ('{"question": 1, "sample": 0, "turn": 0, "nll": "1"}', "line 2"),
        ('{"question": 1, "sample": true, "turn": 0, "nll": 1}', "line 2"),
        ('{"question": null, "sample": 0, "turn": 0, "nll": 1}', "line 2"),
        ('{"question": NaN, "sample": 0, "turn": 0, "nll": 1}', "line 2.*NaN"),
        ('{"question": 1, "sample": 0, "turn": 0, "nll": 1' + "0" * 400 + "}", "line 2"),
        ('{"kind": "decidid", "question": 1, "sample": 0, "turn": 0, "nll": 1}', "line 2"),
        ('{"question": 1, "sample": 0, "turn": "x", "nll": 1}', "line 2"),
        ('{"question": 1, "sample": 0, "turn": 1.5, "nll": 1}', "line 2"),
        ('{"question": 1, "sample": 0, "turn": -1, "nll": 1}', "line 2.*negative"),
        ('{"question": 1, "sample": 0, "turn": 0, "nll": null}', "line 2"),
        ('{"question": "\udcff", "sample": 0, "turn": 0, "nll": 1}', "line 2.*Unicode"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    first = '{"question": "a\u2028b", "sample": 0, "turn": 0, "nll": 1}\n'  # no new line, though Python thinks so
    path.write_bytes((first + line + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_tests(path)


def test_arrays_that_are_no_stream_are_refused_by_name(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, problem=[1], turn=[0])
    with pytest.raises(ValueError, match="lacks the arrays sample, ppl"):
        read_tests(path)
    for ppl, turn, message in (
        ([1.5, 2.0], [0, 0], "equally long"), ([1.5], [0], "equally long"), ([1.0, 2.0, 0.0], [0] * 3, "row 2"),
        ([1.0, float("nan"), 1.0], [0] * 3, "row 1"), ([1.0] * 3, [-1, 0, 0], "row 0"),
    ):  # fmt: skip
        np.savez(path, problem=[1, 2, 3], sample=[0, 0, 0], turn=turn, ppl=ppl)
        with pytest.raises(ValueError, match=message):
            read_tests(path)
    columns = {"problem": [1, 2], "sample": [0, 0], "turn": [0, 0], "ppl": [1.5, 2.0]}
    for name, wrong, message in (
        ("ppl", ["1", "2"], "ppl may not be of <U1"), ("turn", [False, True], "turn may not be of bool"),
        ("turn", [0, 0.5], "row 1"), ("sample", [0, np.nan], "row 1"), ("problem", [1.0, np.nan], "row 1"),
        ("problem", np.array([{}, {}]), f"{path} is not an .npz"), ("answer_found", ["no"] * 2, "answer_found may not"),
    ):  # fmt: skip
        np.savez(path, **columns | {name: wrong})
        with pytest.raises(ValueError, match=message):
            read_tests(path)
    np.savez(path, **columns)
    for data in (b"no zip", b"", path.read_bytes()[:-40], path.read_bytes().replace(b"NUMPY", b"NUMPI")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not an .npz"):
            read_tests(path)
    with path.open("wb") as file:
        np.save(file, [1.0])
    with pytest.raises(ValueError, match="not an .npz"):
        read_tests(path)


SCORES = {
    "constant": lambda i, draw: 1.0,
    "rising": lambda i, draw: float(i),
    "alternating": lambda i, draw: float(i % 2),
    "random": lambda i, draw: draw.random(),
    "heavy": lambda i, draw: math.inf if draw.random() < 0.1 else math.exp(draw.gauss(0, 5)),
    "by question": lambda i, draw: 100.0 * (i // 375) + draw.random(),
    "blocks": lambda i, draw: float(i // 500 % 2) * 1e6 + draw.random(),
}


@pytest.mark.parametrize("order", ["arrival", "shuffled", "interleaved"])
@pytest.mark.parametrize("stream", SCORES)
def test_streams_that_nobody_tuned_on(stream, order):
    """The bars of the published traces, on streams that are nothing like them, at other rates and in three orders."""
    draw = random.Random(7)
    tests = [Row(i // 375, i % 375 % 25, i % 375 // 25, SCORES[stream](i, draw)) for i in range(6000)]
    if order == "shuffled":
        places = draw.sample(range(16), 16)
        tests.sort(key=lambda t: places[t.question])
    elif order == "interleaved":  # 64 samples at once
        keys = {(t.question, t.sample): (i // 64, draw.random()) for i, t in enumerate(tests[:6000:15])}
        tests.sort(key=lambda t: (keys.get((t.question, t.sample), (0, 0))[0], t.turn, draw.random()))
    for alpha in (0.05, 0.5, 0.9):
        found = summary(tests, Conformal(alpha=alpha))
        assert found["deviation"] <= 0.002 and found["worst_window"] <= 0.06 and found["certificate"]["holds"]
        assert found["question_deviation"] <= 0.06, (alpha, found["question_deviation"])


SHAPES = {
    "offsets": lambda q, t, draw: 1000 * random.Random(q).gauss(0, 1) + draw.gauss(0, 0.6),
    "long tail": lambda q, t, draw: math.exp(draw.gauss(0, 3)),
    "trends": lambda q, t, draw: t * random.Random(q).gauss(0, 0.4) + draw.gauss(0, 0.6),
    "huge": lambda q, t, draw: draw.choice([-1.7e308, 1.7e308, 1e308]) * draw.random(),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_right_turns_are_chosen_whatever_the_scale(shape):
    """Questions far apart, scores far out, a trend of each question's own: as a ranking that waits would choose."""
    draw = random.Random(5)
    tests = [Row(i // 240, i % 16, i % 240 // 16, SHAPES[shape](i // 240, i % 240 // 16, draw)) for i in range(6000)]
    tests.sort(key=lambda t: (t.question // 4, draw.random()))  # 64 samples at once, each at a turn of its own
    found = summary(tests, Conformal(alpha=0.4))
    assert found["agreement"] >= 0.78 and found["deviation"] <= 0.002 and found["question_deviation"] <= 0.06


def test_a_log_of_200_000_rows_takes_seconds(tmp_path):
    draw = random.Random(0)
    path = write_lines(
        tmp_path / "a.jsonl", [Row(f"q{i // 400}", i % 16, i // 16 % 25, draw.random()) for i in range(200_000)]
    )
    began = time.process_time()
    found = summary(read_tests(path), Conformal(alpha=0.4))
    assert found["tests"] == 200_000 and found["deviation"] < 1e-4 and time.process_time() - began < 30


def test_an_empty_stream_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no tests"):
        read_tests(tmp_path / "a.jsonl")


def test_command_line(tmp_path):
    log, out = write_lines(tmp_path / "a.jsonl", rows()), tmp_path / "out.json"
    done = CliRunner().invoke(app, ["replay", str(log), "--alpha", "0.4", "--mode", "marginal", "--json", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["mode"] == "marginal" and abs(found["rate"] - 0.4) < 0.02
    assert found["certificate"]["holds"] and math.isclose(found["window_bound"], 0.06)
    assert "guaranteed: 0.060" in done.output
    failed = CliRunner().invoke(app, ["replay", str(log), "--alpha", "1.5"])
    assert isinstance(failed.exception, ValueError) and "[0, 1]" in str(failed.exception)
