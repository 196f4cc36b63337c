"""Predicting queries: kernel = reference = the definition written out in fp64, for windows hard on purpose."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_equal

from slipstream.kernels import predict, reference_predict, triton_predict

KINDS = {"last": 0.0, "mean": 0.0, "ema": 0.7, "analog": 30.0, "ridge": 0.1}
CPU = torch.device("cpu")
# position of the newest query and since when the window is unbroken: full, part of it, the fewest, too few, one, long
# after a break, and full again after many turns
ROWS = ((40, 0), (41, 35), (7, 5), (7, 6), (3, 3), (90, 70), (1000, 2))
# (Hq, D, R, W)
SHAPES = ((1, 4, 2, 3), (2, 27, 16, 27), (2, 16, 16, 16), (1, 64, 64, 64), (1, 144, 16, 20))
FEW = ROWS[:2] + ROWS[3:4] + ROWS[5:6]


def _table(rotary, positions=1100, factor=1.0):
    angles = torch.arange(positions)[:, None] * 1e4 ** (-torch.arange(0, rotary, 2) / rotary)
    return torch.cat((angles.cos(), angles.sin()), 1) * factor


def _state(shape, dtype, device, rows=ROWS, seed=1, factor=1.0):
    """q, positions, seats, first, cos_sin, window: seats out of order, NaN wherever no query of the chain lies."""
    num_q, dim, rotary, size = shape
    generator = torch.Generator().manual_seed(seed)
    seats = torch.randperm(len(rows), generator=generator) + 1
    window = torch.full((len(rows) + 2, size, num_q, dim), torch.nan)
    first = torch.full((len(rows) + 2,), -5)
    for seat, (position, since) in zip(seats.tolist(), rows, strict=True):
        first[seat] = since
        for p in range(max(since, position - size + 1), position):
            window[seat, p % size] = torch.randn(num_q, dim, generator=generator) + 0.5
    q = torch.randn(len(rows), num_q, dim, generator=generator)
    positions = torch.tensor([position for position, _ in rows])
    q, window = q.to(device, dtype), window.to(device, dtype)
    return q, *(x.to(device) for x in (positions, seats, first, _table(rotary, factor=factor))), window


def _naive(queries, kind, strength):
    """What comes after queries [n, D], oldest first: [D] fp64."""
    x = queries.double()
    if len(x) < 3 or kind == "last":
        return x[-1]
    if kind == "mean":
        return x.mean(0)
    if kind == "ema":
        weights = strength ** torch.arange(len(x) - 1, -1, -1, dtype=torch.float64)
        return weights @ x / weights.sum()
    mean = x.mean(0)
    before, after, newest = x[:-1] - mean, x[1:] - mean, x[-1] - mean
    if kind == "analog":
        cosine = before @ newest / (before.norm(dim=1) * newest.norm()).clamp_min(1e-30)
        return mean + (strength * cosine).softmax(0) @ after
    gram = before @ before.T
    eps = max(strength * float(gram.diagonal().mean()), 1e-5 * float(x.square().sum(1).mean()), 1e-30)
    return mean + torch.linalg.solve(gram + eps * torch.eye(len(gram)), before @ newest) @ after


def _rotated(x, table_row, rotary):
    """The last columns of x, as a latent cache has them."""
    cos, sin = table_row.double().chunk(2)
    a, b = x[..., -rotary:].chunk(2, -1)
    return torch.cat((x[..., :-rotary], a * cos - b * sin, b * cos + a * sin), -1)


def _host(*tensors):
    return [x.cpu() if isinstance(x, torch.Tensor) else x for x in tensors]


@pytest.mark.parametrize("rotate", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_definition(kind, rotate):
    shape = (2, 12, 8, 10)
    q, positions, seats, first, table, window = _state(shape, torch.float32, CPU, factor=1.3)
    out = reference_predict.push_and_predict(q, positions, seats, first, table, window, kind, KINDS[kind], rotate)
    for b, (position, since) in enumerate(ROWS):
        history = range(max(since, position - 9), position + 1)
        for head in range(2):
            queries = torch.stack([window[seats[b], p % 10, head] for p in history])
            expected = _naive(queries, kind, KINDS[kind])
            if rotate:
                expected = _rotated(expected, table[position + 1], 8)
            torch.testing.assert_close(out[b, head].double(), expected, rtol=2e-4, atol=2e-4)


def test_push_undoes_the_rotation():
    """The table's factor too, and dimensions that are not rotated stay: rotated again it is the query."""
    q, positions, seats, _, table, window = _state((2, 12, 8, 10), torch.float32, CPU, factor=1.3)
    reference_predict.push_queries(q, positions, seats, table, window, True)
    for b, (position, _) in enumerate(ROWS):
        plain = window[seats[b], position % 10]
        torch.testing.assert_close(_rotated(plain.double(), table[position], 8).float(), q[b])
        assert torch.equal(plain[:, :-8], q[b, :, :-8])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", SHAPES)
def test_push(shape, dtype, device):
    q, positions, seats, _, table, window = _state(shape, dtype, device)
    expected = window.cpu()
    reference_predict.push_queries(*_host(q, positions, seats, table), expected, True)
    triton_predict.push_queries(q, positions, seats, table, window, True)
    assert_equal(window, expected.to(device), "rope")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel(kind, shape, dtype, device):
    """And one launch is the two, bit for bit."""
    rows = FEW if kind == "ridge" and shape[3] > 3 else ROWS  # the interpreter solves slowly
    _check_kernel(kind, _state(shape, dtype, device, rows))


def _check_kernel(kind, state):
    q, positions, seats, first, table, window = state
    pushed, fused = window.clone(), window.clone()
    triton_predict.push_queries(q, positions, seats, table, pushed, True)
    args = (kind, KINDS[kind], True)
    apart = triton_predict.predict_queries(pushed, seats, positions, first, table, *args)
    together = triton_predict.push_and_predict(q, positions, seats, first, table, fused, *args)
    assert torch.equal(apart, together)
    assert_equal(fused, pushed, "copy")
    expected = reference_predict.predict_queries(*_host(pushed, seats, positions, first, table), *args)
    assert_equal(together, expected.to(q.device), "predict")


def _hard(name, size, dim, generator):
    """Windows [size, dim] whose Gram matrices are singular, badly scaled, or nearly nothing beside their mean."""
    noise = torch.randn(size, dim, generator=generator)
    turn = torch.arange(size)[:, None] * torch.linspace(0.1, 1.0, dim)
    windows = {
        "constant": torch.full((size, dim), 3.0),
        "zero": torch.zeros(size, dim),
        "rank_1": noise[:, :1] * noise[:1],
        "period": noise[torch.arange(size) % 5],
        "huge": noise * 1e4,
        "tiny": noise * 1e-6,
        "one_outlier": noise * torch.where(torch.arange(size) == size // 2, 1e3, 1.0)[:, None],
        "far_from_0": noise + 30.0,
        "rounding": noise * 1e-6 + 1.0,
        "smooth": turn.cos(),
        "steps": noise * torch.logspace(0, -6, size)[:, None],
    }
    assert set(windows) == set(HARD)
    return windows[name]


HARD = "constant zero rank_1 period huge tiny one_outlier far_from_0 rounding smooth steps".split()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("size", (32, 64))
@pytest.mark.parametrize("name", HARD)
def test_ridge_of_hard_windows(name, size, dtype, device):
    """Kernel = reference = solve in fp64, all relative to the largest number in the window."""
    generator = torch.Generator().manual_seed(size)
    queries = _hard(name, size, 32, generator).to(dtype)
    window = queries.view(1, size, 1, 32).to(device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    args = (window, rows, rows + 3 * size - 1, rows, _table(32).to(device))
    expected = _naive(queries.float(), "ridge", 0.1)
    scale = float(queries.float().abs().max()) or 1.0
    # Tensor cores: 1.1e-4 at rank 1 on an H200, where the interpreter has 1.4e-5.
    limit = {torch.float32: 2e-4 if device.type == "cuda" else 1e-4, torch.bfloat16: 8e-3}[dtype] * scale
    for op, moved in ((triton_predict.predict_queries, args), (reference_predict.predict_queries, _host(*args))):
        out = op(*moved, "ridge", 0.1, False).cpu()[0, 0].double()
        assert (out - expected).abs().max() <= limit, op.__module__


@pytest.mark.parametrize("size", (65, 128))
def test_ridge_of_large_windows(size, device):
    _check_kernel("ridge", _state((1, 16, 16, size), torch.float32, device, ((150, 0), (150, 100))))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_does_not_depend_on_the_batch(kind):
    q, positions, seats, first, table, window = _state((4, 32, 32, 32), torch.float32, CPU)
    args = (first, table, window, kind, KINDS[kind], True)
    together = reference_predict.push_and_predict(q, positions, seats, *args)
    for b in range(len(ROWS)):
        for row in (slice(b, b + 1), slice(0, b + 1)):
            part = reference_predict.push_and_predict(q[row], positions[row], seats[row], *args)
            assert torch.equal(part, together[row])


def test_sharp_analog_copies_what_came_next(device):
    """A window that repeats exactly: the best match wins whatever beta is, even where exp would underflow."""
    pattern = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(3))
    window = pattern[torch.arange(20) % 5].unsqueeze(0).to(device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    for position in (17, 19):
        args = (window, rows, rows + position, rows, _table(16).to(device), "analog", 1000.0, False)
        out = predict.predict_queries(*args)
        torch.testing.assert_close(out[0].cpu(), pattern[(position + 1) % 5], rtol=1e-3, atol=1e-3)


def test_beyond_the_table_is_its_last_position(device):
    q, positions, seats, first, table, window = _state((2, 16, 16, 16), torch.float32, device, rows=((1099, 1095),))
    out = triton_predict.push_and_predict(q, positions, seats, first, table, window, "last", 0.0, True)
    torch.testing.assert_close(out, q)


def _mlp_weights(num_q, dim, size, features=2, hidden=5):
    generator = torch.Generator().manual_seed(4)
    shapes = ((features, size), ((features + 1) * dim, hidden), (num_q, hidden), (hidden, dim), (num_q, dim))
    return predict.MLPWeights(*(torch.randn(shape, generator=generator) for shape in shapes))


def test_mlp():
    """Written out row by row; a longer window than the network's own changes nothing; zero weights are `last`."""
    q, positions, seats, first, table, window = _state((2, 12, 8, 10), torch.float32, CPU)
    reference_predict.push_queries(q, positions, seats, table, window, True)
    weights = _mlp_weights(2, 12, 6)
    out = predict.predict_mlp(window, seats, positions, first, table, weights, False)
    for b, (position, since) in enumerate(ROWS):
        ages = range(min(6, position - since + 1))
        for head in range(2):
            x = torch.stack([window[seats[b], (position - age) % 10, head] for age in ages]).double()
            expected = x[0]
            if len(x) >= 3:
                centred = x - x.mean(0)
                size = centred.square().mean().sqrt()
                features = torch.cat((centred[:1], weights.mix[:, : len(x)].double() @ centred)).flatten() / size
                hidden = torch.nn.functional.silu(features @ weights.up.double() + weights.up_bias[head])
                expected = x[0] + (hidden @ weights.down.double() + weights.down_bias[head]) * size
            torch.testing.assert_close(out[b, head].double(), expected, rtol=1e-4, atol=1e-4)
    nothing = weights._replace(down=weights.down * 0, down_bias=weights.down_bias * 0)
    last = predict.predict_queries(window, seats, positions, first, table, "last", 0.0, True)
    assert torch.equal(predict.predict_mlp(window, seats, positions, first, table, nothing, True), last)


def _sets(device, budget=7):
    indices = torch.full((4, 2, budget - 1), 99, dtype=torch.int32)
    counts = torch.tensor([[0, 6], [3, 1], [6, 6], [2, 2]], dtype=torch.int32)
    for b in range(4):
        for h in range(2):
            indices[b, h, : counts[b, h]] = torch.arange(counts[b, h], dtype=torch.int32) * 2
    lengths, seats = torch.tensor([20, 30, 0, 40], dtype=torch.int32), torch.tensor([2, 5, 1, 3])
    return [x.to(device) for x in (indices, counts, seats, lengths)]


@pytest.mark.parametrize("places", (2, 1024))
def test_store_sets(places, monkeypatch, device):
    monkeypatch.setattr(triton_predict, "PLACES", places)
    inputs = _sets(device)
    indices, counts, seats, lengths = _host(*inputs)
    stores = []
    for op, moved, where in ((triton_predict.store_sets, inputs, device), (predict.store_sets, _host(*inputs), CPU)):
        all_indices = torch.full((7, 2, 7), -7, dtype=torch.int32, device=where)
        all_counts = torch.full((7, 2), -7, dtype=torch.int32, device=where)
        op(*moved, all_indices, all_counts)
        stores.append((all_indices.cpu(), all_counts.cpu()))
    for all_indices, all_counts in stores:
        for b in range(4):
            for h in range(2):
                tokens = [*indices[b, h, : counts[b, h]].tolist(), int(lengths[b])] if lengths[b] else []
                assert all_indices[seats[b], h].tolist() == tokens + [-1] * (7 - len(tokens))
                assert all_counts[seats[b], h] == len(tokens)
        assert all_indices[[0, 4, 6]].eq(-7).all() and all_counts[[0, 4, 6]].eq(-7).all()


@pytest.mark.parametrize("per_head", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_check_queries(dtype, per_head, device):
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(3, 6, 27, generator=generator)
    predicted = torch.randn(5, 6, 27, generator=generator) * 1e-3
    seats, lengths = torch.tensor([4, 1, 2]), torch.tensor([50, 60, 0], dtype=torch.int32)
    predicted[4, :3] = 2 * q[0, :3]  # as predicted
    predicted[1, 3] = torch.nan
    threshold = torch.tensor([0.99, -1.0] if per_head else 0.5)
    for op, where in ((triton_predict.check_queries, device), (predict.check_queries, CPU)):
        flagged = torch.full((6,), -7, dtype=torch.int32, device=where)
        counter = torch.tensor([10], device=where)
        moved = [x.to(where) for x in (q.to(dtype), predicted.to(dtype), seats, lengths)]
        op(*moved, 2, threshold.to(where), flagged, counter)
        assert flagged.tolist() == ([0, 0, 60, 60, 0, 0] if per_head else [0, 50, 60, 60, 0, 0])
        assert counter.tolist() == [12 if per_head else 13]


def test_no_rows(device):
    q, positions, seats, first, table, window = _state((2, 16, 16, 16), torch.float32, device)
    none = (q[:0], positions[:0], seats[:0])
    triton_predict.push_queries(*none, table, window, True)
    for kind in KINDS:
        assert triton_predict.push_and_predict(*none, first, table, window, kind, 0.5, True).shape == (0, 2, 16)
    indices, counts, seats, lengths = (x[:0] for x in _sets(device))
    triton_predict.store_sets(indices, counts, seats, lengths, torch.zeros((1, 2, 7), dtype=torch.int32), counts)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("size", (32, 64, 96, 128))
@pytest.mark.parametrize("kind", KINDS)
def test_large(kind, size, dtype, device):
    rows = tuple((500 + 7 * b, 100 * b) for b in range(6))
    q, positions, seats, first, table, window = _state((32, 128, 128, size), dtype, device, rows)
    before = window.cpu()
    out = predict.push_and_predict(q, positions, seats, first, table, window, kind, KINDS[kind], True)
    args = _host(q, positions, seats, first, table)
    expected = predict.push_and_predict(*args, before, kind, KINDS[kind], True)
    assert_equal(out, expected.to(device), "predict")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_step_follows_positions(kind, device):
    """One graph serves any positions, seats and windows, without a synchronisation."""
    q, positions, seats, first, table, window = _state((4, 64, 64, 32), torch.bfloat16, device)
    args = (q, positions, seats, first, table, window, kind, KINDS[kind], True)
    predict.push_and_predict(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = predict.push_and_predict(*args)
    for step in range(3):
        positions += 1
        seats.copy_(seats.roll(1))
        positions.copy_(positions.roll(1))
        q.normal_()
        expected_window = window.clone()
        graph.replay()
        expected = predict.push_and_predict(q, positions, seats, first, table, expected_window, *args[6:])
        assert torch.equal(out, expected) and torch.equal(window.nan_to_num(), expected_window.nan_to_num()), step
