"""The definition of sampling: Philox against its published vectors, the noise, the filters against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from slipstream.kernels import reference

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
# Random123, tests/kat_vectors: philox4x32 10
VECTORS = (
    ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
)


@pytest.mark.parametrize("words, expected", VECTORS)
def test_philox_known_answers(words, expected):
    words = [torch.tensor([word]) for word in words]
    output = reference.philox(tuple(words[:4]), tuple(words[4:]))
    assert tuple(int(word) for word in output) == expected


def test_philox_broadcasts():
    token, position = torch.arange(5), torch.tensor([[3], [2**31 + 1]])
    zero, seed = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[7], [ONES]])
    together = reference.philox((token, position, zero, zero), (seed, zero))
    for row, column in itertools.product(range(2), range(5)):
        one = [torch.tensor([int(word)]) for word in (token[column], position[row], 0, 0, seed[row], 0)]
        alone = reference.philox(tuple(one[:4]), tuple(one[4:]))
        assert [int(word) for word in alone] == [int(word[row, column]) for word in together]


def test_noise_is_gumbel():
    """Mean and variance of 400,000 draws, and no infinity at either end of the 23 bits."""
    noise = reference.gumbel(torch.arange(20), torch.arange(20) * 3, 20_000).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.57722) < 5 * 1.28255 / 400_000**0.5
    assert abs(noise.var() / (math.pi**2 / 6) - 1) < 0.02
    ends = ((torch.tensor([0, ONES]) >> 9).float() + 0.5) * 2.0**-23
    assert 0 < ends[0] and ends[1] < 1


def test_noise_depends_on_all_bits_of_seed_and_position():
    seeds = torch.tensor([5, 5 + 2**32, 5, 5])
    positions = torch.tensor([9, 9, 9 + 2**32, 10])
    noise = reference.gumbel(seeds, positions, 50)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(noise, 2))
    assert torch.equal(noise[2], reference.gumbel(seeds[2:3], positions[2:3], 50)[0])
    assert torch.equal(noise[0, :30], reference.gumbel(seeds[:1], positions[:1], 30)[0])


def _sample(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None):
    rows = logits.shape[0]
    default = torch.arange(rows)
    return reference.sample(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        default * 0 + 7 if seeds is None else seeds,
        default if positions is None else positions,
    )


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
@pytest.mark.parametrize("filters", ({}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.9}))
def test_frequencies(temperature, filters):
    """Chi-square of 20,000 draws (one seed, consecutive positions) against the filtered softmax."""
    logits = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.0, -2.0, 1.4, 0.9])
    draws = 20_000
    counts = torch.bincount(_sample(logits.expand(draws, -1), temperature, **filters), minlength=8).double()
    kept = torch.zeros(8, dtype=torch.bool)
    kept[list(_kept(logits.tolist(), temperature, **filters))] = True
    assert (counts[~kept] == 0).all()
    expected = (logits / temperature).double().masked_fill(~kept, -torch.inf).softmax(0)[kept] * draws
    chi_square = ((counts[kept] - expected).square() / expected).sum()
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 4.5 * (2 * degrees) ** 0.5 + 5  # about one in 100,000


def _kept(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Indices that survive, straight from the definition."""
    weights = {i: math.exp((x - max(logits)) / temperature) for i, x in enumerate(logits)}
    kept = set(weights)
    if 0 < top_k < len(logits):
        threshold = sorted(logits)[-top_k]
        kept = {i for i in kept if logits[i] >= threshold}
    if top_p < 1:
        total = sum(weights[i] for i in kept)
        nucleus: set[int] = set()
        for value in sorted({logits[i] for i in kept}, reverse=True):
            if sum(weights[i] for i in nucleus) >= top_p * total:
                break
            nucleus |= {i for i in kept if logits[i] == value}
        kept = nucleus
    return {i for i in kept if weights[i] >= min_p}


@pytest.mark.parametrize("top_k", (0, 1, 3, 7, 50, -1))
@pytest.mark.parametrize("top_p", (0.05, 0.6, 0.95, 1.0))
@pytest.mark.parametrize("min_p", (0.0, 0.3))
def test_filters_against_brute_force(top_k, top_p, min_p):
    """40 rows of 12 logits, rounded so that they tie."""
    logits = (torch.randn(40, 12, generator=torch.Generator().manual_seed(top_k + 60)) * 2).round() / 2
    tokens = _sample(logits, 0.7, top_k, top_p, min_p)
    noise = reference.gumbel(torch.full((40,), 7), torch.arange(40), 12)
    for row in range(40):
        kept = _kept(logits[row].tolist(), 0.7, top_k, top_p, min_p)
        expected = max(kept, key=lambda i: float(logits[row, i]) / 0.7 + float(noise[row, i]))
        assert tokens[row] == expected


def test_greedy_takes_the_first_of_the_best():
    assert _sample(torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), 0.0).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("filters", ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}))
def test_rows_without_numbers(temperature, filters):
    """NaN never wins against a finite logit; a row of NaN and -inf gives token 0."""
    nan, inf = torch.nan, torch.inf
    rows = torch.tensor([[nan, 1.0, nan], [nan, nan, nan], [-inf, -inf, -inf], [nan, -inf, nan], [-inf, nan, -3.0]])
    assert _sample(rows, temperature, **filters).tolist() == [1, 0, 0, 0, 2]


def test_infinite_logit_wins():
    rows = torch.tensor([[0.0, torch.inf, 1.0]] * 20)
    for temperature in (0.0, 0.5, 2.0):
        assert _sample(rows, temperature, top_p=0.9).eq(1).all()


def test_a_row_does_not_feel_its_neighbours():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    mixed = reference.sample(
        logits,
        torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 1.0]),
        torch.tensor([0, 0, 5, 0, 3, 0], dtype=torch.int32),
        torch.tensor([1.0, 0.5, 1.0, 0.9, 0.9, 1.0]),
        torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.0]),
        torch.arange(6) * 10**12,
        torch.arange(6),
    )
    alone = [
        _sample(logits[i : i + 1], t, k, p, m, torch.tensor([i * 10**12]), torch.tensor([i]))
        for i, (t, k, p, m) in enumerate(
            [(0.0, 0, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (0.5, 5, 1.0, 0.1), (2.0, 0, 0.9, 0.0), (1.0, 3, 0.9, 0.0)]
            + [(1.0, 0, 1.0, 0.0)]
        )
    ]
    assert mixed.tolist() == torch.cat(alone).tolist()
