"""The learned predictor: one small network per layer, from recorded queries (``slipstream train-predictor``).

The paper's summary names an MLP, the paper itself trains nothing; both ship, and the ablation has both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from slipstream.asyncspade.traces import QueryTrace
from slipstream.attention.calibration import ModelIdentity
from slipstream.kernels import predict
from slipstream.kernels.reference_predict import FEWEST, MLPWeights, mlp

SCHEMA = 1
ADVICE = "write one with `slipstream train-predictor`"
HELD_OUT = 0.1  # of every trace, its end: what the errors that training reports are measured on
MOST_HELD_OUT = 256  # positions
Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Training:
    """How an MLP is trained. window: queries that it sees; features: sums over them; hidden: inner width."""

    window: int = 32
    features: int = 8
    hidden: int = 256
    steps: int = 300
    batch: int = 64
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("window", "features", "hidden", "steps", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate!r}")


class QueryMLP:
    """Weights of all layers. Every part of :class:`MLPWeights` has one more leading dimension, the layer."""

    def __init__(self, identity: ModelIdentity, rotate: bool, parts: MLPWeights) -> None:
        self.identity, self.rotate, self.parts = identity, rotate, parts

    @property
    def window(self) -> int:
        """Queries that the network sees: a window must be at least as long."""
        return self.parts.mix.shape[2]

    def layer(self, layer: int) -> MLPWeights:
        return MLPWeights(*(part[layer] for part in self.parts))

    def part(self, heads: slice) -> QueryMLP:
        """For some of the query heads only: a rank's."""
        biases = {name: getattr(self.parts, name)[:, heads].contiguous() for name in ("up_bias", "down_bias")}
        return QueryMLP(self.identity, self.rotate, self.parts._replace(**biases))

    def save(self, path: str | Path) -> None:
        facts = {"schema": SCHEMA, "rotate": self.rotate, **asdict(self.identity)}
        tensors = {name: part.contiguous().cpu() for name, part in self.parts._asdict().items()}
        Path(path).write_bytes(save(tensors, {"predictor": json.dumps(facts)}))

    @classmethod
    def load(
        cls, path: str | Path, identity: ModelIdentity, rotate: bool = True, device: torch.device | str = "cpu"
    ) -> QueryMLP:
        """Raises ``ValueError`` for a file that is none, of another model, or for queries on the other side of RoPE."""
        if not Path(path).is_file():
            raise ValueError(f"there is no predictor file {path}: {ADVICE}")
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["predictor"])
                parts = MLPWeights(*(file.get_tensor(name).to(device) for name in MLPWeights._fields))
            version, learned = facts.pop("schema"), facts.pop("rotate", None)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no predictor file ({error}): {ADVICE}") from error
        if version != SCHEMA:
            raise ValueError(f"{path} has schema {version}, this version reads {SCHEMA}: {ADVICE}")
        found = ModelIdentity(**facts)
        if not found.matches(identity):
            raise ValueError(f"{path} is the predictor of {found}, not of {identity}: {ADVICE} on this model")
        if learned != rotate:
            raise ValueError(f"{path} was trained with rotate={learned}: set rotate={learned}, or train another")
        return cls(identity, rotate, parts)


def train(
    traces: Sequence[QueryTrace],
    cos_sin: Tensor,
    identity: ModelIdentity,
    training: Training,
    rotate: bool = True,
    report: Report | None = None,
) -> QueryMLP:
    """One network per layer, by Adam, on all positions of the traces but the last :data:`HELD_OUT` of each.

    The loss is the square error over that of "last", which is 1 by this measure. report: called after each layer with
    the layer and the loss on what was held out (NaN where nothing was).
    Raises ``ValueError`` when no trace is long enough.
    """
    ends = [round(trace.num_tokens * (1 - HELD_OUT)) for trace in traces]
    if not any(end > FEWEST for end in ends):
        raise ValueError(f"no trace has more than {FEWEST} queries to learn from: give longer ones")
    layers = []
    for layer in range(identity.num_layers):
        queries = [_plain(trace.q[layer], cos_sin) if rotate else trace.q[layer].float() for trace in traces]
        samples = _Samples(queries, ends, training)
        weights = _fit(samples, training, torch.Generator().manual_seed(training.seed + layer))
        layers.append(weights)
        if report is not None:
            report(layer, samples.error(weights))
    return QueryMLP(identity, rotate, MLPWeights(*(torch.stack(parts) for parts in zip(*layers, strict=True))))


def _plain(q: Tensor, cos_sin: Tensor) -> Tensor:
    """q: [T, Hq, D] of positions 0 .. T - 1, after RoPE -> before it, fp32."""
    everywhere = torch.arange(len(q), device=q.device)
    window = q.new_zeros((2, *q.shape))
    predict.push_queries(q, everywhere, torch.ones_like(everywhere), cos_sin, window, True)
    return window[1].float()


class _Samples:
    """Windows of one layer's queries with what came next, of all traces laid end to end."""

    def __init__(self, queries: Sequence[Tensor], ends: Sequence[int], training: Training) -> None:
        self.queries, self.ages = torch.cat(list(queries)), torch.arange(training.window, device=queries[0].device)
        sizes = [len(q) for q in queries]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._start = torch.cat([torch.full((n,), s) for n, s in zip(sizes, starts, strict=True)]).to(self.ages.device)
        seen, held = [], []
        for start, size, end in zip(starts, sizes, ends, strict=True):
            seen.append(torch.arange(start + FEWEST - 1, start + end - 1))
            held.append(torch.arange(max(start + FEWEST - 1, start + end - 1), start + size - 1))
        self.seen, self.held = torch.cat(seen), torch.cat(held)

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rows: [B] of the newest query -> x [B, Hq, W, D], valid [B, 1, W], the next query [B, Hq, D]."""
        rows = rows.to(self.ages.device)
        before = rows.unsqueeze(1) - self.ages
        valid = before >= self._start[rows].unsqueeze(1)
        x = self.queries[before.clamp_min(0)].masked_fill(~valid.view(*valid.shape, 1, 1), 0)
        return x.transpose(1, 2), valid.unsqueeze(1), self.queries[rows + 1]

    def error(self, weights: MLPWeights) -> float:
        """The loss on what was held out."""
        x, valid, target = self.at(self.held[:: max(1, len(self.held) // MOST_HELD_OUT)])
        return float(_loss(x, valid, target, weights))


def _loss(x: Tensor, valid: Tensor, target: Tensor, weights: MLPWeights) -> Tensor:
    step = (target - x[:, :, 0]).square().mean()
    return F.mse_loss(mlp(x, valid, weights), target) / step.clamp_min(1e-12)


def _fit(samples: _Samples, training: Training, generator: torch.Generator) -> MLPWeights:
    num_heads, dim = samples.queries.shape[1:]
    width, hidden = (training.features + 1) * dim, training.hidden

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(samples.ages.device).requires_grad_()

    parts = MLPWeights(
        mix=normal(training.features, training.window, scale=training.window**-0.5),
        up=normal(width, hidden, scale=width**-0.5),
        up_bias=normal(num_heads, hidden, scale=0.0),
        down=normal(hidden, dim, scale=0.0),  # it begins as "last"
        down_bias=normal(num_heads, dim, scale=0.0),
    )
    optimiser = torch.optim.Adam(parts, lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, training.steps)
    for _ in range(training.steps):
        rows = samples.seen[torch.randint(len(samples.seen), (training.batch,), generator=generator)]
        optimiser.zero_grad()
        _loss(*samples.at(rows), parts).backward()
        optimiser.step()
        schedule.step()
    return MLPWeights(*(part.detach() for part in parts))
