"""TOVA: attention over seats, what slots weigh and which to give up, kernel = reference = softmax head by head."""

from __future__ import annotations

import pytest
import torch
from paged_cache import naive_attention
from tolerances import assert_equal

from slipstream.kernels import reference_select, triton_sparse, triton_tova

FILLED = (1, 27, 0, 64, 65)
# (Hq, Hk, D, slots)
SHAPES = ((1, 1, 1, 65), (6, 2, 27, 65), (8, 1, 64, 113))


def run(room, q, k, v, rows, filled, scale):
    """Attention and victims, by the kernels or by the reference."""
    out, weights = room.tova_attention(q, k, v, rows, filled, scale)
    return out, room.lowest_slots(weights, filled)


def _seats(shape, filled, dtype, device, seed=2):
    """q, k, v, rows, filled: seats out of order, NaN in every slot that is not filled."""
    num_q, num_kv, dim, slots = shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(filled) + 2, generator=generator)[: len(filled)]
    k, v = torch.full((2, len(filled) + 2, num_kv, slots, dim), torch.nan)
    for row, n in zip(rows.tolist(), filled, strict=True):
        k[row, :, :n], v[row, :, :n] = torch.randn((2, num_kv, n, dim), generator=generator)
    q = torch.randn((len(filled), num_q, dim), generator=generator)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    return q, k, v, rows.to(device), torch.tensor(filled, dtype=torch.int32, device=device)


def _expected(q, k, v, rows, filled, scale):
    """The reference on the CPU in fp32."""
    out, weights = reference_select.tova_attention(
        q.cpu().float(), k.cpu().float(), v.cpu().float(), rows.cpu(), filled.cpu(), scale
    )
    return out.to(q.device, q.dtype), weights


def _weights(q, k, row, n, scale):
    """Weights of one request averaged over heads: [n] fp64."""
    keys = k[row, :, :n].double().repeat_interleave(q.shape[0] // k.shape[1], dim=0)
    return torch.softmax(torch.einsum("hd,hnd->hn", q.double(), keys) * scale, dim=-1).mean(0)


def _check(inputs, scale):
    q, k, _, rows, filled = inputs
    out, found = triton_tova.tova_attention(*inputs, scale)
    victims = triton_tova.lowest_slots(found, filled)
    expected, others = _expected(*inputs, scale)
    assert victims.dtype == torch.int64
    for own, other, n in zip(found.cpu(), others, filled.tolist(), strict=True):
        torch.testing.assert_close(own[:n], other[:n], rtol=2e-2, atol=1e-5)
    assert_equal(out, expected, "attention")
    for b, n in enumerate(filled.tolist()):
        if not n:
            assert victims[b] == 0 and out[b].eq(0).all()
            continue
        weights = _weights(q[b], k, rows[b], n, scale)
        assert 0 <= victims[b] < n and weights[victims[b]] <= weights.min() * (1 + 1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, dtype, device):
    _check(_seats(shape, FILLED, dtype, device), shape[2] ** -0.5)


@pytest.mark.parametrize("split, rank", ((16, 32), (64, 1024)))
def test_any_split(split, rank, monkeypatch, device):
    monkeypatch.setattr(triton_sparse, "LARGEST_SPLIT", split)
    monkeypatch.setattr(triton_sparse, "SMALLEST_SPLIT", split)
    monkeypatch.setattr(triton_tova, "MERGE_TILE", 4)
    monkeypatch.setattr(triton_tova, "WEIGH_SCORES", rank)
    _check(_seats((4, 2, 16, 113), (113, 16, 0, 17), torch.float32, device), 0.3)


@pytest.mark.parametrize("where, victim", (((), 0), ((40, 90), 40), ((112,), 112), (range(1, 113), 1)))
def test_ties_go_to_the_lowest_slot(where, victim, device):
    """Equal keys weigh the same to the last bit; those at ``where`` score lower."""
    q, k, v, rows, filled = _seats((4, 2, 16, 113), (113,), torch.float32, device)
    q[:], k[:] = 1.0, 0.5
    k[:, :, list(where)] = 0.25
    for room in (triton_tova, reference_select):
        assert run(room, q, k, v, rows, filled, 0.1)[1].tolist() == [victim]


def test_nan_stays_in_its_request(device):
    """A NaN key makes that request NaN, with a victim that exists; the others do not feel it."""
    inputs = _seats((4, 2, 16, 65), (65, 40), torch.float32, device)
    clean = run(triton_tova, *inputs, 0.3)
    inputs[1][inputs[3][0], 0, 3] = torch.nan
    for room in (triton_tova, reference_select):
        out, victims = run(room, *inputs, 0.3)
        assert out[0, :2].isnan().all() and victims[0] == 0
        assert_equal(out[1], clean[0][1], "attention")
        assert victims[1] == clean[1][1]


def test_no_requests(device):
    q, k, v, rows, filled = _seats((4, 2, 16, 65), (5,), torch.float32, device)
    out, victims = run(triton_tova, q[:0], k, v, rows[:0], filled[:0], 0.3)
    assert out.shape == (0, 4, 16) and victims.shape == (0,)


def test_reference_is_softmax_head_by_head():
    q, k, v, rows, filled = inputs = _seats((6, 2, 16, 65), FILLED, torch.float32, torch.device("cpu"))
    out, victims = run(reference_select, *inputs, 0.3)
    for b, n in enumerate(FILLED):
        keys, values = (x[rows[b], :, :n].transpose(0, 1) for x in (k, v))
        torch.testing.assert_close(out[b], naive_attention(q[b], keys, values, 0.3) if n else torch.zeros(6, 16))
        assert victims[b] == (_weights(q[b], k, rows[b], n, 0.3).argmin() if n else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ((32, 8, 128, 1025), (64, 8, 128, 4096), (14, 2, 64, 2049)))
def test_large(shape, device):
    filled = (1, shape[3], 0, shape[3] - 1, 1000, 63, 64, 65)
    for dtype in (torch.bfloat16, torch.float32):
        _check(_seats(shape, filled, dtype, device), shape[2] ** -0.5)
