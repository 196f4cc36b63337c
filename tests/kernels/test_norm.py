"""RMSNorm, residual + RMSNorm and SiLU-mul: kernel = reference = the textbook formula."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_equal

from slipstream.kernels import reference, triton_norm

DTYPES = (torch.float32, torch.bfloat16)
ALL_DTYPES = (*DTYPES, torch.float16)
WIDTHS = (1, 27, 63, 64, 65, 113)


def _rows(shape, dtype, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width, dtype, device):
    x, weight = _rows((3, width), dtype, device), _rows((width,), dtype, device, 1)
    actual = triton_norm.rms_norm(x, weight, 1e-6)
    assert_equal(actual, reference.rms_norm(x, weight, 1e-6), "norm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(width, dtype, device):
    x, residual, weight = (_rows(s, dtype, device, i) for i, s in enumerate(((2, width), (2, width), (width,))))
    normed, total = triton_norm.add_rms_norm(x, residual, weight, 1e-5)
    expected_normed, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert_equal(total, expected_total, "copy")
    assert_equal(normed, expected_normed, "norm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(width, dtype, device):
    x = _rows((3, 2 * width), dtype, device)
    assert_equal(triton_norm.silu_mul(x), reference.silu_mul(x), "silu_mul")


def test_reference_is_the_textbook_formula():
    x, residual, weight = torch.randn(4, 33), torch.randn(4, 33), torch.randn(33)
    total = (x + residual).double()
    expected = total / (total.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
    normed, new_residual = reference.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(normed, expected.float())
    torch.testing.assert_close(new_residual, x + residual)
    gate, up = x.double(), residual.double()
    torch.testing.assert_close(
        reference.silu_mul(torch.cat((x, residual), 1)), (gate / (1 + (-gate).exp()) * up).float()
    )


def test_rows_of_a_wider_tensor(device):
    """Rows may be strided: a slice of a larger projection is normed in place of a copy."""
    wide = _rows((3, 200), torch.float32, device)
    x, weight = wide[:, 40:153], _rows((113,), torch.float32, device, 1)
    assert_equal(triton_norm.rms_norm(x, weight, 1e-6), reference.rms_norm(x.contiguous(), weight, 1e-6), "norm")
    gate_up = wide[:, 7:133]
    assert_equal(triton_norm.silu_mul(gate_up), reference.silu_mul(gate_up.contiguous()), "silu_mul")


def test_nan_stays_in_its_row(device):
    x = _rows((3, 65), torch.float32, device)
    x[1, 7] = torch.nan
    actual = triton_norm.rms_norm(x, torch.ones(65, device=device), 1e-6)
    assert actual[1].isnan().all() and actual[[0, 2]].isfinite().all()


def test_no_rows(device):
    empty = torch.empty((0, 64), device=device)
    weight = torch.ones(64, device=device)
    assert triton_norm.rms_norm(empty, weight, 1e-6).shape == (0, 64)
    assert triton_norm.silu_mul(empty).shape == (0, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("width", (896, 3584, 4096, 5120, 16384))
@pytest.mark.parametrize("rows", (1, 64, 3000))
def test_large(rows, width, dtype, device):
    x, residual, weight = (_rows(s, dtype, device, i) for i, s in enumerate(((rows, width), (rows, width), (width,))))
    normed, total = triton_norm.add_rms_norm(x, residual, weight, 1e-6)
    expected_normed, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert_equal(total, expected_total, "copy")
    assert_equal(normed, expected_normed, "norm")
    gate_up = torch.cat((x, residual), dim=1)
    assert_equal(triton_norm.silu_mul(gate_up), reference.silu_mul(gate_up), "silu_mul")
