"""Exact top-k of tokens on the device, by softmax weight or by logit.

One program chooses from a row, the candidates of one request and KV head (:mod:`slipstream.kernels.triton_choose`);
many turn its logits into images before that. A row of more candidates than one program holds is cut into chunks: first
the best of every chunk, then the best of those, which are exact because the best of a union are among the best of its
parts. The softmax statistics that images need come from the kernel that made the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size as power_of_two
from slipstream.kernels.launch import launch_options, num_processors
from slipstream.kernels.triton_choose import ABSENT, FORCED, choose, fill, num_warps, to_image
from slipstream.kernels.triton_weights import (
    FLOAT_MAX,
    candidates,
    finite,
    joined,
    load_logits,
    statistics,
    token_images,
)

TOKEN_TILE = 32768
"""Logits whose images one program chooses from: query heads of a group (as a power of two) times candidates."""
LOGITS_TILE = 2048
"""Logits that one program turns into images, where another one chooses."""
UNION_TILE = 16384
"""Choices of chunks that one program joins; what is left beyond the budget lets chunks end their search early."""
LOGITS_PER_WARP = 2048
SHARED_REGISTERS = 128
"""Of a thread, where there are more rows than processors: left to itself a row of 8192 takes so many (176) that no
processor holds two."""


@triton.jit
def _end(length, width, LISTED: tl.constexpr):
    """No candidate of a row is at this place or behind it."""
    if LISTED:
        return tl.where(length > 0, width, 0)
    return tl.minimum(length, width)


@triton.jit
def _statistics_kernel(
    logits_ptr,
    blocks_ptr,
    lengths_ptr,
    partials_ptr,
    width,
    SIZE: tl.constexpr,
    LISTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (chunks, Hk, B): peaks, then sums, of a chunk's heads go to ``partials_ptr`` [B, Hk, chunks, 2, G]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Last chunks first: the kernel before this one wrote them last, so they are still in the L2 cache.
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths_ptr + tl.program_id(2))
    first = chunk * BLOCK
    peak = tl.full((BLOCK_G,), -FLOAT_MAX, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    if first < _end(length, width, LISTED):
        _, exists = candidates(blocks_ptr + row * (width // SIZE), first, width, length, SIZE, LISTED, BLOCK)
        x = load_logits(logits_ptr + row * GROUP * width, exists, first, width, GROUP, BLOCK_G, BLOCK)
        peak, total = statistics(x)
    out_ptr = partials_ptr + (row * tl.num_programs(0) + chunk) * 2 * BLOCK_G + tl.arange(0, BLOCK_G)
    tl.store(out_ptr, peak)
    tl.store(out_ptr + BLOCK_G, total)


@triton.jit
def _images_kernel(
    logits_ptr, blocks_ptr, lengths_ptr, partials_ptr, images_ptr, width, num_partials, sink, recent,
    SIZE: tl.constexpr, LISTED: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, IS_SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of candidates, Hk, B): images of all candidates go to ``images_ptr`` [B, Hk, C]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths_ptr + tl.program_id(2))
    first = tl.program_id(0) * BLOCK
    at = first + tl.arange(0, BLOCK)
    images = tl.full((BLOCK,), ABSENT, tl.int32)
    if length > 0:
        tokens, exists = candidates(blocks_ptr + row * (width // SIZE), first, width, length, SIZE, LISTED, BLOCK)
        x = load_logits(logits_ptr + row * GROUP * width, exists, first, width, GROUP, BLOCK_G, BLOCK)
        peak, total = joined(partials_ptr + row * num_partials * 2 * BLOCK_G, num_partials, BLOCK_G, BLOCK_P)
        images = token_images(
            x, peak, total, tokens, exists, length, sink, recent, logits_ptr + row * GROUP * width, first, width,
            GROUP, BLOCK_G, BLOCK, IS_SUM,
        )  # fmt: skip
    tl.store(images_ptr + row * width + at, images, mask=at < width)


@triton.jit
def _select_kernel(
    images_ptr,
    blocks_ptr,
    lengths_ptr,
    indices_ptr,
    counts_ptr,
    width,
    budget,
    sink,
    recent,
    SIZE: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ARE_LOGITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (B, Hk): one program holds the images of a whole row. ARE_LOGITS: of one head, not images yet."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    at = tl.arange(0, BLOCK)
    blocks_ptr += row * (width // SIZE)
    # No load waits for another. Images are FORCED and ABSENT already, where they should be.
    images = tl.load(images_ptr + row * width + at, mask=at < width, other=0 if ARE_LOGITS else ABSENT)
    blocks = at // SIZE
    if LISTED:
        blocks = tl.load(blocks_ptr + blocks, mask=at < width, other=-1)
    tokens = blocks * SIZE + at % SIZE
    if ARE_LOGITS:
        length = tl.load(lengths_ptr + tl.program_id(0))
        forced = (tokens < sink) | (tokens >= length - recent)
        exists = (at < width) & (blocks >= 0) & (tokens < length)
        images = tl.where(exists, tl.where(forced, FORCED, to_image(finite(images))), ABSENT)
    kept, place, num = choose(images, budget, 0)
    # A hint like that of the places, where a budget is odd; in truth these stores are single ones too.
    tl.store(tl.multiple_of(indices_ptr + row * budget, 16) + place, tokens, mask=kept)
    fill(indices_ptr + row * budget, num, budget, -1)
    tl.store(counts_ptr + row, num)


@triton.jit
def _chunk_kernel(
    logits_ptr, blocks_ptr, lengths_ptr, partials_ptr, images_ptr, tokens_ptr, width, num_partials, budget, room, sink,
    recent,
    SIZE: tl.constexpr, LISTED: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, IS_SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, Hk, B): a chunk's best, ``room`` places each, go to ``images_ptr`` and ``tokens_ptr``."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths_ptr + tl.program_id(2))
    end = _end(length, width, LISTED)
    first = tl.program_id(0) * BLOCK
    out = (row * tl.num_programs(0) + tl.program_id(0)) * room
    num = 0
    if first < end:
        tokens, exists = candidates(blocks_ptr + row * (width // SIZE), first, width, length, SIZE, LISTED, BLOCK)
        x = load_logits(logits_ptr + row * GROUP * width, exists, first, width, GROUP, BLOCK_G, BLOCK)
        peak, total = tl.zeros((BLOCK_G,), tl.float32), tl.zeros((BLOCK_G,), tl.float32)
        if BLOCK_G > 1:
            peak, total = joined(partials_ptr + row * num_partials * 2 * BLOCK_G, num_partials, BLOCK_G, BLOCK_P)
        images = token_images(
            x, peak, total, tokens, exists, length, sink, recent, logits_ptr + row * GROUP * width, first, width,
            GROUP, BLOCK_G, BLOCK, IS_SUM,
        )  # fmt: skip
        kept, place, num = choose(images, budget, room)
        tl.store(images_ptr + out + place, images, mask=kept)
        tl.store(tokens_ptr + out + place, tokens, mask=kept)
    fill(images_ptr + out, num, room, ABSENT)


@triton.jit
def _union_kernel(
    images_ptr,
    tokens_ptr,
    best_images_ptr,
    indices_ptr,
    counts_ptr,
    width,
    budget,
    IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (parts, B * Hk): the best ``budget`` of every BLOCK images of a row of ``width``; at last, the result."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    images = tl.load(images_ptr + row * width + places, mask=places < width, other=ABSENT)
    kept, place, num = choose(images, budget, 0)
    out = (row * tl.num_programs(0) + tl.program_id(0)) * budget
    tokens = tl.load(tokens_ptr + row * width + places, mask=kept, other=0)
    tl.store(indices_ptr + out + place, tokens, mask=kept)
    if IS_LAST:
        fill(indices_ptr + out, num, budget, -1)
        tl.store(counts_ptr + row, num)
    else:
        tl.store(best_images_ptr + out + place, images, mask=kept)
        fill(best_images_ptr + out, num, budget, ABSENT)


def _join(images: Tensor, tokens: Tensor, indices: Tensor, counts: Tensor) -> None:
    """images, tokens: [B, Hk, n] int32, tokens ascending where present -> the best into indices and counts."""
    requests, num_kv, budget = indices.shape
    tile = max(power_of_two(UNION_TILE), 2 * power_of_two(budget))
    while True:
        width = images.shape[2]
        block = min(tile, power_of_two(width))
        parts = triton.cdiv(width, block)
        is_last = parts == 1
        shape = (requests, num_kv, parts * budget)
        best_images, best = (images, indices) if is_last else images.new_empty((2, *shape)).unbind()
        _union_kernel[(parts, requests * num_kv)](
            images, tokens, best_images, best, counts, width, budget,
            IS_LAST=is_last, BLOCK=block, **launch_options(images, num_warps=num_warps(block)),
        )  # fmt: skip
        if is_last:
            return
        images, tokens = best_images, best


def _select(
    images: Tensor, blocks: Tensor, lengths: Tensor, indices: Tensor, counts: Tensor, size: int, sink: int, recent: int,
    is_listed: bool,
) -> None:  # fmt: skip
    """images: [B, Hk, C] int32, or fp32 logits of lone heads."""
    (requests, num_kv, width), block = images.shape, power_of_two(images.shape[2])
    shared = images.is_cuda and requests * num_kv > num_processors(images.device)
    _select_kernel[(requests, num_kv)](
        images, blocks, lengths, indices, counts, width, indices.shape[2], sink, max(recent, 1),
        SIZE=size, LISTED=is_listed, BLOCK=block, ARE_LOGITS=images.dtype == torch.float32,
        **launch_options(images, num_warps=num_warps(block)), **({"maxnreg": SHARED_REGISTERS} if shared else {}),
    )  # fmt: skip


def top_images(images: Tensor, blocks: Tensor, lengths: Tensor, block_size: int, budget: int) -> tuple[Tensor, Tensor]:
    """The choice of :func:`top_tokens` among candidates of ``blocks`` with ready images, at most TOKEN_TILE of them."""
    requests, num_kv, width = images.shape
    assert width <= TOKEN_TILE and images.dtype == torch.int32 and images.is_contiguous() and blocks.is_contiguous()
    indices = torch.empty((requests, num_kv, budget), dtype=torch.int32, device=images.device)
    counts = torch.empty((requests, num_kv), dtype=torch.int32, device=images.device)
    if requests:
        _select(images, blocks, lengths, indices, counts, block_size, 0, 1, True)
    return indices, counts


def top_tokens(
    logits: Tensor,
    blocks: Tensor | None,
    lengths: Tensor,
    num_kv: int,
    block_size: int,
    budget: int,
    sink: int,
    recent: int,
    aggregate: str,
    partials: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`slipstream.kernels.reference_select.top_tokens`. Reads nothing back to the host.

    partials: [B, Hk, n, 2, G] fp32, G the group's power of two: peaks of parts of a row, and sums of exp(logit - peak),
    from the kernel that made the logits; None: made here.
    """
    requests, num_q, width = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32 and aggregate in ("sum", "max", "peak")
    assert blocks is None or (blocks.is_contiguous() and blocks.shape[2] * block_size == width)
    indices = torch.empty((requests, num_kv, budget), dtype=torch.int32, device=logits.device)
    counts = torch.empty((requests, num_kv), dtype=torch.int32, device=logits.device)
    if not requests:
        return indices, counts
    group = num_q // num_kv
    assert aggregate != "peak" or group == 1, "a peak is one logit for the group"
    block_g = power_of_two(group)
    block = min(power_of_two(width), TOKEN_TILE // block_g)
    chunks = triton.cdiv(width, block)
    small = min(block, max(1, LOGITS_TILE // block_g)) if chunks == 1 else block
    tiles = triton.cdiv(width, small)
    tokens = {"SIZE": block_size, "LISTED": blocks is not None, "GROUP": group, "BLOCK_G": block_g, "BLOCK": small}
    options = launch_options(logits, num_warps=min(32, max(4, small * block_g // LOGITS_PER_WARP)))
    rows = (logits, lengths if blocks is None else blocks, lengths)  # what stands in for blocks is not read
    num_partials, is_sum = 1, aggregate == "sum"
    if group > 1:
        if partials is None:
            partials = torch.empty((requests, num_kv, tiles, 2, block_g), dtype=torch.float32, device=logits.device)
            _statistics_kernel[(tiles, num_kv, requests)](*rows, partials, width, **tokens, **options)
        assert partials.is_contiguous() and partials.shape[3:] == (2, block_g)
        num_partials = partials.shape[2]
    if chunks == 1:
        images = logits
        if group > 1:
            images = torch.empty((requests, num_kv, width), dtype=torch.int32, device=logits.device)
            _images_kernel[(tiles, num_kv, requests)](
                *rows, partials, images, width, num_partials, sink, max(recent, 1),
                BLOCK_P=power_of_two(num_partials), IS_SUM=is_sum, **tokens, **options,
            )  # fmt: skip
        _select(images, *rows[1:], indices, counts, block_size, sink, recent, blocks is not None)
        return indices, counts
    room = min(block, max(budget, UNION_TILE // chunks))
    best_images, best = torch.empty((2, requests, num_kv, chunks * room), dtype=torch.int32, device=logits.device)
    _chunk_kernel[(chunks, num_kv, requests)](
        *rows, partials if group > 1 else logits, best_images, best, width, num_partials, budget, room, sink,
        max(recent, 1), BLOCK_P=power_of_two(num_partials), IS_SUM=is_sum, **tokens, **options,
    )  # fmt: skip
    _join(best_images, best, indices, counts)
    return indices, counts
