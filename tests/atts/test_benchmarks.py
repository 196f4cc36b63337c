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


def test_accuracy_goes_on_from_finished_arms_and_merges_shards(run, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out.json"
    flags = ["--problems", "2", "--operations", "1", "--samples", "1", "--seeds", "1", "--alphas", "0.5", "--scores",
             "perplexity", "--takeovers", "replace", "--modes", "per-question", "--device", "cpu", "--tokens", "12",
             "--kv-memory", "64MiB", "--work", str(work), "--json", str(out)]  # fmt: skip
    limited = run("atts_accuracy", *flags, "--time-limit", "0")
    assert limited["points"] == [] and not work.exists()
    module = importlib.import_module("atts_accuracy")
    for shard in ("0/2", "1/2"):
        sys.argv = ["atts_accuracy", *flags, "--shard", shard]
        module.main()
    assert len(list(work.iterdir())) == 4
    found = run("atts_accuracy", *flags, "--merge")
    assert [(p["mode"], p["alpha"]) for p in found["points"]] == [
        ("coin", 0.0), ("coin", 1.0), ("coin", 0.5), ("per-question", 0.5),
    ]  # fmt: skip
    assert {"vs_coin", "vs_coin_se", "vs_target", "target_share"} <= found["points"][-1].keys()
    assert json.loads(out.read_text()) == found
    again = run("atts_accuracy", *flags, "--time-limit", "0")
    assert again["points"] == found["points"]
    with pytest.raises(AssertionError, match="other settings"):
        run("atts_accuracy", *flags, "--tokens", "13")


def test_a_coin_of_equal_tokens_lies_between_two_coins(run, tmp_path):
    """Known numbers: the arm spends as the coins at 0.2 and 0.4 do on average, and is right where neither is."""
    sys.path.insert(0, str(FOLDER))
    module = importlib.import_module("atts_accuracy")

    def runs(tokens, correct):
        return {0: {"target_tokens": tokens, "correct": correct}}

    arm = ("replace", "marginal", "perplexity", 0.3)
    done = {
        module.DRAFT: runs(0, [0.0, 0.0, 0.0, 0.0]), module.TARGET: runs(1000, [1.0, 1.0, 1.0, 1.0]),
        ("replace", "coin", "none", 0.4): runs(400, [1.0, 1.0, 0.0, 0.0]),
        ("replace", "coin", "none", 0.2): runs(200, [1.0, 0.0, 0.0, 0.0]),
        ("continue", "coin", "none", 0.3): runs(300, [1.0, 1.0, 1.0, 1.0]), arm: runs(300, [1.0, 1.0, 1.0, 0.0]),
    }  # fmt: skip
    found = module.against_coin(arm, done)
    gaps = [0.0, 0.5, 1.0, 0.0]
    assert found == {"equal_coin": 0.375, "vs_coin": 0.375, "vs_coin_se": pytest.approx(np.std(gaps, ddof=1) / 2)}
