"""Sampling on the device: Gumbel-max with counter-based noise, and top-k / top-p / min-p without sorting.

Two launches. *Scan* splits every row over many programs and leaves, per part, the best noisy score and what the filters
need. *Choose* merges the parts of a row; a row without filters is done there. The filters keep an upper set of the
logits, so the token is found by walking down the noisy scores: the best one is the answer if it is kept, and if it is
not, nothing at or below its logit is, so that the search goes on strictly above it (the idea of FlashInfer's
sorting-free rejection sampling, here with the same token as sorting). A token is kept by top-p when the mass strictly
above it is less than p. Only the k-th value of top-k is searched, by bisection over the ordered integer image of the
floats, from a bound that the scan left: the k-th largest maximum of disjoint groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.launch import block_size, launch_options
from slipstream.kernels.reference import MAX_INVERSE_TEMPERATURE

SCAN_BLOCK = 1024
SCAN_TILES = 4
GROUPS = 32
CHOOSE_BLOCK = 4096
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
MAX_INVERSE = tl.constexpr(MAX_INVERSE_TEMPERATURE)


@triton.jit
def _load_logits(row_ptr, tokens, vocab, ban_ptr, bans):
    """fp32 logits of a block; NaN and what lies beyond the vocabulary become -inf, +inf the largest float.

    The first ``bans`` tokens at ban_ptr become -inf, too: none in nearly every row, so the loop costs a comparison.
    """
    x = tl.load(row_ptr + tokens, mask=tokens < vocab, other=-float("inf")).to(tl.float32)
    x = tl.where(x == x, x, -float("inf"))
    for place in range(bans):
        x = tl.where(tokens == tl.load(ban_ptr + place), -float("inf"), x)
    return tl.where(x > FLOAT_MAX, FLOAT_MAX, x)


@triton.jit
def _bans(until_ptr, row, position, NUM_BANNED: tl.constexpr):
    """How many entries of the row's list are to be banned: all of it before ``until``, then none."""
    bans = 0
    if NUM_BANNED > 0:
        bans = tl.where(position < tl.load(until_ptr + row), NUM_BANNED, 0)
    return bans


@triton.jit
def _ordered(x, SHIFT: tl.constexpr):
    """Integer image of fp32 that orders like the numbers (-0 = +0), without the low bits that the dtype never sets."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) >> SHIFT


@triton.jit
def _gumbel(seed, position, tokens):
    """The noise of ``reference.gumbel``: first output word of Philox4x32-10, 23 bits of it."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    counter = tokens.to(tl.uint32)
    word, _, _, _ = tl.philox(seed, counter, counter * 0 + low, counter * 0 + high, counter * 0)
    uniform = ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _inverse_temperature(temperature):
    return tl.minimum(tl.div_rn(1.0, temperature), MAX_INVERSE)


@triton.jit
def _first_best(score, tokens):
    """The largest score of a block and the lowest token that has it."""
    best = tl.max(score, axis=0)
    return best, tl.min(tl.where(score == best, tokens, 0x7FFFFFFF), axis=0)


@triton.jit
def _scan_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    seeds_ptr,
    positions_ptr,
    until_ptr,
    banned_ptr,
    part_score_ptr,
    part_token_ptr,
    part_peak_ptr,
    part_mass_ptr,
    group_ptr,
    logits_stride,
    vocab,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_BANNED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (B, parts). Per part: best noisy score and its token, largest logit, softmax mass, maxima of groups."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_ptr = logits_ptr + row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    inverse = _inverse_temperature(temperature)
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    ban_ptr, bans = banned_ptr + row * NUM_BANNED, _bans(until_ptr, row, position, NUM_BANNED)
    first = part * (BLOCK * TILES) + tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    best_token = first
    peak = best
    for tile in range(TILES):
        tokens = first + tile * BLOCK
        x = _load_logits(row_ptr, tokens, vocab, ban_ptr, bans)
        peak = tl.maximum(peak, x)
        score = x
        if temperature > 0:
            score = x * inverse + _gumbel(seed, position, tokens)
        best_token = tl.where(score > best, tokens, best_token)
        best = tl.maximum(best, score)
    out = row * tl.num_programs(1) + part
    score, token = _first_best(best, best_token)
    tl.store(part_score_ptr + out, score)
    tl.store(part_token_ptr + out, token)
    if (temperature > 0) & ((tl.load(top_k_ptr + row) > 0) | (tl.load(top_p_ptr + row) < 1)):
        groups = tl.max(tl.reshape(peak, (NUM_GROUPS, BLOCK // NUM_GROUPS)), axis=1)
        tl.store(group_ptr + out * NUM_GROUPS + tl.arange(0, NUM_GROUPS), groups)
        part_peak = tl.max(peak, axis=0)
        mass = tl.zeros((BLOCK,), tl.float32)
        for tile in range(TILES):
            x = _load_logits(row_ptr, first + tile * BLOCK, vocab, ban_ptr, bans)
            mass += tl.where(x > -float("inf"), tl.exp((x - part_peak) * inverse), 0.0)
        tl.store(part_mass_ptr + out, tl.sum(mass, axis=0))
    tl.store(part_peak_ptr + out, tl.max(peak, axis=0))


@triton.jit
def _count_at_least(row_ptr, vocab, ban_ptr, bans, bound, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """How many logits of the row have an image >= bound."""
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x = _load_logits(row_ptr, tokens, vocab, ban_ptr, bans)
        count += ((_ordered(x, SHIFT) >= bound) & (tokens < vocab)).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def _mass_above(row_ptr, vocab, ban_ptr, bans, bound, peak, inverse, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """Softmax mass, relative to the best token, of the logits whose image is > bound."""
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        x = _load_logits(row_ptr, start + tl.arange(0, BLOCK), vocab, ban_ptr, bans)
        above = (_ordered(x, SHIFT) > bound) & (x > -float("inf"))
        mass += tl.where(above, tl.exp((x - peak) * inverse), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _best_above(
    row_ptr, vocab, ban_ptr, bans, bound, peak, inverse, log_min_p, seed, position,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Token with the best noisy score among those whose image is > bound and that min-p keeps."""
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    best_token = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    for start in range(0, vocab, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x = _load_logits(row_ptr, tokens, vocab, ban_ptr, bans)
        kept = (_ordered(x, SHIFT) > bound) & ((x - peak) * inverse >= log_min_p)
        # Few blocks hold a kept token, and the noise costs more than all the rest.
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            score = tl.where(kept, x * inverse + _gumbel(seed, position, tokens), -float("inf"))
            best_token = tl.where(score > best, tokens, best_token)
            best = tl.maximum(best, score)
    return _first_best(best, best_token)[1]


@triton.jit
def _kth_image(
    row_ptr, vocab, ban_ptr, bans, k, peak, group_ptr, num_groups,
    BLOCK_GROUPS: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Image of the k-th largest logit, ties counted. 1 <= k <= vocab."""
    ids = tl.arange(0, BLOCK_GROUPS)
    maxima = tl.load(group_ptr + ids, mask=ids < num_groups, other=-float("inf"))
    images = _ordered(maxima, SHIFT).to(tl.int64)
    high = _ordered(peak, SHIFT).to(tl.int64)
    floor = _ordered(peak * 0 - float("inf"), SHIFT).to(tl.int64)
    low = floor
    if k <= num_groups:
        group_high = high
        while low < group_high:
            middle = group_high - (group_high - low) // 2
            enough = tl.sum(((images >= middle) & (ids < num_groups)).to(tl.int32), axis=0) >= k
            low = tl.where(enough, middle, low)
            group_high = tl.where(enough, group_high, middle - 1)
    while low < high:
        middle = high - (high - low) // 2
        enough = _count_at_least(row_ptr, vocab, ban_ptr, bans, middle, BLOCK, SHIFT) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _walk(
    row_ptr,
    vocab,
    ban_ptr,
    bans,
    token,
    bound,
    mass,
    peak,
    inverse,
    log_min_p,
    top_p,
    seed,
    position,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """From the best noisy token of the row down to the first that is kept.

    bound: images at or below it are out by top-k. mass: of what top-k leaves, in units of the best token's.
    """
    x = _load_logits(row_ptr, token, vocab, ban_ptr, bans)
    if (_ordered(x, SHIFT) <= bound) | ((x - peak) * inverse < log_min_p):
        token = _best_above(
            row_ptr, vocab, ban_ptr, bans, bound, peak, inverse, log_min_p, seed, position, BLOCK, SHIFT
        )
        x = _load_logits(row_ptr, token, vocab, ban_ptr, bans)
    if top_p < 1:
        image = _ordered(x, SHIFT).to(tl.int64)
        # The best token has no mass above it, so the walk ends there at the latest; the first condition is for
        # scores that overflow to -inf, where no token is found.
        while (token < vocab) & (
            _mass_above(row_ptr, vocab, ban_ptr, bans, image, peak, inverse, BLOCK, SHIFT) >= top_p * mass
        ):
            token = _best_above(
                row_ptr, vocab, ban_ptr, bans, image, peak, inverse, log_min_p, seed, position, BLOCK, SHIFT
            )
            x = _load_logits(row_ptr, token, vocab, ban_ptr, bans)
            image = _ordered(x, SHIFT).to(tl.int64)
    return token


@triton.jit
def _choose_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    until_ptr,
    banned_ptr,
    part_score_ptr,
    part_token_ptr,
    part_peak_ptr,
    part_mass_ptr,
    group_ptr,
    tokens_ptr,
    logits_stride,
    vocab,
    parts,
    BLOCK_PARTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    NUM_BANNED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (B,): merge the parts of a row, then walk down the noisy scores to the first token that is kept."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    ids = tl.arange(0, BLOCK_PARTS)
    live = ids < parts
    at = row * parts + ids
    scores = tl.load(part_score_ptr + at, mask=live, other=-float("inf"))
    part_tokens = tl.load(part_token_ptr + at, mask=live, other=0x7FFFFFFF)
    _, token = _first_best(scores, part_tokens)
    peaks = tl.load(part_peak_ptr + at, mask=live, other=-float("inf"))
    peak = tl.max(peaks, axis=0)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    filtered = ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)
    if peak == -float("inf"):
        token = tl.minimum(token, 0)
    elif (temperature > 0) & filtered:
        inverse = _inverse_temperature(temperature)
        seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
        ban_ptr, bans = banned_ptr + row * NUM_BANNED, _bans(until_ptr, row, position, NUM_BANNED)
        log_min_p = tl.log(min_p)
        bound = _ordered(peak * 0 - float("inf"), SHIFT).to(tl.int64)
        mass = 0.0
        if (top_k > 0) & (top_k < vocab):
            groups = group_ptr + row * parts * NUM_GROUPS
            bound = _kth_image(
                row_ptr, vocab, ban_ptr, bans, top_k, peak, groups, parts * NUM_GROUPS, BLOCK_GROUPS, BLOCK, SHIFT
            )
            bound -= 1
            if top_p < 1:
                mass = _mass_above(row_ptr, vocab, ban_ptr, bans, bound, peak, inverse, BLOCK, SHIFT)
        elif top_p < 1:
            part_mass = tl.load(part_mass_ptr + at, mask=live, other=0.0)
            mass = tl.sum(tl.where(part_mass > 0, part_mass * tl.exp((peaks - peak) * inverse), 0.0), axis=0)
        token = _walk(
            row_ptr, vocab, ban_ptr, bans, token, bound, mass, peak, inverse, log_min_p, top_p, seed, position,
            BLOCK, SHIFT,
        )  # fmt: skip
    tl.store(tokens_ptr + row, tl.where(token < vocab, token, 0).to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    until: Tensor | None = None,
    banned: Tensor | None = None,
) -> Tensor:
    """See :func:`slipstream.kernels.reference.sample`. Rows of logits must be contiguous; nothing is read back."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    assert logits.stride(1) == 1 and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    parts = triton.cdiv(vocab, SCAN_BLOCK * SCAN_TILES)
    score, peak, mass = torch.empty((3, rows, parts), dtype=torch.float32, device=logits.device)
    token = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    group = torch.empty((rows, parts, GROUPS), dtype=torch.float32, device=logits.device)
    if until is None or banned is None:
        bans, num_banned = (positions, positions), 0  # pointers that nobody follows
    else:
        bans, num_banned = (until, banned), banned.shape[1]
        assert until.is_contiguous() and banned.is_contiguous() and banned.shape[0] == rows == until.shape[0]
    partials = (score, token, peak, mass, group)
    _scan_kernel[(rows, parts)](
        logits, temperature, top_k, top_p, seeds, positions, *bans, *partials, logits.stride(0), vocab,
        BLOCK=SCAN_BLOCK, TILES=SCAN_TILES, NUM_GROUPS=GROUPS, NUM_BANNED=num_banned,
        **launch_options(logits, num_warps=4),
    )  # fmt: skip
    shift = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}[logits.dtype]
    _choose_kernel[(rows,)](
        logits, temperature, top_k, top_p, min_p, seeds, positions, *bans, *partials, tokens, logits.stride(0), vocab,
        parts, BLOCK_PARTS=block_size(parts), NUM_GROUPS=GROUPS, BLOCK_GROUPS=block_size(parts * GROUPS),
        BLOCK=CHOOSE_BLOCK, SHIFT=shift, NUM_BANNED=num_banned, **launch_options(logits, num_warps=16),
    )  # fmt: skip
    return tokens
