"""Logits of tokens from their labels or their keys: tiles of a paged index, or of its pages, times query heads.

Cut and multiplied as the scores of blocks are (:mod:`slipstream.kernels.triton_score`). On the way a program takes the
softmax statistics of its logits, which the choice of tokens needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size as power_of_two
from slipstream.kernels.launch import launch_options
from slipstream.kernels.triton_index import NUMBER, SHIFT
from slipstream.kernels.triton_score import cut, group_rows, tile_of
from slipstream.kernels.triton_weights import FLOAT_MAX, LOG2_E, finite

LABEL_TILE = 256  # tokens
# Two 16-byte pieces of labels a thread; with fewer the way to the tensor cores is byte by byte. Wide labels: half.
LABEL_TOKENS_PER_WARP = 64
LABEL_STAGES = 4
KEY_TILE_BYTES = 16384
KEY_WARPS = 4


@triton.jit
def codes(packed, dtype: tl.constexpr, OFFSET: tl.constexpr):
    """Codes of the first and of the second half of the channels, in the model's dtype, each plus OFFSET.

    In bfloat16 128 + n is 0x4300 | n. Left to itself the compiler converts byte by byte, which costs more than reading
    the labels; seven instructions turn four bytes into eight codes.
    """
    if OFFSET:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high;
            and.b32 low, $4, 0x0F0F0F0F;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0F0F0F0F;
            prmt.b32 $0, low, 0x43434343, 0x4140;
            prmt.b32 $1, low, 0x43434343, 0x4342;
            prmt.b32 $2, high, 0x43434343, 0x4140;
            prmt.b32 $3, high, 0x43434343, 0x4342;
            }
            """,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        return (packed & 15).to(dtype), (packed >> 4).to(dtype)


@triton.jit
def unpacked(both):
    """Steps and zero points of pairs of fp16 that lie in an int32 each."""
    step = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return step, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def product(first, second, first_q, second_q):
    """Both halves of the channels of labels [N, H] times those of queries [H, G]."""
    dots = tl.dot(first, first_q, input_precision="ieee")
    return tl.dot(second, second_q, dots, input_precision="ieee")


@triton.jit
def query_sum(first_q, second_q):
    """[G] fp32: the sum of each query's channels, by which a zero point counts."""
    return tl.sum(first_q.to(tl.float32) + second_q.to(tl.float32), axis=0)


@triton.jit
def _parted(q, channels):
    """A half's queries [BLOCK_H, BLOCK_G], of the first group of scales and of the second; the others' are zero.

    The upper bits of a channel say whether it is of the second one.
    """
    in_second = (channels >> SHIFT)[:, None] != 0
    rest = tl.where(in_second, q, 0.0)
    return tl.where(in_second, 0.0, q), rest


@triton.jit
def _dequantised(first, second, first_q, second_q, total, scales_ptr, live, scale, OFFSET: tl.constexpr):
    """Logits [BLOCK_N, BLOCK_G] of codes and one group's queries. total: scaled sums of those queries [BLOCK_G]."""
    step, zero = unpacked(tl.load(scales_ptr, mask=live, other=0))
    dots = product(first, second, first_q, second_q)
    zero -= OFFSET * step
    return dots * (step * scale)[:, None] + total[None, :] * zero[:, None]


@triton.jit
def _add_tile(logits, live, peak, weight):
    """Statistics of a row with one more tile [BLOCK_N, BLOCK_G]: NaN counts as -inf, +inf as the largest float."""
    x = tl.where(live[:, None], finite(logits), -float("inf"))
    new_peak = tl.maximum(peak, tl.max(x, axis=0))
    new_weight = tl.sum(tl.exp2((x - new_peak[None, :]) * LOG2_E), axis=0)
    return new_peak, weight * tl.exp2((peak - new_peak) * LOG2_E) + new_weight


@triton.jit
def _group_peak(logits, in_group):
    """logits: [BLOCK_N, BLOCK_G] -> [BLOCK_N]: the largest of the group, NaN least of all."""
    return tl.max(tl.where(in_group[None, :] & (logits == logits), logits, -float("inf")), axis=1)


@triton.jit
def _keep(logits, live, known, at, out_ptr, width, row, heads, in_group, peak, weight, PEAK: tl.constexpr):
    """Stores a tile's logits [BLOCK_N, BLOCK_G] at the places ``at`` of rows of ``width``; returns the new statistics,
    of what is ``known``.

    PEAK: stores the largest of the group and leaves the statistics alone.
    """
    if PEAK:
        tl.store(out_ptr + row * width + at, _group_peak(logits, in_group), mask=live)
    else:
        out = out_ptr + heads[None, :] * width + at[:, None]
        tl.store(out, logits, mask=in_group[None, :] & live[:, None])
        peak, weight = _add_tile(logits, known, peak, weight)
    return peak, weight


@triton.jit
def _store_partial(partials_ptr, peak, weight, request, head, in_group, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr):
    """To this program's place in ``partials_ptr`` [B, Hk, programs, 2, BLOCK_S]; absent heads weigh nothing."""
    row = request.to(tl.int64) * tl.num_programs(1) + head
    group = tl.arange(0, BLOCK_G)
    at = partials_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * 2 * BLOCK_S + group
    tl.store(at, tl.where(in_group, peak, -FLOAT_MAX), mask=group < BLOCK_S)
    tl.store(at + BLOCK_S, tl.where(in_group, weight, 0.0), mask=group < BLOCK_S)


@triton.jit
def _label_kernel(
    q_ptr, channels_ptr, labels_ptr, scales_ptr, table_ptr, lengths_ptr, blocks_ptr, out_ptr, partials_ptr, scale,
    table_stride, num_candidates, tiles_per_program,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHOSEN: tl.constexpr, OFFSET: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PEAK: tl.constexpr, UNREAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of tiles of candidates, Hk, B). CHOSEN: candidates are the tokens of ``blocks_ptr``.

    A program's softmax statistics go to ``partials_ptr`` [B, Hk, chunks, 2, BLOCK_S]. PEAK: instead only the largest
    logit of the group is wanted, ``out_ptr`` is [B, Hk, C], and there are no statistics. UNREAD: so many of the newest
    tokens are in none.
    """
    head, request = tl.program_id(1), tl.program_id(2)
    group, half = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
    in_group, in_half = group < GROUP, half < HALF
    # Channels never change in a step, so they need not wait for the kernel before.
    channels = channels_ptr + head * 2 * HALF + half
    first_channels = tl.load(channels, mask=in_half, other=0)
    second_channels = tl.load(channels + HALF, mask=in_half, other=0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(lengths_ptr + request)
    if CHOSEN:
        limit = tl.where(length > 0, num_candidates, 0)
    else:
        limit = tl.minimum(length, num_candidates)
    begin = tl.program_id(0) * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, tl.cdiv(limit, BLOCK_N))
    peak = tl.full((BLOCK_G,), -FLOAT_MAX, tl.float32)
    weight = tl.zeros((BLOCK_G,), tl.float32)
    if begin < end:
        row, heads = request.to(tl.int64) * NUM_KV + head, group_rows(request, head, GROUP, NUM_KV, BLOCK_G)
        mask = in_group[None, :] & in_half[:, None]
        q = q_ptr + heads[None, :] * DIM
        first_q = tl.load(q + (first_channels & NUMBER)[:, None], mask=mask, other=0.0)
        second_q = tl.load(q + (second_channels & NUMBER)[:, None], mask=mask, other=0.0)
        if GROUPS == 2:  # of scales
            first_q, first_rest = _parted(first_q, first_channels)
            second_q, second_rest = _parted(second_q, second_channels)
            rest_total = query_sum(first_rest, second_rest) * scale
        total = query_sum(first_q, second_q) * scale
        table = table_ptr + request.to(tl.int64) * table_stride
        for tile in range(begin, end):
            at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            if CHOSEN:
                blocks = blocks_ptr + row * (num_candidates // BLOCK_SIZE)
                block = tl.load(blocks + at // BLOCK_SIZE, mask=at < num_candidates, other=-1)
                tokens = block * BLOCK_SIZE + at % BLOCK_SIZE
                live = (block >= 0) & (tokens < length)
            else:
                tokens, live = at, at < limit
            pages = tl.load(table + tokens // PAGE, mask=live, other=0).to(tl.int64)
            rows = (pages * NUM_KV + head) * PAGE + tokens % PAGE
            wanted = live[:, None] & in_half[None, :]
            packed = tl.load(labels_ptr + rows[:, None] * HALF + half[None, :], mask=wanted, other=0)
            first, second = codes(packed, first_q.dtype, OFFSET)
            scales = scales_ptr + rows * GROUPS
            logits = _dequantised(first, second, first_q, second_q, total, scales, live, scale, OFFSET)
            if GROUPS == 2:
                scales += 1
                logits += _dequantised(first, second, first_rest, second_rest, rest_total, scales, live, scale, OFFSET)
            known = live
            if UNREAD:
                known = live & (tokens < length - UNREAD)
            peak, weight = _keep(
                logits, live, known, at, out_ptr, num_candidates, row, heads, in_group, peak, weight, PEAK
            )
    if not PEAK:
        _store_partial(partials_ptr, peak, weight, request, head, in_group, BLOCK_G, BLOCK_S)


@triton.jit
def _key_kernel(
    q_ptr, k_ptr, table_ptr, lengths_ptr, out_ptr, partials_ptr, scale, table_stride, num_tokens,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PEAK: tl.constexpr, UNREAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the table's tokens, Hk, B), with partials as the label kernel's."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    table = table_ptr + request.to(tl.int64) * table_stride
    pages = tl.load(table + tokens // PAGE, mask=tokens < num_tokens, other=0).to(tl.int64)
    length = tl.load(lengths_ptr + request)
    in_group = tl.arange(0, BLOCK_G) < GROUP
    peak = tl.full((BLOCK_G,), -FLOAT_MAX, tl.float32)
    weight = tl.zeros((BLOCK_G,), tl.float32)
    if tile * BLOCK_N < length:
        dims = tl.arange(0, BLOCK_D)
        in_dim, live = dims < DIM, tokens < length
        heads = group_rows(request, head, GROUP, NUM_KV, BLOCK_G)
        q = tl.load(q_ptr + heads[None, :] * DIM + dims[:, None], mask=in_group[None, :] & in_dim[:, None], other=0.0)
        rows = (pages * NUM_KV + head) * PAGE + tokens % PAGE
        k = tl.load(k_ptr + rows[:, None] * DIM + dims[None, :], mask=live[:, None] & in_dim[None, :], other=0.0)
        logits = tl.dot(k, q, input_precision="ieee") * scale
        row = request.to(tl.int64) * NUM_KV + head
        known = live
        if UNREAD:
            known = live & (tokens < length - UNREAD)
        peak, weight = _keep(logits, live, known, tokens, out_ptr, num_tokens, row, heads, in_group, peak, weight, PEAK)
    if not PEAK:
        _store_partial(partials_ptr, peak, weight, request, head, in_group, BLOCK_G, BLOCK_S)


def label_logits(
    q: Tensor,
    channels: Tensor,
    labels: Tensor,
    scales: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    blocks: Tensor | None,
    block_size: int,
    scale: float,
) -> Tensor:
    """See :func:`slipstream.kernels.reference_index.label_logits`. Contiguous tensors."""
    return label_logits_and_partials(q, channels, labels, scales, page_table, lengths, blocks, block_size, scale)[0]


def label_logits_and_partials(
    q: Tensor,
    channels: Tensor,
    labels: Tensor,
    scales: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    blocks: Tensor | None,
    block_size: int,
    scale: float,
    peak: bool = False,
    unread: int = 0,
) -> tuple[Tensor, Tensor]:
    """The logits, and what :func:`slipstream.kernels.triton_topk.top_tokens` wants to know of them.

    peak: the largest of each group instead, [B, Hk, C], of which there is nothing more to know. unread: no softmax sees
    so many of the newest tokens.
    """
    requests, num_q, dim = q.shape
    num_kv, page, half = labels.shape[1:]
    assert all(x is None or x.is_contiguous() for x in (q, channels, labels, scales, blocks))
    candidates = page_table.shape[1] * page if blocks is None else blocks.shape[2] * block_size
    out = torch.empty((requests, num_kv if peak else num_q, candidates), dtype=torch.float32, device=q.device)
    tile, per_program, programs = cut(max(candidates, 1), max(requests, 1) * num_kv, LABEL_TILE, q.device)
    partials = _partials(q, num_kv, programs)
    if not out.numel():
        return out, partials
    _label_kernel[(programs, num_kv, requests)](
        q, channels, labels, scales.view(torch.int32), page_table, lengths, blocks, out, partials, scale,
        page_table.stride(0), candidates, per_program,
        NUM_KV=num_kv, GROUP=num_q // num_kv, PAGE=page, DIM=dim, HALF=half, GROUPS=scales.shape[3] // 2,
        BLOCK_SIZE=block_size,
        CHOSEN=blocks is not None, OFFSET=128 if q.is_cuda and q.dtype == torch.bfloat16 else 0,
        BLOCK_G=power_of_two(num_q // num_kv, smallest=8), BLOCK_S=partials.shape[4],
        BLOCK_H=power_of_two(half, smallest=16), BLOCK_N=tile, PEAK=peak, UNREAD=0 if peak else unread,
        **launch_options(
            q, num_warps=max(1, tile // (LABEL_TOKENS_PER_WARP // (1 if half <= 32 else 2))),
            num_stages=LABEL_STAGES if per_program > 1 else 1,
        ),
    )  # fmt: skip
    return out, partials


def _partials(q: Tensor, num_kv: int, programs: int) -> Tensor:
    """Room for the softmax statistics of each program: [B, Hk, programs, 2, power of two of the group]."""
    shape = (q.shape[0], num_kv, programs, 2, power_of_two(q.shape[1] // num_kv))
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def key_logits(q: Tensor, k_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See :func:`slipstream.kernels.reference_index.key_logits`. Contiguous tensors."""
    return key_logits_and_partials(q, k_pages, page_table, lengths, scale)[0]


def key_logits_and_partials(
    q: Tensor, k_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float, peak: bool = False, unread: int = 0
) -> tuple[Tensor, Tensor]:
    """As :func:`label_logits_and_partials`."""
    requests, num_q, dim = q.shape
    num_kv, page = k_pages.shape[1:3]
    assert q.is_contiguous() and k_pages.is_contiguous() and q.dtype == k_pages.dtype
    tokens = page_table.shape[1] * page
    out = torch.empty((requests, num_kv if peak else num_q, tokens), dtype=torch.float32, device=q.device)
    block_dim = power_of_two(dim, smallest=16)
    tile = tile_of(KEY_TILE_BYTES, block_dim * q.element_size())
    programs = triton.cdiv(tokens, tile)
    partials = _partials(q, num_kv, programs)
    if not out.numel():
        return out, partials
    _key_kernel[(programs, num_kv, requests)](
        q, k_pages, page_table, lengths, out, partials, scale, page_table.stride(0), tokens,
        NUM_KV=num_kv, GROUP=num_q // num_kv, PAGE=page, DIM=dim,
        BLOCK_G=power_of_two(num_q // num_kv, smallest=8), BLOCK_S=partials.shape[4],
        BLOCK_D=block_dim, BLOCK_N=tile, PEAK=peak, UNREAD=0 if peak else unread,
        **launch_options(q, num_warps=KEY_WARPS),
    )  # fmt: skip
    return out, partials
