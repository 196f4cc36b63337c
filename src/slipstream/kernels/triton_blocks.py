"""Exact top-k of blocks on the device, by score, and the tokens of chosen blocks.

One program chooses from the blocks of one request and KV head (:mod:`slipstream.kernels.triton_choose`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size as power_of_two
from slipstream.kernels.launch import launch_options
from slipstream.kernels.triton_choose import ABSENT, FORCED, choose, fill, num_warps, to_image
from slipstream.kernels.triton_weights import candidates

LIST_TILE = 1024


@triton.jit
def _blocks_kernel(
    scores_ptr,
    lengths_ptr,
    out_ptr,
    width,
    num_blocks,
    sink,
    recent,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (B, Hk)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    ids = tl.arange(0, BLOCK)
    # What is undefined is loaded too: neither load waits for the other.
    scores = tl.load(scores_ptr + row * width + ids, mask=ids < width, other=0.0)
    length = tl.load(lengths_ptr + tl.program_id(0))
    forced = (ids * SIZE < sink) | ((ids + 1) * SIZE > length - recent)
    images = tl.where(forced, FORCED, to_image(scores))
    images = tl.where((ids < width) & (ids * SIZE < length), images, ABSENT)
    kept, place, num = choose(images, num_blocks, 0)
    tl.store(out_ptr + row * num_blocks + place, ids, mask=kept)
    fill(out_ptr + row * num_blocks, num, num_blocks, -1)


def top_blocks(scores: Tensor, lengths: Tensor, block_size: int, num_blocks: int, sink: int, recent: int) -> Tensor:
    """See :func:`slipstream.kernels.reference_select.top_blocks`. Reads nothing back to the host."""
    requests, num_kv, width = scores.shape
    assert scores.is_contiguous() and scores.dtype == torch.float32
    out = torch.empty((requests, num_kv, num_blocks), dtype=torch.int32, device=scores.device)
    if not requests:
        return out
    block = power_of_two(width)
    _blocks_kernel[(requests, num_kv)](
        scores, lengths, out, width, num_blocks, sink, max(recent, 1), SIZE=block_size, BLOCK=block,
        **launch_options(scores, num_warps=num_warps(block)),
    )  # fmt: skip
    return out


@triton.jit
def _list_kernel(
    blocks_ptr,
    lengths_ptr,
    indices_ptr,
    counts_ptr,
    width,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of a row, Hk, B)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths_ptr + tl.program_id(2))
    blocks_ptr += row * (width // SIZE)
    tokens, exists = candidates(blocks_ptr, tl.program_id(0) * BLOCK, width, length, SIZE, True, BLOCK)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(indices_ptr + row * width + places, tl.where(exists, tokens, -1), mask=places < width)
    if tl.program_id(0) == 0:
        ids = tl.arange(0, BLOCK_M)
        blocks = tl.load(blocks_ptr + ids, mask=ids < width // SIZE, other=-1)
        sizes = tl.minimum(tl.maximum(length - blocks * SIZE, 0), SIZE)
        tl.store(counts_ptr + row, tl.sum(tl.where(blocks >= 0, sizes, 0), axis=0))


def block_tokens(blocks: Tensor, lengths: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See :func:`slipstream.kernels.reference_select.block_tokens`. Reads nothing back to the host."""
    requests, num_kv, num_blocks = blocks.shape
    assert blocks.is_contiguous()
    width = num_blocks * block_size
    indices = torch.empty((requests, num_kv, width), dtype=torch.int32, device=blocks.device)
    counts = torch.empty((requests, num_kv), dtype=torch.int32, device=blocks.device)
    if requests:
        _list_kernel[(triton.cdiv(width, LIST_TILE), num_kv, requests)](
            blocks, lengths, indices, counts, width, SIZE=block_size, BLOCK=LIST_TILE,
            BLOCK_M=power_of_two(num_blocks), **launch_options(blocks, num_warps=4),
        )  # fmt: skip
    return indices, counts
