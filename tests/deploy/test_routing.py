"""Chains of one question go where their prompt's keys and values are, unless that replica has too much to do."""

import random

import pytest

pytest.importorskip("pydantic", reason="needs the extra [serve]")
from slipstream.deploy.routing import Router, marks  # noqa: E402

QUESTIONS = [[random.Random(i).randrange(1000) for _ in range(120)] for i in range(6)]


def shared(a, b):
    return sum(x == y for x, y in zip(a, b, strict=False))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 5000])
def test_prompts_that_begin_alike_share_marks(length):
    ids = [i * 7 % 1000 for i in range(length)]
    text = "x" * (4 * length - 1) + "y"
    for prompt, longer, other in ((ids, [*ids, 5], [*ids[:-1], 999]), (text, text + "z", text[:-1] + "z")):
        own = marks(prompt)
        assert own == marks(prompt) and len(own) == len(set(own)) <= 60
        assert shared(own, marks(longer)) >= len(own) - 1 and shared(own, marks(other)) == len(own) - 1
        assert not set(own) & set(marks(prompt, salt="s"))
    whole = marks(ids)
    assert marks([ids, [1]]) == whole and marks([text, "b"]) == marks(text)


def test_what_is_no_prompt_is_the_replicas_to_refuse():
    for value in (None, [], 3, [1, "a"], [-1], [2**40], ["\ud800"], {"a": 1}, [True]):
        assert isinstance(marks(value), list)
    talk = [{"role": "user", "content": "a" * 100}]
    assert shared(marks(talk), marks([*talk, {"role": "assistant", "content": "b"}])) >= 1


def test_a_question_stays_where_it_is():
    router, load = Router(), {"a": 0, "b": 0, "c": 0}
    home = {}
    for turn in range(5):
        for i, question in enumerate(QUESTIONS):
            chosen = router.choose(load, marks(question + [turn] * 20 * turn))
            assert home.setdefault(i, chosen) == chosen
            load[chosen] += 1 if turn == 0 else 0
    assert set(home.values()) == {"a", "b", "c"} and (router.hits, router.misses) == (24, 6)


def test_a_full_home_is_left_and_the_prompt_is_then_in_two_places():
    router, (question, *_) = Router(patience=2, slack=4), QUESTIONS
    assert router.choose({"a": 0, "b": 1}, marks(question)) == "a"
    assert router.choose({"a": 6, "b": 1}, marks(question)) == "a"
    assert router.choose({"a": 7, "b": 1}, marks(question)) == "b"
    assert router.choose({"a": 2, "b": 3}, marks(question)) == "a"
    assert router.choose({"a": 3, "b": 2}, marks(question)) == "b"
    router.forget("b")
    assert router.choose({"a": 3, "b": 2}, marks(question)) == "a"
    assert router.choose({"b": 9}, marks(question)) == "b"  # whoever else is there


def test_a_common_beginning_draws_not_all_to_one_replica():
    """Questions behind the same template of 200 tokens, 12 of 4 chains at once, over three replicas."""
    router, load, template = Router(), {"a": 0, "b": 0, "c": 0}, list(range(200))
    places = []
    for question in range(12):
        chosen = [router.choose(load, marks(template + [question] * 100)) for _ in range(4)]
        for name in chosen:
            load[name] += 1
        places.append(set(chosen))
    assert max(load.values()) <= 2 * min(load.values()) + 5
    assert sum(len(place) for place in places) <= 20  # most questions are in one place, some are split


def test_idle_replicas_take_turns():
    router, idle = Router(), {"a": 0, "b": 0, "c": 0}
    assert [router.choose(idle, marks([i] * 40)) for i in range(6)] == ["a", "b", "c"] * 2
    assert router.choose(idle, []) == "a" and router.choose({"b": 0, "c": 0}, []) == "b"


def test_the_table_is_bounded():
    router = Router(size=40)
    for question in QUESTIONS * 3:
        router.choose({"a": 0}, marks(question))
    assert len(router._holders) == 40
    router.choose({"a": 5, "b": 0}, marks(QUESTIONS[-1]))
    assert router.choose({"a": 5, "b": 0}, marks(QUESTIONS[-1])) == "b"
