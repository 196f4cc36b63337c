"""The catalogue of what AsyncTLS keeps and moves: which blocks are resident, who gives way, copies between stores.

CUDA goes to Triton, which reads and writes pinned host memory in place (unified addressing); the definitions are in
:mod:`slipstream.kernels.reference_residency`. No op synchronises on CUDA, and every grid depends on shapes only.
"""

from __future__ import annotations

from torch import Tensor

from slipstream.kernels import reference_residency
from slipstream.kernels.reference_residency import COUNTERS, MOST_SLOTS, Slots

Store = tuple[Tensor, Tensor]

__all__ = [
    "COUNTERS", "MOST_SLOTS", "Slots", "Store", "block_rows", "claim_slots", "copy_between", "find_blocks",
    "forget_pages", "load_blocks",
]  # fmt: skip


def find_blocks(
    blocks: Tensor,
    nexts: Tensor,
    page_table: Tensor,
    seats: Tensor,
    lengths: Tensor,
    slots: Slots,
    sets: Tensor,
    made_for: Tensor,
    tick: Tensor,
    counters: Tensor,
    per_page: int,
    block_size: int,
    mode: str,
    drift: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """blocks, nexts: [B, Hk, M] -> (candidates [B, Hk, M'], urgent keys [B, Hk, M], later keys [B, Hk, M]) int32."""
    args = (blocks, nexts, page_table, seats, lengths, slots, sets, made_for, tick, counters)
    if blocks.is_cuda:
        from slipstream.kernels import triton_residency

        return triton_residency.find_blocks(*args, per_page, block_size, mode, drift)
    return reference_residency.find_blocks(*args, per_page, block_size, mode, drift)


def claim_slots(keys: Tensor, slots: Slots, tick: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """keys: [B, Hk, M] int32 -> (loads [Hk, B * M, 2] int32 of key and slot, counts [Hk] int32)."""
    if keys.is_cuda:
        from slipstream.kernels import triton_residency

        return triton_residency.claim_slots(keys, slots, tick, counter)
    return reference_residency.claim_slots(keys, slots, tick, counter)


def forget_pages(
    page_table: Tensor, query_start: Tensor, lengths: Tensor, max_query: int, slots: Slots, page_size: int,
    per_page: int,
) -> None:  # fmt: skip
    """The pages that a step writes are in no slot any more, in all layers: slots [L, ...]."""
    args = (page_table, query_start, lengths, max_query, slots, page_size, per_page)
    if page_table.is_cuda:
        from slipstream.kernels import triton_residency

        triton_residency.forget_pages(*args)
    else:
        reference_residency.forget_pages(*args)


def block_rows(
    page_table: Tensor, seats: Tensor, lengths: Tensor, slot_of: Tensor, num_slots: int, first: int, block_size: int,
    per_page: int,
) -> Tensor:  # fmt: skip
    """page_table: [B, N] -> [B * Hk, N * per_page] int32: where each block is in a store of tails and slots."""
    args = (page_table, seats, lengths, slot_of, num_slots, first, block_size, per_page)
    if page_table.is_cuda:
        from slipstream.kernels import triton_residency

        return triton_residency.block_rows(*args)
    return reference_residency.block_rows(*args)


def load_blocks(pages: Store, loads: Tensor, counts: Tensor, store: Store, num_slots: int, first: int) -> None:
    """Blocks of ``loads`` from pages [P, Hk, S, D], on the host or not, to the slots of a store [X, block, D]."""
    args = (pages, loads, counts, store, num_slots, first)
    if loads.is_cuda:
        from slipstream.kernels import triton_copies

        triton_copies.load_blocks(*args)
    else:
        reference_residency.load_blocks(*args)


def copy_between(source: Store, target: Store, source_pages: Tensor, target_pages: Tensor) -> None:
    """Pages [n] of one pair of stores [P, Hk, S, D] to another, on the device or on the host; below 0 is skipped."""
    args = (source, target, source_pages, target_pages)
    if source_pages.is_cuda:
        from slipstream.kernels import triton_copies

        triton_copies.copy_between(*args)
    else:
        reference_residency.copy_between(*args)
