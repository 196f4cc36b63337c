"""What a method can be told, and what it refuses."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from slipstream import AsyncSpade, AsyncTLS, DoubleSparsity, Oracle, Quest, Tova, TwoLevel, Window
from slipstream.kvcache.index import IndexParts
from slipstream.selection.selector import check_blocks, in_blocks
from slipstream.types import ModelSpec

METHODS = (Window, Oracle, Quest, DoubleSparsity, TwoLevel, Tova)


@pytest.mark.parametrize("method", METHODS)
def test_every_option_has_a_default_and_a_help(method):
    assert method() == method() and all(option.metadata["help"] for option in fields(method))
    with pytest.raises(TypeError, match=f"{method.__name__} has no option 'budgte'; did you mean 'budget'"):
        method(budgte=4)


@pytest.mark.parametrize("method", METHODS[:-1])
def test_a_budget_holds_what_is_always_attended(method):
    assert Window(budget=69).budget == Oracle(budget=8, sink=3, recent=4).budget + 61
    with pytest.raises(ValueError, match=r"budget = 68 cannot hold sink \+ recent \+ the newest token = 4 \+ 64 \+ 1"):
        method(budget=68)
    for name, value in (("budget", 0), ("budget", -5), ("budget", True), ("budget", 2.5), ("budget", None)):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value}"):
            method(**{name: value})
    for name in ("sink", "recent", "dense_layers", "min_context"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 0, got -1"):
            method(**{name: -1})


@pytest.mark.parametrize("method, given, words", [
    (Tova, {"budget": 0}, "budget must be an integer of at least 1"),
    (Oracle, {"aggregate": "sun"}, "aggregate 'sun' is unknown; did you mean 'sum'"),
    (Quest, {"block_score": "minmax4x16"}, "block_score 'minmax4x16' is unknown; did you mean 'minmax'"),
    (Quest, {"budget": 80}, "budget = 5 blocks of 16 tokens, but 4 sinks and 64 recent tokens may lie in 6"),
    (Quest, {"block": 0}, "block must be an integer of at least 1"),
    (DoubleSparsity, {"channels": 31}, "channels must be even"),
    (DoubleSparsity, {"aggregate": "mean"}, "aggregate 'mean' is unknown"),
    (TwoLevel, {"channels": 0}, "channels must be an integer of at least 1"),
    (TwoLevel, {"blocks": 15}, "15 blocks of 64 tokens hold fewer than budget = 1024"),
    (TwoLevel, {"blocks": 2, "budget": 100}, "blocks = 2 blocks of 64 tokens, but 4 sinks and 64 recent tokens may"),
    (TwoLevel, {"block_aggregate": "mean"}, "block_aggregate 'mean' is unknown"),
    (TwoLevel, {"block_score": "menstd"}, "block_score 'menstd' is unknown; did you mean 'meanstd'"),
    (TwoLevel, {"block_score": "minmax4x16", "block": 10, "blocks": 200}, "needs a block of quarters, not of 10"),
    (TwoLevel, {"deviation": float("inf")}, "deviation must be a number of at least 0, got inf"),
    (TwoLevel, {"calibration": True}, "calibration must be text, got True"),
    (Quest, {"block_score": ["minmax"]}, "block_score must be text, got ['minmax']"),
    (AsyncTLS, {"offload": "false"}, "offload must be True or False, got 'false'"),
])  # fmt: skip
def test_refusals(method, given, words):
    with pytest.raises(ValueError) as caught:
        method(**given)
    assert words in str(caught.value)


def test_what_they_need_of_an_index():
    assert Window().index is Oracle().index is None
    assert Quest().index == IndexParts("minmax", 16)
    assert DoubleSparsity().index == IndexParts(num_channels=32)
    assert TwoLevel(block_score="mean").index == IndexParts("mean", 64, 32)
    assert TwoLevel(block_score="minmax4x16").index == IndexParts("minmax", 16, 32)
    with pytest.raises(ValueError, match="blocks of 64 tokens do not divide a page of 16"):
        TwoLevel(block_score="minmax4x16").check_page_size(16)
    assert (Quest().dense_layers, DoubleSparsity().dense_layers, TwoLevel().dense_layers) == (2, 2, 0)


@pytest.mark.parametrize("method", (TwoLevel, AsyncTLS, AsyncSpade))
def test_what_depends_on_the_model(method):
    """Heads that share one latent are joined by their weights; what the user says stays."""
    plain = ModelSpec("gqa", 1, 64, 4, 2, 16, 8, 64, torch.float32)
    latent = ModelSpec("mla", 1, 64, 4, 1, 40, 8, 64, torch.float32, value_dim=32)
    assert method().aggregate is None
    assert [method().for_model(spec).aggregate for spec in (plain, latent)] == ["peak", "sum"]
    assert [method(aggregate="max").for_model(spec).aggregate for spec in (plain, latent)] == ["max", "max"]
    assert DoubleSparsity(aggregate="peak").for_model(latent) == DoubleSparsity(aggregate="peak", channels=20)


def test_forced_blocks_are_counted_at_their_worst():
    """By trying every length: blocks that hold sinks or recent tokens are never more than what is asked for."""
    for block, sink, recent in ((1, 0, 0), (1, 2, 3), (4, 0, 1), (4, 1, 2), (4, 5, 9), (8, 8, 8), (16, 4, 64)):
        most = 0
        for length in range(sink + recent + 4 * block, sink + recent + 12 * block):
            always = [*range(sink), *range(length - max(recent, 1), length)]
            most = max(most, len({token // block for token in always}))
        check_blocks("blocks", most, block, sink, recent)
        with pytest.raises(ValueError, match=f"may lie in {most}"):
            check_blocks("blocks", most - 1, block, sink, recent)


def test_tokens_of_chosen_blocks():
    for block, num_blocks in ((4, 3), (1, 5)):
        for length in range(1, 40):
            last_one = length - (length - 1) // block * block
            expected = length if length <= num_blocks * block else (num_blocks - 1) * block + last_one
            assert in_blocks(length, num_blocks, block) == expected
