"""The k best of a row of scores, exactly and without sorting, inside one program.

The scores live in registers as images: integers that order like the floats. The k-th largest is found by search: every
round counts how many images reach each of two pivots, in one sum of both counts packed into an integer, and the search
ends early where a cut leaves exactly k. The pivots are at the thirds of the images that are left. In long rows, where a
round costs more than thought, they are in turn at the thirds of the *values* (images give most of their range to
numbers near zero, where few scores are) and close around the place where the k-th would be if the rest were spread
evenly: 7 rounds instead of 12 for 8192 normal scores. Whatever the scores, only so many rounds go by values. Ties, to
the lowest index, and places in the output come from one prefix sum, packed likewise. (Two pivots by counting
instructions: for a row of thousands the comparisons of a round cost about as much as the latency of its sum, so more
pivots would not pay for themselves.)
"""

from __future__ import annotations

import triton
import triton.language as tl

IMAGES_PER_WARP = 1024
LARGEST_TILE = 32768  # two counts share an integer of 32 bits
FILL_TILE = tl.constexpr(256)
LONG_ROW = tl.constexpr(4096)
MOST_VALUE_TURNS = tl.constexpr(14)
AIM_MARGIN = tl.constexpr(1 / 16)

FORCED = tl.constexpr(0x7FFFFFFF)  # image of what is always in: above that of +inf
ABSENT = tl.constexpr(-0x80000000)  # image of what may not be chosen: below that of -inf


@triton.jit
def to_image(x):
    """fp32 -> int32 that orders like the numbers, with -0 = +0 and NaN = -inf."""
    x = tl.where(x == x, x, -float("inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _from_image(image):
    """The number of an image, int32 -> fp32."""
    return tl.where(image >= 0, image, image ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _cut(image, budget, room):
    """Where to cut a row: (bound, ties, num). num images are above the bound or among the first ``ties`` equal to it.

    num is the least of budget and images present, or any number above it, up to room, that is found on the way.
    """
    packed = tl.sum(tl.where(image == FORCED, 0x10001, tl.where(image == ABSENT, 0, 0x10000)).to(tl.uint32), axis=0)
    num_low, num_forced = (packed >> 16).to(tl.int32), (packed & 0xFFFF).to(tl.int32)
    num = tl.minimum(num_low, budget)
    # What is neither ABSENT nor FORCED lies from low to high - 1: one less than ABSENT wraps to the largest number.
    low = tl.min(image - 1, axis=0).to(tl.int64) + 1
    high = tl.max(image + 1, axis=0).to(tl.int64)
    all_forced = num_forced >= num
    low = tl.where(all_forced, FORCED, low)
    high = tl.where(all_forced, low + 1, high)
    num_low = tl.where(all_forced, num_forced, num_low)
    num_high = tl.where(all_forced, 0, num_forced)
    # num_low images reach low, and that is enough; num_high reach high, and that is not.
    turn = 0
    while (num_low > tl.maximum(num, room)) & (high - low > 1):
        step = tl.maximum((high - low).to(tl.uint32) // 3, 1).to(tl.int64)
        first, second = low + step, low + 2 * step
        if image.shape[0] >= LONG_ROW:
            bottom, top = _from_image(low.to(tl.int32)), _from_image((high - 1).to(tl.int32))
            span = top - bottom  # NaN or inf where an end is infinite
            if (span < float("inf")) & (turn < MOST_VALUE_TURNS):
                aim = top - span * (num - num_high).to(tl.float32) / (num_low - num_high).to(tl.float32)
                aims = turn % 2 == 1
                lower = tl.where(aims, aim - span * AIM_MARGIN, bottom + span / 3)
                upper = tl.where(aims, aim + span * AIM_MARGIN, top - span / 3)
                first = tl.minimum(tl.maximum(to_image(lower).to(tl.int64), low + 1), high - 1)
                second = tl.minimum(tl.maximum(to_image(upper).to(tl.int64), first), high - 1)
            turn += 1
        # Who reaches the second pivot reaches the first.
        reached = tl.where(image >= second.to(tl.int32), 0x10001, (image >= first.to(tl.int32)).to(tl.int32))
        counts = tl.sum(reached.to(tl.uint32), axis=0)
        num_first, num_second = (counts & 0xFFFF).to(tl.int32), (counts >> 16).to(tl.int32)
        if num_second >= num:
            low, num_low = second, num_second
        elif num_first >= num:
            low, num_low = first, num_first
            high, num_high = second, num_second
        else:
            high, num_high = first, num_first
    found = num_low <= tl.maximum(num, room)
    return (
        tl.where(found, low - 1, low).to(tl.int32),
        tl.where(found, 0, num - num_high),
        tl.where(found, num_low, num),
    )


@triton.jit
def choose(image, budget, room):
    """The best of a row: which are kept, the place of each among the kept, and how many there are."""
    bound, ties, num = _cut(image, budget, room)
    above, tied = image > bound, image == bound
    ranks = tl.cumsum(tl.where(above, 1, tied.to(tl.int32) << 16).to(tl.uint32), axis=0)
    num_tied, num_above = (ranks >> 16).to(tl.int32), (ranks & 0xFFFF).to(tl.int32)
    kept = above | (tied & (num_tied <= ties))
    place = num_above + tl.minimum(num_tied, ties) - 1
    # The hint is not true of all places. It only lets a store keep the layout of the row, four neighbours to a thread,
    # where the prefix sum is cheap. Stores stay single, because the mask ``kept`` is known to be alike nowhere.
    return kept, tl.multiple_of(tl.max_contiguous(place, 4), 4), num


@triton.jit
def fill(ptr, first, last, value):
    """Writes ``value`` at the places first .. last - 1."""
    for start in range(first, last, FILL_TILE):
        places = start + tl.arange(0, FILL_TILE)
        tl.store(ptr + places, tl.full((FILL_TILE,), value, tl.int32), mask=places < last)


def num_warps(tile: int) -> int:
    """Warps for a program that chooses from a tile of images."""
    assert tile <= LARGEST_TILE, f"a program cannot choose from {tile} candidates"
    return min(32, max(4, tile // IMAGES_PER_WARP))
