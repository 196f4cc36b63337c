"""``x W^T + b`` with the weight laid out for the device that reads it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# oneDNN picks a layout for about this many rows; any value above 1 gives the blocked layout that is fast for 1..512.
_PACK_ROWS = 8
# With one row oneDNN sums K in chunks of this many, with more rows in one chain: the last bits would differ.
_ONE_ROW_CHUNK = 1024


class Linear:
    """One projection. weight: [out, in], bias: [out] or None; call with x: [T, in] to get [T, out].

    On a CPU in fp32 the weight is stored in oneDNN's blocked layout and the plain tensor is dropped: on a 2-core EPYC
    that reads weights 2.5 times as fast as ``F.linear`` (MKL) at one row and 3 times at eight, and a row's result does
    not depend on how many other rows there are. Elsewhere this is ``F.linear``.
    """

    __slots__ = ("weight", "bias", "_packed", "_pads_one_row")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed = can_pack(weight)
        self._pads_one_row = self._packed and weight.shape[1] > _ONE_ROW_CHUNK
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS) if self._packed else weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._packed:
            return F.linear(x, self.weight, self.bias)
        if self._pads_one_row and x.shape[0] == 1:
            x = x.expand(2, -1)
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")[:1]
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")

    def first_rows(self, count: int) -> Linear:
        """The projection to the first ``count`` outputs. Shares the weight, but where it is packed."""
        return Linear(self.dense_weight()[:count], None if self.bias is None else self.bias[:count])

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[0]

    def dense_weight(self) -> torch.Tensor:
        """[out, in] in the ordinary layout (a copy when it is packed)."""
        return self.weight.to_dense() if self._packed else self.weight


def can_pack(weight: torch.Tensor) -> bool:
    """Whether torch was built with oneDNN's linear op (the one that its compiler emits) and the weight suits it."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
