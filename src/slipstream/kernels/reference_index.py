"""Block summaries, INT4 labels and the scores they give, in plain torch: the definition, the test oracle, the CPU path.

Quest (arXiv 2406.10774) bounds a block of keys by their channelwise maximum and minimum; Double Sparsity (arXiv
2408.07092) keeps a few calibrated channels of every key as labels; AsyncTLS (arXiv 2604.07815, section on the index)
puts the one before the other and stores labels in INT4. Written for the CPU, as :mod:`slipstream.kernels.reference` is:
lengths are read on the host, arithmetic is fp32, and a result depends on its own request only, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NUM_STATS = {"mean": 1, "minmax": 2, "meanstd": 2}
"""Vectors per block of each kind of summary: the mean; the maximum, then the minimum; the mean, then the deviation."""

MAX_CODE = 15
_MAX_HALF = 65504.0


GROUP_SHIFT = 16
"""A channel in ``channels`` is its number in the low 16 bits and the group of labels that it is scaled with above."""


def _groups(channels: Tensor, scales: Tensor) -> list[Tensor]:
    """Which channels [Hk, r] are of each group: masks, as many as ``scales`` [..., 2 * groups] has pairs."""
    return [(channels >> GROUP_SHIFT) == group for group in range(scales.shape[-1] // 2)]


def quantise_groups(x: Tensor, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """:func:`quantise_labels` of each group of channels by itself. x: [..., Hk, r]; groups: masks [Hk, r].

    -> (codes [..., Hk, r // 2], scales [..., Hk, 2 * groups]: step and zero point, group by group). A group without
    channels has a step and a zero point of 0.
    """
    if len(groups) == 1:
        return quantise_labels(x)
    parts = []
    for mask in groups:
        # What belongs to another group stands in as one that does: it changes no minimum and no maximum.
        own = x.gather(-1, mask.byte().argmax(-1, keepdim=True).expand(*x.shape[:-1], 1))
        parts.append(quantise_labels(torch.where(mask, x, torch.where(mask.any(-1, keepdim=True), own, 0.0))))
    half = x.shape[-1] // 2
    codes = torch.zeros_like(parts[0][0])
    for mask, (packed, _) in zip(groups, parts, strict=True):
        first, second = mask[:, :half].to(torch.uint8), mask[:, half:].to(torch.uint8)
        codes |= packed & (first * 15 + second * 240)
    return codes, torch.cat([scales for _, scales in parts], dim=-1)


def quantise_labels(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., r] -> (codes [..., r // 2] uint8, scales [..., 2] fp16: step and zero point); ``x ~ n * step + zero``.

    Byte j holds channel j in its low nibble and channel j + r/2 in its high one. ``zero = fp16(min)``,
    ``step = fp16((max - min) / 15)``, both saturated to finite numbers; ``n = clamp(floor((x - zero) / step + 0.5), 0,
    15)`` in fp32 with the rounded step and zero, 0 where the step is 0.
    """
    x = x.float()
    # Not aminmax, nor repeat_interleave below: they wake all threads for a handful of numbers.
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    zero = low.clamp(-_MAX_HALF, _MAX_HALF).half()
    # By a tensor: CUDA would multiply by the reciprocal of a number, which is off by a bit at times.
    step = ((high - low) / torch.full_like(low, MAX_CODE)).clamp(max=_MAX_HALF).half()
    codes = ((x - zero.float()) / step.float() + 0.5).floor().clamp(0, MAX_CODE)
    first, second = codes.masked_fill(step == 0, 0).to(torch.uint8).chunk(2, dim=-1)
    return first | (second << 4), torch.cat((step, zero), dim=-1)


def summarise(keys: Tensor, kind: str) -> Tensor:
    """keys: [..., block, D] -> [..., C, D] of the same dtype; see :data:`NUM_STATS`. Deviation: the population's."""
    if kind == "minmax":
        return torch.stack((keys.amax(-2), keys.amin(-2)), dim=-2)
    mean = keys.float().mean(-2, keepdim=True)
    if kind == "mean":
        return mean.to(keys.dtype)
    assert kind == "meanstd", kind
    deviation = (keys.float() - mean).square().mean(-2, keepdim=True).sqrt()
    return torch.cat((mean, deviation), dim=-2).to(keys.dtype)


def extend_index(
    k_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    max_query: int,
    summaries: Tensor | None,
    kind: str,
    labels: Tensor | None,
    scales: Tensor | None,
    channels: Tensor | None,
    key_table: Tensor | None = None,
) -> None:
    """Index the newest tokens of every request, whose keys are stored: their labels, and the blocks that they complete.

    k_pages: [P, Hk, S, D].  page_table: [B, N] int32.  query_start: [B + 1] int32.  lengths: [B] int32 with this step.
    max_query: most tokens of one request (a host int that shapes the device grid).  channels: [Hk, r] int32, each with
    its group (:data:`GROUP_SHIFT`) where there is more than one.  Written in place: summaries
    [P, Hk, S // block, C, D], labels [P, Hk, S, r // 2] uint8, scales [P, Hk, S, 2 * groups] fp16.
    A summary is made of all keys of its block when its last one is there, so it does not depend on how they came.
    key_table: [B, N] int32, the pages of the keys where they are not those of the index.
    """
    # A padding row of length 0 has no tokens, whatever query_start says.
    counts = torch.minimum(query_start.diff(), lengths).long()
    rows = counts.nonzero().squeeze(1) if max_query == 1 else torch.repeat_interleave(counts)
    tokens = torch.arange(rows.shape[0], device=rows.device) + (lengths - counts.cumsum(0))[rows]
    page_size = k_pages.shape[2]
    pages, slots = page_table[rows, tokens // page_size].long(), tokens % page_size
    key_pages = pages if key_table is None else key_table[rows, tokens // page_size].long()
    if labels is not None:
        assert scales is not None and channels is not None, "labels come with their scales and channels"
        keys = k_pages[key_pages, :, slots]
        chosen = keys.gather(-1, _numbers(channels).expand(keys.shape[0], -1, -1))
        labels[pages, :, slots], scales[pages, :, slots] = quantise_groups(chosen, _groups(channels, scales))
    if summaries is not None:
        block = page_size // summaries.shape[2]
        last = ((slots + 1) % block == 0).nonzero().squeeze(1)
        if last.numel():
            pages, key_pages, blocks = pages[last], key_pages[last], slots[last] // block
            summaries[pages, :, blocks] = summarise(k_pages.unflatten(2, (-1, block))[key_pages, :, blocks], kind)


def _numbers(channels: Tensor) -> Tensor:
    """channels without their groups, int64."""
    return channels.long() & ((1 << GROUP_SHIFT) - 1)


def _by_width(lengths: Tensor, tokens: int) -> Iterator[tuple[Tensor | slice, int]]:
    """Requests that hold tokens, grouped by how many columns of so many tokens they fill: (rows, columns)."""
    groups: dict[int, list[int]] = {}
    for b, length in enumerate(lengths.tolist()):
        if length:
            groups.setdefault(-(-length // tokens), []).append(b)
    for columns, members in groups.items():
        everyone = len(members) == lengths.shape[0]
        yield slice(None) if everyone else torch.tensor(members, device=lengths.device), columns


def _gather(pages: Tensor, page_table: Tensor) -> Tensor:
    """pages: [P, Hk, A, ...], page_table: [B, N] -> [B, Hk, N * A, ...]: what the pages hold, in the table's order."""
    num_kv, rest = pages.shape[1], pages.shape[3:]
    rows = (page_table.long() * num_kv).unsqueeze(1) + torch.arange(num_kv, device=pages.device).unsqueeze(1)
    return pages.flatten(2).flatten(0, 1).index_select(0, rows.view(-1)).view(page_table.shape[0], num_kv, -1, *rest)


def _expand(q: Tensor, kind: str, deviation: float) -> Tensor:
    """q: [..., D] -> [..., C * D]: the vector whose product with a summary is the score of its block."""
    if kind == "mean":
        return q
    if kind == "minmax":
        return torch.cat((q.clamp(min=0), q.clamp(max=0)), dim=-1)
    assert kind == "meanstd", kind
    return torch.cat((q, deviation * q.abs()), dim=-1)


def score_blocks(
    q: Tensor,
    summaries: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    kind: str,
    merge: int,
    scale: float,
    aggregate: str,
    deviation: float,
    block_size: int,
) -> Tensor:
    """How well one query token per request matches each block of its context (AsyncTLS, level 1).

    q: [B, Hq, D].  summaries: [P, Hk, S // b, C, D].  page_table: [B, N] int32.  lengths: [B] int32, 0 skips the row.
    block_size: b, tokens of one summary; ``merge`` neighbours are scored as one block of b * merge tokens.
    -> [B, Hk, M] fp32, M = N * (S // b) // merge. Blocks that end behind the length are undefined.
    Per query head: minmax ``relu(q).max + min(q, 0).min``, Quest's upper bound; mean ``q.mean``; meanstd ``q.mean +
    deviation * |q|.std``; times ``scale``. Then the best of the merged blocks, then ``aggregate`` ("max" or "sum")
    over the query heads of the KV head.
    """
    assert aggregate in ("max", "sum"), aggregate
    num_kv, per_page = summaries.shape[1:3]
    out = torch.empty((q.shape[0], num_kv, page_table.shape[1] * per_page // merge), device=q.device)
    query = _expand(q.float(), kind, deviation).unflatten(1, (num_kv, -1))
    for rows, num_pages in _by_width(lengths, per_page * block_size):
        blocks = _gather(summaries, page_table[rows, :num_pages]).flatten(-2).float()
        scores = query[rows] @ blocks.mT * scale
        whole = scores.shape[-1] // merge
        if merge > 1:
            scores = scores[..., : whole * merge].unflatten(-1, (whole, merge)).amax(-1)
        out[rows, :, :whole] = scores.amax(2) if aggregate == "max" else scores.sum(2)
    return out


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
    """Approximate logits of candidate tokens from their labels: ``scale * sum_r q[channel_r] * (n_r * step + zero)``.

    q: [B, Hq, D].  channels: [Hk, r] int32.  labels: [P, Hk, S, r // 2] uint8.  scales: [P, Hk, S, 2 * groups] fp16,
    a step and a zero point for each group of channels (:data:`GROUP_SHIFT`).
    page_table: [B, N] int32.  lengths: [B] int32, 0 skips the row.  blocks: [B, Hk, M] int32, ascending, -1 padded.
    -> [B, Hq, C] fp32. With blocks of ``block_size`` tokens C = M * block_size and candidate j is token
    ``blocks[j // block_size] * block_size + j % block_size``; without, C = N * S and candidate j is token j.
    Candidates of -1 blocks and behind the length are undefined.
    """
    num_kv, page_size, half = labels.shape[1:]
    width = page_table.shape[1] * page_size if blocks is None else blocks.shape[2] * block_size
    out = torch.empty((q.shape[0], q.shape[1], width), device=q.device)
    query = q.float().unflatten(1, (num_kv, -1))
    query = query.gather(-1, _numbers(channels).unsqueeze(1).expand(*query.shape[:3], -1))
    groups = _groups(channels, scales)
    # Chosen blocks are equally many for every request: all rows that hold tokens are one group.
    for rows, num_pages in _by_width(lengths, page_size * (page_table.shape[1] if blocks is not None else 1)):
        if blocks is None:
            table = page_table[rows, :num_pages]
            codes, steps = _gather(labels, table), _gather(scales, table)
        else:
            at = _block_rows(blocks[rows], page_table[rows], num_kv, page_size // block_size)
            codes, steps = (
                x.view(-1, block_size, x.shape[-1]).index_select(0, at.view(-1)).view(*at.shape[:2], width, -1)
                for x in (labels, scales)
            )
        low, high = (codes & MAX_CODE).float().mT, (codes >> 4).float().mT
        logits = torch.zeros(())
        for mask, pair in zip(groups, steps.float().unsqueeze(2).split(2, dim=-1), strict=True):
            own = query[rows] if len(groups) == 1 else query[rows] * mask.unsqueeze(1)
            (first, second), (step, zero) = own.chunk(2, dim=-1), pair.unbind(-1)
            part = scale * ((first @ low + second @ high) * step + own.sum(-1, keepdim=True) * zero)
            logits = part if len(groups) == 1 else logits + part
        out[rows, :, : logits.shape[-1]] = logits.flatten(1, 2)
    return out


def _block_rows(blocks: Tensor, page_table: Tensor, num_kv: int, per_page: int) -> Tensor:
    """blocks: [B, Hk, M] -> [B, Hk, M] int64 rows of ``pages.view(P * Hk * per_page, block, ...)``; -1 counts as 0."""
    blocks = blocks.clamp(min=0).long()
    pages = page_table.long().unsqueeze(1).expand(-1, num_kv, -1).gather(2, blocks // per_page)
    heads = torch.arange(num_kv, device=blocks.device).unsqueeze(1)
    return (pages * num_kv + heads) * per_page + blocks % per_page


def key_logits(q: Tensor, k_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Exact logits, the oracle of every selection. q: [B, Hq, D], k_pages: [P, Hk, S, D] -> [B, Hq, N * S] fp32.

    page_table: [B, N] int32.  lengths: [B] int32, 0 skips the row.  Tokens behind the length are undefined.
    """
    num_kv, page_size = k_pages.shape[1:3]
    out = torch.empty((q.shape[0], q.shape[1], page_table.shape[1] * page_size), device=q.device)
    query = q.float().unflatten(1, (num_kv, -1))
    for rows, num_pages in _by_width(lengths, page_size):
        logits = query[rows] @ _gather(k_pages, page_table[rows, :num_pages]).float().mT * scale
        out[rows, :, : num_pages * page_size] = logits.flatten(1, 2)
    return out
