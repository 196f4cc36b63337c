"""Prefill attention: kernel = reference = softmax token by token, ragged, causal, with any prefix in the cache."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from paged_cache import make_cache, naive_attention, oracle
from tolerances import assert_equal

from slipstream.kernels import reference, triton_prefill

DTYPES = (torch.float32, torch.bfloat16)
ALL_DTYPES = (*DTYPES, torch.float16)
# (length, new tokens): whole prompts, chunks after a prefix, decode rows, a request without new tokens
RAGGED = ((64, 64), (65, 1), (113, 27), (1, 1), (63, 63), (30, 0))
SHAPES = ((1, 1, 1, 4), (6, 2, 27, 8), (5, 1, 63, 16), (4, 4, 64, 64), (8, 1, 113, 128))


def _inputs(ragged, shape, dtype, device):
    num_q, num_kv, dim, page = shape
    cache = make_cache([length for length, _ in ragged], num_kv, page, dim, dtype, device)
    counts = [count for _, count in ragged]
    q = torch.randn(sum(counts), num_q, dim, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    query_start = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
    return q, cache, query_start, max(counts)


def _compare(ragged, shape, dtype, device):
    q, cache, query_start, max_query = _inputs(ragged, shape, dtype, device)
    args = (*cache.args, query_start, cache.lengths, shape[2] ** -0.5, max_query)
    actual = triton_prefill.prefill_attention(q, *args)
    assert_equal(actual, oracle(reference.prefill_attention, q, *args), "attention")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, dtype, device):
    _compare(RAGGED, shape, dtype, device)


@pytest.mark.parametrize("ragged", (((5, 1), (70, 1)), ((3, 3),), ((64, 2), (128, 0)), ((0, 0), (9, 4))))
def test_few_queries(ragged, device):
    """Small steps take the narrow tile."""
    _compare(ragged, (4, 2, 16, 8), torch.float32, device)


def test_max_query_may_be_larger_than_needed(device):
    q, cache, query_start, _ = _inputs(((40, 20), (9, 9)), (4, 2, 16, 8), torch.float32, device)
    args = (*cache.args, query_start, cache.lengths, 0.25)
    assert_equal(
        triton_prefill.prefill_attention(q, *args, 100), oracle(reference.prefill_attention, q, *args, 20), "attention"
    )


def test_nothing_to_do(device):
    q, cache, query_start, _ = _inputs(((9, 0),), (4, 2, 16, 8), torch.float32, device)
    out = triton_prefill.prefill_attention(q, *cache.args, query_start, cache.lengths, 0.25, 0)
    assert out.shape == (0, 4, 16)


def test_reference_is_causal_softmax_attention():
    ragged = ((12, 12), (30, 7), (5, 0), (17, 1))
    q, cache, query_start, max_query = _inputs(ragged, (6, 2, 16, 8), torch.float32, torch.device("cpu"))
    out = reference.prefill_attention(q, *cache.args, query_start, cache.lengths, 0.3, max_query)
    row = 0
    for b, (length, count) in enumerate(ragged):
        for i in range(count):
            seen = length - count + i + 1
            expected = naive_attention(q[row], cache.keys[b][:seen], cache.values[b][:seen], 0.3)
            torch.testing.assert_close(out[row], expected)
            row += 1
    assert row == out.shape[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", ((32, 8, 128, 64), (64, 8, 128, 16), (14, 2, 64, 64), (16, 16, 256, 32)))
def test_large(shape, dtype, device):
    _compare(((1000, 1000), (3000, 1), (2500, 500), (77, 77), (4096, 129), (64, 0)), shape, dtype, device)
