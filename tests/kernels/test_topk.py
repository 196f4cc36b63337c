"""Top-k: kernel = reference where arithmetic is exact, a cut at the right weight where sums may round differently."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.kernels import reference_select, triton_blocks, triton_topk
from slipstream.kernels.reference_select import block_tokens, top_blocks, top_tokens

INF, NAN = float("inf"), float("nan")
MARGIN = 1e-4  # of logarithmic weights, between kernel and reference


def _scores(kind, shape, device, seed=3):
    """Scores whose order is exact in fp32, however they are computed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "equal":
        x = torch.ones(shape)
    elif kind == "few":
        x = torch.randint(-1, 2, shape, generator=generator).float()
    elif kind == "int4":
        x = torch.randint(0, 16, shape, generator=generator) * 0.5 - 3
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "special":
        special = torch.tensor([NAN, -INF, INF, 1.0, -1e38, 1e38, -0.0, 1e-42])
        x = special[torch.randint(0, 8, shape, generator=generator)]
    elif kind == "nan":
        x = torch.full(shape, NAN)
    elif kind == "-inf":
        x = torch.full(shape, -INF)
        x[..., 5] = -1.0
    return x.to(device)


KINDS = ("random", "equal", "few", "int4", "zeros", "special", "nan", "-inf")


def _lengths(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def _same(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype == torch.int32
        torch.testing.assert_close(x.cpu(), y.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_top_blocks(kind, device):
    lengths = _lengths((0, 1, 61, 133, 320, 319), device)
    scores = _scores(kind, (6, 1, 20), device)
    actual = triton_blocks.top_blocks(scores, lengths, 16, 7, 4, 40)
    _same([actual], [top_blocks(scores.cpu(), lengths.cpu(), 16, 7, 4, 40)])


@pytest.mark.parametrize("sink, recent, num_blocks", ((0, 0, 1), (1, 1, 2), (17, 33, 5), (4, 64, 27), (4, 64, 40)))
def test_sinks_and_recent_blocks(sink, recent, num_blocks, device):
    lengths = _lengths((27 * 16, 17, 65), device)
    scores = _scores("random", (3, 1, 27), device)
    _same(
        [triton_blocks.top_blocks(scores, lengths, 16, num_blocks, sink, recent)],
        [top_blocks(scores.cpu(), lengths.cpu(), 16, num_blocks, sink, recent)],
    )


# (candidates of one program, images of one union): chunks alone, such that stop early, such that need two unions
CUTS = ((32, 1), (32, 512), (16, 32))


def _cut(monkeypatch, cut, group=1):
    monkeypatch.setattr(triton_topk, "TOKEN_TILE", cut[0] * group)
    monkeypatch.setattr(triton_topk, "UNION_TILE", cut[1])


def _listed(generator, requests, num_kv, num, of, device):
    """Ascending random blocks, every row padded with -1 by another number."""
    blocks = torch.full((requests, num_kv, num), -1, dtype=torch.int32)
    for i, row in enumerate(blocks.view(-1, num)):
        used = min(num, 1 + i * 3)
        row[:used] = torch.randperm(of, generator=generator)[:used].sort().values.int()
    return blocks.to(device)


@pytest.mark.parametrize("kind", KINDS)
def test_top_tokens_of_one_head(kind, device):
    """Without a sum over heads the order is that of the logits: the very same sets."""
    lengths = _lengths((0, 1, 12, 37, 113), device)
    logits = _scores(kind, (5, 1, 113), device)
    actual = triton_topk.top_tokens(logits, None, lengths, 1, 16, 12, 3, 8, "sum")
    _same(actual, top_tokens(logits.cpu(), None, lengths.cpu(), 1, 16, 12, 3, 8, "sum"))


@pytest.mark.parametrize("kind", (*KINDS, "spread", "far"))
def test_long_rows_are_searched_by_value(kind, device):
    """Rows of 4096 and more: the same sets, also where values hide all that matters in a sliver of their range."""
    lengths = _lengths((4500, 4097, 0), device)
    logits = _scores("random" if kind in ("spread", "far") else kind, (3, 1, 4500), device)
    if kind == "spread":
        logits = logits.sign() * 10.0 ** (30 * logits)  # over 200 powers of ten, infinities among them
    elif kind == "far":
        logits[:, :, 7] = -3e38
    actual = triton_topk.top_tokens(logits, None, lengths, 1, 16, 500, 3, 8, "sum")
    _same(actual, top_tokens(logits.cpu(), None, lengths.cpu(), 1, 16, 500, 3, 8, "sum"))


@pytest.mark.parametrize("kind", ("random", "few", "special"))
@pytest.mark.parametrize("cut", CUTS)
def test_rows_in_chunks(kind, cut, device, monkeypatch):
    _cut(monkeypatch, cut)
    lengths = _lengths((0, 37, 113), device)
    logits = _scores(kind, (3, 1, 113), device)
    for _ in range(2):
        actual = triton_topk.top_tokens(logits, None, lengths, 1, 16, 12, 3, 8, "sum")
        _same(actual, top_tokens(logits.cpu(), None, lengths.cpu(), 1, 16, 12, 3, 8, "sum"))


@pytest.mark.parametrize("cut", ((128, 128), *CUTS))
def test_top_tokens_of_listed_blocks(cut, device, monkeypatch):
    _cut(monkeypatch, cut)
    blocks = _listed(torch.Generator().manual_seed(5), 3, 2, 8, 40, device)
    lengths = _lengths((640, 0, 320), device)
    logits = _scores("few", (3, 2, 128), device)
    args = (2, 16, 12, 3, 8, "max")
    actual = triton_topk.top_tokens(logits, blocks, lengths, *args)
    _same(actual, top_tokens(logits.cpu(), blocks.cpu(), lengths.cpu(), *args))


@pytest.mark.parametrize("budget", (1, 16, 27, 113, 200))
@pytest.mark.parametrize("cut", ((128, 128), (64, 1)))
def test_any_budget(budget, cut, device, monkeypatch):
    _cut(monkeypatch, cut)
    lengths = _lengths((113, 27), device)
    logits = _scores("int4", (2, 1, 113), device)
    args = (1, 16, budget, 0, 1, "sum")
    actual = triton_topk.top_tokens(logits, None, lengths, *args)
    _same(actual, top_tokens(logits.cpu(), None, lengths.cpu(), *args))


def _check_cut(indices, counts, logits, blocks, lengths, num_kv, size, budget, sink, recent, aggregate):
    """Full, ascending, unique, forced tokens in, and nothing left out that weighs more than what is in."""
    tokens, exists = reference_select._candidates(blocks, lengths, size, logits.shape[-1])
    weights = reference_select.token_scores(logits, exists, num_kv, aggregate)
    tokens, exists = (x.expand_as(weights) for x in (tokens, exists))
    for b, h in ((b, h) for b in range(len(lengths)) for h in range(num_kv)):
        n, here = int(counts[b, h]), exists[b, h]
        chosen = indices[b, h, :n].long()
        assert n == min(budget, int(here.sum())) and (indices[b, h, n:] == -1).all()
        assert (chosen.diff() > 0).all()
        candidates, weight = tokens[b, h][here], weights[b, h][here]
        is_in = torch.isin(candidates, chosen)
        assert int(is_in.sum()) == n
        forced = (candidates < sink) | (candidates >= lengths[b] - recent)
        assert is_in[forced].all()
        if n < len(candidates):
            assert weight[is_in & ~forced].min() >= weight[~is_in].max() - MARGIN


@pytest.mark.parametrize("group, aggregate, spread", ((2, "max", 3), (3, "sum", 300), (4, "sum", 0.1), (8, "sum", 3)))
@pytest.mark.parametrize("cut", ((128, 128), (64, 128)))
def test_groups(group, aggregate, spread, cut, device, monkeypatch):
    """Up to weights that fp32 cannot hold, which rank all the same."""
    _cut(monkeypatch, cut, 1 << (group - 1).bit_length())
    generator = torch.Generator().manual_seed(group)
    logits = torch.randn((2, 2 * group, 128), generator=generator) * spread
    logits[0, 0] = NAN
    logits[0, 1, ::2] = -INF
    blocks = _listed(generator, 2, 2, 8, 9, torch.device("cpu"))
    lengths = _lengths((100, 140), "cpu")
    for listed in (None, blocks):
        args = (2, 16, 20, 3, 8, aggregate)
        there = None if listed is None else listed.to(device)
        actual = triton_topk.top_tokens(logits.to(device), there, lengths.to(device), *args)
        _check_cut(*(x.cpu() for x in actual), logits, listed, lengths, *args)
        _check_cut(*top_tokens(logits, listed, lengths, *args), logits, listed, lengths, *args)


def test_weights_are_softmax_joined_over_the_group():
    """token_scores is the logarithm of what it says, and keeps order where softmax underflows."""
    logits = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0)) * 4
    exists = (torch.arange(50) < torch.tensor([[50], [17]])).unsqueeze(1)
    weights = logits.masked_fill(~exists, -INF).double().softmax(-1).unflatten(1, (2, 3))
    for aggregate, expected in (("sum", weights.sum(2)), ("max", weights.amax(2))):
        actual = reference_select.token_scores(logits, exists, 2, aggregate)
        torch.testing.assert_close(actual.double().exp(), expected)
    few = reference_select.token_scores(logits, exists, 2, "sum")
    for more in range(1, 200):  # absent ones, of which a longer neighbour brings any number
        wider, there = (torch.nn.functional.pad(x, (0, more)) for x in (logits, exists))
        assert torch.equal(reference_select.token_scores(wider, there, 2, "sum")[..., :50], few)
    steep = torch.arange(0.0, -5000.0, -100.0).expand(1, 2, 50)
    scores = reference_select.token_scores(steep, exists[:1], 1, "sum")
    assert (scores.diff() < 0).all() and scores.isfinite().all()


def test_no_softmax_sees_unread_tokens():
    """Whatever their logits: they are in, and the others are chosen as if those weighed nothing."""
    logits = torch.randn(2, 6, 60, generator=torch.Generator().manual_seed(2)) * 3
    rule, newest = (_lengths((57, 20), "cpu"), 2, 1, 16, 2, 5, "sum"), torch.tensor([[52], [15]]).unsqueeze(1)
    is_unread = torch.arange(60) >= newest
    expected = top_tokens(logits.masked_fill(is_unread, -INF), None, *rule)
    for strange in (NAN, 80.0):
        found = top_tokens(logits.masked_fill(is_unread, strange), None, *rule, unread=5)
        _same(found, expected)
    assert (found[0][..., 11:] == newest + torch.arange(5)).all()
    assert not torch.equal(top_tokens(logits, None, *rule)[0], expected[0]), "it would matter"


@pytest.mark.parametrize("size, num", ((1, 5), (16, 7), (64, 20)))
def test_block_tokens(size, num, device, monkeypatch):
    monkeypatch.setattr(triton_blocks, "LIST_TILE", 128)
    blocks = _listed(torch.Generator().manual_seed(1), 3, 2, num, 30, device)
    blocks[1] = -1
    lengths = _lengths((30 * size, 0, 13 * size - size // 2), device)
    blocks[2, 1, :] = torch.where(blocks[2, 1] < 13, blocks[2, 1], -1)
    actual = triton_blocks.block_tokens(blocks, lengths, size)
    _same(actual, block_tokens(blocks.cpu(), lengths.cpu(), size))
    for b, h in ((0, 0), (2, 1)):
        expected = [t for j in blocks[b, h].tolist() if j >= 0 for t in range(j * size, (j + 1) * size)]
        expected = [t for t in expected if t < lengths[b]]
        assert actual[0][b, h, : len(expected)].tolist() == expected and actual[1][b, h] == len(expected)


def test_no_requests(device):
    none = _lengths((), device)
    assert triton_blocks.top_blocks(torch.empty((0, 2, 9), device=device), none, 16, 3, 1, 1).shape == (0, 2, 3)
    indices, counts = triton_topk.top_tokens(torch.empty((0, 4, 9), device=device), None, none, 2, 16, 3, 1, 1, "sum")
    assert indices.shape == (0, 2, 3) and counts.shape == (0, 2)


# No +inf: beside it all other softmax weights are 0, so that they tie (`special` above has it).
NUMBERS = st.sampled_from((NAN, -INF, -1.0, 0.0, -0.0, 1.0, 1.5, 2.0))


@settings(deadline=None, max_examples=150)
@given(st.lists(NUMBERS, min_size=1, max_size=40), st.integers(0, 44), st.integers(0, 6), st.integers(0, 6), st.data())
def test_reference_against_sorting(values, length, sink, recent, data):
    """Python's stable sort by (forced, score) is the rule: both choices of the reference follow it."""

    def best(length, num, is_forced):
        rank = [(not is_forced(i), INF if v != v else -v, i) for i, v in enumerate(values[:length])]
        return sorted(i for _, _, i in sorted(rank)[:num])

    budget = data.draw(st.integers(min(length, len(values), sink + max(recent, 1)), 45))
    recent_start = length - max(recent, 1)
    logits = torch.tensor(values).view(1, 1, -1)
    indices, counts = top_tokens(logits, None, _lengths([length], "cpu"), 1, 16, budget, sink, recent, "max")
    expected = best(length, budget, lambda i: i < sink or i >= recent_start)
    assert counts.item() == len(expected)
    assert indices.flatten().tolist() == expected + [-1] * (budget - len(expected))
    blocks = -(-length // 3)
    num = data.draw(st.integers(min(blocks, len(values), 6), 45))
    chosen = top_blocks(logits, _lengths([length], "cpu"), 3, num, sink, recent).flatten().tolist()
    expected = best(blocks, num, lambda i: 3 * i < sink or 3 * i + 3 > recent_start)
    assert chosen == expected + [-1] * (num - len(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("width", (8192, 131072))
@pytest.mark.parametrize("kind", ("random", "int4", "equal"))
def test_large(width, kind, device):
    lengths = _lengths((width, 0, width - 777, 1025), device)
    logits = _scores(kind, (4, 8, width), device)
    for budget in (1024, 2000):
        args = (8, 64, budget, 4, 64, "sum")
        _same(triton_topk.top_tokens(logits, None, lengths, *args), top_tokens(logits, None, lengths, *args))
    wide = torch.cat((logits, logits.roll(99, -1) * 0.5), dim=1)
    args = (4, 64, 1024, 4, 64, "sum")
    actual = triton_topk.top_tokens(wide, None, lengths, *args)
    _check_cut(*(x.cpu() for x in actual), wide.cpu(), None, lengths.cpu(), *args)
    scores = logits[:, :, :8192].contiguous()
    blocks = triton_blocks.top_blocks(scores, lengths, 16, 64, 4, 64)
    _same([blocks], [top_blocks(scores, lengths, 16, 64, 4, 64)])


@pytest.mark.gpu
def test_one_graph_serves_any_lengths(device):
    lengths = _lengths((1, 1), device)
    logits = _scores("random", (2, 2, 40000), device)
    triton_topk.top_tokens(logits, None, lengths, 2, 64, 512, 4, 64, "sum")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_topk.top_tokens(logits, None, lengths, 2, 64, 512, 4, 64, "sum")
    for current in ((40000, 513), (0, 20000), (64, 8193)):
        lengths.copy_(torch.tensor(current, dtype=torch.int32))
        graph.replay()
        _same(out, top_tokens(logits, None, lengths, 2, 64, 512, 4, 64, "sum"))
