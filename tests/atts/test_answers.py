"""Finding, spelling and comparing answers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.atts.answers import Boxed, Choice, Tagged, boxes, clusters, math_equal, normal, shuffled_choices


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}.", ["42"]),
        (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
        (r"\boxed{\sqrt{\frac{a}{b^{2}}}} then \boxed{x}", [r"\sqrt{\frac{a}{b^{2}}}", "x"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{\frac{1}{2}", []),  # cut off: not balanced, no answer
        (r"\boxed{}", []),
        (r"\boxed {7}", ["7"]),
        (r"\fbox{3}", ["3"]),
        ("no box", []),
    ],
)
def test_boxes_are_balanced(text, found):
    assert boxes(text) == found and Boxed().find(text, False) == found


@given(st.recursive(st.just("x"), lambda inner: st.builds("{{{}y}}{}".format, inner, inner), max_leaves=12))
@settings(max_examples=60, deadline=None)
def test_any_balanced_content_comes_back_whole(content):
    assert boxes("a " + r"\boxed{" + content + "} b }") == [content]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0.50", "0.5"), ("007", "7"), ("+3", "3"), ("-0", "0"), ("1,234,567", "1234567"), ("$12$", "12"),
        (r"\dfrac{1}{2}", r"\frac12"), (r"\frac{3}{4}", "3/4"), (r"x = 5", "5"), (r"\text{ yes }", "Yes"),
        (r"90^\circ\,", r"90^\circ"), (r"50\%", "50"), ("4.", "4"), (r"\left(1, 2\right)", "(1,2)"), ("2.000", "2"),
    ],
)  # fmt: skip
def test_spellings_of_one_answer(one, other):
    assert normal(one) == normal(other) and Boxed().same(one, other)


@pytest.mark.parametrize(
    ("one", "other"), [("1", "2"), ("12", "1,2"), ("0.5", "5"), ("-3", "3"), ("10", "1"), ("x", "y")]
)
def test_different_answers_stay_different(one, other):
    assert normal(one) != normal(other)


def test_math_verify_knows_what_spelling_does_not():
    assert math_equal(r"\frac{1}{2}", "0.5") and math_equal("2x+x", "3x") and math_equal(r"\sqrt{8}", r"2\sqrt{2}")
    assert not math_equal(r"\frac{1}{2}", "0.6") and not math_equal("", "0")


def test_tagged_answers_are_those_of_finished_chains():
    tagged = Tagged()
    assert tagged.find("<think>\n1\n</think>\n42", True) == ["42"]
    assert tagged.find("<think>\n1\n</think>\n42", False) == []  # more digits may come
    assert tagged.find("<think>\n42", True) == [] and tagged.find("<think></think>\n ", True) == []
    assert tagged.correct("07", 7)


def test_choices():
    choice = Choice()
    assert choice.find(r"\boxed{b}", False) == ["B"] and choice.find(r"\boxed{\text{(C)}}", False) == ["C"]
    assert choice.find("I think the answer is (D).", True) == ["D"]
    assert choice.find("I think the answer is (D).", False) == []
    assert choice.find("the answer is Dutch", True) == []
    assert choice.correct("C", "c") and not choice.same("A", "B")


def test_choices_are_shuffled_with_a_seed():
    choices = [f"choice {i}" for i in range(6)]
    made = [shuffled_choices("Which?", choices, 2, seed, "q1") for seed in range(40)]
    assert made[0] == shuffled_choices("Which?", choices, 2, 0, "q1") != shuffled_choices("Which?", choices, 2, 0, "q2")
    letters = set()
    for prompt, letter in made:
        assert f"{letter}) choice 2" in prompt.splitlines() and sorted(prompt.split("\n")[1:])[0].startswith("A)")
        letters.add(letter)
    assert letters == set("ABCDEF")
    with pytest.raises(ValueError, match="index of the right one"):
        shuffled_choices("Which?", choices, 6, 0, "q")


def test_clusters_vote_together():
    answers = ["1/2", "0.5", "3", "0.5", "3", "half"]
    equal = {("1/2", "0.5"): True, ("1/2", "half"): True}
    assert clusters(answers, equal) == [[0, 1, 3, 5], [2, 4]]
    assert clusters(["b", "a", "a", "b"], {}) == [[0, 3], [1, 2]]  # a tie goes to the earlier
    assert clusters([], {}) == []
