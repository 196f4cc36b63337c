"""q/k norm + RoPE + store: kernel = reference, reference = transformers' rotation, and nothing else is written."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_equal

from slipstream.kernels import reference, triton_rope

DTYPES = (torch.float32, torch.bfloat16)
ALL_DTYPES = (*DTYPES, torch.float16)
# (Hq, Hk, D, R): groups 1, 3, 4, 5; odd and even D; rotary part smaller than D and equal to it
SHAPES = ((1, 1, 27, 26), (6, 2, 63, 32), (4, 4, 64, 64), (5, 1, 65, 2), (8, 2, 113, 64))


def _cos_sin(max_position, rotary, device):
    angle = torch.arange(max_position)[:, None] * 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    return torch.cat((angle.cos(), angle.sin()), dim=1).to(device)


def _inputs(shape, tokens, dtype, device, page=4, pages=6):
    num_q, num_kv, dim, rotary = shape
    generator = torch.Generator().manual_seed(dim)
    qkv = torch.randn(tokens, (num_q + 2 * num_kv) * dim, generator=generator).to(device, dtype)
    q_weight, k_weight = (torch.randn(dim, generator=generator).to(device, dtype) for _ in range(2))
    positions = torch.randint(0, 40, (tokens,), generator=generator).to(device)
    slots = torch.randperm(pages * page, generator=generator)[:tokens].to(device)
    pool = torch.full((pages, num_kv, page, dim), torch.nan, dtype=dtype, device=device)
    return qkv, q_weight, k_weight, _cos_sin(40, rotary, device), positions, slots, pool


def _run(op, qkv, q_weight, k_weight, cos_sin, positions, slots, pool):
    k_pages, v_pages = pool.clone(), pool.clone()
    q = op(qkv, q_weight, k_weight, 1e-6, cos_sin, positions, slots, k_pages, v_pages)
    return q, k_pages, v_pages


def _compare(inputs):
    q, k_pages, v_pages = _run(triton_rope.qk_norm_rope_store, *inputs)
    expected_q, expected_k, expected_v = _run(reference.qk_norm_rope_store, *inputs)
    assert_equal(q, expected_q, "rope")
    assert_equal(k_pages, expected_k, "rope")  # NaN wherever nothing was to be stored
    assert_equal(v_pages, expected_v, "copy")
    assert int((~v_pages.isnan()).sum()) == inputs[5].numel() * v_pages.shape[1] * v_pages.shape[3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, dtype, device):
    _compare(_inputs(shape, 3, dtype, device))


@pytest.mark.parametrize("q_norm, k_norm", [(False, False), (True, False), (False, True)])
def test_norm_is_optional(q_norm, k_norm, device):
    inputs = list(_inputs((6, 2, 27, 16), 3, torch.float32, device))
    inputs[1] = inputs[1] if q_norm else None
    inputs[2] = inputs[2] if k_norm else None
    _compare(inputs)


def test_reference_is_transformers_rotation():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    qkv, q_weight, k_weight, cos_sin, positions, slots, pool = _inputs((6, 2, 64, 64), 3, torch.float32, "cpu")
    q, k_pages, _ = _run(reference.qk_norm_rope_store, qkv, q_weight, k_weight, cos_sin, positions, slots, pool)
    heads = qkv.view(3, 10, 64)
    norms = [Qwen3RMSNorm(64, eps=1e-6) for _ in range(2)]
    for norm, weight in zip(norms, (q_weight, k_weight), strict=True):
        norm.weight.data.copy_(weight)
    cos, sin = cos_sin[positions].chunk(2, dim=1)
    cos, sin = torch.cat((cos, cos), 1)[None], torch.cat((sin, sin), 1)[None]
    normed_q, normed_k = norms[0](heads[:, :6]).transpose(0, 1)[None], norms[1](heads[:, 6:8]).transpose(0, 1)[None]
    expected_q, expected_k = apply_rotary_pos_emb(normed_q, normed_k, cos, sin)
    torch.testing.assert_close(q, expected_q[0].transpose(0, 1))
    torch.testing.assert_close(k_pages[slots // 4, :, slots % 4], expected_k[0].transpose(0, 1))


def test_no_tokens(device):
    inputs = _inputs((6, 2, 64, 64), 0, torch.float32, device)
    q, k_pages, _ = _run(triton_rope.qk_norm_rope_store, *inputs)
    assert q.shape == (0, 6, 64) and k_pages.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", ((32, 8, 128, 128), (64, 8, 128, 64), (14, 2, 64, 64), (40, 8, 113, 112)))
def test_large(shape, dtype, device):
    _compare(_inputs(shape, 300, dtype, device, page=64, pages=9))


@pytest.mark.gpu
def test_slots_beyond_32_bits(device):
    """The last page of a pool with more than 2^31 elements."""
    pages = 2**31 // (8 * 64 * 128) + 2
    k_pages = torch.zeros((pages, 8, 64, 128), dtype=torch.bfloat16, device=device)
    v_pages = torch.zeros_like(k_pages)
    inputs = _inputs((32, 8, 128, 128), 2, torch.bfloat16, device, page=64, pages=2)
    slots = torch.tensor([(pages - 1) * 64 + 5, (pages - 1) * 64 + 63], device=device)
    triton_rope.qk_norm_rope_store(*inputs[:3], 1e-6, *inputs[3:5], slots, k_pages, v_pages)
    _, expected_k, expected_v = _run(reference.qk_norm_rope_store, *inputs[:5], slots % 64, inputs[6])
    assert_equal(k_pages[-1][:, [5, 63]], expected_k[0][:, [5, 63]], "rope")
    assert_equal(v_pages[-1][:, [5, 63]], expected_v[0][:, [5, 63]], "copy")
    assert int(k_pages[:-1].count_nonzero()) == 0
