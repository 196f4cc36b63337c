"""The benchmarks of this room run, on little: they check their own work and end with one JSON line."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """A stream in the format of the published traces: 4 questions, 16 samples, up to 6 turns."""
    draw, rows = np.random.default_rng(0), []
    for problem in range(4):
        for turn in range(6):
            for sample in draw.permutation(16)[: 16 - 2 * turn]:
                takeover = draw.random() < 0.4
                rows.append((problem, sample, turn, np.exp(draw.gamma(2, 0.2) + 0.1 * problem), takeover,
                             draw.integers(700, 1500), draw.integers(500, 1500) * takeover, 0))  # fmt: skip
    names = ("problem", "sample", "turn", "ppl", "takeover", "draft_chars", "target_chars", "answer_found")
    path = tmp_path_factory.mktemp("traces") / "traces.npz"
    np.savez(path, **{f"pair__{n}": np.array(column) for n, column in zip(names, zip(*rows, strict=True), strict=True)})
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a benchmark in this process: the last line of what it printed."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("SLIPSTREAM_COMMIT", "test")

    def main(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *flags])
        importlib.import_module(name).main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return main


def test_replay(run, traces):
    found = run("atts_replay", "--traces", traces, "--streams", "pair", "--scores", "2000")
    assert len(found["bars"]) == 5 and {p["order"] for p in found["points"] if "order" in p} == {
        "arrival", "shuffled", "interleaved",
    }  # fmt: skip


def test_schedule_on_a_stopwatch(run, traces):
    found = run("atts_schedule", "--traces", traces, "--simulate", "--draft", "8", "--target", "4", "--window", "32")
    seconds = {p["schedule"]: p["seconds"] for p in found["points"] if "schedule" in p}
    assert found["equal_tokens"] and seconds["async"] < seconds["question"] < seconds["turn"] < seconds["paper"]


def test_schedule_on_engines(run, traces):
    found = run("atts_schedule", "--traces", traces, "--device", "cpu", "--problems", "1", "--scale", "0.006",
                "--schedules", "async,turn", "--kv-memory", "64MiB,64MiB")  # fmt: skip
    assert found["equal_tokens"] and all(p["target_tokens"] > 0 for p in found["points"])


def test_accuracy_goes_on_from_finished_arms(run, tmp_path):
    flags = ["--problems", "2", "--operations", "1", "--samples", "1", "--seeds", "1", "--alphas", "0.5", "--scores",
             "log-ratio", "--takeovers", "replace", "--device", "cpu", "--kv-memory", "64MiB", "--tokens", "12",
             "--work", str(tmp_path)]  # fmt: skip
    limited = run("atts_accuracy", *flags, "--time-limit", "0")
    assert limited["points"] == [] and not list(tmp_path.iterdir())
    found = run("atts_accuracy", *flags)
    assert {(p["mode"], p["alpha"]) for p in found["points"]} >= {("coin", 0.0), ("coin", 1.0), ("marginal", 0.5)}
    assert len(list(tmp_path.iterdir())) == len(found["points"]) == 6 and len(found["bars"]) == 0
    again = run("atts_accuracy", *flags, "--time-limit", "0")
    assert again["points"] == found["points"]
