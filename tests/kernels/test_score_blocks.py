"""Scores of blocks: kernel = reference = head by head, and what a bound and a merge of blocks promise."""

from __future__ import annotations

import pytest
import torch
from paged_cache import make_cache, oracle
from paged_index import make_index, make_query
from tolerances import assert_equal

from slipstream.kernels import reference_index, sparse, triton_score

KINDS = tuple(reference_index.NUM_STATS)
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (0, 1, 27, 63, 64, 65, 113, 200)
# (Hq, Hk, D, page, block, merge)
SHAPES = (
    (1, 1, 16, 16, 16, 1),
    (8, 2, 63, 64, 16, 4),
    (5, 1, 64, 64, 64, 1),
    (4, 4, 113, 128, 16, 2),
    (8, 2, 64, 16, 16, 4),
    (20, 1, 576, 64, 16, 4),
)


def _case(shape, kind, dtype, device, lengths=LENGTHS):
    """(q, summaries, page_table, lengths) and a mask of the defined scores, [B, 1, M]."""
    num_q, num_kv, dim, page, block, merge = shape
    cache = make_cache(lengths, num_kv, page, dim, dtype, device)
    index = make_index(cache, block, kind, 2)
    q = make_query(len(lengths), num_q, dim, dtype, device)
    ends = torch.arange(1, cache.page_table.shape[1] * page // (block * merge) + 1, device=device) * block * merge
    defined = (ends <= cache.lengths.unsqueeze(1)).unsqueeze(1)
    return (q, index.summaries, cache.page_table, cache.lengths), defined, cache


def _compare(args, options, defined):
    """Undefined scores, which are NaN where nobody wrote them, are left out."""
    actual = triton_score.score_blocks(*args, *options)
    q, *rest = args
    expected = oracle(reference_index.score_blocks, q.float(), *rest, *options)
    assert defined.any()
    assert_equal(actual.masked_fill(~defined, 0), expected.masked_fill(~defined, 0), "logits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, kind, dtype, device):
    """The deviation is a power of two: no factor is rounded in half precision."""
    args, defined, _ = _case(shape, kind, dtype, device)
    aggregate = "max" if shape[-1] == 1 or kind == "mean" else "sum"
    _compare(args, (kind, shape[-1], 0.25, aggregate, 0.5, shape[-2]), defined)


@pytest.mark.parametrize("num_bytes", (1, 1 << 20))
@pytest.mark.parametrize("per_processor", (1, 100))
def test_any_tile(num_bytes, per_processor, monkeypatch, device):
    """One tile or many in a program."""
    monkeypatch.setattr(triton_score, "SCORE_TILE_BYTES", num_bytes)
    monkeypatch.setattr(triton_score, "MAX_PROGRAMS", per_processor)
    monkeypatch.setattr(triton_score, "MIN_PROGRAMS", 0)
    args, defined, _ = _case((8, 2, 16, 32, 16, 2), "minmax", torch.float32, device, (1000, 0, 33, 700))
    _compare(args, ("minmax", 2, 1.0, "max", 1.0, 16), defined)


@pytest.mark.parametrize("op", (reference_index.score_blocks, triton_score.score_blocks))
def test_minmax_bounds_every_key(op, device):
    """Quest's promise, for blocks as stored and merged; sums of heads are bounded by sums of bounds."""
    shape = (6, 2, 63, 64, 16, 1)
    args, _, cache = _case(shape, "minmax", torch.float32, device)
    logits = reference_index.key_logits(args[0], cache.k_pages, *args[2:], 0.25).unflatten(1, (2, 3))
    for merge in (1, 4):
        for aggregate in ("max", "sum"):
            scores = op(*args, "minmax", merge, 0.25, aggregate, 1.0, 16)
            over_group = logits.amax(2) if aggregate == "max" else logits.sum(2)
            for b, length in enumerate(LENGTHS):
                whole = length // (16 * merge)
                best = over_group[b, :, : whole * 16 * merge].unflatten(-1, (whole, 16 * merge)).amax(-1)
                assert (scores[b, :, :whole] >= best - 1e-4).all()


@pytest.mark.parametrize("op", (reference_index.score_blocks, triton_score.score_blocks))
def test_merged_is_the_best_of_its_parts(op, device):
    args, _, _ = _case((4, 2, 16, 64, 16, 4), "meanstd", torch.float32, device, (64, 200))
    parts, merged = (op(*args, "meanstd", merge, 1.0, "max", 2.0, 16) for merge in (1, 4))
    assert_equal(merged[1, :, :3], parts[1, :, :12].unflatten(-1, (3, 4)).amax(-1), "logits")
    assert_equal(merged[0, :, :1], parts[0, :, :4].amax(-1, keepdim=True), "logits")


def test_reference_is_the_formula_head_by_head():
    for kind in KINDS:
        args, _, cache = _case((4, 2, 16, 32, 16, 2), kind, torch.float32, torch.device("cpu"), (70,))
        q, keys = args[0][0], cache.keys[0][:64].view(4, 16, 2, 16)
        first, second = keys.amax(1), keys.amin(1)
        if kind != "minmax":
            first, second = keys.mean(1), keys.std(1, correction=0)
        scores = torch.zeros(4, 4)
        for head in range(4):
            for block in range(4):
                a, b = first[block, head // 2], second[block, head // 2]
                if kind == "minmax":
                    scores[head, block] = q[head].clamp(min=0) @ a + q[head].clamp(max=0) @ b
                else:
                    scores[head, block] = q[head] @ a + (kind == "meanstd") * 1.5 * (q[head].abs() @ b)
        expected = 0.5 * scores.view(2, 2, 2, 2).amax(-1).sum(1)
        actual = reference_index.score_blocks(*args, kind, 2, 0.5, "sum", 1.5, 16)
        torch.testing.assert_close(actual[0, :, :2], expected)


def test_reference_does_not_depend_on_the_batch():
    """To the last bit: a request alone, and among others of any length."""
    args, _, _ = _case((8, 2, 64, 64, 16, 4), "minmax", torch.float32, torch.device("cpu"), (500, 64, 65, 700, 640, 3))
    options = ("minmax", 4, 0.1, "sum", 1.0, 16)
    together = reference_index.score_blocks(*args, *options)
    for b, length in enumerate(args[3].tolist()):
        row = slice(b, b + 1)
        alone = reference_index.score_blocks(args[0][row], args[1], args[2][row], args[3][row], *options)
        assert torch.equal(alone[0, :, : length // 64], together[b, :, : length // 64])


def test_huge_scores_and_no_requests(device):
    args, defined, _ = _case((2, 1, 16, 16, 16, 1), "minmax", torch.float32, device, (65, 16))
    _compare((args[0] * 1e30, *args[1:]), ("minmax", 1, 1.0, "max", 1.0, 16), defined)
    q, summaries, table, lengths = args
    none = triton_score.score_blocks(q[:0], summaries, table[:0], lengths[:0], "minmax", 1, 1.0, "max", 1.0, 16)
    assert none.shape == (0, 1, table.shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ((32, 8, 128, 64, 64, 1), (64, 8, 128, 64, 16, 4), (40, 8, 128, 16, 16, 1)))
def test_large(shape, kind, device):
    lengths = (1, 9000, 64, 65, 0, 4096, 333)
    args, defined, _ = _case(shape, kind, torch.bfloat16, device, lengths)
    _compare(args, (kind, shape[-1], 128**-0.5, "max", 1.0, shape[-2]), defined)


@pytest.mark.gpu
def test_one_graph_serves_any_lengths_without_waiting(device):
    (q, summaries, table, _), _, _ = _case((32, 8, 128, 64, 64, 1), "minmax", torch.bfloat16, device, (700, 1, 3000))
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    options = ("minmax", 1, 0.1, "max", 1.0, 64)
    sparse.score_blocks(q, summaries, table, lengths, *options)
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse.score_blocks(q, summaries, table, lengths, *options)
    torch.cuda.set_sync_debug_mode("default")
    for current in ((700, 1, 3000), (0, 0, 65), (64, 0, 2048)):
        lengths.copy_(torch.tensor(current, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        expected = oracle(reference_index.score_blocks, q.float(), summaries, table, lengths, *options)
        for b, length in enumerate(current):
            assert_equal(out[b, :, : length // 64], expected[b, :, : length // 64], "logits")
            assert out[b, :, length // 64 :].isnan().all()
