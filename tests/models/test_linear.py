"""The projection in whatever layout the device prefers: equal to F.linear, and each row a world of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from slipstream.models.linear import Linear, can_pack

SHAPES = [(7, 5), (101, 60), (96, 64), (64, 1024), (48, 1152), (33, 2500)]


def make(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(dtype)
    return weight, torch.randn(shape[0], generator=generator).to(dtype) if bias else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    weight, offset = make(shape, bias, dtype)
    linear = Linear(weight.clone(), offset)
    assert torch.equal(linear.dense_weight(), weight)
    for rows in (1, 2, 8, 65):
        x = torch.randn(rows, shape[1]).to(dtype)
        found = linear(x)
        assert found.shape == (rows, shape[0]) and found.dtype == dtype
        torch.testing.assert_close(found, F.linear(x, weight, offset), rtol=1e-4, atol=1e-3)


def test_strided_rows() -> None:
    weight, _ = make((96, 64), False, torch.float32)
    x = torch.randn(9, 128)[::2, 64:]
    torch.testing.assert_close(Linear(weight.clone())(x), F.linear(x, weight), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_do_not_see_each_other(shape: tuple[int, int]) -> None:
    """What a request computes must not depend on what else is in the batch (fp32)."""
    weight, _ = make(shape, False, torch.float32)
    x = torch.randn(40, shape[1])
    linear = Linear(weight)
    whole = linear(x)
    for rows in (1, 2, 3, 8, 17):
        error = (linear(x[:rows]) - whole[:rows]).abs().max()
        assert error <= 1e-6 * whole.abs().max()


def test_only_fp32_on_a_cpu_is_packed() -> None:
    assert can_pack(torch.zeros(2, 2)) == torch.backends.mkldnn.is_available()
    assert not can_pack(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not can_pack(torch.zeros(2, 2, device="meta"))
