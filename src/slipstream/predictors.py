"""Which predictor finds the tokens that the next query will want? Measured on recorded chains, without an engine.

For every decoded position a predictor sees the queries up to it, and the tokens that its guess selects are compared
with those that the true next query selects one step later. Both hold sinks, recent tokens and the newest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream import evaluation
from slipstream.asyncspade.config import PREDICTORS, AsyncSpade
from slipstream.asyncspade.mlp import QueryMLP
from slipstream.asyncspade.traces import QueryTrace, record
from slipstream.evaluation import Cell
from slipstream.kernels import predict, sparse
from slipstream.types import SamplingParams, nearest

STRENGTHS = {"ridge": "ridge", "analog": "beta", "ema": "decay"}  # the option that says how strongly
BOUNDS = ("oracle", "window")  # the true query; no query at all: sinks and recent tokens
CANDIDATES = ",".join(
    (
        "oracle,window,residual,last:rotate=0,last,mean:window=8,mean:window=64,ema:decay=0.5,ema:decay=0.8",
        *(f"ridge:window={w}:rotate=0" for w in (16, 32, 64, 128)),
        *(f"ridge:window={w}:ridge={strength}" for w in (16, 32, 64, 128) for strength in (0.01, 0.1, 1.0)),
        *(f"analog:window={w}:beta={beta}" for w in (64, 128, 512) for beta in (10, 15, 30)),
    )
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A predictor with its options, as in :class:`AsyncSpade`. kind: the predictor, or "window" for none.

    mlp: what the predictor of this name has learned.
    """

    label: str
    kind: str
    config: AsyncSpade
    mlp: QueryMLP | None = None

    @classmethod
    def parse(cls, text: str, llm: Any = None) -> Candidate:
        """``"ridge:window=64:ridge=0.1:rotate=0"``, ``"mlp:predictor_file=PATH"``; ``ValueError`` says what is wrong.

        llm: whose ``mlp`` it is, if it is one.
        """
        kind, given = evaluation.parse_name(text, "predictor:option=value, e.g. ridge:window=64")
        if kind not in (*PREDICTORS, "window"):
            raise ValueError(f"predictor {kind!r} is unknown; {nearest(kind, (*PREDICTORS, 'window'))}")
        known = {"mlp": ["predictor_file"], "window": [], "oracle": [], "residual": []}.get(kind, ["window", "rotate"])
        for name in given:
            if name not in (*known, STRENGTHS.get(kind)):
                raise ValueError(f"predictor {kind!r} has no option {name!r}; {nearest(name, known)}")
        config = AsyncSpade(predictor="oracle" if kind == "window" else kind, **given)
        file = config.predictor_file
        mlp = QueryMLP.load(file, llm.identity, device=llm.device) if file else None
        return cls(text.strip(), kind, config, mlp)

    def queries(self, layer: int, pre: Tensor, at: Tensor, cos_sin: Tensor) -> Tensor:
        """Guesses for positions ``at + 1``: [n, Hq, D]. pre: [T, Hq, D], before RoPE if ``rotate``; at: [n] int64."""
        own = self.config
        size = self.mlp.window if self.mlp else own.window
        slots = torch.arange(size, device=at.device)
        position = at[:, None] - (at[:, None] - slots) % size  # the latest position of every ring slot
        window = pre[position.clamp_min(0)]
        rows = torch.arange(len(at), device=at.device)
        common = (window, rows, at, torch.zeros_like(at), cos_sin)
        if self.mlp:
            return predict.predict_mlp(*common, self.mlp.layer(layer), own.rotate)
        strength = float(getattr(own, STRENGTHS.get(self.kind, ""), 0.0))
        return predict.predict_queries(*common, self.kind, strength, own.rotate)


def parse_candidates(text: str, llm: Any = None) -> list[Candidate]:
    found = [Candidate.parse(part, llm) for part in text.split(",") if part.strip()]
    if not found:
        raise ValueError("no predictor is named, e.g. last,ridge:window=64")
    return found


def cells_of(names: str, length: int, samples: int) -> list[Cell]:
    """Cells of comma-separated tasks: those that have a length at ``length``, by protocol B, others by A."""
    found = []
    for text in filter(None, map(str.strip, names.split(","))):
        protocol = "B" if text.startswith(evaluation.LENGTH_TASKS) else "A"
        found.append(evaluation.parse_cell(text, length, samples, protocol))
    if not found:
        raise ValueError("no task is named, e.g. needle_multikey,program:steps=50")
    return found


def traces(llm: Any, cell: Cell, seed: int, greedy: bool) -> Iterator[QueryTrace]:
    """One trace per problem of the cell. Decoded is what comes after the prompt; under protocol B, after the context.

    greedy: the model writes the chains itself; else they are the tasks' ideal ones, which the embedded models write.
    """
    for index in range(cell.samples):
        problem = cell.problem(index, seed)
        if cell.protocol == "B":
            prompt = evaluation.split_prompt(llm, problem)
            ids, start = list(prompt["prompt_token_ids"]), prompt["dense_tokens"]
        else:
            ids = evaluation.prompt_ids(llm, problem)
            start = len(ids)
        if greedy:
            output = llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=cell.max_tokens))
            chain = output[0].outputs[0].token_ids
        else:
            chain = llm.codec.tokenizer.encode(problem.completion, add_special_tokens=False)
        yield record(llm, [*ids, *chain], start)


@dataclass(frozen=True)
class Rule:
    """What a selection holds whatever the query: as in the configs of sparse methods. points: positions per chain."""

    budgets: tuple[Fraction, ...] = (Fraction(1, 8), Fraction(1, 16))  # of the sequence, rounded to 16 tokens
    sink: int = 4
    recent: int = 64
    points: int = 64

    def tokens(self, share: Fraction, num_tokens: int) -> int:
        budget = round(share * num_tokens / 16) * 16
        if budget < self.sink + self.recent + 1:
            raise ValueError(
                f"{share} of {num_tokens} tokens cannot hold sink + recent + the newest token = {self.sink} + "
                f"{self.recent} + 1: raise the budget or the length, or lower recent"
            )
        return budget


def positions(trace: QueryTrace, points: int) -> Tensor:
    """[n] int64: the positions that a query is predicted from; evenly spaced over those that are decoded."""
    last = trace.num_tokens - 2
    first = min(max(0, trace.start - 1), last)
    count = min(points, last - first + 1)
    return torch.linspace(first, last, count, device=trace.q[0].device).round().long()


def measure(
    trace: QueryTrace, candidates: Sequence[Candidate], rule: Rule, cos_sin: Tensor, scale: float, at: Tensor
) -> dict[str, Tensor]:
    """By candidate's label, [budgets, L, n, Hk, 4] fp32 on the CPU: the four ``MEASURES`` for positions ``at`` [n].

    overlap: the share of the true set that is in the predicted one; overlap_free: of its tokens that are not always
    kept. mass: the attention of the true query, over all its keys, on the predicted set; cosine: of guess and query;
    both are means of the query heads of a KV head.
    """
    found: dict[str, list[Tensor]] = {candidate.label: [] for candidate in candidates}
    for index in range(len(trace.q)):
        layer = _Layer(index, trace, rule, cos_sin, scale, at)
        for candidate in candidates:
            found[candidate.label].append(layer.measure(candidate))
    return {label: torch.stack(layers, 1).cpu() for label, layers in found.items()}


class _Layer:
    """One layer of a trace: the true weights and sets of all positions, against which guesses are held."""

    def __init__(self, index: int, trace: QueryTrace, rule: Rule, cos_sin: Tensor, scale: float, at: Tensor) -> None:
        q, k = trace.q[index], trace.k[index]
        self.index, self.q, self.k, self.rule, self.cos_sin, self.scale, self.at = index, q, k, rule, cos_sin, scale, at
        self.num_kv = k.shape[1]
        self.budgets = [rule.tokens(share, len(q)) for share in rule.budgets]
        self.true = q[at + 1]
        self.foreseen = trace.foreseen[index][at + 1] if trace.foreseen else self.true
        self.lengths = (at + 2).int()  # of the step that the guess is for
        logits = self._logits(self.true, self.lengths)
        self.weights = logits.softmax(-1).unflatten(1, (self.num_kv, -1))
        tokens = torch.arange(len(q), device=q.device)
        ends = self.lengths.view(-1, 1, 1)
        self.kept = (tokens < ends) & ((tokens < rule.sink) | (tokens >= ends - rule.recent))
        self.wanted = [self._chosen(logits, self.lengths, budget, rule.recent) for budget in self.budgets]
        turned = torch.zeros((2, *q.shape), dtype=q.dtype, device=q.device)
        everywhere = torch.arange(len(q), device=q.device)
        predict.push_queries(q, everywhere, torch.ones_like(everywhere), cos_sin, turned, True)
        self.pre = turned[1]

    def _logits(self, query: Tensor, lengths: Tensor) -> Tensor:
        """[n, Hq, T] fp32, -inf from each row's length on."""
        grouped = query.float().unflatten(1, (self.num_kv, -1))
        logits = torch.einsum("nkgd,tkd->nkgt", grouped, self.k.float()).flatten(1, 2) * self.scale
        tokens = torch.arange(len(self.k), device=logits.device)
        return logits.masked_fill(tokens >= lengths.view(-1, 1, 1), -torch.inf)

    def _chosen(self, logits: Tensor, lengths: Tensor, budget: int, recent: int) -> Tensor:
        """[n, Hk, T] bool."""
        indices, _ = sparse.top_tokens(logits, None, lengths, self.num_kv, 1, budget, self.rule.sink, recent, "sum")
        size = len(self.k)
        flags = torch.zeros((*indices.shape[:2], size + 1), dtype=torch.bool, device=indices.device)
        return flags.scatter_(2, indices.long().remainder(size + 1), True)[..., :size]

    def measure(self, candidate: Candidate) -> Tensor:
        """[budgets, n, Hk, 4]."""
        later = int(candidate.kind != "residual")  # tokens that come after the choice: in time one, in depth none
        if candidate.kind in BOUNDS:
            guess = self.true
        elif not later:
            guess = self.foreseen
        else:
            pre = self.pre if candidate.config.rotate else self.q
            guess = candidate.queries(self.index, pre, self.at, self.cos_sin)
        cosine = torch.cosine_similarity(guess.float(), self.true.float(), dim=-1)
        cosine = cosine.unflatten(1, (self.num_kv, -1)).mean(-1)
        known = self.lengths - later  # the newest token is not there yet: it is appended
        logits = self._logits(guess, known)
        if candidate.kind == "window":
            logits = torch.arange(len(self.k), device=logits.device).expand_as(logits).float()
        rows = []
        for budget, wanted in zip(self.budgets, self.wanted, strict=True):
            chosen = self._chosen(logits, known, budget - later, self.rule.recent - later)
            chosen.scatter_(2, (self.lengths - 1).long().view(-1, 1, 1).expand(-1, self.num_kv, 1), True)
            free, both = wanted & ~self.kept, wanted & chosen
            overlap = both.sum(-1) / wanted.sum(-1)
            overlap_free = (both & free).sum(-1) / free.sum(-1).clamp_min(1)
            mass = (self.weights * chosen.unsqueeze(2)).sum(-1).mean(-1)
            rows.append(torch.stack((overlap, overlap_free, mass, cosine), -1))
        return torch.stack(rows)


@torch.inference_mode()
def compare(
    llm: Any, cell: Cell, candidates: Sequence[Candidate], rule: Rule, seed: int, greedy: bool,
    advance: Callable[[], object] = lambda: None,
) -> list[Row]:  # fmt: skip
    """The rows of one cell; ``advance()`` is called after every chain."""
    found = []
    for trace in traces(llm, cell, seed, greedy):
        at = positions(trace, rule.points)
        found.append(measure(trace, candidates, rule, llm.model.cos_sin, llm.spec.scale, at))
        advance()
    return rows_of(found, cell.name, rule)


def pivot(rows: Sequence[Row], budget: str) -> list[Row]:
    """A line per predictor, a column per cell: mass, and overlap of what is not always kept."""
    own = [row for row in rows if row["budget"] == budget]
    lines: dict[str, Row] = {}
    for row in own:
        line = lines.setdefault(row["predictor"], {"predictor": row["predictor"]})
        line[row["cell"].split()[0]] = f"{row['mass']:.3f} {row['overlap_free']:.2f}"
    return list(lines.values())


MEASURES = ("overlap", "overlap_free", "mass", "cosine")


def rows_of(found: Sequence[Mapping[str, Tensor]], cell: str, rule: Rule) -> list[Row]:
    """A row per candidate and budget: means over chains, positions, layers and heads, and the mass of every layer.

    mass_stderr: the standard error of the mass over chains. confidence_5: the cosine below which 5 % of all KV heads
    and steps are; mass_gate_5: the mass when these attend to everything; and the same for 2 % and 10 %.
    """
    rows = []
    for label in found[0]:
        chains = torch.stack([values[label].mean((2, 3)) for values in found]).double()  # [chains, budgets, L, 4]
        pooled = torch.cat([values[label] for values in found], 2)
        for i, share in enumerate(rule.budgets):
            row: Row = {"cell": cell, "budget": str(share), "predictor": label, "chains": len(found)}
            own = chains[:, i].mean(1)
            row |= {name: round(float(own[:, m].mean()), 4) for m, name in enumerate(MEASURES)}
            spread = own[:, 2].std() / len(own) ** 0.5 if len(own) > 1 else torch.zeros(())
            row |= {"mass_stderr": round(float(spread), 4)}
            mass, cosine = pooled[i, ..., 2], pooled[i, ..., 3]
            for percent in (2, 5, 10):
                threshold = cosine.flatten().sort().values[percent * cosine.numel() // 100]
                repaired = mass.masked_fill(cosine < threshold, 1.0)
                row[f"confidence_{percent}"] = round(float(threshold), 4)
                row[f"mass_gate_{percent}"] = round(float(repaired.mean()), 4)
            row["mass_by_layer"] = [round(float(x), 4) for x in chains[:, i, :, 2].mean(0)]
            rows.append(row)
    return rows


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Attention mass of every predictor: a panel per cell, a bar per predictor and budget, bounds as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells, labels, budgets = (list(dict.fromkeys(row[k] for row in rows)) for k in ("cell", "predictor", "budget"))
    shown = [label for label in labels if label not in BOUNDS]
    height = max(3.0, 0.24 * len(shown) + 1.6)
    least = min(row["mass"] for row in rows)
    figure, axes = plt.subplots(
        1, len(cells), figsize=(3.6 * len(cells) + 2.2, height), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, cell in zip(axes[0], cells, strict=True):
        for b, budget in enumerate(budgets):
            own = {row["predictor"]: row for row in rows if (row["cell"], row["budget"]) == (cell, budget)}
            y = [i + (b - (len(budgets) - 1) / 2) * 0.8 / len(budgets) for i in range(len(shown))]
            errors = [own[label]["mass_stderr"] for label in shown]
            values = [own[label]["mass"] for label in shown]
            axis.barh(y, values, 0.75 / len(budgets), xerr=errors, color=f"C{b}", label=f"budget {budget}")
            for label, style in (("oracle", "-"), ("window", ":")):
                if label in own:
                    name = f"{label}, {budget}"
                    axis.axvline(own[label]["mass"], color=f"C{b}", linestyle=style, linewidth=1.2, label=name)
        axis.set_yticks(range(len(shown)), shown, fontsize=8)
        axis.set(xlabel="attention mass captured", xlim=(0.8 * least, 1), ylim=(len(shown) - 0.4, -0.6))
        axis.set_title(cell.replace(" ", chr(10), 1), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
