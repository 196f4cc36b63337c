"""The index of new tokens: kernel = reference = the formulas, and the same bits however the tokens came."""

from __future__ import annotations

import pytest
import torch
from paged_cache import make_cache
from paged_index import PagedIndex, empty_index, make_index, starts
from tolerances import assert_equal

from slipstream.kernels import reference_index, sparse, triton_index

DTYPES = (torch.float32, torch.bfloat16)
OPS = (reference_index.extend_index, triton_index.extend_index)
LENGTHS = (0, 1, 27, 63, 64, 65, 113, 200)
# (Hk, D, page, block, kind, channels)
SHAPES = (
    (2, 16, 64, 16, "minmax", 4),
    (1, 63, 64, 64, "mean", 32),
    (3, 64, 16, 16, "meanstd", 64),
    (2, 113, 128, 64, "minmax", 20),
    (1, 64, 48, 24, "meanstd", 2),
)


def _extend(op, cache, index, kind, counts, lengths):
    lengths = torch.tensor(lengths, dtype=torch.int32, device=cache.k_pages.device)
    query_start = starts(counts, lengths.device)
    op(cache.k_pages, cache.page_table, query_start, lengths, max(counts), index.summaries, kind, *index[1:])


def _assert_same(actual: PagedIndex, expected: PagedIndex, op: str = "copy"):
    assert_equal(actual.summaries, expected.summaries, op)
    assert torch.equal(actual.labels, expected.labels)
    assert_equal(actual.scales, expected.scales, "copy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, dtype, device):
    """Every entry, written or left alone; codes and scales to the last bit."""
    num_kv, dim, page, block, kind, num_channels = shape
    cache = make_cache(LENGTHS, num_kv, page, dim, dtype, device)
    index = empty_index(cache, block, kind, num_channels)
    _extend(triton_index.extend_index, cache, index, kind, LENGTHS, LENGTHS)
    _assert_same(index, make_index(cache, block, kind, num_channels), "copy" if kind == "minmax" else "summary")


@pytest.mark.parametrize("kind", reference_index.NUM_STATS)
@pytest.mark.parametrize("op", OPS)
def test_token_by_token_is_in_chunks_is_at_once(op, kind, device):
    total = (70, 33, 0, 64) if op is reference_index.extend_index else (19, 9, 0, 16)
    cache = make_cache(total, 2, 16, 8, torch.bfloat16, device)
    at_once, in_chunks, by_token = (empty_index(cache, 8, kind, 6) for _ in range(3))
    _extend(op, cache, at_once, kind, total, total)
    for index, chunk in ((in_chunks, 7), (by_token, 1)):
        done = [0] * len(total)
        while done != list(total):
            now = [min(chunk, n - d) for n, d in zip(total, done, strict=True)]
            done = [d + n for d, n in zip(done, now, strict=True)]
            _extend(op, cache, index, kind, now, done)
    _assert_same(in_chunks, at_once)
    _assert_same(by_token, at_once)
    assert at_once.summaries.isfinite().flatten(1).all(1).sum() == sum(n // 16 for n in total)


@pytest.mark.parametrize("op", OPS)
def test_padding_rows_write_nothing(op, device):
    """A captured batch pads with rows of length 0 that claim a token; a mixed one may have rows without any."""
    cache = make_cache((32, 0, 16), 1, 16, 8, torch.float32, device)
    index, before = empty_index(cache, 16, "mean", 4), empty_index(cache, 16, "mean", 4)
    _extend(op, cache, index, "mean", (1, 1, 0), (32, 0, 16))
    page = cache.page_table[0, 1].item()
    assert index.summaries[page].isfinite().all() and index.scales[page, 0, 15].isfinite().all()
    for written, untouched in zip(index[:3], before[:3], strict=True):
        rest = torch.arange(written.shape[0], device=device) != page
        assert torch.equal(written[rest].nan_to_num(7), untouched[rest].nan_to_num(7))


@pytest.mark.parametrize("op", OPS)
def test_summaries_or_labels_alone(op, device):
    cache = make_cache((70, 5), 2, 32, 8, torch.float32, device)
    whole, index = make_index(cache, 16, "minmax", 4), empty_index(cache, 16, "minmax", 4)
    args = cache.k_pages, cache.page_table, starts((70, 5), device), cache.lengths, 70
    op(*args, None, "", *index[1:])
    assert index.summaries.isnan().all() and torch.equal(index.labels, whole.labels)
    index.labels.fill_(255)
    op(*args, index.summaries, "minmax", None, None, None)
    assert_equal(index.summaries, whole.summaries, "copy")
    assert index.labels.eq(255).all()


@pytest.mark.parametrize("op", OPS)
def test_constant_and_huge_keys(op, device):
    """A step of 0 gives codes of 0; what fp16 cannot hold saturates, the same in kernel and reference."""
    cache = make_cache((20, 20), 1, 16, 8, torch.float32, device)
    constant, huge = cache.page_table[0, 0].long(), cache.page_table[1, 0].long()
    cache.k_pages[constant] = 0.75
    cache.k_pages[huge] *= 1e6
    index, expected = empty_index(cache, 16, "minmax", 4), make_index(cache, 16, "minmax", 4)
    _extend(op, cache, index, "minmax", (20, 20), (20, 20))
    assert index.labels[constant].eq(0).all()
    assert index.scales[constant].eq(torch.tensor([0, 0.75], dtype=torch.float16, device=device)).all()
    assert index.scales[huge].isfinite().all() and index.summaries[huge].abs().amax() > 1e6
    _assert_same(index, expected)


@pytest.mark.parametrize("spread", (1e-6, 0.1, 3.0, 1e3))
@pytest.mark.parametrize("num_channels", (2, 32, 128))
def test_labels_are_within_half_a_step(num_channels, spread):
    """``n * step + zero`` is within step / 2 of the channel, and what rounding step and zero to fp16 adds."""
    generator = torch.Generator().manual_seed(num_channels)
    x = torch.randn(500, num_channels, generator=generator) * spread + torch.randn(500, 1, generator=generator)
    codes, scales = reference_index.quantise_labels(x)
    assert codes.shape == (500, num_channels // 2) and scales.dtype == torch.float16
    step, zero = scales.float().split(1, dim=-1)
    values = torch.cat((codes & 15, codes >> 4), dim=-1).float() * step + zero
    rounding = zero.abs() * 2**-11 + 15 * (step * 2**-11 + 2**-25)
    assert ((values - x).abs() <= step / 2 * (1 + 1e-4) + rounding + 1e-6).all()


def test_summaries_are_what_their_names_say():
    cache = make_cache((48,), 1, 32, 5, torch.float32, torch.device("cpu"))
    blocks = cache.keys[0].view(3, 16, 5)
    page, last = cache.page_table[0, :2].long().tolist()
    for kind, first, second in (
        ("minmax", blocks.amax(1), blocks.amin(1)),
        ("meanstd", blocks.mean(1), blocks.std(1, correction=0)),
        ("mean", blocks.mean(1), None),
    ):
        summaries = make_index(cache, 16, kind, 4).summaries[:, 0]
        found = torch.cat((summaries[page], summaries[last, :1]))
        torch.testing.assert_close(found[:, 0], first)
        assert second is None or torch.allclose(found[:, 1], second)
        assert summaries[last, 1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", reference_index.NUM_STATS)
def test_large(kind, device):
    lengths = [1, 9000, 64, 65, 0, 4096, 333]
    cache = make_cache(lengths, 8, 64, 128, torch.bfloat16, device)
    expected, index = make_index(cache, 64, kind, 32), empty_index(cache, 64, kind, 32)
    _extend(sparse.extend_index, cache, index, kind, lengths, lengths)
    _assert_same(index, expected, "copy" if kind == "minmax" else "summary")
