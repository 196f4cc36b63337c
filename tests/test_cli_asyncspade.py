"""The commands of AsyncSpade: what they write, and what they refuse in one line."""

import json
import sys

import pytest

from slipstream import cli


@pytest.fixture
def slipstream(monkeypatch, capsys):
    """Runs a command in this process: ``slipstream(*arguments) -> (exit code, last line of stdout, stderr)``."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(cli.err, "width", 160)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["slipstream", *map(str, arguments), "-m", "slipstream-draft"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, json.loads(out.splitlines()[-1]) if out else None, err

    return command


def test_train_then_compare(slipstream, tmp_path):
    weights, table = tmp_path / "mlp.safetensors", tmp_path / "p.json"
    chains = ("--tasks", "program:steps=10", "--device", "cpu")
    code, found, _ = slipstream("train-predictor", weights, *chains, "--samples", 1, "--steps", 5, "--window", 8)
    assert code == 0 and len(found["loss_by_layer"]) == 4 and weights.exists()
    own = f"last,mlp:predictor_file={weights}"
    code, found, err = slipstream(
        "compare-predictors", *chains, "--predictors", own, "--samples", 1, "--points", 4, "--recent", 16,
        "--json", table, "--picture", tmp_path / "p.png",
    )  # fmt: skip
    assert code == 0 and found == json.loads(table.read_text()) and "budget 1/16" in err
    assert [row["predictor"] for row in found["rows"][::2]] == own.split(",") and (tmp_path / "p.png").exists()


def test_trace(slipstream, tmp_path):
    sparse = ("--attention", "asyncspade", "--budget", 96, "--min-context", 96, "--max-model-len", 1024)
    code, found, err = slipstream(
        "trace", *sparse, "--device", "cpu", "--kv-memory", "64MiB", "--batch", 2, "--context", 200, "--steps", 2,
        "--out", tmp_path / "t.json",
    )  # fmt: skip
    assert code == 0 and found["method"] == "asyncspade" and found["steps"] == 2 and "hidden behind" in err
    assert {"attend", "predict", "select"} <= found["us_by_kind"].keys()
    assert (tmp_path / "t.png").exists() and (tmp_path / "t.json").exists()


@pytest.mark.parametrize("arguments, words", [
    (("compare-predictors", "--budgets", "512"), "--budgets takes fractions of the sequence here"),
    (("compare-predictors", "--predictors", "rigde"), "did you mean 'ridge'?"),
    (("train-predictor", "x", "--window", 0), "window must be an integer of at least 1"),
    (("trace", "--context", "many"), "--context takes comma-separated numbers"),
])  # fmt: skip
def test_refused(slipstream, arguments, words):
    code, _, err = slipstream(*arguments)
    assert code == 2 and words in err
