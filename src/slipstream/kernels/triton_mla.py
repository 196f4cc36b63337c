"""Decode attention over a latent cache (MLA): dense, over a selection, and in TOVA's seats.

One row of a token serves all query heads, as key and, in its first columns, as value: a tile is read once and used by
both products. The heads are the rows of those products, padded to a multiple of 16 (20 to 32). Work is cut as in
:mod:`slipstream.kernels.triton_decode` and :mod:`slipstream.kernels.triton_sparse`, whose merges finish it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels import triton_decode, triton_sparse
from slipstream.kernels.launch import block_size, launch_options, num_processors
from slipstream.kernels.triton_decode import LOG2_E, request_at, tiles_of

# How work is cut for an H200; none of them moves a result beyond the order of sums.
MAX_HEADS = 32  # query heads of one program; more heads read a tile again, from the L2 cache
TILE_BYTES = 65536  # rows of one tile
WARPS = 8
DENSE_STAGES = 5  # loads through the page table count double in Triton's pipeliner: this makes two buffers of 72 KiB
DENSE_PROGRAMS_PER_PROCESSOR = 1
SPARSE_STAGES = 2
SPARSE_PROGRAMS_PER_PROCESSOR = 1
SMALLEST_SPLIT, LARGEST_SPLIT = 32, 512  # selected tokens of one program
MERGE_TILE = 16


@triton.jit
def latent_rows(table_ptr, indices_ptr, listed, start, last, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of ``pages.view(P * S, D)`` of the places start .. start + BLOCK_N - 1, those before ``last`` at least.

    listed: how many indices may be read, so that they need not wait for ``last``.
    """
    places = start + tl.arange(0, BLOCK_N)
    if indices_ptr is None and PAGE % BLOCK_N == 0:  # start is a multiple of BLOCK_N: the tile lies in one page
        page = tl.load(table_ptr + start // PAGE).to(tl.int64)
        return page * PAGE + start % PAGE + tl.arange(0, BLOCK_N)
    tokens = places
    if indices_ptr is not None:
        tokens = tl.load(indices_ptr + places, mask=places < listed, other=0)
    pages = tl.load(table_ptr + tokens // PAGE, mask=places < last, other=0).to(tl.int64)
    return pages * PAGE + tokens % PAGE


@triton.jit
def load_query(
    q_ptr, first_row, in_heads, VALUE: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The latent and the rotary part of BLOCK_H rows of ``q.view(-1, D)``, zeros where not ``in_heads``."""
    rows = (first_row + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None] * (VALUE + ROPE)
    cols, turned = tl.arange(0, BLOCK_V)[None, :], tl.arange(0, BLOCK_R)[None, :]
    latent = tl.load(q_ptr + rows + cols, mask=in_heads[:, None] & (cols < VALUE), other=0.0)
    rotary = tl.load(q_ptr + rows + VALUE + turned, mask=in_heads[:, None] & (turned < ROPE), other=0.0)
    return latent, rotary


@triton.jit
def attend_rows(
    latent,
    rotary,
    k_ptr,
    table_ptr,
    indices_ptr,
    scores_ptr,
    scores_stride,
    in_heads,
    listed,
    first,
    end,
    last,
    scale_log2,
    PAGE: tl.constexpr,
    VALUE: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the places first .. last - 1: (unnormalised sum [BLOCK_H, BLOCK_V], row sums, row maxima).

    end: where the walk ends, ``last`` or a bound of it that is known earlier; nothing means anything if last <= first.
    indices_ptr: the token at every place, ``listed`` of them, or None: place i is token i. scores_ptr: where the
    scores, base 2, of head h at place i are kept, at h * scores_stride + i, or None.
    """
    cols, turned = tl.arange(0, BLOCK_V)[None, :], tl.arange(0, BLOCK_R)[None, :]
    peak = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_V), tl.float32)
    for start in range(first, end, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        valid = places < last
        rows = latent_rows(table_ptr, indices_ptr, listed, start, last, PAGE, BLOCK_N)[:, None] * (VALUE + ROPE)
        k = tl.load(k_ptr + rows + cols, mask=valid[:, None] & (cols < VALUE), other=0.0)
        k_rotary = tl.load(k_ptr + rows + VALUE + turned, mask=valid[:, None] & (turned < ROPE), other=0.0)
        scores = tl.dot(latent, tl.trans(k), input_precision="ieee")
        scores = tl.dot(rotary, tl.trans(k_rotary), scores, input_precision="ieee") * scale_log2
        if scores_ptr is not None:
            at = tl.arange(0, BLOCK_H)[:, None] * scores_stride + places[None, :]
            tl.store(scores_ptr + at, scores, mask=in_heads[:, None] & valid[None, :])
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(k.dtype), k, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit
def store_piece(
    out_ptr, piece_ptr, lse_ptr, acc, total, peak, out_row, piece_row, whole, in_heads,
    VALUE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A piece that is a whole request goes to ``out`` from ``out_row`` on, any other to the pieces."""
    heads, cols = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_V)[None, :]
    mask = in_heads[:, None] & (cols < VALUE)
    acc = acc / total[:, None]
    if whole:
        at = (out_row + heads).to(tl.int64)[:, None] * VALUE + cols
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        rows = (piece_row + heads).to(tl.int64)
        tl.store(piece_ptr + rows[:, None] * VALUE + cols, acc, mask=mask)
        tl.store(lse_ptr + rows, peak + tl.log2(total), mask=in_heads)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, table_ptr, lengths_ptr, out_ptr, piece_ptr, lse_ptr, scale_log2, table_stride, num_requests,
    NUM_Q: tl.constexpr, PAGE: tl.constexpr, VALUE: tl.constexpr, ROPE: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (C, blocks of heads): program c takes the c-th C-th part of the line of all requests' tiles."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program, first_head = tl.program_id(0), tl.program_id(1) * BLOCK_H
    tiles = tiles_of(lengths_ptr, num_requests, BLOCK_B, BLOCK_N)
    line = tl.sum(tiles, axis=0)
    # On a short line the programs beyond its tiles have nothing to do, and every other has at least one.
    busy = tl.maximum(tl.minimum(tl.num_programs(0), line), 1)
    begin = tl.minimum(line * program // busy, line)
    end = tl.minimum(line * (program + 1) // busy, line)
    request, request_begin = request_at(tiles, begin)
    in_heads = first_head + tl.arange(0, BLOCK_H) < NUM_Q
    while begin < end:
        length = tl.load(lengths_ptr + request)
        request_end = request_begin + tl.cdiv(length, BLOCK_N)
        piece_end = tl.minimum(end, request_end)
        if piece_end > begin:
            row = request * NUM_Q + first_head
            latent, rotary = load_query(q_ptr, row, in_heads, VALUE, ROPE, BLOCK_V, BLOCK_R, BLOCK_H)
            last = tl.minimum((piece_end - request_begin) * BLOCK_N, length)
            acc, total, peak = attend_rows(
                latent, rotary, k_ptr, table_ptr + request.to(tl.int64) * table_stride, None, None, 0, in_heads,
                0, (begin - request_begin) * BLOCK_N, last, last,
                scale_log2, PAGE, VALUE, ROPE, BLOCK_V, BLOCK_R, BLOCK_H, BLOCK_N,
            )  # fmt: skip
            whole = (begin == request_begin) & (piece_end == request_end)
            store_piece(
                out_ptr, piece_ptr, lse_ptr, acc, total, peak, row, (program + request) * NUM_Q + first_head, whole,
                in_heads, VALUE, BLOCK_V, BLOCK_H,
            )  # fmt: skip
        begin = piece_end
        request_begin = request_end
        request += 1


@triton.jit
def _split_kernel(
    q_ptr, k_ptr, table_ptr, indices_ptr, counts_ptr, rows_ptr, scores_ptr, out_ptr, piece_ptr, lse_ptr, scale_log2,
    table_stride, budget, split,
    NUM_Q: tl.constexpr, PAGE: tl.constexpr, VALUE: tl.constexpr, ROPE: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (splits, blocks of heads, B) over selected tokens, or, where ``scores_ptr`` is given, over whole seats.

    A seat is a request whose only page has all its slots; all its scores are kept, and all its pieces.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first_head, request = tl.program_id(1) * BLOCK_H, tl.program_id(2).to(tl.int64)
    chosen = request
    if rows_ptr is not None:
        chosen = tl.load(rows_ptr + request)
    count = tl.load(counts_ptr + chosen)
    first = tl.program_id(0) * split
    in_heads = first_head + tl.arange(0, BLOCK_H) < NUM_Q
    row = request * NUM_Q + first_head
    latent, rotary = load_query(q_ptr, row, in_heads, VALUE, ROPE, BLOCK_V, BLOCK_R, BLOCK_H)
    if indices_ptr is not None:
        indices_ptr += chosen * budget
    if scores_ptr is not None:
        scores_ptr += row * budget
    last = tl.minimum(first + split, count)
    end = last
    if ONE_TILE:  # of a piece: nothing before the page table waits for the count
        end = first + BLOCK_N
    acc, total, peak = attend_rows(
        latent, rotary, k_ptr, table_ptr + request * table_stride, indices_ptr, scores_ptr, budget, in_heads,
        budget, first, end, last, scale_log2, PAGE, VALUE, ROPE, BLOCK_V, BLOCK_R, BLOCK_H, BLOCK_N,
    )  # fmt: skip
    if first < count:
        piece_row = (request * tl.num_programs(0) + tl.program_id(0)) * NUM_Q + first_head
        whole = (count <= split) & (scores_ptr is None)
        store_piece(
            out_ptr, piece_ptr, lse_ptr, acc, total, peak, row, piece_row, whole, in_heads, VALUE, BLOCK_V, BLOCK_H
        )


def shape_of(q: Tensor, value_dim: int) -> dict[str, int]:
    """Sizes that every kernel of a latent cache needs, without the tile's."""
    whole = q.shape[-1] * q.element_size() % 16 == 0
    assert whole or not q.is_cuda, f"a device reads rows 16 bytes at a time, and {q.shape[-1]} columns are not that"
    num_q, dim = q.shape[1:]
    return {
        "NUM_Q": num_q,
        "VALUE": value_dim,
        "ROPE": dim - value_dim,
        "BLOCK_V": block_size(value_dim, smallest=16),
        "BLOCK_R": block_size(dim - value_dim, smallest=16),
        "BLOCK_H": min(MAX_HEADS, block_size(num_q, smallest=16)),
    }


def _tile(shape: dict[str, int], itemsize: int) -> int:
    return min(64, max(16, TILE_BYTES // (shape["BLOCK_V"] * itemsize)))


def _pieces(rows: int, value_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.empty((rows, value_dim), dtype=torch.float32, device=device),
        torch.empty((rows,), dtype=torch.float32, device=device),
    )


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`slipstream.kernels.reference.decode_attention`, of a latent cache. Reads nothing back to the host.

    out: written where given; requests of length 0 keep what it holds.
    """
    (requests, num_q), value_dim = q.shape[:2], v_pages.shape[3]
    assert q.is_contiguous() and k_pages.is_contiguous() and k_pages.shape[1] == 1 and q.dtype == k_pages.dtype
    keep, out = out is not None, q.new_empty((requests, num_q, value_dim)) if out is None else out
    assert out.is_contiguous()
    if not requests:
        return out
    shape = shape_of(q, value_dim)
    blocks = triton.cdiv(num_q, shape["BLOCK_H"])
    programs = max(1, DENSE_PROGRAMS_PER_PROCESSOR * num_processors(q.device) // blocks)
    piece, lse = _pieces((programs + requests) * num_q, value_dim, q.device)
    tile, block_b = _tile(shape, q.element_size()), block_size(requests)
    _decode_kernel[(programs, blocks)](
        q, k_pages, page_table, lengths, out, piece, lse, scale * LOG2_E, page_table.stride(0), requests,
        PAGE=k_pages.shape[2], BLOCK_B=block_b, BLOCK_N=tile, **shape,
        **launch_options(q, num_warps=WARPS, num_stages=DENSE_STAGES),
    )  # fmt: skip
    triton_decode._merge_kernel[(requests, num_q)](
        lengths, out, piece, lse, programs, requests, GROUP=num_q, DIM=value_dim, BLOCK_B=block_b,
        BLOCK_D=shape["BLOCK_V"], BLOCK_N=tile, BLOCK=MERGE_TILE, KEEP=keep,
        **launch_options(q, num_warps=4),
    )  # fmt: skip
    return out


def split_pieces(
    q: Tensor,
    k: Tensor,
    value_dim: int,
    table: Tensor,
    indices: Tensor | None,
    counts: Tensor,
    rows: Tensor | None,
    scores: Tensor | None,
    scale: float,
    out: Tensor,
    budget: int,
) -> tuple[Tensor, Tensor, int, int]:
    """Launches the split kernel: (pieces, their log-sum-exp, tokens per split, splits). k: [P, 1, S, D]."""
    requests, num_q = q.shape[:2]
    shape = shape_of(q, value_dim)
    blocks = triton.cdiv(num_q, shape["BLOCK_H"])
    share = SPARSE_PROGRAMS_PER_PROCESSOR * num_processors(q.device) // (blocks * requests)
    split = min(LARGEST_SPLIT, block_size(triton.cdiv(budget, max(1, share)), smallest=SMALLEST_SPLIT))
    splits = triton.cdiv(budget, split)
    piece, lse = _pieces(requests * num_q * splits, value_dim, q.device)
    tile = min(split, _tile(shape, q.element_size()))
    _split_kernel[(splits, blocks, requests)](
        q, k, table, indices, counts, rows, scores, out, piece, lse, scale * LOG2_E, table.stride(0), budget, split,
        PAGE=k.shape[2], BLOCK_N=tile, ONE_TILE=tile == split, **shape,
        **launch_options(q, num_warps=WARPS, num_stages=SPARSE_STAGES),
    )  # fmt: skip
    return piece, lse, split, splits


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    out: Tensor,
    rows: Tensor | None = None,
) -> None:
    """See :func:`slipstream.kernels.reference_select.sparse_attention`, of a latent cache. Nothing reads the host."""
    (requests, num_q), value_dim, budget = q.shape[:2], v_pages.shape[3], indices.shape[2]
    assert q.is_contiguous() and out.is_contiguous() and indices.is_contiguous() and counts.is_contiguous()
    assert k_pages.is_contiguous() and k_pages.shape[1] == 1 and q.dtype == k_pages.dtype
    if not requests:
        return
    piece, lse, split, splits = split_pieces(
        q, k_pages, value_dim, page_table, indices, counts, rows, None, scale, out, budget
    )
    if splits > 1:
        triton_sparse._merge_kernel[(requests * num_q,)](
            counts, rows, out, piece, lse, split, splits, NUM_KV=1, GROUP=num_q, DIM=value_dim,
            BLOCK_D=block_size(value_dim, smallest=16), BLOCK=MERGE_TILE,
            **launch_options(q, num_warps=4),
        )  # fmt: skip
