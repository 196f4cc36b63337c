"""Expressions, search and counting, checked by other means than the generator's."""

import ast
import re
from collections import Counter
from itertools import combinations

import pytest

from slipstream import tasks
from slipstream.tasks.lexicon import pieces
from slipstream.tasks.problem import final_answer


def value_of(text: str) -> int:
    """An expression by Python's own parser (leading zeros are no Python), mod 100 at the end only."""
    found = eval(compile(ast.parse(re.sub(r"\b0(\d)", r"\1", text), mode="eval"), "expression", "eval"), {})
    return found % 100


@pytest.mark.parametrize("operations", [1, 2, 8, 30, 64])
def test_expression_by_an_independent_evaluator(operations):
    for seed in range(12):
        problem = tasks.make("expression", seed, operations=operations)
        assert len(re.findall(r"[+*-]", problem.question)) == operations
        assert value_of(problem.question) == problem.meta["expected"] == int(problem.answer)
        lines = problem.completion.split("</think>")[0].splitlines()[1:]
        for line in lines:
            if "=" in line:  # one bracket
                left, right = line.split("=")
                assert value_of(left) == int(right)
            else:  # what is left of the expression
                assert value_of(line) == int(problem.answer)
        assert sum("=" in line for line in lines) == operations


@pytest.mark.parametrize(
    ("wording", "right"),
    [
        ("7", True),
        ("07", True),
        ("**Answer: 07**", True),
        (r"The value is $\boxed{7}$.", True),
        ("(5+2) = 7", True),
        ("207 mod 100 = 7", True),
        ("The result is 7 (mod 100).", True),
        ("7.5", False),
        ("-7", False),
        ("107", False),
        ("70", False),
        ("7, or rather 8", False),
        ("seven", False),
    ],
)
def test_wordings_of_a_value(wording, right):
    assert tasks.verify(tasks.Problem("expression", "", "", "", "", {"expected": 7}), wording) is right


def numbers_and_target(problem: tasks.Problem) -> tuple[list[int], int]:
    return [int(n) for n in problem.context.split()[1:]], int(re.search(r"the sum (\d\d) mod", problem.question)[1])


@pytest.mark.parametrize("size", [4, 8, 16])
def test_every_solution_of_a_search_counts(size):
    for seed in range(15):
        problem = tasks.make("search", seed, size=size)
        numbers, target = numbers_and_target(problem)
        assert len(set(numbers)) == size
        solutions = 0
        for three in combinations(numbers, 3):
            right = sum(three) % 100 == target
            solutions += right
            assert tasks.verify(problem, "+".join(f"{n:02d}" for n in reversed(three))) is right
        assert solutions > 0, "there is always a solution"


def test_search_chains_are_true_and_bounded():
    given_up = 0
    for seed in range(200):
        problem = tasks.make("search", seed, size=10, tries=3)
        numbers, target = numbers_and_target(problem)
        lines = problem.completion.split("</think>")[0].splitlines()[1:]
        assert 1 <= len(lines) <= 3
        for line in lines:
            a, b, total, need, verdict = re.fullmatch(r"try (\d\d)\+(\d\d)=(\d\d) need (\d\d) (yes|no)", line).groups()
            assert (int(a) + int(b)) % 100 == int(total) and (int(total) + int(need)) % 100 == target
            assert (verdict == "yes") == (int(need) in numbers and need not in (a, b))
        given_up += problem.answer == "none"
        assert tasks.verify(problem, problem.completion) == (problem.answer != "none") == lines[-1].endswith("yes")
    assert 0 < given_up < 200, "a chain may fail, so that more samples help"


@pytest.mark.parametrize(
    ("wording", "right"),
    [
        ("12+30+61", True),
        ("12 + 30 + 61 = 103 ≡ 3 (mod 100)", True),
        ("**12, 30 and 61**, whose sum is 103, that is 03 mod 100", True),
        (r"$\boxed{12, 30, 61}$", True),
        ("12,30,61", True),
        ("1. 12\n2. 30\n3. 61", True),
        ("- 61\n- 12\n- 30", True),
        ("First 12 + 30 + 45 = 87, but then: 12 + 30 + 61 = 03", True),
        ("12 + 30", False),
        ("12 + 30 + 61 + 45", False),
        ("12 + 12 + 79", False),
        ("12 + 31 + 60", False),
        ("12 + 30 + 61 = 03, or 12 + 30 + 45", False),
        ("none", False),
    ],
)
def test_wordings_of_a_sum(wording, right):
    problem = tasks.Problem("search", "", "", "", "", {"numbers": [12, 30, 61, 45, 79], "target": 3})
    assert tasks.verify(problem, wording) is right


def ranked(problem: tasks.Problem) -> list[tuple[str, int]]:
    return Counter(word for line in problem.context.splitlines()[1:] for word in line.split()[1:]).most_common()


@pytest.mark.parametrize("length", [64, 512, 8192])
@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        ("common_words", {}),
        ("common_words", {"top": 8, "ratio": 2}),
        ("frequent_words", {}),
        ("frequent_words", {"top": 1, "alpha": 3.5}),
    ],
)
def test_the_asked_words_are_the_most_frequent(task, parameters, length):
    for seed in range(5):
        problem = tasks.make(task, seed, num_tokens=length, **parameters)
        counts, top = ranked(problem), len(problem.meta["expected"])
        assert {word for word, _ in counts[:top]} == set(problem.meta["expected"])
        assert counts[top - 1][1] > (counts[top][1] if len(counts) > top else 0), "no tie at the border"
        assert f"Which {top} words" in problem.question


def test_common_words_ratio():
    counts = ranked(tasks.make("common_words", 0, top=3, ratio=6, num_tokens=4096))
    assert {n for _, n in counts[:3]} == {6 * counts[3][1]} and len({n for _, n in counts[3:]}) == 1


@pytest.mark.parametrize(
    ("wording", "right"),
    [
        ("able back city", True),
        ("# city back able", True),
        ("The 3 most common words are: able, back and city.", True),
        ("The most common words are **able**, **back**, and **city**.", True),
        ('The most frequent words are "able", "back" and "city".', True),
        ("1. able (32 times)\n2. back (31 times)\n3. city (30 times)", True),
        ("Most common:\n\n- **Able**: 32\n- **Back**: 31\n- **City**: 30", True),
        ("I looked for the most common words.\nable, back, city", True),
        ("able, back", False),
        ("able, back, care", False),
        ("able, back, city, care", False),
        ("The 3 most common words are: able, back, city, care.", False),
        ("", False),
    ],
)
def test_wordings_of_words(wording, right):
    problem = tasks.Problem("common_words", "", "", "", "", {"expected": ["able", "back", "city"]})
    assert tasks.verify(problem, wording) is right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\na\n</think>\nb\n", "b"),
        ("a</think>b", "b"),
        ("b", "b"),
        ("<think>a", ""),
        ("<think>a</think>", ""),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a</think>b<think>c", "b"),
        ("<think>a</think><think>c", ""),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", ["", "L012 : add A:B,C|12;34>A=46\n", "täglich 中文 \t\r\n L0123 AB a1", "  # a  b"])
def test_pieces_lose_nothing(text):
    assert "".join(pieces(text)) == text and tasks.count_tokens(text) == len(pieces(text))
