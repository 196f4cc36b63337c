"""Every selector keeps its promises: a fixed shape, the right number, what is always in, never above the oracle."""

from __future__ import annotations

import pytest
import torch

from slipstream import DoubleSparsity, Oracle, Quest, TwoLevel, Window
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec

COMMON = {"sink": 2, "recent": 3, "dense_layers": 0}
PAGE = 8
METHODS = {
    "window": lambda budget: Window(budget, **COMMON),
    "oracle": lambda budget: Oracle(budget, **COMMON),
    "oracle max": lambda budget: Oracle(budget, **COMMON, aggregate="max"),
    "quest": lambda budget: Quest(budget, **COMMON, block=4),
    "quest mean": lambda budget: Quest(budget, **COMMON, block=4, block_score="mean", aggregate="max"),
    "double_sparsity": lambda budget: DoubleSparsity(budget, **COMMON, channels=8),
    "two_level mean": lambda budget: _two_level(budget, block_score="mean"),
    "two_level minmax": lambda budget: _two_level(budget, block_score="minmax", block_aggregate="sum"),
    "two_level meanstd": lambda budget: _two_level(budget, block_score="meanstd", deviation=0.5, aggregate="max"),
    "two_level 4x": lambda budget: _two_level(budget, block_score="minmax4x16"),
}


def _two_level(budget, **options):
    return TwoLevel(budget, **COMMON, blocks=max(3, 2 * budget // 8), block=8, channels=8, **options)


class Contexts:
    """One layer of random keys of requests of given lengths, indexed, and a selector over them."""

    def __init__(self, config, lengths, seed=0, num_q=4, num_kv=2, dim=16):
        self.spec = ModelSpec("toy", 1, num_q * dim, num_q, num_kv, dim, 8, 4096, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        width = -(-max(lengths) // PAGE)
        self.pool = KVPool(1, 1 + width * len(lengths), num_kv, PAGE, dim, torch.float32)
        self.pool.k.fill_(torch.nan)
        pages = (torch.randperm(width * len(lengths), generator=generator) + 1).view(len(lengths), width)
        self.keys = []
        for b, length in enumerate(lengths):
            # A few directions that come back, as in text: scores are not all alike.
            topics = torch.randn(6, num_kv, dim, generator=generator) * 2
            keys = topics[torch.randint(6, (length,), generator=generator)]
            self.keys.append(keys + torch.randn(length, num_kv, dim, generator=generator))
            at = torch.arange(length)
            self.pool.k[0][pages[b][at // PAGE], :, at % PAGE] = self.keys[b]
        self.query = torch.randn(len(lengths), num_q, dim, generator=generator)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.table = pages.int()
        index = None
        if config.index is not None:
            index = KeyIndex(self.pool, config.index)
            starts = torch.cat((torch.zeros(1), self.lengths.cumsum(0))).int()
            index.extend(0, self.pool.k[0], self.table, starts, self.lengths, max(lengths))
        self.selector = config.selector(self.pool, self.spec, index)

    def select(self, gated=()):
        lengths = self.lengths.clone()
        lengths[list(gated)] = 0
        nothing = torch.zeros(len(lengths), dtype=torch.int64)
        host = self.lengths.tolist()
        batch = Batch(
            nothing, nothing, nothing, self.table, self.lengths, torch.arange(len(host) + 1).int(), nothing, nothing,
            host, list(range(len(host) + 1)), self.table.tolist(), len(host),
        )  # fmt: skip
        self.selector.plan(batch, lengths)
        return self.selector.select(0, self.query)

    def mass(self, selection):
        """[B, Hk] softmax weight of the selected tokens, summed over the heads of the group."""
        found = torch.zeros(selection.counts.shape)
        for b, keys in enumerate(self.keys):
            query = self.query[b].unflatten(0, (keys.shape[1], -1))
            weights = (torch.einsum("hgd,nhd->hgn", query, keys) * self.spec.scale).softmax(-1).sum(1)
            for h, count in enumerate(selection.counts[b].tolist()):
                found[b, h] = weights[h, selection.indices[b, h, :count].long()].sum()
        return found


LENGTHS = [5, 8, 40, 41, 47, 48, 130]


@pytest.mark.parametrize("method", METHODS)
def test_selections_are_what_they_promise(method):
    contexts = Contexts(METHODS[method](24), LENGTHS)
    indices, counts, _ = contexts.select(gated=(2,))
    assert indices.dtype == counts.dtype == torch.int32 and indices.shape[-1] == 24
    for b, length in enumerate(LENGTHS):
        for tokens, count in zip(indices[b].tolist(), counts[b].tolist(), strict=True):
            assert tokens[count:] == [-1] * (24 - count)
            if b == 2:
                assert count == 0
                continue
            assert count == contexts.selector.attended(length) <= min(24, length)
            kept = tokens[:count]
            assert kept == sorted(set(kept)) and set(kept) <= set(range(length))
            assert {*range(2), *range(length - 3, length)} <= set(kept)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_the_context_is_the_context(method):
    lengths = [1, 7, 40, 64]
    indices, counts, _ = Contexts(METHODS[method](64), lengths).select()
    for b, length in enumerate(lengths):
        assert counts[b].tolist() == [length] * 2
        assert indices[b, :, :length].tolist() == [list(range(length))] * 2


@pytest.mark.parametrize("seed", range(12))
def test_nobody_captures_more_than_the_oracle(seed):
    lengths, budget = [33, 70, 257], 8 * (2 + seed % 3)
    best = Contexts(METHODS["oracle"](budget), lengths, seed)
    bound = best.mass(best.select())
    for method, make in METHODS.items():
        contexts = Contexts(make(budget), lengths, seed)
        mass = contexts.mass(contexts.select())
        assert (mass <= bound + 1e-5).all(), method
        if method == "window":
            assert mass.sum() < 0.9 * bound.sum(), "the keys leave nothing to find"


def test_a_window_is_the_first_and_the_last():
    indices, counts, _ = Contexts(Window(10, sink=2, recent=3), [30, 4]).select()
    assert indices[0].tolist() == [[0, 1, *range(22, 30)]] * 2
    assert indices[1].tolist() == [[0, 1, 2, 3, *[-1] * 6]] * 2 and counts.tolist() == [[10, 10], [4, 4]]


def test_labels_of_all_channels_find_almost_what_the_oracle_finds():
    for make in (METHODS["oracle"], lambda b: DoubleSparsity(b, **COMMON, channels=16)):
        contexts = Contexts(make(32), [300, 200], seed=3)
        chosen = contexts.select().indices
        if make is METHODS["oracle"]:
            best = chosen
    shared = sum(
        len({*a} & {*b}) for a, b in zip(best.flatten(0, 1).tolist(), chosen.flatten(0, 1).tolist(), strict=True)
    )
    assert shared > 0.85 * best.numel()
