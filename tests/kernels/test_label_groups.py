"""Labels of two groups of channels, as a latent cache has them: each with a scale and a zero point of its own."""

from __future__ import annotations

import pytest
import torch
from paged_cache import make_cache
from paged_index import make_query, starts
from tolerances import assert_equal

from slipstream.kernels import reference_index, sparse, triton_index, triton_logits, triton_topk
from slipstream.kernels.reference_index import GROUP_SHIFT

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (0, 1, 27, 64, 130)
# (Hq, D, border, page, channels)
SHAPES = ((5, 40, 32, 16, 20), (20, 72, 64, 64, 32), (8, 40, 32, 64, 40), (3, 24, 24, 16, 8), (3, 24, 0, 16, 8))


def case(shape, dtype, device):
    """(cache, channels with their groups, empty labels and scales)."""
    num_q, dim, border, page, count = shape
    cache = make_cache(LENGTHS, 1, page, dim, dtype, device)
    cache.k_pages[..., border:] *= 30  # rotary keys are larger than latents; one scale would drown these
    chosen = torch.randperm(dim, generator=torch.Generator().manual_seed(3))[:count].sort().values.int()
    channels = (chosen | (chosen >= border).int() << GROUP_SHIFT)[None].to(device)
    size = cache.k_pages.shape[:3]
    labels = torch.full((*size, count // 2), 255, dtype=torch.uint8, device=device)
    scales = torch.full((*size, 4), torch.nan, dtype=torch.float16, device=device)
    return cache, channels, labels, scales


def extend(op, cache, channels, labels, scales):
    query_start = starts(LENGTHS, labels.device)
    op(
        cache.k_pages, cache.page_table, query_start, cache.lengths, max(LENGTHS), None, "mean", labels, scales,
        channels,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels(shape, dtype, device):
    cache, channels, labels, scales = case(shape, dtype, device)
    expected = [x.cpu() for x in (labels, scales)]
    host = type(cache)(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in vars(cache).values()))
    extend(reference_index.extend_index, host, channels.cpu(), *expected)
    extend(triton_index.extend_index, cache, channels, labels, scales)
    assert torch.equal(labels.cpu(), expected[0])
    assert_equal(scales.cpu(), expected[1], "copy")
    q = make_query(len(LENGTHS), shape[0], shape[1], dtype, device)
    args = (channels, labels, scales, cache.page_table, cache.lengths)
    seen = torch.arange(cache.page_table.shape[1] * shape[3], device=device) < cache.lengths.view(-1, 1, 1)
    found = triton_logits.label_logits(q, *args, None, 1, 0.1).masked_fill(~seen, 0)
    host_args = (x.cpu() for x in args)
    wanted = reference_index.label_logits(q.cpu().float(), *host_args, None, 1, 0.1).to(device).masked_fill(~seen, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("aggregate", ("sum", "max"))
@pytest.mark.parametrize("chosen", (False, True))
def test_choice_by_weights(chosen, aggregate, device):
    """What decoding runs on a latent cache. Labels of unread tokens are not written yet: they may say anything."""
    unread, shape = 40, (20, 72, 64, 64, 32)
    cache, channels, labels, scales = case(shape, torch.float32, device)
    extend(triton_index.extend_index, cache, channels, labels, scales)
    for b, length in enumerate(LENGTHS):
        for token in range(max(length - unread, 0), length):
            scales[cache.page_table[b, token // 64], :, token % 64] = 9.0
    q = make_query(len(LENGTHS), 20, 72, torch.float32, device)
    blocks = None
    if chosen:  # of each request its last two pages
        last = (cache.lengths + 63) // 64 - 1
        blocks = torch.stack((last - 1, last), -1).clamp(min=-1).sort(-1).values.unsqueeze(1).int()
        blocks = torch.where(blocks[..., :1] < 0, blocks.flip(-1), blocks)
    size = 64 if chosen else 1
    args = (q, channels, labels, scales, cache.page_table, cache.lengths)
    rule = (cache.lengths, 1, size, 55, 4, unread, aggregate)
    logits, partials = triton_logits.label_logits_and_partials(*args, blocks, size, 0.1, unread=unread)
    found = triton_topk.top_tokens(logits, blocks, *rule, partials)
    host = [None if x is None else x.cpu() for x in (*args, blocks)]
    wanted, seen = (sparse.label_tokens(*host, size, 0.1, *rule[3:], which) for which in (unread, 0))
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    assert not torch.equal(wanted[0], seen[0]), "it matters what is seen"


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_dequantised_product(shape):
    cache, channels, labels, scales = case(shape, torch.float32, torch.device("cpu"))
    extend(reference_index.extend_index, cache, channels, labels, scales)
    numbers, groups = channels[0] & 0xFFFF, channels[0] >> GROUP_SHIFT
    q = make_query(len(LENGTHS), shape[0], shape[1], torch.float32, torch.device("cpu"))
    logits = reference_index.label_logits(
        q, channels, labels, scales, cache.page_table, cache.lengths, None, 1, 0.1
    )  # fmt: skip
    page, token = int(cache.page_table[2, 1]) if shape[3] == 16 else int(cache.page_table[2, 0]), 17
    slot = token % shape[3]
    codes = torch.cat((labels[page, 0, slot] & 15, labels[page, 0, slot] >> 4)).float()
    pairs = scales[page, 0, slot].float().view(2, 2)
    key = codes * pairs[groups.long(), 0] + pairs[groups.long(), 1]
    torch.testing.assert_close(logits[2, :, 17], 0.1 * q[2][:, numbers.long()] @ key, rtol=1e-4, atol=1e-3)
    true = cache.k_pages[page, 0, slot, numbers.long()]
    for group in groups.unique():
        own = groups == group
        assert (key - true)[own].abs().max() <= 0.51 * pairs[group, 0] + 0.01 * true[own].abs().max()
