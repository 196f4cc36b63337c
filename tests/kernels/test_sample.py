"""The sampling kernels: the same token as the reference, whatever the parameters, ties, NaN and sizes."""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels import reference, triton_sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 27, 63, 64, 65, 113)
# (temperature, top_k, top_p, min_p), one row each
PARAMETERS = (
    (0.0, 5, 0.5, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 20, 1.0, 0.0),
    (1.5, 0, 0.9, 0.0),
    (0.6, 20, 0.95, 0.0),
    (2.0, 0, 1.0, 0.1),
    (1.0, 1, 1.0, 0.0),
    (3.0, 40, 0.3, 0.05),
    (1.0, 10**6, 0.01, 0.0),
)


@pytest.fixture
def small_blocks(monkeypatch, device):
    """In the interpreter: blocks so small that a small vocabulary has several parts and tiles."""
    if device.type == "cpu":
        for name, value in {"SCAN_BLOCK": 32, "SCAN_TILES": 2, "GROUPS": 8, "CHOOSE_BLOCK": 64}.items():
            monkeypatch.setattr(triton_sample, name, value)


def _arguments(logits, parameters, seed=3):
    rows, device = logits.shape[0], logits.device
    columns = list(zip(*(parameters[i % len(parameters)] for i in range(rows)), strict=True))
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    tensors = [torch.tensor(c, dtype=d, device=device) for c, d in zip(columns, dtypes, strict=True)]
    order = torch.arange(rows, device=device)
    return (logits, *tensors, order * 10**11 + seed, order + 2**32 - 3)


def _compare(logits, parameters=PARAMETERS, seed=3):
    arguments = _arguments(logits, parameters, seed)
    actual, expected = triton_sample.sample(*arguments), reference.sample(*arguments)
    assert actual.dtype == torch.int64 and actual.shape == expected.shape
    differ = actual != expected
    if differ.any():
        # Only two candidates within rounding of each other may trade places.
        _, temperature, _, _, _, seeds, positions = arguments
        noise = reference.gumbel(seeds, positions, logits.shape[1])
        score = logits.float() / temperature.clamp(min=1e-6).unsqueeze(1) + noise
        gap = (score.gather(1, actual[:, None]) - score.gather(1, expected[:, None])).squeeze(1).abs()
        assert (temperature[differ] > 0).all() and (gap[differ] < 2e-5).all(), (actual, expected, gap)
    return actual


def _logits(rows, vocab, dtype, device, seed=0, scale=3.0):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_kernel(vocab, dtype, device, small_blocks):
    _compare(_logits(len(PARAMETERS), vocab, dtype, device))


@pytest.mark.parametrize("seed", range(3))
def test_ties(seed, device, small_blocks):
    """A handful of distinct values, both zeros among them: thresholds fall on ties."""
    logits = _logits(len(PARAMETERS), 100, torch.float32, device, seed, 1.0).round()
    assert (logits == 0).sum(1).min() > 5
    _compare(logits, seed=seed)
    _compare(-logits, seed=seed)
    _compare(torch.zeros_like(logits), seed=seed)


@pytest.mark.parametrize("kind", ("distinct", "zeros", "nan"))
def test_thresholds_are_exact(kind, device, small_blocks):
    """Rows so hot that every kept token is drawn: one token too many or too few in the kept set is seen."""
    parameters = [(50.0, k, 1.0, 0.0) for k in (2, 3, 4, 7)] + [(50.0, 0, p, 0.0) for p in (0.05, 0.11)]
    parameters += [(50.0, 8, 0.5, 0.0), (50.0, 0, 1.0, 0.97)]
    logits = _logits(3 * len(parameters), 90, torch.bfloat16, device, seed=4, scale=1.0)
    if kind == "zeros":  # a few ones above zeros of both signs
        logits = torch.where(logits > 2.0, 1.0, torch.where(logits > 0, 0.0, -0.0)).bfloat16()
    if kind == "nan":
        logits[:, ::7] = torch.nan
    _compare(logits, parameters)


def test_greedy_ties_across_parts(device, small_blocks):
    logits = torch.zeros((3, 300), device=device)
    logits[0, [70, 71, 250]] = 4.0
    logits[1, 299] = 1.0
    assert _compare(logits, ((0.0, 0, 1.0, 0.0),)).tolist() == [70, 299, 0]


def test_rows_without_numbers(device, small_blocks):
    """NaN, -inf and +inf, alone and mixed, for greedy, plain and filtered rows."""
    nan, inf = torch.nan, torch.inf
    patterns = torch.tensor(
        [
            [nan] * 4,
            [-inf] * 4,
            [nan, -inf, nan, -inf],
            [nan, 1.0, nan, -inf],
            [0.0, inf, nan, inf],
            [-inf, nan, -9, -9],
        ],
        device=device,
    )
    for row in patterns:
        logits = torch.full((len(PARAMETERS), 80), -inf, device=device)
        logits[:, 33:37] = row
        logits[:, 70] = nan
        tokens = _compare(logits)
        if not (row > -inf).any():
            assert tokens.eq(0).all()


def test_extreme_temperatures(device, small_blocks):
    logits = _logits(4, 65, torch.float32, device)
    parameters = ((1e-30, 0, 1.0, 0.0), (1e-6, 3, 0.5, 0.0), (1e6, 0, 0.5, 0.0), (1e-45, 0, 0.9, 0.1))
    tokens = _compare(logits, parameters)
    assert torch.equal(tokens[[0, 1, 3]], logits.argmax(1)[[0, 1, 3]])
    _compare(logits * 1e38, parameters)


def test_rows_may_be_strided(device, small_blocks):
    wide = _logits(len(PARAMETERS), 200, torch.float32, device)
    assert torch.equal(_compare(wide[:, 50:170]), _compare(wide[:, 50:170].contiguous()))


def test_default_blocks(device):
    """Two parts and two tiles at the block sizes that the GPU runs."""
    _compare(_logits(5, 5000, torch.bfloat16, device), PARAMETERS[:1] + PARAMETERS[1:2] + PARAMETERS[4:7])


def test_no_rows(device):
    assert triton_sample.sample(*_arguments(_logits(1, 9, torch.float32, device), PARAMETERS)).shape == (1,)
    empty = [x[:0] for x in _arguments(_logits(1, 9, torch.float32, device), PARAMETERS)]
    assert triton_sample.sample(*empty).shape == (0,)


def test_banned_tokens(device, small_blocks):
    """The best tokens of every other row are held back: the token is that of logits in which they are -inf."""
    logits = _logits(2 * len(PARAMETERS), 130, torch.float32, device, seed=6)
    arguments = _arguments(logits, PARAMETERS)
    rows = torch.arange(len(logits), device=device)
    until = arguments[-1] + (rows % 2)  # positions < until in odd rows
    banned = torch.full((len(logits), 4), -1, dtype=torch.int32, device=device)
    banned[:, :3] = logits.topk(3).indices
    held = logits.clone()
    held[1::2] = logits[1::2].scatter(1, banned[1::2, :3].long(), -torch.inf)
    for sample in (triton_sample.sample, reference.sample):
        tokens = sample(*arguments, until, banned)
        assert torch.equal(tokens, sample(held, *arguments[1:]))
        assert not (tokens[1::2, None] == banned[1::2]).any() and tokens[0] == banned[0, 0]
    beyond = torch.full_like(banned, 10**6)  # no token of this vocabulary
    assert torch.equal(reference.sample(*arguments, until, beyond), reference.sample(*arguments))
    assert torch.equal(triton_sample.sample(*arguments, until, beyond), triton_sample.sample(*arguments))


def test_a_row_whose_tokens_are_all_banned_gives_token_0(device, small_blocks):
    logits = _logits(len(PARAMETERS), 3, torch.float32, device)
    arguments = _arguments(logits, PARAMETERS)
    banned = torch.arange(3, dtype=torch.int32, device=device).expand(len(logits), -1).contiguous()
    for sample in (triton_sample.sample, reference.sample):
        assert sample(*arguments, arguments[-1] + 1, banned).eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (0.01, 1.0, 4.0))
@pytest.mark.parametrize("vocab", (32000, 151936, 262144))
def test_large(vocab, scale, dtype, device):
    _compare(_logits(3 * len(PARAMETERS), vocab, dtype, device, scale=scale), seed=int(scale * 100))


@pytest.mark.gpu
def test_rows_beyond_32_bits(device):
    vocab = 151936
    rows = 2**31 // vocab + 2
    logits = torch.zeros((rows, vocab), dtype=torch.bfloat16, device=device)
    logits[-1, 777] = 5.0
    last = logits[-1:]
    zeros = torch.zeros(rows, device=device)
    integers = torch.zeros(rows, dtype=torch.int64, device=device)
    tokens = triton_sample.sample(logits, zeros, integers.int(), zeros + 1, zeros, integers, integers)
    assert last.argmax() == 777 and tokens[-1] == 777 and tokens[:-1].eq(0).all()
