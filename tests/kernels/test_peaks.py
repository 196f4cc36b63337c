"""Images of peaks from labels: they order as the reference's peaks, and what is chosen by them is the reference's."""

from __future__ import annotations

import pytest
import torch
from test_label_logits import _candidates, _case, _pick_blocks

from slipstream.kernels import reference_index, reference_select, sparse, triton_logits, triton_peaks, triton_topk

ABSENT, FORCED = -0x80000000, 0x7FFFFFFF
LENGTHS = (0, 1, 63, 64, 65, 113, 500)
# (Hq, Hk, D, page, block, channels): groups of 1 to 20 heads, blocks of a page and of a part of it
SHAPES = (
    (4, 1, 64, 64, 64, 32),
    (6, 2, 64, 64, 16, 32),
    (2, 2, 40, 32, 32, 32),
    (4, 2, 128, 64, 32, 64),
    (8, 1, 64, 64, 64, 32),
    (20, 1, 64, 32, 16, 32),
)


def _numbers(images):
    """The floats that images are of."""
    return torch.where(images >= 0, images, images ^ FORCED).view(torch.float32)


def _run(args, blocks, block, sink, recent):
    assert triton_peaks.suits(args[2], args[3], blocks, block)
    images = triton_peaks.label_images(*args, blocks, block, 0.25, sink, recent)
    tokens, exists = _candidates(blocks, args[5], block)
    is_forced = exists & ((tokens < sink) | (tokens >= args[5].view(-1, 1, 1) - max(recent, 1)))
    return images, exists, is_forced


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_of_the_peaks(shape, dtype, device):
    args, _ = _case(shape, dtype, device, LENGTHS)
    blocks = _pick_blocks(args[5], shape[1], 5, shape[4])
    images, exists, is_forced = _run(args, blocks, shape[4], 4, 20)
    assert (images[~exists] == ABSENT).all() and (images[is_forced] == FORCED).all()
    free = exists & ~is_forced
    logits = reference_index.label_logits(*(x.cpu() for x in args), blocks.cpu(), shape[4], 0.25)
    expected = reference_select.group_peak(logits, shape[1]).to(device)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(_numbers(images)[free], expected[free], **close)
    other, _ = triton_logits.label_logits_and_partials(*args, blocks, shape[4], 0.25, peak=True)
    # In bfloat16 on a device codes are 128 too large, and what that adds to a sum is taken off again.
    slack = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(_numbers(images)[free], other[free], rtol=slack, atol=slack)


@pytest.mark.parametrize("per_processor", (1, 2, 1000))
def test_any_cut(per_processor, monkeypatch, device):
    """One block or many in a program, the last program with fewer."""
    args, _ = _case((4, 1, 64, 64, 64, 32), torch.float32, device, (1500, 0, 900))
    blocks = _pick_blocks(args[5], 1, 13, 64)
    expected, *_ = _run(args, blocks, 64, 4, 70)
    monkeypatch.setattr(triton_peaks, "PROGRAMS_PER_PROCESSOR", per_processor)
    assert torch.equal(_run(args, blocks, 64, 4, 70)[0], expected)


def test_strange_queries(device):
    """NaN is less than any number, the infinities are in their places; only a forced token is above them."""
    args, _ = _case((4, 1, 64, 64, 64, 32), torch.float32, device, (400,) * 3)
    args[0][0, :3] = torch.nan
    args[0][1] = torch.nan
    args[0][2, 0] = torch.inf
    blocks = _pick_blocks(args[5], 1, 5, 64)
    images, exists, is_forced = _run(args, blocks, 64, 4, 10)
    free = exists & ~is_forced
    rest, _ = triton_logits.label_logits_and_partials(*args, blocks, 64, 0.25)
    torch.testing.assert_close(_numbers(images)[0][free[0]], rest[0, 3:][free[0]], rtol=1e-5, atol=1e-5)
    assert (images[1][free[1]] == _image(-torch.inf)).all()
    assert (images[free] > ABSENT).all() and (images[free] < FORCED).all()


def _image(number):
    bits = torch.tensor(number).view(torch.int32)
    return int(bits if bits >= 0 else bits ^ FORCED)


def test_minus_zero_is_zero(device):
    args, _ = _case((4, 1, 64, 64, 64, 32), torch.float32, device, (200,))
    args[3].zero_()
    args[0].neg_()
    blocks = _pick_blocks(args[5], 1, 3, 64)
    images, exists, is_forced = _run(args, blocks, 64, 1, 1)
    assert (images[exists & ~is_forced] == 0).all()


@pytest.mark.parametrize("budget", (30, 100, 320))
@pytest.mark.parametrize("sizes", ((4, 20), (0, 0), (70, 30)))
def test_choice(budget, sizes, device):
    """What is chosen is what the definition chooses; labels tell all tokens apart."""
    args, _ = _case((6, 2, 64, 64, 64, 32), torch.float32, device, LENGTHS)
    blocks = _pick_blocks(args[5], 2, 5, 64)
    rule = (budget, *sizes)
    images = triton_peaks.label_images(*args, blocks, 64, 0.25, *rule[1:])
    indices, counts = triton_topk.top_images(images, blocks, args[5], 64, budget)
    host = [x.cpu() for x in (*args, blocks)]
    wanted, numbers = sparse.label_tokens(*host, 64, 0.25, *rule, "peak")
    assert torch.equal(counts.cpu(), numbers)
    places = torch.arange(budget) < numbers.unsqueeze(-1)
    assert torch.equal(indices.cpu()[places], wanted[places])


def test_what_does_not_suit(device):
    args, _ = _case((4, 1, 64, 64, 64, 32), torch.float32, device, (100,))
    labels, scales = args[2:4]
    blocks = torch.zeros((1, 1, 4), dtype=torch.int32, device=device)
    assert triton_peaks.suits(labels, scales, blocks, 64)
    assert not triton_peaks.suits(labels, scales, blocks, 8)
    assert not triton_peaks.suits(labels[..., :12], scales, blocks, 64)
    assert not triton_peaks.suits(labels, scales.repeat(1, 1, 1, 2), blocks, 64)
    assert not triton_peaks.suits(labels, scales, blocks.repeat(1, 1, 256), 64)


@pytest.mark.gpu
def test_large_on_a_device(device):
    """The sizes of decoding, through the op, against its definition on the host: the same tokens but for near ties."""
    args, _ = _case((32, 8, 128, 64, 64, 32), torch.bfloat16, device, (9000, 0, 64, 5000))
    blocks = _pick_blocks(args[5], 8, 128, 64)
    rule = (64, 128**-0.5, 1024, 4, 64, "peak")
    indices, counts = sparse.label_tokens(*args, blocks, *rule)
    wanted, numbers = sparse.label_tokens(*(x.cpu() for x in (*args, blocks)), *rule)
    assert torch.equal(counts.cpu(), numbers)
    for mine, theirs, count in zip(
        indices.cpu().flatten(0, 1), wanted.flatten(0, 1), numbers.flatten().tolist(), strict=True
    ):
        assert (mine[:count].diff() > 0).all()
        assert count - len(set(mine[:count].tolist()) & set(theirs[:count].tolist())) <= count // 200
