"""Tasks through a model: accuracy by task, resumable, with the timings that go with it.

Every finished problem is one line of a JSON-lines file, written when it is done, so that an interrupted run goes on
where it stopped. A line is reused only if it came from the same question to the same settings (its ``key``).
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slipstream import tasks
from slipstream.llm import LLM
from slipstream.types import RequestOutput, SamplingParams, nearest

_LINE_START = b'{"key": "'
_MOST_PROMPTS = 8192
_prompts: dict[Any, Any] = {}
PROTOCOLS = ("A", "B")
LENGTH_TASKS = ("needle", "variable_tracking", "common_words", "frequent_words", "program_spread")


@dataclass(frozen=True)
class Cell:
    """One cell of an evaluation: a task with its parameters, and how many problems of it.

    protocol: ``"A"`` or ``"B"``, see docs/tasks.md. max_tokens: most tokens of a chain, where it is not the run's.
    """

    task: str
    parameters: tuple[tuple[str, Any], ...] = ()
    samples: int = 100
    protocol: str = "A"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"protocol must be A (the prompt is dense) or B (only the context is), not {self.protocol!r}"
            )
        if self.task not in tasks.TASKS:
            raise ValueError(f"unknown task {self.task!r}; {nearest(self.task, tasks.TASKS)}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        known = tasks.parameters_of(self.task)
        for name, _ in self.parameters:
            if name not in known:
                raise ValueError(f"task {self.task!r} has no parameter {name!r}; {nearest(name, known)}")

    @property
    def name(self) -> str:
        protocol = [] if self.protocol == "A" else [f"protocol={self.protocol}"]
        return " ".join([self.task, *(f"{k}={v}" for k, v in self.parameters), *protocol])

    def problem(self, index: int, seed: int) -> tasks.Problem:
        return tasks.make(self.task, seed * 1_000_003 + index, **dict(self.parameters))


@dataclass
class Answer:
    """What came of one problem. ``correct``: one entry per sampled chain."""

    key: str
    cell: str
    index: int
    correct: list[bool]
    finish: list[str]
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    texts: list[str] = field(default_factory=list)


def parse_cell(text: str, length: int | None, samples: int, protocol: str = "A") -> Cell:
    """``"program:steps=50"`` to a :class:`Cell`; ``length`` becomes ``num_tokens`` of the tasks that have a length."""
    name, given = parse_name(text, "task:parameter=value, e.g. program:steps=50")
    length_given = {"num_tokens": length} if length is not None and name.startswith(LENGTH_TASKS) else {}
    return Cell(name, tuple((length_given | given).items()), samples, protocol)


def parse_name(text: str, form: str) -> tuple[str, dict[str, Any]]:
    """``"name:key=value:key=value"`` to its name and values; ``form`` says in the error what to write."""
    name, _, rest = text.strip().partition(":")
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(":")):
        key, equals, value = part.partition("=")
        latest = next(reversed(given), "")
        if not equals and isinstance(given.get(latest), str):
            given[latest] += f":{part}"  # cache_device=cuda:1
            continue
        if not equals:
            raise ValueError(f"cannot read {part!r} in {text!r}: write {form}")
        given[key] = _value(value)
    return name, given


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def prompt_ids(llm: LLM, problem: tasks.Problem) -> list[int]:
    """The problem as one user turn of the model's chat."""
    return llm.codec.chat([{"role": "user", "content": problem.prompt}])


def split_prompt(llm: LLM, problem: tasks.Problem) -> dict[str, Any]:
    """The prompt of protocol B: the ids of :func:`prompt_ids`, and how many of them lie entirely before the question.

    The template's head and the context are dense; the question and the template's tail go through decode steps. Raises
    ``ValueError`` where the border cannot be found.
    """
    tokenizer = llm.codec.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"protocol B needs a fast tokenizer (one that tells where a token is in the text): {llm.name}")
    turn = [{"role": "user", "content": problem.prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    start = text.find(problem.prompt)
    if start < 0:
        raise ValueError(f"protocol B cannot find the question: the chat template of {llm.name} changes the prompt")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    border = start + len(problem.context)
    dense_tokens = sum(end <= border for _, end in encoding["offset_mapping"])
    return {"prompt_token_ids": encoding["input_ids"], "dense_tokens": dense_tokens}


def _prompt(llm: LLM, cell: Cell, index: int, seed: int, problem: tasks.Problem) -> dict[str, Any]:
    """What the engine is given. Comparisons ask the same of many engines, and long texts are slow to tokenise."""
    key = (llm.name, cell.task, cell.parameters, index, seed, cell.protocol)
    if key not in _prompts:
        if len(_prompts) >= _MOST_PROMPTS:
            _prompts.clear()
        whole = cell.protocol == "A"
        prompt = {"prompt_token_ids": prompt_ids(llm, problem)} if whole else split_prompt(llm, problem)
        _prompts[key] = prompt | {"prompt_token_ids": array("i", prompt["prompt_token_ids"])}
    return _prompts[key]


def run(
    llm: LLM,
    cells: Sequence[Cell],
    *,
    params: SamplingParams | None = None,
    seed: int = 0,
    log: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    keep_text: bool = False,
) -> list[Answer]:
    """Answers of every problem of every cell, in order. With ``log``, what is already there is not computed again.

    params.seed, where given, is the first of the seeds: no two chains of a cell share one.
    progress(done, total, cell) is called after every problem. Ctrl-C ends the run; the log keeps what was done.
    """
    params = params or SamplingParams(temperature=0.0, max_tokens=None)
    done = {a.key: a for a in read_log(log)} if log else {}
    work = [(cell, index) for cell in cells for index in range(cell.samples)]
    keys = [_key(llm, cell, index, seed, params) for cell, index in work]
    todo = [i for i, key in enumerate(keys) if key not in done]
    total, finished = len(work), len(work) - len(todo)
    if progress and finished:
        progress(finished, total, "resumed")
    for i, problem, output in _outputs(llm, work, todo, params, seed):
        answer = _judge(keys[i], work[i], problem, output, keep_text)
        done[keys[i]] = answer
        if log:
            _append(log, answer)
        finished += 1
        if progress:
            progress(finished, total, work[i][0].name)
    return [done[key] for key in keys]


def _outputs(
    llm: LLM, work: Sequence[tuple[Cell, int]], todo: Iterable[int], params: SamplingParams, seed: int
) -> Iterator[tuple[int, tasks.Problem, RequestOutput]]:
    """Problems are made as the engine asks for them, and handed back as they finish."""
    problems: dict[int, tasks.Problem] = {}

    def prompts() -> Iterator[tuple[int, Any, SamplingParams]]:
        for i in todo:
            cell, index = work[i]
            problems[i] = cell.problem(index, seed)
            own = _params(cell, params)
            if own.seed is not None:
                own = replace(own, seed=own.seed + index * own.n)
            yield i, _prompt(llm, cell, index, seed, problems[i]), own

    for i, output in llm.as_completed(prompts()):
        yield i, problems.pop(i), output


def _judge(key: str, work: tuple[Cell, int], problem: tasks.Problem, output: RequestOutput, keep_text: bool) -> Answer:
    metrics = output.metrics
    return Answer(
        key=key,
        cell=work[0].name,
        index=work[1],
        correct=[tasks.verify(problem, chain.text) for chain in output.outputs],
        finish=[str(chain.finish_reason) for chain in output.outputs],
        prompt_tokens=len(output.prompt_token_ids),
        output_tokens=sum(len(chain.token_ids) for chain in output.outputs),
        ttft_s=metrics.ttft_s if metrics else None,
        tpot_s=metrics.tpot_s if metrics else None,
        texts=[chain.text for chain in output.outputs] if keep_text else [],
    )


def _params(cell: Cell, params: SamplingParams) -> SamplingParams:
    return params if cell.max_tokens is None else replace(params, max_tokens=cell.max_tokens)


def _key(llm: LLM, cell: Cell, index: int, seed: int, params: SamplingParams) -> str:
    """Names one question to one model under one setting; a later run with the same key may reuse the answer."""
    facts = [llm.name, llm.fingerprint, cell.task, sorted(cell.parameters), index, seed, asdict(_params(cell, params))]
    facts += [] if cell.protocol == "A" else [cell.protocol]  # logs from before there was a choice stay valid
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _append(log: Path, answer: Answer) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(answer)) + "\n")


def read_log(log: Path) -> list[Answer]:
    """The answers of a log. A last line cut off by an interruption is dropped; any other bad line is an error."""
    if not log.exists():
        return []
    *lines, cut = log.read_bytes().split(b"\n")
    answers = []
    for number, line in enumerate(lines, 1):
        try:
            answers.append(Answer(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{log}, line {number}: not an answer of an evaluation ({error})") from error
    if cut:  # no newline after it: the write was interrupted
        if not cut.startswith(_LINE_START[: len(cut)]):
            raise ValueError(f"{log}, line {len(lines) + 1}: not an answer of an evaluation")
        os.truncate(log, log.stat().st_size - len(cut))
    return answers


def summary(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """One row per cell: accuracy (mean over chains), pass@k, standard error, tokens, TTFT and TPOT in ms."""
    rows = []
    for cell in dict.fromkeys(a.cell for a in answers):
        group = [a for a in answers if a.cell == cell]
        shares = [sum(a.correct) / len(a.correct) for a in group]
        row: dict[str, Any] = {
            "cell": cell,
            "problems": len(group),
            "accuracy": statistics.fmean(shares),
            "stderr": statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0,
            "cut_off": sum(reason == "length" for a in group for reason in a.finish),
            "prompt_tokens": round(statistics.fmean(a.prompt_tokens for a in group)),
            "output_tokens": round(statistics.fmean(a.output_tokens for a in group)),
        }
        chains = max(len(a.correct) for a in group)
        if chains > 1:
            row[f"pass@{chains}"] = statistics.fmean(any(a.correct) for a in group)
        rows.append(row | timings(group))
    return rows


def timings(answers: Sequence[Answer]) -> dict[str, float]:
    """Percentiles in milliseconds over the answers that have them."""
    found = {}
    for name in ("ttft_s", "tpot_s"):
        values = sorted(v for a in answers if (v := getattr(a, name)) is not None)
        for label, share in (("p50", 0.5), ("p99", 0.99)):
            if values:
                found[f"{name.removesuffix('_s')}_{label}_ms"] = 1e3 * values[round(share * (len(values) - 1))]
    return found
