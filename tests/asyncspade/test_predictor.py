"""Windows by seat: pushed by steps and prompts, reset, inherited; the learned predictor trained, saved, refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from slipstream.asyncspade.mlp import QueryMLP, Training, train
from slipstream.asyncspade.predictor import Predictor
from slipstream.asyncspade.traces import QueryTrace
from slipstream.attention.calibration import ModelIdentity
from slipstream.kernels import predict
from slipstream.models.rope import cos_sin_table
from slipstream.types import ModelSpec

SPEC = ModelSpec("toy", 2, 32, 4, 2, 8, 64, 256, torch.float32)
TABLE = cos_sin_table({"rope_type": "default", "rope_theta": 1e4}, 8, 256, 256, "cpu")
IDENTITY = ModelIdentity("toy", "toy", 2, 2, 8, "feed")


@dataclass(frozen=True)
class Config:
    predictor: str = "analog"
    window: int = 6
    ridge: float = 0.1
    beta: float = 30.0
    decay: float = 0.5
    rotate: bool = True


def _predictor(mlp=None, **options):
    return Predictor(Config(**options), SPEC, 5, TABLE, "cpu", mlp)


def _queries(chain, position):
    generator = torch.Generator().manual_seed(1000 * chain + position)
    return torch.randn(2, 4, 8, generator=generator)  # [L, Hq, D]


def _step(predictor, rows):
    """One decode step of rows (seat, chain, position): guesses [L, B, Hq, D]."""
    seats, positions = (torch.tensor([row[i] for row in rows]) for i in (0, 2))
    q = torch.stack([_queries(chain, position) for _, chain, position in rows], 1)
    predictor.advance(seats, positions)
    return torch.stack([predictor.step(layer, q[layer], seats, positions) for layer in range(2)])


def _alone(chain, positions, **options):
    """What a fresh predictor says after these positions of one chain."""
    predictor = _predictor(**options)
    for position in positions:
        out = _step(predictor, [(1, chain, position)])
    return out[:, 0]


@pytest.mark.parametrize("kind", predict.KINDS)
def test_a_chain_does_not_see_the_batch(kind):
    """Two chains that come and go, in seats of their own, beside padding rows."""
    predictor = _predictor(predictor=kind)
    for t in range(12):
        rows = [(3, 7, 20 + t), (0, 0, 0), (0, 0, 0)] if t < 8 else []
        rows += [(5, 8, t)]
        out = _step(predictor, rows)
    assert torch.equal(out[:, -1], _alone(8, range(12), predictor=kind))


def test_a_break_begins_anew():
    """Positions that do not follow on: nothing from before the break counts."""
    predictor = _predictor()
    for position in (*range(9), *range(40, 44)):
        out = _step(predictor, [(2, 1, position)])
    assert torch.equal(out[:, 0], _alone(1, range(40, 44)))


def test_a_new_chain_sees_nothing_of_the_old():
    """Even when its positions follow on from the old chain's."""
    predictor = _predictor()
    for position in range(9):
        _step(predictor, [(2, 1, position)])
    predictor.reset([2])
    for position in range(9, 13):
        out = _step(predictor, [(2, 4, position)])
    assert torch.equal(out[:, 0], _alone(4, range(9, 13)))


@pytest.mark.parametrize("chunks", ((9,), (4, 5), (1, 8), (3, 3, 3)))
def test_prompts_fill_the_window(chunks):
    """In any chunks, of which the last W queries of each are pushed: as if every token had been a step."""
    predictor, start = _predictor(), 30
    seats = torch.tensor([4])
    for count in chunks:
        predictor.advance(seats, torch.tensor([start]), torch.tensor([count]))
        positions = torch.arange(start + max(0, count - 6), start + count)
        q = torch.stack([_queries(1, p) for p in positions.tolist()], 1)
        for layer in range(2):
            predictor.push_prompt(layer, q[layer], positions, seats.expand(len(positions)))
        start += count
    assert torch.equal(_step(predictor, [(4, 1, start)])[:, 0], _alone(1, range(30, 40)))


def test_heirs_go_on():
    predictor = _predictor()
    for position in range(7):
        _step(predictor, [(1, 1, position), (2, 2, position)])
    predictor.inherit(torch.tensor([1, 1, 2]), torch.tensor([3, 5, 4]))
    out = _step(predictor, [(5, 1, 7), (4, 2, 7), (3, 1, 7), (1, 1, 7)])
    first = _alone(1, range(8))
    assert torch.equal(out[:, 0], first) and torch.equal(out[:, 2], first) and torch.equal(out[:, 3], first)
    assert torch.equal(out[:, 1], _alone(2, range(8)))


def test_oracle_predicts_its_own_query_and_holds_nothing():
    predictor = _predictor(predictor="oracle")
    out = _step(predictor, [(1, 1, 3)])
    assert torch.equal(out[:, 0], _queries(1, 3)) and predictor.windows.numel() == 0
    predictor.push_prompt(0, torch.zeros(2, 4, 8), torch.tensor([0, 1]), torch.tensor([1, 1]))


@pytest.mark.parametrize("kind", ("ridge", "oracle"))
def test_bytes(kind):
    config = Config(predictor=kind)
    assert _predictor(predictor=kind).bytes == 6 * Predictor.seat_bytes(config, SPEC)
    assert Predictor.seat_bytes(config, replace(SPEC, dtype=torch.bfloat16)) == (
        2 * 6 * 4 * 8 * 2 + 16 if kind == "ridge" else 16
    )


def _trace(num_tokens, seed):
    """Queries whose plain form repeats every five tokens, with a little noise."""
    pattern = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in range(2):
        plain = pattern.roll(layer, 0)[torch.arange(num_tokens) % 5]
        plain = plain + 0.05 * torch.randn(plain.shape, generator=generator)
        angles = torch.cat((TABLE[:num_tokens, :4], -TABLE[:num_tokens, 4:]), 1)  # pushing by these rotates onward
        window = torch.zeros(2, num_tokens, 4, 8)
        everywhere = torch.arange(num_tokens)
        predict.push_queries(plain, everywhere, torch.ones_like(everywhere), angles, window, True)
        layers.append(window[1])
    return QueryTrace(layers, layers, 0)


TRAINING = Training(window=6, features=6, hidden=64, steps=150, batch=32, learning_rate=3e-3)


def test_train_learns_save_and_load(tmp_path):
    """What repeats is learned; a file gives back the same guesses, in a window that is longer than was learned."""
    errors = {}
    traces = [_trace(120, 1), _trace(90, 2)]
    mlp = train(traces, TABLE, IDENTITY, TRAINING, report=errors.__setitem__)
    assert set(errors) == {0, 1} and all(error < 0.1 for error in errors.values())
    mlp.save(tmp_path / "mlp.safetensors")
    moved = replace(IDENTITY, name="elsewhere")
    loaded = QueryMLP.load(tmp_path / "mlp.safetensors", moved)
    assert loaded.window == 6
    outs = []
    for weights in (mlp, loaded):
        predictor = _predictor(weights, predictor="mlp", window=9)
        for position in range(20):
            seats, positions = torch.tensor([1]), torch.tensor([position])
            predictor.advance(seats, positions)
            out = [predictor.step(x, traces[0].q[x][position : position + 1], seats, positions) for x in range(2)]
        outs.append(torch.cat(out))
    assert torch.equal(*outs)
    true = torch.stack([traces[0].q[layer][20] for layer in range(2)])
    assert torch.cosine_similarity(outs[0], true, dim=-1).min() > 0.95


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "mlp.safetensors"
    with pytest.raises(ValueError, match="there is no predictor file .*train-predictor"):
        QueryMLP.load(path, IDENTITY)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no predictor file"):
        QueryMLP.load(path, IDENTITY)
    mlp = train([_trace(30, 1)], TABLE, IDENTITY, replace(TRAINING, steps=1))
    mlp.save(path)
    with pytest.raises(ValueError, match="weights feed.*not of toy.*weights beef"):
        QueryMLP.load(path, replace(IDENTITY, weights="beef"))
    with pytest.raises(ValueError, match="trained with rotate=True: set rotate=True"):
        QueryMLP.load(path, IDENTITY, rotate=False)


def test_training_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="no trace has more than"):
        train([_trace(3, 1)], TABLE, IDENTITY, TRAINING)
    with pytest.raises(ValueError, match="hidden must be an integer of at least 1"):
        Training(hidden=0)
    with pytest.raises(ValueError, match="learning_rate"):
        Training(learning_rate=0.0)


def test_training_is_repeatable():
    one, two = (train([_trace(40, 1)], TABLE, IDENTITY, replace(TRAINING, steps=3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parts, two.parts, strict=True))
