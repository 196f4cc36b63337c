"""The catalogue of what AsyncTLS keeps and moves: which blocks are resident, who gives way, copies between stores.

CUDA goes to Triton, which reads and writes pinned host memory in place (unified addressing); the definitions are in
:mod:`slipstream.kernels.reference_residency`. No op synchronises on CUDA, and every grid depends on shapes only.
"""

from __future__ import annotations

from torch import Tensor

from slipstream.kernels import reference_residency
from slipstream.kernels.dispatch import op
from slipstream.kernels.reference_residency import CLOCK, COUNTERS, MOST_SLOTS, History, Slots

Store = tuple[Tensor, Tensor]

__all__ = [
    "CLOCK", "COUNTERS", "MOST_SLOTS", "History", "Slots", "Store", "add_time", "block_rows", "claim_slots",
    "copy_between", "find_blocks", "forget_pages", "load_blocks",
]  # fmt: skip

find_blocks = op(reference_residency.find_blocks, "triton_residency")
claim_slots = op(reference_residency.claim_slots, "triton_residency")
forget_pages = op(reference_residency.forget_pages, "triton_residency")
block_rows = op(reference_residency.block_rows, "triton_residency")
add_time = op(reference_residency.add_time, "triton_copies")
load_blocks = op(reference_residency.load_blocks, "triton_copies", by=1)  # pages may be on the host
copy_between = op(reference_residency.copy_between, "triton_copies", by=2)
