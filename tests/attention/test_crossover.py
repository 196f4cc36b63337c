"""The gate: what the user says, what was measured, a guess; never below the budget."""

from __future__ import annotations

import pytest
import torch
from steps import make_spec

from slipstream.attention import crossover

CPU, SPEC = torch.device("cpu"), make_spec(4, 2, 16, torch.float32)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache" / "crossover.json"


def test_measured_crossovers_are_kept(cache):
    assert crossover.load(CPU, SPEC, "quest", 64) is None
    assert crossover.store(CPU, SPEC, "quest", 64, 900) == cache
    crossover.store(CPU, SPEC, "quest", 32, 500)
    crossover.store(CPU, SPEC, "quest", 64, 1000)
    assert crossover.load(CPU, SPEC, "quest", 64) == 1000 and crossover.load(CPU, SPEC, "quest", 32) == 500
    for other in (("window", 64), ("quest", 65)):
        assert crossover.load(CPU, SPEC, *other) is None
    assert crossover.load(CPU, make_spec(4, 1, 16, torch.float32), "quest", 64) is None
    assert [path.name for path in cache.parent.iterdir()] == ["crossover.json"]


def test_the_gate(cache):
    assert crossover.gate(CPU, SPEC, "quest", 64, None) == 4 * 64
    crossover.store(CPU, SPEC, "quest", 64, 900)
    assert crossover.gate(CPU, SPEC, "quest", 64, None) == 900
    assert crossover.gate(CPU, SPEC, "quest", 64, 100) == 100
    assert crossover.gate(CPU, SPEC, "quest", 64, 0) == 64
    crossover.store(CPU, SPEC, "quest", 64, 3)
    assert crossover.gate(CPU, SPEC, "quest", 64, None) == 64


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": "b"}'])
def test_a_spoilt_file_is_named(cache, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    with pytest.raises(ValueError, match="crossover.json .*: delete it and run `slipstream bench crossover`"):
        crossover.gate(CPU, SPEC, "quest", 64, None)
