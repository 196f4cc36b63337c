"""Page tables to the flat page lists that FlashInfer reads, one small launch per step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options

LIST_BLOCK = 128


@triton.jit
def _list_pages_kernel(
    table_ptr,
    lengths_ptr,
    indices_ptr,
    last_page_len_ptr,
    table_stride,
    num_requests,
    PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (B, blocks of the table's width)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    request, block = tl.program_id(0), tl.program_id(1)
    ids = tl.arange(0, BLOCK_B)
    counts = tl.cdiv(tl.load(lengths_ptr + ids, mask=ids < num_requests, other=0), PAGE)
    start = tl.sum(tl.where(ids < request, counts, 0), axis=0)
    length = tl.load(lengths_ptr + request)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    mask = columns < tl.cdiv(length, PAGE)
    pages = tl.load(table_ptr + request.to(tl.int64) * table_stride + columns, mask=mask, other=0)
    tl.store(indices_ptr + start + columns, pages, mask=mask)
    if block == 0:
        tl.store(last_page_len_ptr + request, (length - 1) % PAGE + 1)


def list_pages(page_table: Tensor, lengths: Tensor, page_size: int, indices: Tensor, last_page_len: Tensor) -> None:
    """See :func:`slipstream.kernels.reference.list_pages`."""
    requests, width = page_table.shape
    if not requests:
        return
    _list_pages_kernel[(requests, triton.cdiv(width, LIST_BLOCK))](
        page_table, lengths, indices, last_page_len, page_table.stride(0), requests,
        PAGE=page_size, BLOCK_B=block_size(requests), BLOCK=LIST_BLOCK, **launch_options(lengths, num_warps=1),
    )  # fmt: skip
