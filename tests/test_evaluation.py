"""Evaluation: cells from text, answers that are kept and resumed, seeds, and the numbers of the table."""

import json

import pytest

from slipstream import SamplingParams, tasks
from slipstream.evaluation import Answer, Cell, parse_cell, prompt_ids, read_log, run, split_prompt, summary

SHORT = [Cell("program", (("steps", 3),), 2), Cell("needle_single", (("num_tokens", 200),), 2)]


def answer(cell="a", index=0, correct=(True,), **given):
    known = {"finish": ["stop"] * len(correct), "prompt_tokens": 10, "output_tokens": 4, "ttft_s": 0.5, "tpot_s": 0.01}
    return Answer(f"{cell}-{index}", cell, index, list(correct), **(known | given))


def facts(answers):
    """An answer without its timings."""
    return [(a.key, a.cell, a.index, a.correct, a.finish, a.prompt_tokens, a.output_tokens) for a in answers]


# cells


@pytest.mark.parametrize("text, length, name, parameters", [
    ("program", None, "program", {}),
    (" program:steps=50 ", None, "program", {"steps": 50}),
    ("program:steps=50:order=random", 2048, "program", {"steps": 50, "order": "random"}),
    ("frequent_words:alpha=1.5:top=2", 512, "frequent_words", {"num_tokens": 512, "alpha": 1.5, "top": 2}),
    ("frequent_words:alpha=15e-1", None, "frequent_words", {"alpha": 1.5}),
    ("needle_multikey", 4096, "needle_multikey", {"num_tokens": 4096}),
    ("needle_single:num_tokens=300", 4096, "needle_single", {"num_tokens": 300}),
])  # fmt: skip
def test_parse_cell(text, length, name, parameters):
    cell = parse_cell(text, length, 7)
    assert (cell.task, dict(cell.parameters), cell.samples) == (name, parameters, 7)
    assert [type(v) for v in dict(cell.parameters).values()] == [type(v) for v in parameters.values()]
    assert cell.problem(0, 0).prompt


@pytest.mark.parametrize("text, samples, words", [
    ("progam", 5, "unknown task 'progam'; did you mean 'program'?"),
    ("program:steps", 5, "cannot read 'steps' in 'program:steps': write task:parameter=value"),
    ("program:stepz=5", 5, "task 'program' has no parameter 'stepz'; did you mean 'steps'?"),
    ("program", 0, "samples must be at least 1, got 0"),
])  # fmt: skip
def test_bad_cells(text, samples, words):
    with pytest.raises(ValueError) as caught:
        parse_cell(text, None, samples)
    assert words in str(caught.value)


def test_names_and_seeds_of_problems():
    cell = parse_cell("program:steps=5", None, 3)
    assert cell.name == "program steps=5"
    prompts = [cell.problem(index, seed).prompt for seed in (0, 1) for index in range(3)]
    assert len(set(prompts)) == 6
    assert cell.problem(2, 1) == parse_cell("program:steps=5", None, 3).problem(2, 1)


def test_a_protocol_is_part_of_the_name():
    assert parse_cell("program:steps=5", None, 3, "B").name == "program steps=5 protocol=B"
    with pytest.raises(ValueError, match="protocol must be A .* or B .*, not 'C'"):
        parse_cell("program", None, 3, "C")


# prompts of protocol B


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_split_prompt_is_the_same_prompt(draft, task):
    problem = tasks.make(task, 3)
    split, ids = split_prompt(draft, problem), prompt_ids(draft, problem)
    assert split["prompt_token_ids"] == ids
    tokenizer = draft.codec.tokenizer
    head, tail = (tokenizer.decode(part) for part in (ids[: split["dense_tokens"]], ids[split["dense_tokens"] :]))
    assert head == "<|im_start|>user\n" + problem.context
    assert tail == problem.question + "<|im_end|>\n<|im_start|>assistant\n"


def test_a_token_across_the_border_is_not_dense(draft):
    """Only tokens that lie entirely before the question are."""
    whole = tasks.make("needle_single", 0, num_tokens=200)
    cut = tasks.Problem(whole.task, whole.prompt[:-10], whole.prompt[-10:], whole.answer, whole.completion)
    split, text = split_prompt(draft, cut), "<|im_start|>user\n" + cut.context
    dense = draft.codec.tokenizer.decode(split["prompt_token_ids"][: split["dense_tokens"]])
    assert text.startswith(dense) and 0 < len(text) - len(dense) < 10


def test_protocol_b_refuses_what_it_cannot_split(draft, monkeypatch):
    problem = tasks.make("needle_single", 0, num_tokens=200)
    monkeypatch.setattr(draft.codec.tokenizer, "chat_template", "{{ messages[0]['content'] | upper }}")
    with pytest.raises(ValueError, match="the chat template of slipstream-draft changes the prompt"):
        split_prompt(draft, problem)
    monkeypatch.setattr(draft.codec, "tokenizer", object())
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        split_prompt(draft, problem)


def test_full_attention_answers_alike_by_both_protocols(draft):
    by_a, by_b = (run(draft, [Cell("needle_single", (("num_tokens", 200),), 2, p)], keep_text=True) for p in "AB")
    assert [a.texts for a in by_a] == [b.texts for b in by_b] and by_a[0].key != by_b[0].key


def test_a_cell_may_bound_its_chains(draft):
    bounded = Cell("program", (("steps", 3),), 1, max_tokens=7)
    (short,), (whole,) = run(draft, [bounded]), run(draft, [Cell("program", (("steps", 3),), 1)])
    assert (short.output_tokens, short.finish) == (7, ["length"]) and whole.output_tokens > 7
    assert short.key != whole.key


# runs


def test_a_run_verifies_every_problem_in_order(draft):
    seen = []
    answers = run(draft, SHORT, progress=lambda *news: seen.append(news), keep_text=True)
    assert [(a.cell, a.index) for a in answers] == [(c.name, i) for c in SHORT for i in range(2)]
    problems = [cell.problem(i, 0) for cell in SHORT for i in range(2)]
    assert [a.correct for a in answers] == [
        [tasks.verify(p, a.texts[0])] for p, a in zip(problems, answers, strict=True)
    ]
    assert all(a.correct == [True] for a in answers[2:])  # a draft finds one needle
    assert [news[:2] for news in seen] == [(i, 4) for i in range(1, 5)]
    assert all(a.ttft_s > 0 and a.tpot_s > 0 and a.finish == ["stop"] for a in answers)
    assert facts(run(draft, SHORT)) == facts(answers)
    other = run(draft, SHORT, seed=1)
    assert {a.key for a in other}.isdisjoint(a.key for a in answers)


def test_sampled_chains_have_seeds_of_their_own(draft):
    params = SamplingParams(n=2, temperature=5.0, seed=5, max_tokens=12)
    cells = [Cell("program", (("steps", 3),), 2)]
    first = run(draft, cells, params=params, keep_text=True)
    assert len({text for a in first for text in a.texts}) == 4 and all(len(a.correct) == 2 for a in first)
    assert [a.texts for a in run(draft, cells, params=params, keep_text=True)] == [a.texts for a in first]
    own = SamplingParams(temperature=5.0, seed=5 + 1 * 2 + 1, max_tokens=12)  # problem 1, chain 1
    prompt = draft.encode(cells[0].problem(1, 0).prompt, chat=True)
    assert draft.generate(prompt, own)[0].outputs[0].text == first[1].texts[1]


def test_resume_computes_only_what_is_missing(draft, tmp_path):
    log = tmp_path / "deep" / "answers.jsonl"
    whole = run(draft, SHORT, log=log)
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    log.write_text("".join(lines[:2]) + lines[2][:37])  # interrupted in the middle of a line
    before, seen = draft.stats()["finished_requests"], []
    again = run(draft, SHORT, log=log, progress=lambda *news: seen.append(news))
    assert draft.stats()["finished_requests"] - before == 2 and seen[0] == (2, 4, "resumed")
    assert facts(again) == facts(whole)
    assert log.read_text().splitlines(keepends=True)[:2] == lines[:2] and len(read_log(log)) == 4
    before = draft.stats()["finished_requests"]
    assert facts(run(draft, SHORT, log=log)) == facts(whole)
    assert draft.stats()["finished_requests"] == before
    more = run(draft, [Cell("program", (("steps", 3),), 3)], log=log)  # another run shares what it can
    assert draft.stats()["finished_requests"] == before + 1 and facts(more)[:2] == facts(whole)[:2]
    run(draft, SHORT, log=log, params=SamplingParams(temperature=0, max_tokens=5))  # other settings: all anew
    assert draft.stats()["finished_requests"] == before + 5


# logs


def write(path, *parts):
    path.write_text("".join(parts))
    return path


def line(index):
    return json.dumps(vars(answer(index=index))) + "\n"


def test_a_missing_or_empty_log(tmp_path):
    assert read_log(tmp_path / "none.jsonl") == [] == read_log(write(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize("kept", [1, 5, 60, -1])
def test_a_cut_last_line_is_dropped(tmp_path, kept):
    """Even one that lacks only its newline: the next answer must not be written onto it."""
    log = write(tmp_path / "log.jsonl", line(0), line(1), line(2)[:kept])
    assert read_log(log) == [answer(index=0), answer(index=1)]
    assert log.read_text() == line(0) + line(1)


@pytest.mark.parametrize("bad", ["{}\n", "[1]\n", "\n", '{"key": "a"\n', '{"key": 1, "colour": 2}\n'])
def test_a_corrupt_line_is_named(tmp_path, bad):
    log = write(tmp_path / "log.jsonl", line(0), bad, line(1))
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not an answer of an evaluation"):
        read_log(log)
    assert log.read_text() == line(0) + bad + line(1)


def test_somebody_elses_file_is_left_alone(tmp_path):
    notes = write(tmp_path / "notes.txt", "buy milk")
    with pytest.raises(ValueError, match=r"notes\.txt, line 1: not an answer"):
        read_log(notes)
    assert notes.read_text() == "buy milk"


# numbers


def test_summary():
    answers = [
        answer("a", 0, [True, False], ttft_s=0.1, tpot_s=0.01, finish=["stop", "length"], prompt_tokens=10),
        answer("b", 0, [False], ttft_s=None, tpot_s=None, output_tokens=9),
        answer("a", 1, [False, False], ttft_s=0.3, tpot_s=None, finish=["length", "length"], prompt_tokens=15),
        answer("a", 2, [True, True], ttft_s=0.2, tpot_s=0.03, prompt_tokens=20, output_tokens=10),
    ]
    first, second = summary(answers)
    assert first == {
        "cell": "a", "problems": 3, "accuracy": pytest.approx(0.5), "stderr": pytest.approx(0.5 / 3**0.5),
        "cut_off": 3, "prompt_tokens": 15, "output_tokens": 6, "pass@2": pytest.approx(2 / 3),
        "ttft_p50_ms": pytest.approx(200), "ttft_p99_ms": pytest.approx(300),
        "tpot_p50_ms": pytest.approx(10), "tpot_p99_ms": pytest.approx(30),
    }  # fmt: skip
    assert second == {
        "cell": "b", "problems": 1, "accuracy": 0, "stderr": 0, "cut_off": 0, "prompt_tokens": 10, "output_tokens": 9,
    }  # fmt: skip
    assert summary([]) == []


def test_percentiles_of_many():
    (row,) = summary([answer(index=i, ttft_s=i / 1000, tpot_s=None) for i in reversed(range(101))])
    assert row["ttft_p50_ms"] == pytest.approx(50) and row["ttft_p99_ms"] == pytest.approx(99)
    assert "tpot_p50_ms" not in row
