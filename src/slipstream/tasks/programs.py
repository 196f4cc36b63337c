"""Register-machine programs, executed line by line: in order, in random line order, or spread among comments.

A chain line repeats the instruction, then the operand values, then the result; a state is always ``x=vv``. Whatever has
to be looked up (operator, x, y, z, value of y, value of z, latest value of x) follows a delimiter of its own.
"""

from __future__ import annotations

import re

import numpy as np

from slipstream.tasks.filler import Count, lines_that_fit, scatter
from slipstream.tasks.lexicon import LABELS, NUM_LABELS, OPERATORS, REGISTERS, count_tokens
from slipstream.tasks.problem import Problem, chain_text, require
from slipstream.tasks.reading import NUMBER, plain

MODULUS = 100
MAX_STEPS = 400
_INSTRUCTIONS = (
    "Registers A to H, mod 100. add X:Y,Z sets X to Y plus Z, sub to Y minus Z, max to the larger of both, "
    "mul X:Y,3 to Y times 3. Lines with # are comments.\n"
)
# "A=07", "[A]: 7", "Register A holds 7", "A = 12 + 95 = 107 mod 100 = 7"; a minus sign is part of the value.
_STATE = re.compile(
    r"(?<![A-Za-z])([A-H])(?![A-Za-z])"
    r"(?:[^\w−-]|->|\b(?:is|equals|holds|contains|has|the|final|value|of|to|now)\b)*"
    r"(?:\d(?:[\d\s+*×()-]|mod)*=\s*)?"
    r"(?<![\d.−-])(\d{1,2})(?!\d|\.\d|,\d{3})"
)


def _line(label: int, op: int, x: int, y: int, z: int, digit: int) -> str:
    shown = str(digit) if op == 3 else REGISTERS[z]
    return f"{LABELS[label]} : {OPERATORS[op]} {REGISTERS[x]}:{REGISTERS[y]},{shown}"


def _execute(state: list[int], code: list[list[int]], first: int) -> tuple[list[str], list[str]]:
    """Run ``code`` (operator, x, y, z, digit per line) on ``state`` in place: program lines and chain lines."""
    program, chain = [], []
    for i, (op, x, y, z, digit) in enumerate(code):
        left, right = state[y], digit if op == 3 else state[z]
        if op == 0:
            result = (left + right) % MODULUS
        elif op == 1:
            result = (left - right) % MODULUS
        elif op == 2:
            result = left if left > right else right
        else:
            result = left * right % MODULUS
        line = _line(first + i, op, x, y, z, digit)
        program.append(line + "\n")
        chain.append(f"{line}|{left:02d};{right:02d}>{REGISTERS[x]}={result:02d}")
        state[x] = result
    return program, chain


def _random_code(rng: np.random.Generator, count: int) -> list[list[int]]:
    size = len(REGISTERS)
    code = rng.integers(0, (len(OPERATORS), size, size, size, 8), (count, 5))
    code[:, 4] += 2
    return code.tolist()


def _decoys(rng: np.random.Generator, count: int, first: int, last: int) -> list[str]:
    """Lines that are never reached: their labels lie outside ``first - 1 .. last``."""
    labels = rng.permutation([i for i in range(NUM_LABELS) if not first - 1 <= i <= last])[:count].tolist()
    require(len(labels) == count, f"decoys must be in 0..{len(labels)} (the labels left), got {count}")
    return [_line(label, *code) + "\n" for label, code in zip(labels, _random_code(rng, count), strict=True)]


def program(
    rng: np.random.Generator,
    *,
    steps: int = 50,
    asked: int = 1,
    order: str = "sequential",
    decoys: int = 0,
    num_tokens: int = 0,
    count: Count = count_tokens,
    task: str = "program",
) -> Problem:
    """A program of ``steps`` lines (1 to 400) whose final values of ``asked`` registers (1 to 8) are wanted.

    order: ``sequential``, or ``random`` for lines in random order (labels give the order of execution).
    decoys: lines with labels before the start or after the halt, which are never executed.
    num_tokens: aim for a prompt of this length by comment lines between the program's lines (0: none).
    """
    require(1 <= steps <= MAX_STEPS, f"steps must be in 1..{MAX_STEPS}, got {steps}")
    require(1 <= asked <= len(REGISTERS), f"asked must be in 1..{len(REGISTERS)}, got {asked}")
    require(decoys >= 0, f"decoys must be at least 0, got {decoys}")
    require(order in ("sequential", "random"), f"order must be 'sequential' or 'random', got {order!r}")
    first = int(rng.integers(1, NUM_LABELS - steps))
    initial = rng.integers(0, MODULUS, len(REGISTERS)).tolist()
    size = len(REGISTERS)
    code = _random_code(rng, steps)
    header = "".join([f"{name}={value:02d}\n" for name, value in zip(REGISTERS, initial, strict=True)])
    state = list(initial)
    lines, chain = _execute(state, code, first)
    halt = LABELS[first + steps] + " : halt"
    lines.append(halt + "\n")
    chain.append(halt)
    if decoys:
        lines = sorted(lines + _decoys(rng, decoys, first, first + steps))
    if order == "random":
        lines = [lines[i] for i in rng.permutation(len(lines)).tolist()]
    wanted = [REGISTERS[i] for i in np.sort(rng.permutation(size)[:asked]).tolist()]
    question = (
        f"Start after {LABELS[first - 1]}, execute the lines in ascending order until halt, "
        f"then report {' '.join('[' + name + ']' for name in wanted)}."
    )
    num_comments = 0
    if num_tokens:
        used = count(_INSTRUCTIONS + header + "".join(lines) + question)
        num_comments = lines_that_fit(rng, num_tokens - used, count)
    context = _INSTRUCTIONS + header + (scatter(rng, lines, num_comments) if num_comments else "".join(lines))
    values = {name: state[REGISTERS.index(name)] for name in wanted}
    answer = "\n".join(f"{name}={value:02d}" for name, value in values.items())
    meta = {"expected": values, "steps": steps}
    return Problem(task, context, question, answer, chain_text(chain, answer), meta)


def check_program(problem: Problem, answer: str) -> bool:
    """Every asked register has its value; the last mention counts. Of a single register the bare value is enough."""
    expected, text = problem.meta["expected"], plain(answer)
    found = {name: int(value) for name, value in _STATE.findall(text)}
    if not found and len(expected) == 1:
        return {int(n) for n in NUMBER.findall(text)} == set(expected.values())
    return all(found.get(name) == value for name, value in expected.items())
