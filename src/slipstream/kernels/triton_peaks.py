"""What the choice of tokens by their peaks needs, in one launch: images of the largest logit of each KV head's group.

The special case of :mod:`slipstream.kernels.triton_logits` that decoding runs, where instructions decide and not bytes:
433 a warp for the 64 tokens of a block there, about 195 here (sm_90 code). A block lies in one page, so its labels and
scales are runs of memory at one address, and masks are needed only where sinks, recent tokens or no block are. Where
the group is smaller than the 8 columns of a tensor-core product, several tokens lie side by side in a row of the left
operand, each with columns of its own that are zero for the others: no column, sum or shuffle is spent on padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size as power_of_two
from slipstream.kernels.launch import launch_options, num_processors
from slipstream.kernels.triton_choose import ABSENT, FORCED
from slipstream.kernels.triton_index import NUMBER
from slipstream.kernels.triton_logits import codes, product, query_sum, unpacked
from slipstream.kernels.triton_topk import TOKEN_TILE
from slipstream.kernels.triton_weights import finite

COLUMNS = 8  # of a product
PROGRAMS_PER_PROCESSOR = 32  # of one warp each, where there are blocks enough
REGISTERS = 64  # of a thread, so that a processor holds so many; wide labels and fp32 take what they need
STAGES = 1


@triton.jit
def _image_kernel(
    q_ptr,
    channels_ptr,
    labels_ptr,
    scales_ptr,
    table_ptr,
    lengths_ptr,
    blocks_ptr,
    out_ptr,
    scale,
    table_stride,
    num_blocks,
    per_program,
    sink,
    recent,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
    PER_PAGE: tl.constexpr,
    OFFSET: tl.constexpr,
    ASIDE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (chunks of ``per_program`` chosen blocks, Hk, B). ASIDE tokens share a row of a tile of labels."""
    head, request = tl.program_id(1), tl.program_id(2)
    wide, columns = tl.arange(0, ASIDE * HALF), tl.arange(0, ASIDE * BLOCK_G)
    # Channels never change in a step, so they need not wait for the kernel before.
    channels = channels_ptr + head * 2 * HALF + wide % HALF
    first_channels = tl.load(channels) & NUMBER
    second_channels = tl.load(channels + HALF) & NUMBER
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = request.to(tl.int64) * NUM_KV + head
    begin = tl.program_id(0) * per_program
    number = tl.minimum(per_program, num_blocks - begin)
    ahead = tl.arange(0, BLOCK_P)
    blocks = tl.load(blocks_ptr + row * num_blocks + begin + ahead, mask=ahead < number, other=-1)
    length = tl.load(lengths_ptr + request)
    # Columns that a group does not fill repeat its last head, which changes no largest logit.
    q = q_ptr + (row * GROUP + tl.minimum(columns % BLOCK_G, GROUP - 1))[None, :] * DIM
    own = (wide // HALF)[:, None] == (columns // BLOCK_G)[None, :]
    first_q = tl.load(q + first_channels[:, None], mask=own, other=0.0)
    second_q = tl.load(q + second_channels[:, None], mask=own, other=0.0)
    total = tl.reshape(query_sum(first_q, second_q), (1, ASIDE, BLOCK_G))
    present = tl.maximum(blocks, 0)
    pages = tl.load(table_ptr + request.to(tl.int64) * table_stride + present // PER_PAGE)
    rows = (pages * NUM_KV + head) * PER_PAGE + present % PER_PAGE  # of blocks; one number for each fits 32 bits
    lines = tl.arange(0, SIZE // ASIDE)[:, None]
    places = lines * ASIDE + tl.arange(0, ASIDE)[None, :]
    for i in range(0, number):
        block = tl.max(tl.where(ahead == i, blocks, -1), axis=0)
        first_row = tl.sum(tl.where(ahead == i, rows, 0), axis=0).to(tl.int64) * SIZE
        # Scales first: behind the labels' way through shared memory their load would wait for that of the labels.
        both = tl.load(scales_ptr + first_row + places)
        packed = tl.load(labels_ptr + first_row * HALF + (lines * (ASIDE * HALF) + wide[None, :]))
        first, second = codes(packed, first_q.dtype, OFFSET)
        dots = product(first, second, first_q, second_q)
        step, zero = unpacked(both)
        zero -= OFFSET * step
        logits = tl.reshape(dots, (SIZE // ASIDE, ASIDE, BLOCK_G)) * step[:, :, None] + total * zero[:, :, None]
        # NaN is less than any number to tl.max. Adding 0 makes -0 +0.
        bits = finite(tl.max(logits, axis=2) * scale + 0.0).to(tl.int32, bitcast=True)
        image = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
        if (block < 0) | (block * SIZE < sink) | ((block + 1) * SIZE > length - recent):
            tokens = block * SIZE + places
            image = tl.where((tokens < sink) | (tokens >= length - recent), FORCED, image)
            image = tl.where((block >= 0) & (tokens < length), image, ABSENT)
        tl.store(out_ptr + (row * num_blocks + begin + i) * SIZE + places, image)


def suits(labels: Tensor, scales: Tensor, blocks: Tensor, block_size: int) -> bool:
    """Whether :func:`label_images` serves: one group of channels, sizes that are powers of two, one tile of choice."""
    page, half = labels.shape[2:]
    if scales.shape[3] != 2 or page % block_size or blocks.shape[2] * block_size > TOKEN_TILE:
        return False
    return all(size == power_of_two(size, smallest=16) for size in (block_size, half))


def label_images(
    q: Tensor,
    channels: Tensor,
    labels: Tensor,
    scales: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    block_size: int,
    scale: float,
    sink: int,
    recent: int,
) -> Tensor:
    """[B, Hk, M * block_size] int32: images (:mod:`triton_choose`) of the largest of each group's ``label_logits``.

    Arguments as of :func:`slipstream.kernels.reference_index.label_logits`, contiguous; ``suits`` is true of them. The
    first ``sink`` tokens and the last ``recent`` are FORCED; what is behind the length, or in no block, is ABSENT.
    """
    requests, num_q, dim = q.shape
    num_kv, page, half = labels.shape[1:]
    assert all(x.is_contiguous() for x in (q, channels, labels, scales, blocks))
    num_blocks, group = blocks.shape[2], num_q // num_kv
    out = torch.empty((requests, num_kv, num_blocks * block_size), dtype=torch.int32, device=q.device)
    if not out.numel():
        return out
    programs = PROGRAMS_PER_PROCESSOR * num_processors(q.device)
    per_program = min(num_blocks, triton.cdiv(num_blocks * num_kv * requests, programs))
    block_g = power_of_two(group)
    aside = max(1, min(COLUMNS // block_g, block_size // 16))  # a product takes tiles of at least 16 lines
    is_narrow = q.is_cuda and half <= 16 and q.element_size() == 2
    _image_kernel[(triton.cdiv(num_blocks, per_program), num_kv, requests)](
        q, channels, labels, scales.view(torch.int32), page_table, lengths, blocks, out, scale, page_table.stride(0),
        num_blocks, per_program, sink, max(recent, 1),
        NUM_KV=num_kv, GROUP=group, DIM=dim, HALF=half, SIZE=block_size, PER_PAGE=page // block_size,
        OFFSET=128 if q.is_cuda and q.dtype == torch.bfloat16 else 0,
        ASIDE=aside, BLOCK_G=max(COLUMNS // aside, block_g), BLOCK_P=power_of_two(per_program),
        **launch_options(q, num_warps=1, num_stages=STAGES), **({"maxnreg": REGISTERS} if is_narrow else {}),
    )  # fmt: skip
    return out
