"""Are the embedded models what the rest of the house needs, in our own engine? Accuracy by cell, greedy and sampled.

The target has to retrieve and to finish long chains; the draft has to be wrong often enough on a family where the
target is right, and sampling more chains has to help there (pass@k above pass@1). A chain may be as long as the longest
ideal chain of its cell and a little more, as in ``training/evaluate.py``, whose 100 problems a cell (bfloat16, GPU)
these are compared with; the problems here are others. About half an hour on one core.

    PYTHONPATH=src python benchmarks/embedded_models.py --json benchmarks/results/cpu/embedded_models.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Report, check

from slipstream import LLM, SamplingParams, tasks
from slipstream.evaluation import Answer, Cell, read_log, run

TEMPERATURE, CHAINS = 0.8, 4
NEEDLES = ("needle_single", "needle_multikey", "needle_multiquery")
SPREAD_DOCUMENT = 7100  # prompt tokens that leave room for 50 steps inside 8192, the longest trained document


@dataclass(frozen=True)
class Row:
    """One line of the table: ``count`` problems, shared by the tasks that make up the cell."""

    name: str
    tasks: tuple[str, ...]
    parameters: tuple[tuple[str, int], ...]
    count: int
    sampled: bool = False

    def cells(self, most: int) -> list[Cell]:
        each = max(min(self.count, most) // len(self.tasks), 1)
        return [Cell(task, self.parameters, each) for task in self.tasks]


def row(name: str, task: str | tuple[str, ...], count: int, sampled: bool = False, **parameters: int) -> Row:
    return Row(name, (task,) if isinstance(task, str) else task, tuple(parameters.items()), count, sampled)


TARGET = (
    row("needles_1024", NEEDLES, 30, num_tokens=924),
    row("needles_8192", NEEDLES, 12, num_tokens=8092),
    row("program_100", "program", 10, steps=100),
    row("program_200", "program", 5, steps=200),
    row("shuffled_50", "program_shuffled", 10, steps=50),
    row("spread_8192_50", "program_spread", 5, steps=50, num_tokens=SPREAD_DOCUMENT),
    row("expression_12", "expression", 25, operations=12),
    row("expression_16", "expression", 50, operations=16),
    row("expression_16", "expression", 20, True, operations=16),
    row("search_8", "search", 100),
    row("search_8", "search", 100, True),
)
DRAFT = (
    row("expression_12", "expression", 100, operations=12),
    row("expression_12", "expression", 100, True, operations=12),
    row("expression_16", "expression", 100, operations=16),
    row("expression_16", "expression", 100, True, operations=16),
    row("program_100", "program", 10, steps=100),
    row("program_100", "program", 5, True, steps=100),
    row("program_200", "program", 8, steps=200),
    row("program_200", "program", 3, True, steps=200),
    row("search_8", "search", 100),
    row("search_8", "search", 100, True),
    row("needles_1024", NEEDLES, 30, num_tokens=924),
    row("needles_1024", NEEDLES, 12, True, num_tokens=924),
    row("needles_8192", NEEDLES, 6, num_tokens=8092),
    row("shuffled_50", "program_shuffled", 10, steps=50),
    row("spread_8192_50", "program_spread", 3, steps=50, num_tokens=SPREAD_DOCUMENT),
)
LATENT = (
    row("needles_1024", NEEDLES, 30, num_tokens=924),
    row("needles_4096", NEEDLES, 12, num_tokens=3996),
    row("program_50", "program", 10, steps=50),
    row("program_100", "program", 5, steps=100),
    row("shuffled_50", "program_shuffled", 10, steps=50),
    row("expression_12", "expression", 25, operations=12),
)
ROWS = {"slipstream-target": TARGET, "slipstream-draft": DRAFT, "slipstream-mla": LATENT}
TARGET_BARS = {
    "needles_1024": 0.95,
    "needles_8192": 0.95,
    "program_100": 0.95,
    "program_200": 0.80,
    "shuffled_50": 0.80,
    "spread_8192_50": 0.80,
}
FAMILY = "expression_16"  # where the draft is to be weak, the target strong, and more samples of use


def measure(model: str, what: Row, most: int, log: Path | None) -> dict[str, Any]:
    """One row of the table. The engine is made anew for each, so that a row does not depend on the rows before it."""
    cells = what.cells(most)
    problems = [cell.problem(index, 0) for cell in cells for index in range(cell.samples)]
    llm = LLM(model, device="cpu", max_model_len=16384)
    longest = max(len(llm.codec.encode(problem.completion)) for problem in problems)
    params = SamplingParams(
        n=CHAINS if what.sampled else 1,
        temperature=TEMPERATURE if what.sampled else 0.0,
        max_tokens=longest + (120 if "search" in what.tasks else 16),
    )
    answers = run(llm, cells, params=params, log=log, keep_text=True)
    check(len(answers) == len(problems), "an answer for every problem")
    found = {"model": model, "cell": what.name, "temperature": params.temperature, "chains": params.n}
    found |= rates(answers, problems)
    texts = [text for answer in answers for text in answer.texts]
    found["closed"] = sum("</think>" in text for text in texts) / len(texts)
    found["output_tokens"] = sum(answer.output_tokens for answer in answers)
    return found | {"dtype": str(llm.spec.dtype).removeprefix("torch.")}


def rates(answers: list[Answer], problems: list[tasks.Problem]) -> dict[str, Any]:
    """problems, accuracy (pass@1); of several chains also pass@k and, where answers have one spelling, the vote's."""
    shares = [sum(answer.correct) / len(answer.correct) for answer in answers]
    found: dict[str, Any] = {"problems": len(answers), "accuracy": sum(shares) / len(shares)}
    if len(answers[0].correct) > 1:
        found[f"pass@{CHAINS}"] = sum(any(answer.correct) for answer in answers) / len(answers)
        if all(problem.task in ("expression", "program") for problem in problems):
            found["majority"] = sum(map(vote, answers)) / len(answers)
    return found


def vote(answer: Answer) -> bool:
    """Is the answer that most chains agree on right? The earliest wins a tie; a chain without an answer has no vote."""
    given = [tasks.final_answer(text) for text in answer.texts]
    ballots = Counter(text for text in given if text)
    return bool(ballots) and answer.correct[given.index(ballots.most_common(1)[0][0])]


def bars(report: Report) -> None:
    """The issue's demands, as far as the measured rows go."""
    found = {(p["model"], p["cell"], p["chains"] > 1): p for p in report.points}
    for name, limit in TARGET_BARS.items():
        if point := found.get(("slipstream-target", name, False)):
            report.bar(f"target {name}, greedy, {point['problems']} problems", point["accuracy"], limit, ">=")
    if point := found.get(("slipstream-target", FAMILY, False)):
        report.bar(f"target {FAMILY}, greedy, {point['problems']} problems", point["accuracy"], 0.85, ">=")
    if point := found.get(("slipstream-draft", FAMILY, False)):
        report.bar(f"draft {FAMILY}, greedy: not hopeless", point["accuracy"], 0.20, ">=")
        report.bar(f"draft {FAMILY}, greedy: not solved", point["accuracy"], 0.70, "<=")
    if point := found.get(("slipstream-draft", FAMILY, True)):
        gain = point[f"pass@{CHAINS}"] - point["accuracy"]
        report.bar(f"draft {FAMILY}: pass@{CHAINS} minus pass@1 at {TEMPERATURE}", gain, 0.10, ">=")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(ROWS), help="comma-separated, of " + ", ".join(ROWS))
    parser.add_argument("--samples", type=int, default=100, help="most problems of a row; a row may ask for fewer")
    parser.add_argument("--log", type=Path, help="JSON lines of finished problems; a rerun goes on from there")
    parser.add_argument("--json", help="write the result here")
    options = parser.parse_args()
    if options.samples < 1:
        parser.error("--samples must be at least 1")
    report = Report("embedded_models")
    if options.log:  # answers of another run, perhaps of another commit: the result says so
        report.notes["answers_in_log_before"] = len(read_log(options.log))
    for model in options.models.split(","):
        if model not in ROWS:
            parser.error(f"--models takes {', '.join(ROWS)}, got {model!r}")
        for what in ROWS[model]:
            report.point(**measure(model, what, options.samples, options.log))
    bars(report)
    report.finish(options.json)


if __name__ == "__main__":
    main()
