"""Needles, variable tracking and recall: what is asked is in the text, once, and nothing else answers it."""

import re

import pytest

from slipstream import tasks
from slipstream.tasks.lexicon import FILLER, KEYS

NEEDLE = re.compile(r"(?m)^Remember that @([a-z]+) is (\d{5})\.$")
KINDS = [  # task, keys, queries, values of an asked key
    ("needle_single", 1, 1, 1),
    ("needle_multikey", 16, 1, 1),
    ("needle_multivalue", 4, 1, 4),
    ("needle_multiquery", 8, 4, 1),
]


def test_keys_never_occur_as_filler():
    assert not set(KEYS) & set(FILLER)
    assert len(set(KEYS)) == len(KEYS) and len(set(FILLER)) == len(FILLER)


@pytest.mark.parametrize(("task", "keys", "queries", "values"), KINDS)
def test_needles_are_in_the_haystack(task, keys, queries, values):
    for seed in range(10):
        problem = tasks.make(task, seed, num_tokens=2048)
        hidden = NEEDLE.findall(problem.context)
        asked = re.findall(r"@([a-z]+)", problem.question)
        assert len({name for name, _ in hidden}) == keys and len(asked) == len(set(asked)) == queries
        wanted = {name: [number for other, number in hidden if other == name] for name in asked}
        assert all(len(numbers) == values for numbers in wanted.values())
        assert len({number for _, number in hidden}) == len(hidden), "every number belongs to one needle"
        assert problem.meta["expected"] == wanted
        assert problem.answer == "\n".join(f"@{name} is {n}" for name in asked for n in wanted[name])
        rest = [line for line in problem.context.splitlines()[1:] if not NEEDLE.match(line)]
        assert all(re.fullmatch(r"#( [a-z]+){14}", line) for line in rest)


def test_needles_lie_anywhere():
    places = []
    for seed in range(60):
        lines = tasks.make("needle_single", seed, num_tokens=2048).context.splitlines()
        places += [i / len(lines) for i, line in enumerate(lines) if line.startswith("Remember that")]
    assert min(places) < 0.1 and max(places) > 0.9 and 0.35 < sum(places) / len(places) < 0.65


def test_more_queries_with_several_values():
    problem = tasks.make("needle_multivalue", 1, keys=6, queries=3, values=2)
    assert sorted(map(len, problem.meta["expected"].values())) == [2, 2, 2]
    assert tasks.verify(problem, problem.completion)


@pytest.mark.parametrize(
    ("wording", "right"),
    [
        ("The number of @apple is **12345** and the number of @birch is 02468.", True),
        ("12,345 and 02468", True),
        (r"\boxed{12345}, \boxed{02468}", True),
        ("02468, 12345", True),
        ("- `@apple`: 12345\n- `@birch`: 02468", True),
        ("12345", False),
        ("12345 and 2468", False),
        ("12345, 02468 and 99999", False),
        ("123450, 02468", False),
    ],
)
def test_wordings_of_numbers(wording, right):
    meta = {"expected": {"apple": ["12345"], "birch": ["02468"]}}
    problem = tasks.Problem("needle_multiquery", "", "", "", "", meta)
    assert tasks.verify(problem, wording) is right


def follow(prompt: str) -> set[str]:
    """The variables that hold the number asked for, by executing the assignments in the order of the text."""
    holds: dict[str, str] = {}
    for number, first, old, new in re.findall(r"Store (\d{5}) in @(\w+)\.|Copy @(\w+) into @(\w+)\.", prompt):
        if number:
            holds[first] = number
        else:
            holds[new] = holds[old]
    wanted = re.search(r"Which (\d+) variables hold (\d{5})\?", prompt)
    found = {name for name, number in holds.items() if number == wanted[2]}
    assert len(found) == int(wanted[1])
    return found


@pytest.mark.parametrize(("chains", "hops"), [(1, 1), (2, 4), (5, 8), (16, 16)])
def test_tracking_by_an_independent_reading(chains, hops):
    for seed in range(8):
        problem = tasks.make("variable_tracking", seed, chains=chains, hops=hops, num_tokens=2048)
        assert follow(problem.prompt) == set(problem.meta["expected"])
        told = problem.context.splitlines()
        assert sum(line.startswith(("Store", "Copy")) for line in told) == chains * (hops + 1)
        assert all(line in told for line in problem.completion.split("</think>")[0].splitlines()[1:])


@pytest.mark.parametrize(
    ("wording", "right"),
    [
        ("The variables are @apple, @birch and @cobra.", True),
        ("apple, birch, cobra", True),
        ("1. **@Apple**\n2. **@Birch**\n3. **@Cobra**", True),
        ("After the storm (no ocean here): `@apple`, `@birch`, `@cobra`", True),
        ("@apple, @birch", False),
        ("@apple, @birch, @cobra, @dolphin", False),
        ("apple, birch, dolphin", False),
    ],
)
def test_wordings_of_variables(wording, right):
    meta = {"expected": ["apple", "birch", "cobra"]}
    assert tasks.verify(tasks.Problem("variable_tracking", "", "", "", "", meta), wording) is right


def test_recall_repeats_the_pairs():
    problem = tasks.make("recall", 0, pairs=100)
    lines = problem.context.splitlines()
    assert sorted(problem.answer.splitlines()) == sorted(lines) and problem.answer.splitlines() != lines
    assert len({line.split(" = ")[0] for line in lines}) == 100


def test_recall_may_draw_with_repetition():
    problem = tasks.make("recall", 0, pairs=3, draws=8)
    assert len(problem.answer.splitlines()) == 8 and tasks.verify(problem, problem.completion)
    assert not tasks.verify(problem, problem.answer.replace("\n", "\nopal = zzz\n", 1))


@pytest.mark.parametrize(
    ("wording", "right"),
    [
        ("L012 = able\nopal = back", True),
        ("Here are the pairs:\n1. **opal** = back\n2. **L012** = able", True),
        ("The pairs: opal = back, L012 = able.", True),
        ("opal: back\nL012: able", True),
        ("opal = back", False),
        ("opal = able\nL012 = back", False),
        ("opal = back\nL012 = able\nopal = back", False),
        ("opal = back\nL012 = able\nowl = able", False),
    ],
)
def test_wordings_of_pairs(wording, right):
    meta = {"expected": ["L012 = able", "opal = back"], "draws": 0}
    assert tasks.verify(tasks.Problem("recall", "", "", "", "", meta), wording) is right
