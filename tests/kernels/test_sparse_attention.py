"""Attention over a selection: kernel = reference = softmax head by head, for any counts, pages, groups and splits."""

from __future__ import annotations

import pytest
import torch
from paged_cache import make_cache, naive_attention, oracle
from tolerances import assert_equal

from slipstream.kernels import reference, reference_select, triton_sparse

LENGTHS = (1, 27, 64, 65, 113)
# (Hq, Hk, D, page size)
SHAPES = ((1, 1, 1, 4), (6, 2, 27, 8), (4, 4, 64, 64), (8, 1, 113, 16))
CPU = torch.device("cpu")


def _query(batch, num_q, dim, dtype, device, seed=9):
    return torch.randn(batch, num_q, dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _selection(lengths, num_kv, budget, device, seed=1):
    """Random ascending tokens of every request and KV head: at most budget, fewer in some heads, -1 behind them."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((len(lengths), num_kv, budget), -1, dtype=torch.int32)
    counts = torch.zeros((len(lengths), num_kv), dtype=torch.int32)
    for b, length in enumerate(lengths):
        for h in range(num_kv):
            n = (
                min(budget, length)
                if h == 0
                else int(torch.randint(0, min(budget, length) + 1, (), generator=generator))
            )
            indices[b, h, :n] = torch.randperm(length, generator=generator)[:n].sort().values
            counts[b, h] = n
    return indices.to(device), counts.to(device)


def _attend(op, q, cache, indices, counts, scale):
    out = torch.full_like(q, 7.0)
    op(q, *cache.args, indices, counts, scale, out)
    return out


def _expected(q, cache, indices, counts, scale):
    return oracle(_attend_reference, q, *cache.args, indices, counts, scale)


def _attend_reference(q, k_pages, v_pages, page_table, indices, counts, scale):
    out = torch.full_like(q, 7.0)
    reference_select.sparse_attention(q, k_pages, v_pages, page_table, indices, counts, scale, out)
    return out


def _poison_unselected(cache, indices, counts):
    """NaN in every slot of the pools that no row has selected."""
    num_kv, page = cache.k_pages.shape[1:3]
    kept = torch.zeros(cache.k_pages.shape[:3], dtype=torch.bool)
    for b in range(len(counts)):
        for h in range(num_kv):
            tokens = indices[b, h, : counts[b, h]].cpu().long()
            kept[cache.page_table[b].cpu().long()[tokens // page], h, tokens % page] = True
    for pages in (cache.k_pages, cache.v_pages):
        pages[~kept.to(pages.device)] = torch.nan


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, dtype, device):
    num_q, num_kv, dim, page = shape
    cache = make_cache(LENGTHS, num_kv, page, dim, dtype, device)
    indices, counts = _selection(LENGTHS, num_kv, 48, device)
    _poison_unselected(cache, indices, counts)
    q = _query(len(LENGTHS), num_q, dim, dtype, device)
    actual = _attend(triton_sparse.sparse_attention, q, cache, indices, counts, dim**-0.5)
    assert_equal(actual, _expected(q, cache, indices, counts, dim**-0.5), "attention")
    untouched = (counts == 0).repeat_interleave(num_q // num_kv, dim=1)
    assert actual[untouched].eq(7).all() and not actual.isnan().any()


@pytest.mark.parametrize("split, tile, budget", ((16, 16, 100), (32, 16, 113), (64, 64, 65), (256, 32, 200)))
def test_any_split(split, tile, budget, monkeypatch, device):
    """Budgets that are no powers of two; one tile or several, one split, several, or more than one merge takes."""
    monkeypatch.setattr(triton_sparse, "LARGEST_SPLIT", split)
    monkeypatch.setattr(triton_sparse, "SMALLEST_SPLIT", split)
    monkeypatch.setattr(triton_sparse, "TILE_BYTES", tile * 16 * 4)
    monkeypatch.setattr(triton_sparse, "MERGE_TILE", 4)
    lengths = (113, 0, 200, 16, 17)
    cache = make_cache(lengths, 1, 16, 16, torch.float32, device)
    indices, counts = _selection(lengths, 1, budget, device)
    q = _query(5, 2, 16, torch.float32, device)
    actual = _attend(triton_sparse.sparse_attention, q, cache, indices, counts, 0.3)
    assert_equal(actual, _expected(q, cache, indices, counts, 0.3), "attention")
    assert actual[1].eq(7).all()
    again = _attend(triton_sparse.sparse_attention, q, cache, indices, counts, 0.3)
    assert_equal(again, actual, "copy")


def test_split_follows_the_device():
    """Rows of a full batch make about as many programs as the device runs at once, within the bounds of a split."""
    sizes = [triton_sparse.split_size(rows, 1024, 264) for rows in (1, 8, 16, 64, 512)]
    assert sizes == [32, 32, 64, 256, 512]
    assert triton_sparse.split_size(64, 1000, 264) == 256 and triton_sparse.split_size(8, 20, 264) == 32


def test_everything_selected_is_dense_attention(device):
    lengths = (113, 64, 1)
    cache = make_cache(lengths, 2, 16, 32, torch.float32, device)
    q = _query(3, 6, 32, torch.float32, device)
    indices = torch.arange(120, dtype=torch.int32, device=device).expand(3, 2, -1).contiguous()
    counts = cache.lengths.unsqueeze(1).expand(-1, 2).contiguous()
    dense = oracle(reference.decode_attention, q, *cache.args, cache.lengths, 0.2)
    for op in (triton_sparse.sparse_attention, reference_select.sparse_attention):
        assert_equal(_attend(op, q, cache, indices, counts, 0.2), dense, "attention")


def test_large_scores_do_not_overflow(device):
    cache = make_cache((65, 40), 1, 8, 16, torch.float32, device)
    indices, counts = _selection((65, 40), 1, 40, device)
    q = _query(2, 2, 16, torch.float32, device)
    actual = _attend(triton_sparse.sparse_attention, q, cache, indices, counts, 1e4)
    assert_equal(actual, _expected(q, cache, indices, counts, 1e4), "attention")


@pytest.mark.parametrize("split", (16, 256))
def test_rows(split, monkeypatch, device):
    """Each request uses the row it names: the same as with these rows gathered, to the bit; rows may be shared."""
    monkeypatch.setattr(triton_sparse, "LARGEST_SPLIT", split)
    monkeypatch.setattr(triton_sparse, "SMALLEST_SPLIT", split)
    lengths = (113, 64, 65)
    cache = make_cache(lengths, 2, 16, 32, torch.float32, device)
    indices, counts = _selection((64, 64, 64, 64, 64), 2, 48, device)
    counts[3] = 0
    q = _query(3, 6, 32, torch.float32, device)
    for chosen in ((4, 0, 2), (1, 1, 3)):
        rows = torch.tensor(chosen, device=device)
        for op in (triton_sparse.sparse_attention, reference_select.sparse_attention):
            gathered = _attend(op, q, cache, indices[rows], counts[rows], 0.2)
            out = torch.full_like(q, 7.0)
            op(q, *cache.args, indices, counts, 0.2, out, rows)
            assert torch.equal(out, gathered)


def test_no_requests(device):
    cache = make_cache((1,), 1, 8, 16, torch.float32, device)
    indices, counts = (x[:0] for x in _selection((1,), 1, 4, device))
    q = torch.empty((0, 2, 16), device=device)
    triton_sparse.sparse_attention(q, *cache.args[:2], cache.page_table[:0], indices, counts, 1.0, q)


def test_reference_is_softmax_over_the_selection():
    cache = make_cache(LENGTHS, 2, 8, 16, torch.float32, CPU)
    indices, counts = _selection(LENGTHS, 2, 48, CPU)
    q = _query(len(LENGTHS), 6, 16, torch.float32, CPU)
    out = _attend(reference_select.sparse_attention, q, cache, indices, counts, 0.3)
    for b in range(len(LENGTHS)):
        for h in range(2):
            heads = slice(3 * h, 3 * h + 3)
            tokens = indices[b, h, : counts[b, h]].long()
            keys, values = cache.keys[b][tokens, h : h + 1], cache.values[b][tokens, h : h + 1]
            expected = naive_attention(q[b, heads], keys, values, 0.3) if len(tokens) else torch.full((3, 16), 7.0)
            torch.testing.assert_close(out[b, heads], expected)


def test_reference_does_not_depend_on_the_batch():
    """To the last bit: a request alone, among others, and among others that are not attended."""
    cache = make_cache((50, 30, 17, 90), 2, 8, 16, torch.float32, CPU)
    indices, counts = _selection((50, 30, 17, 90), 2, 27, CPU)
    counts[2] = 0
    q = _query(4, 6, 16, torch.float32, CPU)
    together = _attend(reference_select.sparse_attention, q, cache, indices, counts, 0.3)
    for b in range(4):
        row = slice(b, b + 1)
        alone = torch.full_like(q[row], 7.0)
        table = cache.page_table[row]
        reference_select.sparse_attention(q[row], *cache.args[:2], table, indices[row], counts[row], 0.3, alone)
        assert torch.equal(alone, together[row])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("budget", (1000, 1024, 2048))
@pytest.mark.parametrize("shape", ((32, 8, 128, 64), (64, 8, 128, 16), (16, 16, 256, 32), (14, 2, 64, 64)))
def test_large(shape, budget, dtype, device):
    num_q, num_kv, dim, page = shape
    lengths = (1, 9000, 64, 0, 4096, 1024, 1025, 3333)
    for rows in (1, 8):
        cache = make_cache(lengths[1 : 1 + rows] if rows == 1 else lengths, num_kv, page, dim, dtype, device)
        indices, counts = _selection(lengths[1 : 1 + rows] if rows == 1 else lengths, num_kv, budget, device)
        q = _query(rows, num_q, dim, dtype, device)
        actual = _attend(triton_sparse.sparse_attention, q, cache, indices, counts, dim**-0.5)
        assert_equal(actual, _expected(q, cache, indices, counts, dim**-0.5), "attention")


@pytest.mark.gpu
def test_one_graph_serves_any_counts(device):
    lengths = (700, 3000, 2048, 1500)
    cache = make_cache(lengths, 8, 64, 128, torch.bfloat16, device)
    indices, full = _selection(lengths, 8, 1024, device)
    q = _query(4, 32, 128, torch.bfloat16, device)
    counts, out = full.clone(), torch.empty_like(q)
    triton_sparse.sparse_attention(q, *cache.args, indices, counts, 0.1, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_sparse.sparse_attention(q, *cache.args, indices, counts, 0.1, out)
    for limit in ((1024, 1024, 1024, 1024), (0, 1, 300, 64), (700, 0, 0, 1000)):
        counts.copy_(torch.minimum(full, torch.tensor(limit, dtype=torch.int32, device=device).unsqueeze(1)))
        out.fill_(7.0)
        graph.replay()
        assert_equal(out, _expected(q, cache, indices, counts, 0.1), "attention")
