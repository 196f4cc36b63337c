"""Decode attention that reads the pages in place: the reference's numbers, and each request a world of its own."""

from __future__ import annotations

import pytest
import torch
from paged_cache import PagedCache, make_cache
from tolerances import assert_equal

from slipstream.kernels import cpu_decode, ops, reference, reference_select

CPU = torch.device("cpu")
# (Hq, Hk, D, page size)
SHAPES = ((1, 1, 1, 4), (6, 2, 27, 8), (5, 1, 63, 16), (8, 2, 64, 64), (4, 4, 65, 128))
LENGTHS = (1, 0, 27, 63, 64, 64, 65, 64, 500)


def _inputs(lengths, shape=(8, 2, 64, 64)) -> tuple[torch.Tensor, PagedCache]:
    num_q, num_kv, dim, page = shape
    q = torch.randn(len(lengths), num_q, dim, generator=torch.Generator().manual_seed(9))
    return q, make_cache(lengths, num_kv, page, dim, torch.float32, CPU)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", (LENGTHS, (33, 33, 33), (0, 5, 0), (0, 0), (300,)))
def test_equals_the_reference(lengths, shape):
    q, cache = _inputs(lengths, shape)
    expected = reference.decode_attention(q, *cache.args, cache.lengths, 0.2)
    assert_equal(cpu_decode.decode_attention(q, *cache.args, cache.lengths, 0.2), expected, "attention")


def test_no_requests():
    q, cache = _inputs((1,))
    assert (
        cpu_decode.decode_attention(q[:0], *cache.args[:2], cache.page_table[:0], cache.lengths[:0], 1.0).numel() == 0
    )


def test_to_the_last_bit_alone_and_among_others():
    q, cache = _inputs(LENGTHS)
    together = cpu_decode.decode_attention(q, *cache.args, cache.lengths, 0.125)
    for b in range(len(LENGTHS)):
        row = slice(b, b + 1)
        alone = cpu_decode.decode_attention(q[row], *cache.args[:2], cache.page_table[row], cache.lengths[row], 0.125)
        assert torch.equal(alone, together[row])


def test_to_the_last_bit_wherever_the_pages_lie():
    q, cache = _inputs((200, 130))
    order = torch.randperm(cache.k_pages.shape[0])
    place = order.argsort().int()
    expected = cpu_decode.decode_attention(q, *cache.args, cache.lengths, 0.125)
    moved = cpu_decode.decode_attention(
        q, cache.k_pages[order], cache.v_pages[order], place[cache.page_table.long()], cache.lengths, 0.125
    )
    assert torch.equal(moved, expected)


def test_shared_pages():
    q, cache = _inputs((130, 130))
    cache.page_table[1, :2] = cache.page_table[0, :2]
    expected = reference.decode_attention(q, *cache.args, cache.lengths, 0.2)
    assert_equal(cpu_decode.decode_attention(q, *cache.args, cache.lengths, 0.2), expected, "attention")


def test_a_step_never_reads_where_the_last_one_did():
    """What is remembered between layers is found by value: tensors that changed in place are new questions."""
    q, cache = _inputs((128, 128))
    page_table, lengths = cache.page_table.clone(), cache.lengths.clone()
    for change in (lambda: lengths.sub_(1), lambda: page_table.copy_(page_table[:, [1, 0, 2]])):
        cpu_decode.decode_attention(q, *cache.args[:2], page_table, lengths, 0.2)
        change()
        found = cpu_decode.decode_attention(q, *cache.args[:2], page_table, lengths, 0.2)
        expected = reference.decode_attention(q, *cache.args[:2], page_table, lengths, 0.2)
        assert found.isfinite().all()
        assert_equal(found, expected, "attention")


def test_nan_stays_with_its_request():
    q, cache = _inputs((65, 40))
    clean = cpu_decode.decode_attention(q, *cache.args, cache.lengths, 0.25)
    cache.v_pages[cache.page_table[1, 0].long(), :, 3] = torch.nan
    dirty = cpu_decode.decode_attention(q, *cache.args, cache.lengths, 0.25)
    assert dirty[1].isnan().all() and torch.equal(dirty[0], clean[0]) and clean.isfinite().all()


def test_the_catalogue_takes_it_where_it_suits(monkeypatch):
    q, cache = _inputs((65, 40))
    calls = []
    monkeypatch.setattr(reference, "decode_attention", lambda *args: calls.append("gather"))
    ops.decode_attention(q, *cache.args, cache.lengths, 0.25)
    assert not calls
    half = (q.bfloat16(), cache.k_pages.bfloat16(), cache.v_pages.bfloat16(), cache.page_table, cache.lengths)
    ops.decode_attention(*half, 0.25)
    assert calls == ["gather"]
    assert not cpu_decode.suits(torch.empty(2, 1, 4, 8, device="meta"))
    assert not cpu_decode.suits(torch.empty(1).expand(2**20, 2**5, 2**6, 8))


def _sets(lengths, num_kv, width):
    """Random ascending tokens of each request and head; heads differ in how many."""
    indices = torch.full((len(lengths), num_kv, width), -1, dtype=torch.int32)
    counts = torch.zeros((len(lengths), num_kv), dtype=torch.int32)
    for b, length in enumerate(lengths):
        for head in range(num_kv):
            chosen = torch.randperm(length)[: max(0, width - 3 * head - b % 2)].sort().values
            indices[b, head, : len(chosen)], counts[b, head] = chosen.int(), len(chosen)
    return indices, counts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", (LENGTHS, (0, 5, 0), (0, 0), (300,)))
def test_over_a_selection_it_equals_the_reference(lengths, shape):
    q, cache = _inputs(lengths, shape)
    indices, counts = _sets(lengths, shape[1], 17)
    if len(lengths) == 3:
        counts[1, 0] = 0  # one head of a request that has others
    rows = torch.randperm(len(lengths))
    own = indices[rows.argsort()], counts[rows.argsort()]
    expected, found = torch.ones_like(q), torch.ones_like(q)
    reference_select.sparse_attention(q, *cache.args, indices, counts, 0.2, expected)
    cpu_decode.sparse_attention(q, *cache.args, *own, 0.2, found, rows)
    assert_equal(found, expected, "attention")


def test_over_a_selection_to_the_last_bit_alone_and_whatever_lies_beside():
    q, cache = _inputs(LENGTHS)
    indices, counts = _sets(LENGTHS, 2, 40)
    together = torch.zeros_like(q)
    cpu_decode.sparse_attention(q, *cache.args, indices, counts, 0.125, together)
    chosen = torch.zeros(cache.k_pages.shape[:3], dtype=torch.bool)
    for b in range(len(LENGTHS)):
        for head in range(2):
            tokens = indices[b, head, : counts[b, head]].long()
            chosen[cache.page_table[b, tokens // 64].long(), head, tokens % 64] = True
    spoiled = [pages.masked_fill(~chosen.unsqueeze(-1), float("nan")) for pages in cache.args[:2]]
    for b in range(len(LENGTHS)):
        row, out = slice(b, b + 1), torch.zeros_like(q[:1])
        cpu_decode.sparse_attention(q[row], *spoiled, cache.page_table[row], indices[row], counts[row], 0.125, out)
        assert torch.equal(out, together[row])
