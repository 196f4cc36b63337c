"""Programs, run from the text of their prompt by an interpreter that shares nothing with the generator."""

import re

import pytest

from slipstream import tasks

LINE = re.compile(r"L(\d{3}) : (?:(add|sub|max|mul) ([A-H]):([A-H]),([A-H2-9])|halt)")
KINDS = [
    ("program", {"steps": 1}),
    ("program", {"steps": 60, "asked": 8}),
    ("program", {"steps": 400}),
    ("program", {"steps": 10, "decoys": 30, "asked": 3}),
    ("program_shuffled", {"steps": 60, "asked": 2}),
    ("program_shuffled", {"steps": 400, "asked": 8}),
    ("program_shuffled", {"steps": 9, "decoys": 12, "asked": 8}),
    ("program_spread", {"steps": 30, "num_tokens": 2048}),
    ("program_spread", {"steps": 30, "num_tokens": 2048, "order": "random", "decoys": 5}),
]


def interpret(prompt: str) -> tuple[list[str], dict[str, int]]:
    """(labels in the order of execution, values of the registers asked for)."""
    registers, lines = {}, {}
    for text in prompt.splitlines():
        if text.startswith("#"):
            continue
        if state := re.fullmatch(r"([A-H])=(\d\d)", text):
            assert state[1] not in registers
            registers[state[1]] = int(state[2])
        elif line := LINE.fullmatch(text):
            assert line[1] not in lines, "a label occurs once"
            lines[line[1]] = line
    start = re.search(r"Start after L(\d{3}), ", prompt)[1]
    executed = []
    for label in sorted(label for label in lines if label > start):
        executed.append(label)
        operator, x, y, z = lines[label].groups()[1:]
        if operator is None:
            break
        left, right = registers[y], int(z) if z.isdigit() else registers[z]
        registers[x] = {
            "add": left + right,
            "sub": left - right,
            "mul": left * right,
            "max": max(left, right),
        }[operator] % 100
    else:
        raise AssertionError("no halt")
    return executed, {name: registers[name] for name in re.findall(r"\[([A-H])\]", prompt)}


@pytest.mark.parametrize(("task", "parameters"), KINDS)
def test_answer_by_an_independent_interpreter(task, parameters):
    for seed in range(12):
        problem = tasks.make(task, seed, **parameters)
        executed, values = interpret(problem.prompt)
        assert len(values) == parameters.get("asked", 1)
        assert len(executed) == parameters["steps"] + 1
        assert problem.answer == "\n".join(f"{name}={value:02d}" for name, value in values.items())
        assert tasks.verify(problem, "\n".join(f"{name}={value:02d}" for name, value in values.items()))


@pytest.mark.parametrize(("task", "parameters"), KINDS)
def test_chain_follows_the_execution(task, parameters):
    """Every chain line: the program's line, its operands' values at that moment, the result."""
    problem = tasks.make(task, 3, **parameters)
    executed, values = interpret(problem.prompt)
    state = {name: int(value) for name, value in re.findall(r"(?m)^([A-H])=(\d\d)$", problem.context)}
    chain = problem.completion.split("\n")[1 : 1 + len(executed)]
    assert [line[1:4] for line in chain] == executed and chain[-1].endswith(" : halt")
    program = problem.context.splitlines()
    for line in chain[:-1]:
        instruction, left, right, x, result = re.fullmatch(r"(.*)\|(\d\d);(\d\d)>([A-H])=(\d\d)", line).groups()
        assert instruction in program
        operator, target, y, z = LINE.fullmatch(instruction).groups()[1:]
        assert (x, int(left)) == (target, state[y]) and int(right) == (int(z) if z.isdigit() else state[z])
        state[x] = int(result)
    assert {name: state[name] for name in values} == values


def labels(problem: tasks.Problem) -> list[str]:
    return re.findall(r"(?m)^L(\d{3}) :", problem.context)


def test_order_of_the_lines():
    for seed in range(10):
        ordered, shuffled = tasks.make("program", seed, steps=40), tasks.make("program_shuffled", seed, steps=40)
        assert labels(ordered) == sorted(labels(ordered))
        assert labels(shuffled) != sorted(labels(shuffled))
        assert len(labels(ordered)) == len(labels(shuffled)) == 41


def test_lines_may_come_in_any_order():
    """The answer depends on the labels only: any order of the same lines gives it."""
    problem = tasks.make("program_shuffled", 4, steps=30, asked=8)
    head = problem.context.splitlines()
    program = [line for line in head if line.startswith("L")]
    rest = [line for line in head if not line.startswith("L")]
    results = [
        interpret("\n".join([*rest, *order, problem.question])) for order in (program, sorted(program), program[::-1])
    ]
    assert results[0] == results[1] == results[2] and results[0][1] == problem.meta["expected"]


def test_spread_lines_lie_all_over_the_prompt():
    lines = tasks.make("program_spread", 0, steps=40, num_tokens=8192).context.splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith("L")]
    assert places[0] < len(lines) / 4 and places[-1] > len(lines) * 3 / 4
    assert sum(line.startswith("# ") for line in lines) > 400


@pytest.mark.parametrize(
    "wording",
    [
        "A=42",
        "A = 42",
        "**A = 42**",
        "[A] = 42",
        "[A]: 42",
        "`A` → 42",
        "A -> 42",
        "$A = 42$",
        r"\(\boxed{A = 42}\)",
        r"$$A = \boxed{42}$$",
        "The final value of register A is **42**.",
        "Register A holds 42.",
        "| register | value |\n|---|---|\n| A | 42 |",
        "A = 12 + 30 = 42",
        "A = 142 mod 100 = 42",
        "- **A**: 42 (mod 100)",
        "A=41, no: A=42",
        "42",
        r"\boxed{42}",
        "The program halts with the value 42.",
    ],
)
def test_wordings_of_one_register(wording):
    problem = with_expected({"A": 42})
    assert tasks.verify(problem, f"<think>\nA=13\n</think>\n{wording}"), wording
    for wrong in (wording.replace("42", "43"), wording.replace("42", "142"), wording.replace("42", "-42")):
        assert wrong == wording or not tasks.verify(problem, f"<think>\nA=42\n</think>\n{wrong}"), wrong


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("A=42\nC=07", True),
        ("C = 7 and A = 42", True),
        ("A: 42, C: 7, D: 11", True),
        ("A=42,C=7", True),
        ("A=07\nC=42", False),
        ("A=42", False),
        ("42 and 7", False),
        ("A=42\nC=7.5", False),
        ("A=42\nC=1,007", False),
        ("CA=42\nC=7", False),
    ],
)
def test_wordings_of_two_registers(text, right):
    assert tasks.verify(with_expected({"A": 42, "C": 7}), text) is right


def with_expected(values: dict[str, int]) -> tasks.Problem:
    return tasks.Problem("program", "", "", "", "", {"expected": values, "steps": 1})
