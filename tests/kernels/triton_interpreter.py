"""Three repairs of Triton 3.6's CPU interpreter, so that it computes what a GPU computes.

Loop bounds: it calls ``int`` on arrays of one element, which numpy 2.4 refuses. bfloat16: it keeps the 16 bits as
integers, truncates where hardware rounds to nearest even, and multiplies the bits as integers in ``tl.dot``.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair() -> None:
    """Patch the interpreter of this process; call once, before any kernel runs."""
    patch_tensor = interpreter._patch_lang_tensor
    cast, dot = interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def patched_cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            src = interpreter.TensorHandle(_from_bf16(src.data), tl.float32)
            return src if target == tl.float32 else cast(self, src, dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return interpreter.TensorHandle(_to_bf16(src.data.astype(np.float32)), target)
        return cast(self, src, dst_type)

    def patched_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            interpreter.TensorHandle(_from_bf16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    interpreter._patch_lang_tensor = patched_tensor
    interpreter.InterpreterBuilder.cast_impl = patched_cast
    interpreter.InterpreterBuilder.create_dot = patched_dot
