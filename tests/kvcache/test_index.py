"""The index of keys: whatever happened to a page, its index is what its keys make it (golden equality 5)."""

from __future__ import annotations

import random

import pytest
import torch

from slipstream.kernels.reference_index import quantise_labels, summarise
from slipstream.kvcache.index import IndexParts, KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.kvcache.table import PageTable
from slipstream.types import ModelSpec

SPEC = ModelSpec("toy", 2, 48, 2, 2, 12, 7, 512, torch.float32)
PAGE = 8
PARTS = [
    IndexParts("mean", 8, 6),
    IndexParts("minmax", 2),
    IndexParts("meanstd", 4, 12),
    IndexParts(num_channels=2),
]


class Cache:
    """Chains over a table, a pool and its index. The key of a token is a function of its id and its position."""

    def __init__(self, parts, num_pages=24, seed=0, channels=None):
        self.random = random.Random(seed)
        shape = (SPEC.num_layers, SPEC.vocab_size, 40, SPEC.num_kv_heads, SPEC.head_dim)
        self.keys = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.pool = KVPool(SPEC.num_layers, num_pages, SPEC.num_kv_heads, PAGE, SPEC.head_dim, torch.float32)
        self.index = KeyIndex(self.pool, parts, channels)
        self.parts = parts
        self.table = PageTable(num_pages, PAGE)
        self.chains = []  # [lease, token ids]

    def keys_of(self, layer, ids):
        return self.keys[layer][torch.tensor(ids), torch.arange(len(ids))]

    def write(self, lease, ids, first):
        """Store and index the tokens from ``first`` on, as a step does; two requests, one of them a padding row."""
        table = torch.zeros((2, 40 // PAGE), dtype=torch.int32)
        table[0, : len(lease.pages)] = torch.tensor(lease.pages)
        count = len(ids) - first
        starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, count, count], [len(ids), 0]))
        for layer in range(SPEC.num_layers):
            for at in range(first, len(ids)):
                self.pool.k[layer, lease.pages[at // PAGE], :, at % PAGE] = self.keys_of(layer, ids)[at]
            self.index.extend(layer, self.pool.k[layer], table, starts, lengths, count)

    def start(self):
        ids = [self.random.randrange(2) for _ in range(self.random.randrange(1, 30))]
        if self.table.num_new_pages(ids, len(ids) - 1) > self.table.num_available:
            return
        lease = self.table.allocate(ids, len(ids) - 1)
        first = lease.length
        self.pool.copy_pages(self.table.append(lease, len(ids) - first))
        self.write(lease, ids, first)
        self.chains.append((lease, ids))

    def grow(self):
        lease, ids = self.random.choice(self.chains)
        count = self.random.choice((1, 1, 1, 3))
        if len(ids) + count > 40 or not self.table.can_append(lease, count):
            return
        self.pool.copy_pages(self.table.append(lease, count))
        ids += [self.random.randrange(2) for _ in range(count)]
        self.write(lease, ids, len(ids) - count)

    def fork(self):
        lease, ids = self.random.choice(self.chains)
        length = self.random.randrange(1, len(ids) + 1)
        self.chains.append((self.table.fork(lease, length), ids[:length]))

    def end(self):
        lease, ids = self.chains.pop(self.random.randrange(len(self.chains)))
        self.table.commit(lease, ids, len(ids))
        self.table.free(lease)

    def check(self):
        for lease, ids in self.chains:
            for layer in range(SPEC.num_layers):
                self.check_layer(layer, lease.pages, self.keys_of(layer, ids))

    def check_layer(self, layer, pages, keys):
        if self.parts.num_channels:
            channels, labels, scales = self.index.labels(layer)
            codes, steps = quantise_labels(keys.gather(2, channels.long().expand(len(keys), -1, -1)))
            for at in range(len(keys)):
                assert torch.equal(labels[pages[at // PAGE], :, at % PAGE], codes[at])
                assert torch.equal(scales[pages[at // PAGE], :, at % PAGE], steps[at])
        if self.parts.kind is not None:
            size = self.parts.block
            for block in range(len(keys) // size):
                of_block = keys[block * size : (block + 1) * size].transpose(0, 1)
                stored = self.index.summaries(layer)[pages[block * size // PAGE], :, block % (PAGE // size)]
                torch.testing.assert_close(stored, summarise(of_block, self.parts.kind), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_the_index_follows_its_pages(parts):
    cache = Cache(parts, seed=len(str(parts)))
    copied = []
    copy_pages = cache.pool.copy_pages
    cache.pool.copy_pages = lambda pairs: (copied.extend(pairs), copy_pages(pairs))
    for step in range(120):
        moves = [cache.start, cache.grow, cache.grow, cache.fork, cache.end] if cache.chains else [cache.start]
        cache.random.choice(moves)()
        cache.table.check_integrity()
        if step % 6 == 0:
            cache.check()
    assert copied and cache.table.num_cached, "the fuzzing shared nothing"


def test_other_channels_relabel_what_is_stored():
    cache = Cache(IndexParts(num_channels=4))
    for _ in range(3):
        cache.start()
    cache.check()
    before = cache.index.labels(0).labels.clone()
    pages = {page for lease, _ in cache.chains for page in lease.pages}
    for layer in range(SPEC.num_layers):
        cache.index.set_channels(layer, torch.tensor([[1, 5, 8, 11], [0, 2, 3, 9]]), cache.pool.k[layer], pages)
    assert not torch.equal(before, cache.index.labels(0).labels)
    cache.check()
    cache.grow()
    cache.check()


def test_given_channels_are_used_from_the_start():
    channels = torch.tensor([[[1, 5], [0, 2]], [[3, 4], [10, 11]]], dtype=torch.int32)
    cache = Cache(IndexParts(num_channels=2), channels=channels)
    cache.start()
    assert torch.equal(cache.index.labels(1).channels, channels[1])
    cache.check()


@pytest.mark.parametrize("parts, per_token", [
    (IndexParts("mean", 8), 2 * 2 * 12 * 4 / 8),
    (IndexParts("minmax", 2), 2 * 2 * 2 * 12 * 4 / 2),
    (IndexParts(num_channels=6), 2 * 2 * (3 + 4)),
    (IndexParts("meanstd", 4, 12), 2 * 2 * (2 * 12 * 4 / 4 + 6 + 4)),
])  # fmt: skip
def test_bytes(parts, per_token):
    pool = KVPool(SPEC.num_layers, 5, SPEC.num_kv_heads, PAGE, SPEC.head_dim, torch.float32)
    assert parts.bytes_per_token(SPEC) == per_token
    assert KeyIndex(pool, parts).bytes == 5 * PAGE * per_token


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="blocks of 3 tokens do not divide a page of 8"):
        IndexParts("mean", 3).check_page_size(8)
    with pytest.raises(ValueError, match="channels = 14 exceeds the head dimension 12"):
        IndexParts(num_channels=14).check_model(SPEC)
