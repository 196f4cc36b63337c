"""Methods against methods: accuracy over budgets and tasks, as rows, a table and a picture.

An *arm* is a method at one budget: one engine, through which every cell that has this budget goes in one batch. A
budget that is a fraction is one of the cell's context: of the prompt for retrieval tasks, of the prompt and the ideal
chain for all others. In an arm a request is sparse as soon as it is longer than the budget (``min_context``).
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch

from slipstream import evaluation, tasks
from slipstream.attention.probe import Probe
from slipstream.build import ATTENTION, embedded_models, parse_attention
from slipstream.evaluation import Answer, Cell
from slipstream.llm import LLM
from slipstream.types import ModelSpec, SamplingParams, nearest

Budget = int | Fraction
Row = dict[str, Any]
Result = TypeVar("Result")
Progress = Callable[[int, int, str], None]
RETRIEVAL = ("needle", "variable_tracking", "common_words", "frequent_words")
CANDIDATES = 8  # two_level: blocks that hold so many budgets, as its 128 blocks of 64 do for its 1024 tokens
GRAIN = 16  # a fraction becomes a multiple of Quest's block
GREEDY = SamplingParams(temperature=0.0, max_tokens=None, seed=0)


@dataclass(frozen=True)
class Method:
    """A method with the options that it is compared with. label: the text that it came from, e.g. ``quest:block=32``.

    Raises ``ValueError`` for a name, an option or a value that the method does not take.
    """

    label: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in ATTENTION:
            raise ValueError(f"attention method {self.name!r} is unknown; {nearest(self.name, ATTENTION)}")
        for own in ("budget", "min_context"):
            if own in dict(self.options):
                raise ValueError(f"{self.label}: a comparison sets {own} itself, from --budgets")
        given = dict(self.options)
        room = given["blocks"] * given.get("block", 64) if isinstance(given.get("blocks"), int) else 1 << 20
        try:  # at a budget that is none too small: that is for plan() to see
            parse_attention(self.attention(room))
        except TypeError as error:
            raise ValueError(str(error)) from error

    @classmethod
    def parse(cls, text: str, shared: Mapping[str, Any] | None = None) -> Method:
        """``"two_level:block_score=mean"``; of ``shared`` options it gets those that the method has."""
        name, options = evaluation.parse_name(text, "method:option=value, e.g. two_level:block_score=mean")
        known = {f.name for f in fields(ATTENTION[name])} if name in ATTENTION else set()
        options = {k: v for k, v in (shared or {}).items() if k in known} | options
        return cls(text.strip(), name, tuple(options.items()))

    @property
    def is_dense(self) -> bool:
        return not self._takes("budget")

    def _takes(self, option: str) -> bool:
        return option in {f.name for f in fields(ATTENTION[self.name])}

    def attention(self, budget: int) -> dict[str, Any]:
        """What ``LLM(attention=...)`` takes."""
        chosen: dict[str, Any] = {"method": self.name}
        chosen |= {name: budget for name in ("budget", "min_context") if self._takes(name)}
        if self._takes("blocks") and "blocks" not in dict(self.options):
            chosen["blocks"] = max(4, ceil(CANDIDATES * budget / dict(self.options).get("block", 64)))
        return chosen | dict(self.options)


@dataclass(frozen=True)
class Arm:
    """One engine's work. budget: tokens; 0 for a method that has none. cells: each with its budget as it was asked."""

    method: Method
    budget: int
    cells: tuple[tuple[Cell, str], ...]

    @property
    def attention(self) -> dict[str, Any]:
        return self.method.attention(self.budget)

    @property
    def name(self) -> str:
        return f"{self.method.label} {self.budget}" if self.budget else self.method.label


def parse_methods(names: str, shared: Mapping[str, Any]) -> list[Method]:
    """Comma-separated methods. An option of ``shared`` that none of them has raises ``ValueError``."""
    methods = [Method.parse(text, shared) for text in names.split(",") if text.strip()]
    if not methods:
        raise ValueError("no method is named, e.g. full,two_level")
    for option in shared:
        if not any(option in dict(method.options) for method in methods):
            raise ValueError(f"none of the methods {names} has an option {option!r}")
    return methods


def parse_budget(text: str) -> Budget:
    """``"1/8"`` or ``"0.125"`` of the context, ``"512"`` tokens."""
    try:
        budget = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        budget = Fraction(0)
    if budget <= 0 or (budget > 1 and budget.denominator != 1):
        raise ValueError(
            f"a budget is a fraction of the context (1/8) or a number of tokens (512), got {text.strip()!r}"
        )
    return budget if budget < 1 else int(budget)


def cells_of(names: str, lengths: Sequence[int], protocols: Sequence[str], samples: int) -> list[Cell]:
    """Cells of comma-separated tasks: those that have a length at every length, by every protocol."""
    found: dict[Cell, None] = {}
    for text in filter(None, map(str.strip, names.split(","))):
        for length in lengths:
            found |= {evaluation.parse_cell(text, length, samples, protocol): None for protocol in protocols}
    if not found:
        raise ValueError("no task is named, e.g. needle_multikey,program:steps=50")
    return list(found)


def context_of(cell: Cell) -> int:
    """The tokens that a fraction is one of, as ``tasks.count_tokens`` counts them: the prompt's, for retrieval.

    For other tasks prompt and ideal chain, the mean of three problems.
    """
    if cell.task.startswith(RETRIEVAL):
        return int((tasks.parameters_of(cell.task) | dict(cell.parameters))["num_tokens"])
    problems = [cell.problem(index, 0) for index in range(3)]
    return round(statistics.fmean(tasks.count_tokens(p.prompt) + tasks.count_tokens(p.completion) for p in problems))


def plan(methods: Sequence[Method], budgets: Sequence[Budget], cells: Sequence[Cell]) -> tuple[list[Arm], list[Row]]:
    """The arms, and a row with a ``note`` for everything that cannot be: a budget below what a method always keeps."""
    contexts = {cell: context_of(cell) for cell in cells}
    arms: dict[tuple[Method, int], list[tuple[Cell, str]]] = {}
    skipped: list[Row] = []
    for method in methods:
        for asked in ["all"] if method.is_dense else budgets:
            for cell in cells:
                budget = _tokens(asked, contexts[cell])
                reason = "" if method.is_dense else _refusal(method, budget, contexts[cell])
                if reason:
                    skipped.append(_head(method, asked, budget, cell) | {"note": reason})
                else:
                    arms.setdefault((method, budget), []).append((cell, str(asked)))
    return [Arm(method, budget, tuple(of)) for (method, budget), of in arms.items()], skipped


def _tokens(asked: Budget | str, context: int) -> int:
    if isinstance(asked, Fraction):
        return max(GRAIN, round(asked * context / GRAIN) * GRAIN)
    return asked if isinstance(asked, int) else 0


def _refusal(method: Method, budget: int, context: int) -> str:
    if budget >= context:
        return f"never sparse: a context of {context} fits a budget of {budget}"
    try:
        parse_attention(method.attention(budget))
    except ValueError as error:
        return str(error)
    return ""


def _head(method: Method, asked: Budget | str, budget: int, cell: Cell) -> Row:
    return {"method": method.label, "budget": str(asked), "tokens": budget, "cell": cell.name,
            "task": cell.task, "protocol": cell.protocol}  # fmt: skip


def run(
    model: Any, arms: Sequence[Arm], *, engine: dict[str, Any] | None = None, seed: int = 0, log: Path | None = None,
    probe: int = 0, progress: Progress | None = None,
) -> Iterator[list[Row]]:  # fmt: skip
    """The rows of one arm after the other; each arm's engine is freed before the next is made.

    engine: options of ``LLM``. log: as in :func:`evaluation.run`; an interrupted comparison goes on from it.
    probe: problems per cell that are run a second time, eagerly, with a :class:`Probe` in every sparse layer.
    """
    for arm in arms:
        yield run_arm(model, arm, engine=engine, seed=seed, log=log, probe=probe, progress=progress)


def run_arm(
    model: Any, arm: Arm, *, engine: dict[str, Any] | None = None, seed: int = 0, log: Path | None = None,
    probe: int = 0, progress: Progress | None = None,
) -> list[Row]:  # fmt: skip
    """One row for each (cell, budget as asked) of the arm."""
    cells = list(dict.fromkeys(cell for cell, _ in arm.cells))
    if isinstance(model, str) and model in embedded_models():
        cells, longest = _bounded(cells)
        engine = {k: v for k, v in (engine or {}).items() if v is not None}
        engine = {"max_model_len": longest} | engine
    engine = engine or {}

    def work(llm: LLM) -> tuple[list[Answer], ModelSpec, dict[str, Any]]:
        answers = evaluation.run(llm, cells, params=GREEDY, seed=seed, log=log, progress=progress)
        return answers, llm.spec, llm.stats()

    answers, spec, stats = _with_engine(model, arm, engine, work)
    selection = _probe(model, arm, engine, [replace(c, samples=probe) for c in cells], seed) if probe else {}
    config: Any = parse_attention(arm.attention)
    config = config.for_model(spec) if hasattr(config, "for_model") else config
    rows = []
    for cell, asked in arm.cells:
        own = [answer for answer in answers if answer.cell == cell.name]
        row = _head(arm.method, asked, arm.budget, cell) | evaluation.summary(own)[0]
        row |= reading(config, own, spec) | selection.get(cell.name, {})
        rows.append(row | {"config": repr(config), "stats": stats})
    return rows


def _bounded(cells: Sequence[Cell]) -> tuple[list[Cell], int]:
    """Cells whose chains end a quarter and 64 tokens after the ideal ones, and the model length that they need.

    A chain that has lost its way need not go on for ever, and kernels cost by the longest request that may come.
    """
    bounded, longest = [], 0
    for cell in cells:
        problems = [cell.problem(index, 0) for index in range(5)]
        prompt, chain = (max(tasks.count_tokens(text) for text in texts)
                         for texts in ([p.prompt for p in problems], [p.completion for p in problems]))  # fmt: skip
        bounded.append(replace(cell, max_tokens=chain * 5 // 4 + 64))
        longest = max(longest, prompt + prompt // 16 + chain * 5 // 4 + 128)
    grain = max(1024, 1 << (longest.bit_length() - 3))  # few different lengths: what is in the log stays valid
    return bounded, -(-longest // grain) * grain


def _with_engine(model: Any, arm: Arm, engine: dict[str, Any], work: Callable[[LLM], Result]) -> Result:
    """``work`` on the arm's engine, which is gone with all its memory afterwards: the next one takes what is free."""
    llm = LLM(model, **(engine | {"attention": arm.attention}))
    try:
        return work(llm)
    finally:
        llm.close()
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _probe(model: Any, arm: Arm, engine: dict[str, Any], cells: Sequence[Cell], seed: int) -> dict[str, Row]:
    """By cell: recall and mass, the means over layers and per layer. Nothing for methods without a selection."""

    def work(llm: LLM) -> dict[str, Row]:
        probe = Probe.of(llm.engine.backend, llm.spec, parse_attention(arm.attention))
        found: dict[str, Row] = {}
        for cell in cells if probe is not None else ():
            assert probe is not None
            probe.reset()
            evaluation.run(llm, [cell], params=GREEDY, seed=seed)
            found[cell.name] = probe.report()
        return found

    return _with_engine(model, arm, engine | {"cuda_graphs": False}, work)


def reading(config: Any, answers: Sequence[Answer], spec: ModelSpec) -> Row:
    """What a decode step reads, per KV head, the mean over layers and steps.

    tokens_read: keys and values, in tokens. index_read: what the selection reads beside them, in tokens' worth of
    bytes (a token is 2 D elements, or one row of a latent cache).
    """
    read, index = [], []
    for answer in answers:
        lengths = range(answer.prompt_tokens + 1, answer.prompt_tokens + max(2, answer.output_tokens))
        for length in (lengths[0], lengths[-1]):  # both are near enough to linear in between
            budget, dense = getattr(config, "budget", length), getattr(config, "dense_layers", 0) / spec.num_layers
            sparse = length > budget
            read.append(dense * length + (1 - dense) * min(length, budget))
            index.append((1 - dense) * index_bytes(config, length, spec) / _token_bytes(spec) if sparse else 0.0)
    return {"tokens_read": statistics.fmean(read), "index_read": statistics.fmean(index)}


def _token_bytes(spec: ModelSpec) -> int:
    return spec.kv_bytes_per_token() // (spec.num_layers * spec.num_kv_heads)


def index_bytes(config: Any, length: int, spec: ModelSpec) -> float:
    """Bytes of keys, summaries and labels that one selection reads, per layer and KV head, at ``length`` tokens."""
    key = spec.head_dim * spec.dtype.itemsize
    config = getattr(config, "inner", lambda: config)()  # asyncspade selects by another method
    config = config.for_model(spec) if hasattr(config, "for_model") else config
    config = config.inner() if hasattr(config, "inner") else config  # asyncspade reads what its scoring reads
    scales = 4 if spec.value_dim is None else 8  # scale and zero point in fp16 of each group of channels
    label = (getattr(config, "channels", 0) or 0) / 2 + scales  # INT4
    vectors = {"mean": 1, "minmax": 2, "meanstd": 2, "minmax4x16": 8}.get(getattr(config, "block_score", ""), 0)
    blocks = vectors * key * length / getattr(config, "block", 1)
    by_method = {"Oracle": key * length, "DoubleSparsity": label * length, "Quest": blocks}
    if type(config).__name__ == "TwoLevel":
        return blocks + label * min(length, config.blocks * config.block)
    return by_method.get(type(config).__name__, 0.0)


def pivot(rows: Sequence[Row], show: Callable[[Row], str]) -> tuple[list[Row], list[str]]:
    """A line per (cell, method), a column per budget as asked; what was skipped shows the number of its note."""
    cells, methods, columns = (list(dict.fromkeys(row[name] for row in rows)) for name in ("cell", "method", "budget"))
    notes = list(dict.fromkeys(row["note"] for row in rows if "note" in row))
    texts = {
        (row["cell"], row["method"], row["budget"]): f"({notes.index(row['note']) + 1})" if "note" in row else show(row)
        for row in rows
    }
    lines: list[Row] = []
    for cell in cells:
        for i, method in enumerate(m for m in methods if any((cell, m, budget) in texts for budget in columns)):
            line = {"cell": "" if i else cell, "method": method}
            lines.append(line | {budget: texts.get((cell, method, budget), "") for budget in columns})
    return lines, [f"({i}) skipped: {note}" for i, note in enumerate(notes, 1)]


def family(row: Row) -> str:
    """What shares a panel: a task under one protocol, over all its lengths."""
    return f"{row['task'].replace('_', ' ')}, protocol {row['protocol']}"


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Accuracy against tokens read: a panel per task and protocol, a line per method, a point per budget.

    A point is the mean over the cells of the panel (its lengths, or steps) that have this budget.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "note" not in row]
    panels, methods = (list(dict.fromkeys(of)) for of in (map(family, rows), (r["method"] for r in rows)))
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    shape = (-(-len(panels) // columns), columns)
    figure, axes = plt.subplots(
        *shape, figsize=(4.2 * shape[1] + 1.6, 3.1 * shape[0] + 0.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for i, method in enumerate(methods):
            points = _points([row for row in rows if family(row) == panel and row["method"] == method])
            if len(points) == 1 and points[0][2] == "all":
                axis.axhline(points[0][1], color="0.35", linestyle="--", linewidth=1.2, label=method, zorder=1)
            elif points:
                x, y, _ = zip(*points, strict=True)
                marker = "osD^vPX*"[i % 8]
                axis.plot(
                    x,
                    y,
                    marker=marker,
                    color=f"C{i % 10}",
                    markersize=9 - 0.7 * i,
                    linewidth=2.4 - 0.2 * i,
                    label=method,
                    alpha=0.85,
                )
        axis.set_xscale("log", base=2)
        axis.set(title=panel, ylim=(-0.04, 1.06))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    known = {label: handle for a in axes.flat for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    ordered = [method for method in methods if method in known]
    figure.suptitle(title)
    for axis in axes[-1]:
        axis.set_xlabel("tokens of keys and values read per step and KV head", fontsize=10)
    figure.supylabel("problems solved", fontsize=10)
    figure.legend([known[m] for m in ordered], ordered, loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _points(rows: Sequence[Row]) -> list[tuple[float, float, str]]:
    """(tokens read, accuracy, budget) of each budget, the mean over its cells, by tokens read."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["budget"], []).append(row)
    mean = statistics.fmean
    return sorted(
        (mean(r["tokens_read"] for r in g), mean(r["accuracy"] for r in g), asked) for asked, g in groups.items()
    )
