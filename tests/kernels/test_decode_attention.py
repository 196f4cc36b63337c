"""Decode attention: kernel = reference = softmax head by head, for any lengths, pages, groups, numbers of programs."""

from __future__ import annotations

import pytest
import torch
from paged_cache import make_cache, naive_attention, oracle
from tolerances import assert_equal

from slipstream.kernels import ops, reference, triton_decode

DTYPES = (torch.float32, torch.bfloat16)
ALL_DTYPES = (*DTYPES, torch.float16)
LENGTHS = (1, 27, 63, 64, 65, 113)
# (Hq, Hk, D, page size): pages smaller than, equal to and larger than a tile of keys
SHAPES = ((1, 1, 1, 4), (6, 2, 27, 8), (5, 1, 63, 16), (4, 4, 64, 64), (8, 2, 65, 128), (8, 1, 113, 64))


def _query(batch, num_q, dim, dtype, device, seed=9):
    return torch.randn(batch, num_q, dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _compare(q, cache, scale):
    actual = triton_decode.decode_attention(q, *cache.args, cache.lengths, scale)
    assert_equal(actual, oracle(reference.decode_attention, q, *cache.args, cache.lengths, scale), "attention")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, dtype, device):
    num_q, num_kv, dim, page = shape
    cache = make_cache(LENGTHS, num_kv, page, dim, dtype, device)
    _compare(_query(len(LENGTHS), num_q, dim, dtype, device), cache, dim**-0.5)


@pytest.mark.parametrize("per_processor", (1, 3, 40))
def test_any_number_of_programs(per_processor, monkeypatch, device):
    """From one program that walks over several requests to many more programs than tiles."""
    monkeypatch.setattr(triton_decode, "PROGRAMS_PER_PROCESSOR", per_processor)
    cache = make_cache((200, 1, 0, 64, 129, 0), 2, 16, 16, torch.float32, device)
    _compare(_query(6, 4, 16, torch.float32, device), cache, 0.3)


@pytest.mark.parametrize("lengths", ((0, 0), (0,), (1,), (0, 5, 0), (300,)))
def test_empty_requests_give_zeros(lengths, device):
    """Padding rows of a captured batch may be empty."""
    cache = make_cache(lengths, 2, 8, 32, torch.float32, device)
    q = _query(len(lengths), 4, 32, torch.float32, device)
    _compare(q, cache, 0.2)
    out = triton_decode.decode_attention(q, *cache.args, cache.lengths, 0.2)
    for b, length in enumerate(lengths):
        assert length or out[b].eq(0).all()


@pytest.mark.parametrize("lengths", ((0, 300, 0, 5), (0, 0), (130,)))
def test_empty_requests_keep_what_an_output_holds(lengths, device):
    """Where one is given: heads that are not attended anew keep what they have."""
    cache = make_cache(lengths, 2, 8, 32, torch.float32, device)
    q = _query(len(lengths), 4, 32, torch.float32, device)
    expected = ops.decode_attention(q, *cache.args, cache.lengths, 0.2)
    for attend in (ops.decode_attention, triton_decode.decode_attention):
        out = torch.full_like(q, torch.nan)
        assert attend(q, *cache.args, cache.lengths, 0.2, out) is out
        for b, length in enumerate(lengths):
            if length:
                assert_equal(out[b], expected[b], "attention")
            else:
                assert out[b].isnan().all()


def test_a_request_does_not_feel_its_neighbours(device):
    """NaN keys of one request, NaN beyond every length: the other requests stay finite and equal."""
    cache = make_cache((65, 40, 130), 1, 8, 16, torch.float32, device)
    q = _query(3, 2, 16, torch.float32, device)
    clean = triton_decode.decode_attention(q, *cache.args, cache.lengths, 0.25)
    cache.k_pages[cache.page_table[1, 2].long(), 0, 3] = torch.nan
    dirty = triton_decode.decode_attention(q, *cache.args, cache.lengths, 0.25)
    assert dirty[1].isnan().all() and clean.isfinite().all()
    assert_equal(dirty[[0, 2]], clean[[0, 2]], "copy")
    assert_equal(dirty, oracle(reference.decode_attention, q, *cache.args, cache.lengths, 0.25), "attention")


def test_large_scores_do_not_overflow(device):
    cache = make_cache((65, 3), 1, 8, 16, torch.float32, device)
    _compare(_query(2, 2, 16, torch.float32, device), cache, 1e4)


def test_no_requests(device):
    cache = make_cache((1,), 1, 8, 16, torch.float32, device)
    out = triton_decode.decode_attention(
        torch.empty((0, 2, 16), device=device), *cache.args[:2], cache.page_table[:0], cache.lengths[:0], 1.0
    )
    assert out.shape == (0, 2, 16)


def test_reference_is_softmax_attention():
    cache = make_cache((1, 30, 0, 17), 2, 8, 16, torch.float32, torch.device("cpu"))
    q = _query(4, 6, 16, torch.float32, "cpu")
    out = reference.decode_attention(q, *cache.args, cache.lengths, 0.3)
    for b in (0, 1, 3):
        torch.testing.assert_close(out[b], naive_attention(q[b], cache.keys[b], cache.values[b], 0.3))


def test_reference_does_not_depend_on_the_batch():
    cache = make_cache((50, 30, 17), 2, 8, 16, torch.float32, torch.device("cpu"))
    q = _query(3, 6, 16, torch.float32, "cpu")
    together = reference.decode_attention(q, *cache.args, cache.lengths, 0.3)
    for b in range(3):
        row = slice(b, b + 1)
        alone = reference.decode_attention(q[row], *cache.args[:2], cache.page_table[row], cache.lengths[row], 0.3)
        assert torch.equal(alone, together[row])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(
    "shape", ((32, 8, 128, 64), (64, 8, 128, 16), (14, 2, 64, 64), (16, 16, 256, 32), (40, 8, 128, 4))
)
def test_large(shape, dtype, device):
    num_q, num_kv, dim, page = shape
    lengths = [1, 9000, 64, 65, 0, 4096, 333, 2000] + [100 + 37 * i for i in range(25)]
    cache = make_cache(lengths, num_kv, page, dim, dtype, device)
    _compare(_query(len(lengths), num_q, dim, dtype, device), cache, dim**-0.5)


@pytest.mark.gpu
def test_pages_beyond_32_bits(device):
    """A request whose pages lie past 2^31 elements."""
    pages = 2**31 // (8 * 64 * 128) + 8
    cache = make_cache((300,), 8, 64, 128, torch.bfloat16, device)
    q = _query(1, 32, 128, torch.bfloat16, device)
    expected = oracle(reference.decode_attention, q, *cache.args, cache.lengths, 0.1)
    k_pages, v_pages = (torch.zeros((pages, 8, 64, 128), dtype=torch.bfloat16, device=device) for _ in range(2))
    shift = pages - cache.k_pages.shape[0]
    k_pages[shift:], v_pages[shift:] = cache.k_pages, cache.v_pages
    actual = triton_decode.decode_attention(q, k_pages, v_pages, cache.page_table + shift, cache.lengths, 0.1)
    assert_equal(actual, expected, "attention")


@pytest.mark.gpu
def test_one_graph_serves_any_lengths(device):
    cache = make_cache((700, 64, 1, 3000), 8, 64, 128, torch.bfloat16, device)
    q = _query(4, 32, 128, torch.bfloat16, device)
    lengths = torch.ones(4, dtype=torch.int32, device=device)
    triton_decode.decode_attention(q, *cache.args, lengths, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_decode.decode_attention(q, *cache.args, lengths, 0.1)
    for current in ((700, 64, 1, 3000), (0, 3, 1, 65), (64, 64, 0, 2048)):
        lengths.copy_(torch.tensor(current, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        assert_equal(out, oracle(reference.decode_attention, q, *cache.args, lengths, 0.1), "attention")


def test_reference_does_not_depend_on_a_ragged_batch():
    """To the last bit: a request alone, and among others of any length."""
    lengths = [1, 500, 64, 65, 700, 640, 3]
    cache = make_cache(lengths, 2, 64, 64, torch.float32, torch.device("cpu"))
    q = torch.randn(len(lengths), 8, 64, generator=torch.Generator().manual_seed(1))
    (k, v, table), length = cache.args, cache.lengths
    together = reference.decode_attention(q, k, v, table, length, 0.125)
    for b in range(len(lengths)):
        alone = reference.decode_attention(q[b : b + 1], k, v, table[b : b + 1], length[b : b + 1], 0.125)
        assert torch.equal(alone[0], together[b])
