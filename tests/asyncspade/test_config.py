"""What AsyncSpade can be told, what it refuses, and what it makes of it."""

from __future__ import annotations

import dataclasses
from dataclasses import fields

import pytest
import torch

from slipstream import AsyncSpade, Oracle, TwoLevel
from slipstream.asyncspade.backend import AsyncSpadeBackend
from slipstream.build import ATTENTION, Options, build, method_of, parse_attention
from slipstream.types import ModelSpec

SPEC = ModelSpec("tiny", 3, 64, 4, 2, 16, 64, 256, torch.bfloat16)


def test_every_option_has_a_help_and_those_of_two_level_its_default():
    assert all(option.metadata["help"] for option in fields(AsyncSpade))
    for option in fields(TwoLevel):
        assert getattr(AsyncSpade(), option.name) == getattr(TwoLevel(), option.name), option.name
    with pytest.raises(TypeError, match="AsyncSpade has no option 'predicter'; did you mean 'predictor'"):
        AsyncSpade(predicter="last")


@pytest.mark.parametrize("given, words", [
    ({"predictor": "rigde"}, "predictor 'rigde' is unknown; did you mean 'ridge'"),
    ({"scoring": "indices"}, "scoring 'indices' is unknown; did you mean 'index'"),
    ({"lane": "fast"}, "lane 'fast' is unknown"),
    ({"transfer": "delte"}, "transfer 'delte' is unknown; did you mean 'delta'"),
    ({"late": "never"}, "late 'never' is unknown"),
    ({"repair": "fix"}, "repair 'fix' is unknown"),
    ({"window": 0}, "window must be an integer of at least 1, got 0"),
    ({"predictor": "ridge", "window": 129}, "predictor 'ridge' takes a window of at most 128 queries, got 129"),
    ({"ridge": -0.1}, "ridge must be a number of at least 0, got -0.1"),
    ({"beta": float("inf")}, "beta must be a number of at least 0, got inf"),
    ({"decay": 1.0}, "decay must be below 1, got 1.0"),
    ({"rotate": "yes"}, "rotate must be True or False, got 'yes'"),
    ({"recent": 0}, "recent = 0, but the newest token"),
    ({"measure": -1}, "measure must be an integer of at least 0"),
    ({"max_stale": 0}, "max_stale must be an integer of at least 1"),
    ({"confidence": 1.01}, "confidence is a cosine, in [-1, 1], got 1.01"),
    ({"confidence": float("nan")}, "confidence is a cosine, in [-1, 1], got nan"),
    ({"confidence": "high"}, "confidence is a cosine, in [-1, 1], got 'high'"),
    ({"predictor": "mlp"}, "predictor 'mlp' and predictor_file go together"),
    ({"predictor_file": "x"}, "predictor 'mlp' and predictor_file go together"),
    ({"predictor": "oracle", "confidence": 0.5}, "predictor 'oracle' is never wrong"),
    ({"cache_device": "cuda:1", "cache_rank": "a:1"}, "give one of them"),
    ({"blocks": 15}, "15 blocks of 64 tokens hold fewer than budget"),
    ({"channels": 31}, "channels must be even"),
    ({"aggregate": "mean"}, "aggregate 'mean' is unknown"),
    ({"budget": 68}, "budget = 68 cannot hold"),
])  # fmt: skip
def test_refusals(given, words):
    with pytest.raises(ValueError) as caught:
        AsyncSpade(**given)
    assert words in str(caught.value)


def test_what_selects_leaves_room_for_what_it_cannot_know():
    ahead = AsyncSpade(budget=100, recent=20, block=16, blocks=9, predictor="ridge")
    assert ahead.inner() == TwoLevel(budget=99, recent=19, block=16, blocks=9) and ahead.is_ahead
    assert ahead.inner(0) == TwoLevel(budget=100, recent=20, block=16, blocks=9)
    oracle = dataclasses.replace(ahead, predictor="oracle")
    assert oracle.inner() == ahead.inner(0) and oracle.spare == 0
    by_keys = AsyncSpade(predictor="last", budget=100, recent=1, scoring="keys", aggregate="sum", dense_layers=2)
    assert by_keys.inner() == Oracle(budget=99, recent=0, dense_layers=2) and by_keys.index is None
    assert ahead.index == TwoLevel(block=16).index and AsyncSpade(predictor="last").unread == 63
    stale = AsyncSpade(cache_rank="host:1", late="stale", max_stale=3)
    assert stale.spare == 4 and AsyncSpade(predictor="last", late="stale", max_stale=3).spare == 1
    with pytest.raises(ValueError, match="blocks of 64 tokens do not divide a page of 16"):
        AsyncSpade().check_page_size(16)


def test_it_is_a_method_like_any_other():
    assert ATTENTION["asyncspade"] is AsyncSpade and method_of(AsyncSpade()) == "asyncspade"
    given = {"method": "asyncspade", "predictor": "analog", "window": 512, "rotate": 0}
    assert parse_attention(given) == AsyncSpade(predictor="analog", window=512, rotate=False)
    with pytest.raises(TypeError, match="attention method 'asyncspade' has no option 'windwo'; did you mean 'window'"):
        parse_attention({"method": "asyncspade", "windwo": 3})


def test_bytes_of_a_seat():
    """Windows in the model's dtype, sets in int32, and the predicted queries where they are checked."""
    config = AsyncSpade(budget=100, recent=20, window=8, predictor="ridge")
    windows, sets, facts = 3 * 8 * 4 * 16 * 2, 3 * 2 * 4 * 101, 8 + 16
    assert AsyncSpadeBackend.seat_bytes(config, SPEC) == windows + sets + facts
    checked = dataclasses.replace(config, confidence=0.5)
    assert AsyncSpadeBackend.seat_bytes(checked, SPEC) == windows + sets + facts + 3 * 4 * 16 * 2
    assert AsyncSpadeBackend.seat_bytes(dataclasses.replace(config, predictor="oracle"), SPEC) == 0


def test_what_auto_means():
    """By depth where that is possible."""
    assert AsyncSpade().predictor == "residual"
    for more in ({"confidence": 0.5}, {"cache_rank": "host:1"}):
        assert AsyncSpade(**more).predictor == "analog"


def test_in_depth_a_page_that_fills_is_not_indexed_yet():
    """Nor is the newest token, so one token fewer may stay unread than where the index is extended first."""
    assert AsyncSpade(recent=64).unread == 63 and AsyncSpade(recent=63).unread == TwoLevel(recent=62).unread == 62


def test_a_predictor_file_must_be_there(tmp_path, tiny):
    missing = str(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="there is no predictor file .*none.safetensors"):
        tiny(attention=AsyncSpade(predictor="mlp", channels=8, predictor_file=missing), kv_memory="4MiB")


def test_a_lane_must_be_there():
    from slipstream.build import DEFAULT_MODEL

    with pytest.raises(ValueError, match="lane='stream' needs an NVIDIA GPU"):
        build(DEFAULT_MODEL, Options(attention=AsyncSpade(lane="stream"), device="cpu", max_num_seqs=2))
