"""Page lists, page copies, log-probabilities, and where the catalogue sends an op."""

from __future__ import annotations

import math

import pytest
import torch

from slipstream.kernels import ops, reference, triton_pages


@pytest.mark.parametrize("lengths", ((1,), (4, 5, 8), (27, 1, 64, 9, 13)))
def test_list_pages(lengths, device):
    page = 4
    table = torch.arange(1, 1 + len(lengths) * 20, dtype=torch.int32, device=device).view(-1, 20)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=device)
    results = []
    for op in (triton_pages.list_pages, reference.list_pages):
        indices = torch.full((len(lengths) * 20,), -1, dtype=torch.int32, device=device)
        last_page_len = torch.full((len(lengths),), -1, dtype=torch.int32, device=device)
        op(table, on_device, page, indices, last_page_len)
        results.append((indices.tolist(), last_page_len.tolist()))
    expected = [t for b, n in enumerate(lengths) for t in table[b, : -(-n // page)].tolist()]
    assert results[0] == results[1]
    assert results[0][0] == expected + [-1] * (len(lengths) * 20 - len(expected))
    assert results[0][1] == [n - (-(-n // page) - 1) * page for n in lengths]


def test_copy_pages_reads_before_it_writes(device):
    pages = torch.arange(2 * 4 * 3, dtype=torch.float32, device=device).view(2, 4, 1, 1, 3)
    before = pages.clone()
    ops.copy_pages(pages, torch.tensor([1, 2], device=device), torch.tensor([2, 3], device=device))
    assert torch.equal(pages[:, 2], before[:, 1]) and torch.equal(pages[:, 3], before[:, 2])
    assert torch.equal(pages[:, :2], before[:, :2])


def test_token_logprobs(device):
    logits = torch.tensor([[0.0, 1.0, 1.0, -torch.inf], [5.0, 4.0, 3.0, 2.0]], device=device)
    logprob, rank, values, ids = ops.token_logprobs(logits, torch.tensor([2, 3], device=device), 2)
    total = math.log(1 + 2 * math.e)
    torch.testing.assert_close(logprob.cpu(), torch.tensor([1 - total, logits[1].log_softmax(0)[3].item()]))
    assert rank.tolist() == [1, 4]
    assert set(ids[0].tolist()) == {1, 2} and ids[1].tolist() == [0, 1]
    torch.testing.assert_close(values[0].cpu(), torch.tensor([1 - total] * 2))
    assert ops.token_logprobs(logits, torch.tensor([0, 0], device=device), 0)[3].shape == (2, 0)


def test_token_logprobs_of_half_precision_are_fp32(device):
    logits = torch.randn(3, 50, device=device).bfloat16()
    logprob, _, values, _ = ops.token_logprobs(logits, torch.zeros(3, dtype=torch.int64, device=device), 5)
    assert logprob.dtype == values.dtype == torch.float32
    torch.testing.assert_close(logprob, logits.float().log_softmax(-1)[:, 0])


@pytest.mark.gpu
def test_the_catalogue_never_waits_for_the_device(device):
    """Golden equality 7 for the ops: none of them synchronises."""
    options = {"device": device}
    x, weight = torch.randn(4, 256, **options), torch.randn(256, **options)
    pool = torch.zeros((8, 2, 16, 64), **options)
    qkv, cos_sin = torch.randn(4, 8 * 64, **options), torch.randn(64, 64, **options)
    index, table = torch.arange(4, **options), torch.ones((4, 3), dtype=torch.int32, **options)
    lengths, ones = torch.full((4,), 20, dtype=torch.int32, **options), torch.ones(4, **options)
    starts = torch.arange(5, dtype=torch.int32, **options)

    def everything():
        ops.rms_norm(x, weight, 1e-6)
        ops.add_rms_norm(x, x, weight, 1e-6)
        ops.silu_mul(x)
        q = ops.qk_norm_rope_store(qkv, None, None, 1e-6, cos_sin, index, index + 16, pool, pool.clone())
        ops.decode_attention(q, pool, pool, table, lengths, 0.1)
        ops.prefill_attention(q, pool, pool, table, starts, lengths, 0.1, 1)
        ops.sample(x, ones, lengths, ones * 0.9, ones * 0, index, index)
        ops.token_logprobs(x, index, 3)
        ops.copy_pages(pool[None], index, index)
        ops.list_pages(table, lengths, 16, torch.empty(20, dtype=torch.int32, **options), lengths.clone())

    torch.use_deterministic_algorithms(False)  # torch's own deterministic scatter may synchronise
    everything()
    torch.cuda.set_sync_debug_mode("error")
    everything()
    torch.cuda.set_sync_debug_mode("default")
