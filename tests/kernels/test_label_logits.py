"""Logits from labels and from keys: kernel = reference = the dequantised product; candidates by block = all of them."""

from __future__ import annotations

import pytest
import torch
from paged_cache import make_cache, oracle
from paged_index import make_index, make_query
from tolerances import assert_equal

from slipstream.kernels import reference_index, reference_select, sparse, triton_logits, triton_score

DTYPES = (torch.float32, torch.bfloat16)
OPS = (reference_index.label_logits, triton_logits.label_logits)
LENGTHS = (0, 1, 27, 63, 64, 65, 113, 200)
# (Hq, Hk, D, page, block, channels)
SHAPES = (
    (1, 1, 16, 16, 16, 2),
    (8, 2, 63, 64, 16, 32),
    (5, 1, 64, 64, 64, 64),
    (4, 4, 113, 128, 64, 40),
    (8, 2, 64, 16, 16, 16),
)


def _case(shape, dtype, device, lengths=LENGTHS):
    """((q, channels, labels, scales, page_table, lengths), cache)."""
    num_q, num_kv, dim, page, block, num_channels = shape
    cache = make_cache(lengths, num_kv, page, dim, dtype, device)
    index = make_index(cache, block, "mean", num_channels)
    q = make_query(len(lengths), num_q, dim, dtype, device)
    return (q, index.channels, index.labels, index.scales, cache.page_table, cache.lengths), cache


def _pick_blocks(lengths, num_kv, num_blocks, block):
    """Every head its own blocks, ascending, -1 behind; the last block of a request may be incomplete."""
    generator = torch.Generator().manual_seed(5)
    blocks = torch.full((len(lengths), num_kv, num_blocks), -1, dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        for head in range(num_kv):
            chosen = torch.randperm(-(-length // block), generator=generator)[:num_blocks].sort().values
            blocks[b, head, : len(chosen)] = chosen
    return blocks.to(lengths.device)


def _candidates(blocks, lengths, block):
    """(tokens, defined), [B, Hk, M * block] each."""
    tokens = (blocks.unsqueeze(-1) * block + torch.arange(block, device=blocks.device)).flatten(2).long()
    return tokens, (blocks >= 0).repeat_interleave(block, 2) & (tokens < lengths.view(-1, 1, 1))


def _compare(args, blocks, block, scale, defined):
    actual = triton_logits.label_logits(*args, blocks, block, scale)
    expected = oracle(reference_index.label_logits, args[0].float(), *args[1:], blocks, block, scale)
    defined = defined.repeat_interleave(actual.shape[1] // defined.shape[1], 1)
    assert defined.any()
    assert_equal(actual.masked_fill(~defined, 0), expected.masked_fill(~defined, 0), "logits")


def _seen(args, num_kv):
    tokens = torch.arange(args[4].shape[1] * args[2].shape[2], device=args[5].device)
    return (tokens < args[5].view(-1, 1, 1)).expand(-1, num_kv, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, dtype, device):
    args, _ = _case(shape, dtype, device)
    _compare(args, None, shape[4], 0.25, _seen(args, shape[1]))
    blocks = _pick_blocks(args[5], shape[1], 3, shape[4])
    _compare(args, blocks, shape[4], 0.25, _candidates(blocks, args[5], shape[4])[1])


@pytest.mark.parametrize("tile", (16, 64, 512))
@pytest.mark.parametrize("per_processor", (1, 100))
def test_any_tile(tile, per_processor, monkeypatch, device):
    """Tiles smaller and larger than a block, one or many of them in a program."""
    monkeypatch.setattr(triton_logits, "LABEL_TILE", tile)
    monkeypatch.setattr(triton_score, "MIN_PROGRAMS", 0)
    monkeypatch.setattr(triton_score, "MAX_PROGRAMS", per_processor)
    args, _ = _case((4, 2, 16, 32, 32, 8), torch.float32, device, (700, 0, 33))
    _compare(args, None, 32, 1.0, _seen(args, 2))
    blocks = _pick_blocks(args[5], 2, 11, 32)
    _compare(args, blocks, 32, 1.0, _candidates(blocks, args[5], 32)[1])


@pytest.mark.parametrize("op", OPS)
def test_candidates_by_block_are_those_of_all_tokens(op, device):
    args, _ = _case((6, 2, 64, 64, 16, 32), torch.float32, device)
    every = op(*args, None, 16, 0.3).unflatten(1, (2, 3))
    blocks = _pick_blocks(args[5], 2, 4, 16)
    chosen = op(*args, blocks, 16, 0.3).unflatten(1, (2, 3))
    tokens, defined = _candidates(blocks, args[5], 16)
    expected = every.gather(3, tokens.clamp(min=0).unsqueeze(2).expand(-1, -1, 3, -1))
    defined = defined.unsqueeze(2)
    assert_equal(chosen.masked_fill(~defined, 0), expected.masked_fill(~defined, 0), "logits")


def test_reference_is_near_the_product_of_the_channels():
    """Off by no more than half a step in every channel, weighted by the query."""
    args, cache = _case((4, 2, 64, 32, 32, 32), torch.float32, torch.device("cpu"), (100,))
    logits = reference_index.label_logits(*args, None, 32, 0.5)[0]
    for head in range(4):
        channels = args[1][head // 2].long()
        q, keys = args[0][0, head, channels], cache.keys[0][:, head // 2, channels]
        step = (keys.amax(1) - keys.amin(1)) / 15
        allowed = 0.5 * (step / 2 + 0.01) * q.abs().sum()
        assert ((logits[head, :100] - 0.5 * keys @ q).abs() <= allowed).all()


def test_equal_labels_tie_exactly(device):
    """Whatever tile or block a token lies in: selection breaks ties by index, so they must be ties."""
    args, cache = _case((4, 1, 64, 64, 64, 32), torch.bfloat16, device, (512,))
    args[2].copy_(args[2][1, :, :1].expand_as(args[2]))
    args[3].copy_(args[3][1, :, :1].expand_as(args[3]))
    logits = triton_logits.label_logits(*args, None, 64, 0.3)[0, :, :512]
    assert logits.isfinite().all() and (logits == logits[:, :1]).all()


def test_constant_keys(device):
    """A step of 0: every token's logit is its zero point times the sum of the query's channels."""
    for op in OPS:
        args, _ = _case((4, 2, 16, 32, 32, 8), torch.float32, device, (40,))
        args[3][..., 0] = 0
        args[3][..., 1] = 0.5
        total = args[0][0].view(2, 2, 16).gather(2, args[1].long().unsqueeze(1).expand(-1, 2, -1)).sum(-1)
        logits = op(*args, None, 32, 2.0)[0, :, :40]
        torch.testing.assert_close(logits, total.view(4, 1).expand(-1, 40), rtol=1e-5, atol=1e-5)


def test_references_do_not_depend_on_the_batch():
    """To the last bit: a request alone, and among others of any length."""
    args, cache = _case((8, 2, 64, 64, 64, 32), torch.float32, torch.device("cpu"), (500, 64, 65, 700, 640, 3))
    q, table, lengths = args[0], *args[4:]
    blocks = _pick_blocks(lengths, 2, 5, 64)
    ops = (
        lambda row: reference_index.label_logits(q[row], *args[1:4], table[row], lengths[row], None, 64, 0.1),
        lambda row: reference_index.label_logits(q[row], *args[1:4], table[row], lengths[row], blocks[row], 64, 0.1),
        lambda row: reference_index.key_logits(q[row], cache.k_pages, table[row], lengths[row], 0.1),
    )
    for op in ops:
        together = op(slice(None))
        for b, length in enumerate(lengths.tolist()):
            defined = min(length, 64)
            assert torch.equal(op(slice(b, b + 1))[0, :, :defined], together[b, :, :defined])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((1, 1, 16, 16), (8, 2, 63, 64), (5, 1, 64, 64), (4, 4, 113, 128)))
def test_key_logits(shape, dtype, device):
    num_q, num_kv, dim, page = shape
    cache = make_cache(LENGTHS, num_kv, page, dim, dtype, device)
    q = make_query(len(LENGTHS), num_q, dim, dtype, device)
    actual = triton_logits.key_logits(q, cache.k_pages, cache.page_table, cache.lengths, 0.25)
    expected = oracle(reference_index.key_logits, q.float(), cache.k_pages, cache.page_table, cache.lengths, 0.25)
    for b, length in enumerate(LENGTHS):
        assert_equal(actual[b, :, :length], expected[b, :, :length], "logits")
        naive = torch.einsum("hgd,thd->hgt", q[b].float().unflatten(0, (num_kv, -1)), cache.keys[b].float()) * 0.25
        torch.testing.assert_close(expected[b, :, :length], naive.flatten(0, 1), rtol=1e-5, atol=1e-4)


def test_no_requests(device):
    args, cache = _case((2, 1, 16, 16, 16, 4), torch.float32, device, (5,))
    q, table, lengths = args[0][:0], args[4][:0], args[5][:0]
    assert triton_logits.label_logits(q, *args[1:4], table, lengths, None, 16, 1.0).shape == (0, 2, 32)
    assert triton_logits.key_logits(q, cache.k_pages, table, lengths, 1.0).shape == (0, 2, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ((32, 8, 128, 64, 64, 32), (64, 8, 128, 64, 16, 128), (40, 8, 128, 16, 16, 16)))
def test_large(shape, device):
    args, cache = _case(shape, torch.bfloat16, device, (1, 9000, 64, 65, 0, 4096, 333))
    _compare(args, None, shape[4], 128**-0.5, _seen(args, 8))
    blocks = _pick_blocks(args[5], 8, 40, shape[4])
    _compare(args, blocks, shape[4], 128**-0.5, _candidates(blocks, args[5], shape[4])[1])
    q, table, lengths = args[0], *args[4:]
    actual = sparse.key_logits(q, cache.k_pages, table, lengths, 0.1)
    expected = oracle(reference_index.key_logits, q.float(), cache.k_pages, table, lengths, 0.1)
    seen = _seen(args, shape[0])
    assert_equal(actual.masked_fill(~seen, 0), expected.masked_fill(~seen, 0), "logits")


@pytest.mark.gpu
def test_one_graph_serves_any_lengths_without_waiting(device):
    args, _ = _case((32, 8, 128, 64, 64, 32), torch.bfloat16, device, (700, 1, 3000))
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    blocks = torch.zeros((3, 8, 7), dtype=torch.int32, device=device)

    def everything():
        every = sparse.label_logits(*args[:5], lengths, None, 64, 0.1)
        return every, sparse.label_logits(*args[:5], lengths, blocks, 64, 0.1)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = everything()
    torch.cuda.set_sync_debug_mode("default")
    for current in ((700, 1, 3000), (0, 0, 65), (64, 0, 2048)):
        lengths.copy_(torch.tensor(current, dtype=torch.int32))
        blocks.copy_(_pick_blocks(lengths, 8, 7, 64))
        every, chosen = (out.fill_(torch.nan) for out in outs)
        graph.replay()
        defined = _candidates(blocks, lengths, 64)[1].repeat_interleave(4, 1)
        seen = _seen((*args[:5], lengths), 32)
        for actual, mask, which in ((every, seen, None), (chosen, defined, blocks)):
            expected = oracle(reference_index.label_logits, args[0].float(), *args[1:5], lengths, which, 64, 0.1)
            assert_equal(actual.masked_fill(~mask, 0), expected.masked_fill(~mask, 0), "logits")
            assert actual.isnan().eq(~mask).all()


@pytest.mark.parametrize("chosen", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_partials_are_the_softmax_statistics_of_the_row(chosen, dtype, device):
    """Peaks and sums of a row's parts, joined, are its log-sum-exp; heads that only pad the group weigh nothing."""
    args, cache = _case((6, 2, 64, 32, 32, 16), dtype, device, (200, 1, 0, 77))
    blocks = _pick_blocks(cache.lengths, 2, 3, 32) if chosen else None
    logits, partials = triton_logits.label_logits_and_partials(*args, blocks, 32, 0.5)
    size = 32 if chosen else 1
    _, exists = reference_select._candidates(blocks, cache.lengths, size, logits.shape[-1])
    exists = exists.expand(-1, 2, -1).repeat_interleave(3, 1)
    expected = logits.masked_fill(~exists, -torch.inf).logsumexp(-1).view(4, 2, 3)
    peaks, sums = partials.unbind(3)
    actual = (peaks.double().exp() * sums).sum(2).log()
    torch.testing.assert_close(actual[..., :3].float(), expected, rtol=1e-4, atol=1e-4)
    assert (sums[..., 3:] == 0).all()


@pytest.mark.parametrize("chosen", (False, True))
def test_peak_of_a_group(chosen, device):
    """One logit per KV head: the largest of its query heads, as the reference says."""
    args, cache = _case((6, 2, 64, 32, 32, 16), torch.float32, device, (200, 1, 0, 77))
    blocks = _pick_blocks(cache.lengths, 2, 3, 32) if chosen else None
    logits, _ = triton_logits.label_logits_and_partials(*args, blocks, 32, 0.5)
    peak, _ = triton_logits.label_logits_and_partials(*args, blocks, 32, 0.5, peak=True)
    _, exists = reference_select._candidates(blocks, cache.lengths, 32 if chosen else 1, logits.shape[-1])
    exists = exists.expand(-1, 2, -1)
    close = {"rtol": 1e-5, "atol": 1e-5}  # another kernel to the compiler, which may fuse other products and sums
    torch.testing.assert_close(peak[exists], reference_select.group_peak(logits, 2)[exists], **close)
    if not chosen:
        q, k_pages = args[0], cache.k_pages
        every, _ = triton_logits.key_logits_and_partials(q, k_pages, cache.page_table, cache.lengths, 0.5)
        peak, _ = triton_logits.key_logits_and_partials(q, k_pages, cache.page_table, cache.lengths, 0.5, peak=True)
        torch.testing.assert_close(peak[exists], reference_select.group_peak(every, 2)[exists], **close)
