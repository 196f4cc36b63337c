"""How far a kernel may be from its reference: the one table of this room.

(relative, absolute) per op and dtype. The reference rounds where the kernel does, so what is left is the order of sums
and, in half precision, one rounding that falls to the other side; attention also rounds its weights to the dtype before
the second product. ``copy`` is for values that are moved and not computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "copy": {torch.float32: (0, 0), torch.bfloat16: (0, 0), torch.float16: (0, 0)},
    "norm": {torch.float32: (1e-5, 1e-6), torch.bfloat16: (1.6e-2, 1e-3), torch.float16: (2e-3, 1e-4)},
    "silu_mul": {torch.float32: (1e-5, 1e-6), torch.bfloat16: (1.6e-2, 1e-3), torch.float16: (2e-3, 1e-4)},
    "rope": {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.6e-2, 3e-2), torch.float16: (2e-3, 4e-3)},
    "attention": {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.6e-2, 8e-3), torch.float16: (2e-3, 2e-3)},
    "summary": {torch.float32: (1e-5, 1e-6), torch.bfloat16: (8e-3, 1e-3)},
    "predict": {torch.float32: (1e-4, 1e-4), torch.bfloat16: (1.6e-2, 3e-2), torch.float16: (2e-3, 4e-3)},
    "logits": {torch.float32: (1e-5, 3e-4)},
}


def assert_equal(actual: Tensor, expected: Tensor, op: str) -> None:
    """Same shape, dtype and values within the table; NaN only where the reference has NaN."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    rtol, atol = TOLERANCES[op][expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
