"""RMSNorm, with and without the residual sum, and the gated SiLU product, one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options

SILU_BLOCK = 1024


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * width + cols, x, mask=mask)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, axis=0) / width + eps)
    normed = (x32 * scale).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + cols, (weight * normed).to(x.dtype), mask=mask)


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, x_stride, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * x_stride + width + cols, mask=mask, other=0.0).to(tl.float32)
    gate32 = gate.to(tl.float32)
    silu = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + cols, (silu * up).to(gate.dtype), mask=mask)


def _launch_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    if rows:
        block = block_size(width)
        # Eight elements a thread: one 16-byte load of bf16, and the shortest chain of instructions.
        options = launch_options(x, num_warps=min(16, max(1, block // 256)))
        other = x if residual is None else residual
        _rms_norm_kernel[(rows,)](
            x, other, weight, out, total, x.stride(0), other.stride(0), width, eps,
            BLOCK=block, ADD=residual is not None, **options,
        )  # fmt: skip
    return out, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, H] with contiguous rows, weight: [H] -> [T, H]. One program per row."""
    return _launch_rms_norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, H] with contiguous rows -> (norm of x + residual, x + residual). One program per row."""
    return _launch_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2I] with contiguous rows -> [T, I]. One program per row and 1024 columns."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(SILU_BLOCK, block_size(width))
        options = launch_options(gate_up, num_warps=max(1, block // 256))
        _silu_mul_kernel[(rows, triton.cdiv(width, block))](
            gate_up, out, gate_up.stride(0), width, BLOCK=block, **options
        )
    return out
