"""The pipeline on simulated models and a virtual clock: order, barriers, limits, failures, answers."""

import asyncio
import collections
import time

import pytest
from simulated import Model, failing, problems, scale

from slipstream.atts.backends import BackendError, Turn, prompt_ids
from slipstream.atts.config import ATTS
from slipstream.atts.events import Decided, Drafted, Ended, Failed, Limited, Looped, TakenOver
from slipstream.atts.pipeline.chain import Context, Gate, Together, repeated_share
from slipstream.atts.pipeline.clock import run_virtual
from slipstream.atts.pipeline.run import Run
from slipstream.atts.report import picture, summary

SMALL = {"samples": 4, "turns": 8, "draft_tokens": 20, "target_tokens": 20, "settle": False, "takeover": "continue"}


def of(outcome, kind):
    return [event for event in outcome.events if isinstance(event, kind)]


def texts(outcome):
    return {(e.question, e.sample, e.turn, e.kind): e.ids for e in outcome.events if isinstance(e, Drafted | TakenOver)}


def test_everything_is_deterministic_under_a_virtual_clock():
    began = time.perf_counter()
    first, seconds, *_ = scale(ATTS(**SMALL))
    again, same, *_ = scale(ATTS(**SMALL))
    assert first.events == again.events and seconds == same > 1.0
    assert time.perf_counter() - began < seconds  # the clock jumps
    assert len(of(first, Ended)) == 12 and summary(first)["chains"] == 12
    assert scale(ATTS(seed=1, **SMALL))[0].events != first.events


def test_rejected_turns_and_no_others_are_continued_behind_the_draft():
    outcome, *_ = scale(ATTS(**SMALL), count=6)
    decided = {(e.question, e.sample, e.turn): e.rejected for e in of(outcome, Decided)}
    taken = {(e.question, e.sample, e.turn) for e in of(outcome, TakenOver)}
    assert taken == {key for key, rejected in decided.items() if rejected} and 0 < len(taken) < len(decided)
    first = {(e.question, e.sample): len(e.ids) for e in of(outcome, Drafted) if e.turn == 0}
    lengths = collections.defaultdict(list)
    for event in outcome.events:
        if isinstance(event, TakenOver) and event.turn == 0:
            lengths[event.question, event.sample].append(len(event.ids))
    assert lengths and all(first[key] == 20 for key in lengths)


def test_alpha_zero_never_asks_the_target_and_alpha_one_never_the_draft():
    outcome, _, _, target = scale(ATTS(alpha=0.0, **SMALL))
    assert [call for call in target.log if call[0] != "open"] == [] and not of(outcome, Decided)
    outcome, _, draft, target = scale(ATTS(alpha=1.0, **SMALL))
    assert [call for call in draft.log if call[0] != "open"] == [] and len(of(outcome, TakenOver)) > 12
    assert not [call for call in target.log if call[0] == "score"]


def test_an_answer_is_looked_for_before_anything_is_scored():
    outcome, *_ = scale(ATTS(**SMALL))
    answered = {(e.question, e.sample, e.turn) for e in of(outcome, Ended) if e.reason == "answer"}
    last = {k for k in answered if k in {(e.question, e.sample, e.turn) for e in of(outcome, TakenOver)}}
    tested = {(e.question, e.sample, e.turn) for e in of(outcome, Decided)}
    assert answered and not (answered - last) & tested
    both, *_ = scale(ATTS(test_answers=True, **SMALL))
    assert len(of(both, Decided)) > len(of(outcome, Decided))
    assert ATTS().tests_answers and not ATTS(takeover="continue").tests_answers  # what is wrong can be written anew


def test_replace_writes_the_rejected_turn_anew():
    outcome, _, _, target = scale(ATTS(**(SMALL | {"takeover": "replace"})))
    prompt = len(problems()[0]["prompt"])
    starts = {call[1] for call in target.log if call[0] == "extend"}
    assert of(outcome, TakenOver) and all((length - prompt) % 20 == 0 for length in starts)
    for end in of(outcome, Ended):
        assert end.reason in ("answer", "turns")


# -- schedules


def run_schedules(**options):
    return {name: scale(ATTS(schedule=name, **(SMALL | options)), count=8) for name in ("async", "question", "turn")}


def test_the_twins_write_the_same_text_and_wait_longer():
    """Same engines, same limits, decisions that do not depend on the order (the static mode's do; a coin's do too).

    With every turn taken over or none, the text is a function of the seeds alone.
    """
    for alpha in (0.0, 1.0):
        runs = run_schedules(alpha=alpha)
        assert texts(runs["async"][0]) == texts(runs["question"][0]) == texts(runs["turn"][0])
    runs = run_schedules(alpha=0.4, mode="per-question", samples=8, draft_concurrency=3, gather=1)
    seconds = {name: run[1] for name, run in runs.items()}
    assert seconds["async"] < seconds["question"] <= seconds["turn"]
    waits = {name: sum(e.wait_s for e in of(run[0], Decided)) for name, run in runs.items()}
    assert waits["turn"] > waits["question"] == 0  # there are places for all scores


def test_the_turn_barrier_keeps_stages_apart():
    outcome, *_ = scale(ATTS(schedule="turn", draft_concurrency=2, **SMALL), count=2)
    phase = 0
    for event in outcome.events:
        if event.question == "q0" and isinstance(event, Drafted | Decided | TakenOver):
            now = 3 * event.turn + (Drafted, Decided, TakenOver).index(type(event))
            assert now >= phase, "a chain went on before the others of its question had arrived"
            phase = now
    questions = [e.question for e in outcome.events]
    assert questions == sorted(questions)


def test_limits_hold_and_are_used():
    _, _, draft, target = scale(
        ATTS(draft_concurrency=3, target_concurrency=2, score_concurrency=1, window=9, alpha=0.5, **SMALL), count=6
    )
    assert draft.most == 3 and target.most == 3  # one scores while two write


def test_the_window_limits_the_chains_in_flight():
    outcome, *_ = scale(ATTS(window=2, **SMALL), count=4)
    live = 0
    for event in sorted(outcome.events, key=lambda e: (e.at_s, not isinstance(e, Ended))):
        live += (isinstance(event, Drafted) and event.turn == 0) - isinstance(event, Ended)
        assert live <= 2


def test_the_target_works_on_many_at_once_while_drafts_wait_for_a_place():
    """It begins together; whatever the limits are, nobody waits for others who never come."""
    few = {"draft_concurrency": 4, "target_concurrency": 16, "alpha": 0.3, "gather": 1} | SMALL
    runs = {n: scale(ATTS(**(few | {"gather": n, "window": 24})), count=12) for n in (1, 8, 1000)}
    starts = {n: {round(e.at_s - e.busy_s, 6) for e in of(run[0], TakenOver)} for n, run in runs.items()}
    assert 2 * max(len(starts[8]), len(starts[1000])) < len(starts[1])
    assert max(seconds for _, seconds, *_ in runs.values()) < 1.2 * runs[1][1]  # a device each: little is lost
    for window in (1, 2, 5):
        for options in ({}, {"score_concurrency": 1, "target_concurrency": 1}, {"alpha": 1.0}, {"schedule": "turn"}):
            outcome, *_ = scale(ATTS(**(few | {"gather": 16, "window": window} | options)), count=3)
            assert len(of(outcome, Ended)) == 12 and not of(outcome, Failed)


def test_who_is_cancelled_is_not_counted_among_those_who_wait_together():
    async def work():
        over, together = False, Together(3, lambda: over)
        waiting = [asyncio.create_task(together.join()) for _ in range(2)]
        await asyncio.sleep(1)
        waiting[0].cancel()
        waiting.append(asyncio.create_task(together.join()))
        await asyncio.sleep(1)
        assert not any(task.done() for task in waiting[1:])
        over = True
        together.look()
        await asyncio.gather(*waiting[1:])

    run_virtual(work())


def test_a_cancelled_party_does_not_hold_the_gate():
    async def work():
        gate = Gate(3)
        arrivals = [asyncio.create_task(gate.arrive()) for _ in range(2)]
        await asyncio.sleep(1)
        arrivals[0].cancel()
        await asyncio.sleep(1)
        gate.leave()
        assert not arrivals[1].done()
        await gate.arrive()
        await arrivals[1]

    run_virtual(work())


def test_a_stuck_run_is_an_error_not_a_silence():
    async def stuck():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="stuck"):
        run_virtual(stuck())


# -- failures


@pytest.mark.parametrize("policy", ["takeover", "accept", "drop"])
@pytest.mark.parametrize("kind", ["http 500", "timeout", "empty", "connection"])
def test_a_failed_score_is_an_event_with_a_policy(policy, kind):
    target = Model("target", fail=failing(kind)("score", kind))
    outcome, *_ = scale(ATTS(on_failure=policy, **SMALL), target=target)
    failures = of(outcome, Failed)
    assert failures and {(e.stage, e.policy) for e in failures} == {("score", policy)}
    assert all(e.what.startswith(kind) for e in failures) and not of(outcome, Decided)
    assert len(of(outcome, TakenOver)) == (len(failures) if policy == "takeover" else 0)
    assert {e.reason for e in of(outcome, Ended)} == ({"failed"} if policy == "drop" else {"answer"})
    assert outcome.certificate.tests == 0 and str(failures[0].policy) in str(summary(outcome)["failures"])


def test_what_failed_is_counted_beside_the_certificate():
    """A third of the scores fail and are taken over: the summary says what the certificate does not."""
    target = Model("target", fail=failing("", every=3)("score", "http 500"))
    outcome, *_ = scale(ATTS(on_failure="takeover", **SMALL), count=12, target=target)
    failed, decided, found = of(outcome, Failed), of(outcome, Decided), summary(outcome)
    assert found["untested"] == {"takeover": len(failed)} and outcome.certificate.tests == len(decided)
    everywhere = (sum(e.rejected for e in decided) + len(failed)) / (len(decided) + len(failed))
    assert found["rate_with_untested"] == pytest.approx(everywhere) and everywhere > outcome.certificate.rate + 0.15
    assert len(of(outcome, TakenOver)) == sum(e.rejected for e in decided) + len(failed)
    fine = summary(scale(ATTS(**SMALL))[0])
    assert fine["untested"] == {} and fine["rate_with_untested"] is None


def test_nan_is_a_failure_and_infinity_is_a_score():
    nan, *_ = scale(ATTS(score=lambda view: float("nan"), **SMALL))
    assert {e.what.split(":")[0] for e in of(nan, Failed)} == {"nan"} and not of(nan, Decided)
    infinite, *_ = scale(ATTS(score=lambda view: float("inf"), **SMALL))
    assert not of(infinite, Failed) and {e.nll for e in of(infinite, Decided)} == {float("inf")}


def test_a_slow_scorer_times_out():
    class Slow(Model):
        async def score(self, ids, start):
            await asyncio.sleep(100)

    outcome, *_ = scale(ATTS(timeout_s=5.0, **SMALL), target=Slow("target"))
    assert of(outcome, Failed) and all(e.what.startswith("timeout") for e in of(outcome, Failed))


def test_a_failed_draft_or_take_over_ends_its_chain_visibly():
    outcome, *_ = scale(ATTS(**SMALL), draft=Model("draft", fail=failing("", every=5)("extend", "engine")))
    assert {e.stage for e in of(outcome, Failed)} == {"draft"}
    assert sum(e.reason == "failed" for e in of(outcome, Ended)) == len(of(outcome, Failed)) > 0
    for policy, stage in (("takeover", "failed"), ("accept", "answer")):
        target = Model("target", fail=failing("")("extend", "engine"))
        outcome, *_ = scale(ATTS(**(SMALL | {"on_failure": policy, "takeover": "replace"})), target=target)
        assert {e.stage for e in of(outcome, Failed)} == {"take-over"}
        ended = {(e.question, e.sample): e.reason for e in of(outcome, Ended)}
        assert {ended[e.question, e.sample] for e in of(outcome, Failed)} == {stage}


def test_capacity_is_a_hard_limit_and_says_so():
    outcome, _, _, target = scale(ATTS(alpha=0.9, capacity=2, target_concurrency=1, samples=8, turns=8, draft_tokens=20,
                                       target_tokens=20, settle=False))  # fmt: skip
    limited = of(outcome, Limited)
    assert limited and {e.reason for e in limited} == {"capacity"}
    rejected = {(e.question, e.sample, e.turn) for e in of(outcome, Decided) if e.rejected}
    taken = {(e.question, e.sample, e.turn) for e in of(outcome, TakenOver)}
    assert taken | {(e.question, e.sample, e.turn) for e in limited} == rejected


def test_loops_are_tested_with_an_infinite_score():
    class Looping(Model):
        def write(self, ids, ask):
            turn = super().write(ids, ask)
            return turn if turn.finish == "stop" else Turn(list(b"again " * 4), 24, "length", 0.0, 0.0)

    outcome, _, _, target = scale(ATTS(**(SMALL | {"draft_tokens": 24})), draft=Looping("draft"))
    loops = {(e.question, e.sample, e.turn) for e in of(outcome, Looped)}
    assert loops and not [call for call in target.log if call[0] == "score"]
    assert all(e.nll == float("inf") for e in of(outcome, Decided) if (e.question, e.sample, e.turn) in loops)
    assert abs(outcome.certificate.rate - 0.3) < 0.1  # a loop is a test like any other: the rate still holds
    assert repeated_share(list(b"again " * 4), 8) > 0.5 > repeated_share(list(range(50)), 8)
    assert repeated_share([1] * 50, 0) == 0.0


def test_an_empty_take_over_is_retried_with_the_end_banned_then_marked():
    class Silent(Model):
        stubborn = False

        def write(self, ids, ask):
            return Turn([], 0, "stop") if self.stubborn or not ask.ban_end else super().write(ids, ask)

    outcome, *_ = scale(ATTS(**SMALL), target=Silent("target"))
    assert of(outcome, TakenOver) and all(e.retried and e.tokens for e in of(outcome, TakenOver))
    stubborn = Silent("target")
    stubborn.stubborn = True
    outcome, *_ = scale(ATTS(**SMALL), target=stubborn)
    marked = of(outcome, TakenOver)
    assert marked and all(e.retried and e.tokens == 0 for e in marked)
    assert summary(outcome)["empty_take_overs"] == len(marked)


def test_a_draft_that_writes_nothing_is_not_accepted_silently():
    class Mute(Model):
        def write(self, ids, ask):
            return Turn([], 0, "stop", 0.0)

    outcome, *_ = scale(ATTS(**SMALL), draft=Mute("draft"))
    assert of(outcome, Failed) and {e.what.split(":")[0] for e in of(outcome, Failed)} == {"empty"}
    assert of(outcome, TakenOver)


def test_a_bare_end_token_after_an_answer_is_no_turn_to_test():
    """The answer came with the turn before, cut right behind it; the next turn is the end token alone."""

    class Late(Model):
        def write(self, ids, ask):
            turn = super().write(ids, ask)
            if bytes(ids).endswith(b"}"):
                return Turn([], 0, "stop", 0.0)
            return Turn(turn.ids, turn.tokens, "length", turn.logprob)

    options = SMALL | {"takeover": "replace", "min_turns": 5}
    outcome, *_ = scale(ATTS(**options), draft=Late("draft"), target=Late("target"))
    assert any(not e.ids for e in of(outcome, Drafted)) and not of(outcome, Failed)
    assert {e.reason for e in of(outcome, Ended)} == {"answer"}


# -- budgets


def test_a_token_budget_is_kept_and_used():
    outcome, *_ = scale(ATTS(token_budget=1000, window=8, **SMALL), count=24)
    used = summary(outcome)["target_tokens"]
    assert 700 < used <= 1000 and outcome.certificate.holds
    assert {e.reason for e in of(outcome, Limited)} <= {"budget"}
    plenty, *_ = scale(ATTS(token_budget=10**6, **SMALL), count=3)
    assert plenty.certificate.rate == 1.0


def test_a_cost_budget_counts_what_the_draft_and_the_scores_cost():
    options = SMALL | {"window": 8, "cost_budget": 2500.0}
    outcome, *_ = scale(ATTS(prices="0.1,0.2,1", **options), count=24)
    found = summary(outcome)
    drafting = 0.1 * found["draft_tokens"] + 0.2 * found["scored_tokens"]
    assert drafting > 100 and 1500 < found["target_tokens"] + drafting <= 2500
    dearer, *_ = scale(ATTS(prices="0.1,0.2,3", **options), count=24)
    assert 0 < summary(dearer)["target_tokens"] < found["target_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": 19}, "does not pay for one take-over"),
        ({"alpha": 1.2}, "alpha"),
        ({"samples": 0}, "samples must be an integer of at least 1"),
        ({"token_budget": 100, "cost_budget": 5.0}, "not both"),
        ({"prices": "1,2"}, "three numbers"),
        ({"prices": "nan,0,1", "cost_budget": 9.0}, "NaN"),
        ({"score": "perplexty"}, "did you mean 'perplexity'"),
        ({"takeover": "contine"}, "did you mean 'continue'"),
        ({"loop_share": 0.0}, "loop_share"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message):
    draft, target = Model(), Model()
    with pytest.raises(ValueError, match=message):
        Run(problems(), draft, target, ATTS(**(SMALL | options)))
    assert draft.log == target.log == []


def test_a_run_needs_problems_with_ids_of_their_own():
    for wrong, message in (([], "no problems"), (problems(1) * 2, "same id"), ([{"prompt": "x"}], "needs an id")):
        with pytest.raises(ValueError, match=message):
            Run(wrong, Model(), Model())
    with pytest.raises(ValueError, match="problem 'a' has no prompt"):
        prompt_ids({"id": "a"}, None, chat=False)


def test_a_target_that_cannot_score_is_refused_for_scores_that_read_it():
    class Blind(Model):
        can_score = False

    with pytest.raises(ValueError, match="choose --score draft, entropy or grade"):
        scale(ATTS(**SMALL), target=Blind("target"))
    outcome, _, draft, target = scale(ATTS(score="draft", **SMALL), target=Blind("target"))
    assert of(outcome, Decided) and not [call for call in target.log if call[0] == "score"]
    assert draft.closed == target.closed == 1


# -- answers


def test_a_settled_majority_cancels_the_rest():
    draft = Model("draft", right=1.0)
    outcome, *_ = scale(ATTS(alpha=0.0, samples=8, turns=8, draft_tokens=20, draft_concurrency=2), draft=draft)
    ends = of(outcome, Ended)
    assert len(ends) == 24 and collections.Counter(e.question for e in ends) == {"q0": 8, "q1": 8, "q2": 8}
    settled = [e for e in ends if e.reason == "settled"]
    assert settled and all(e.answer is None for e in settled)
    for question in ("q0", "q1", "q2"):
        assert sum(e.question == question and e.reason == "answer" for e in ends) >= 5
    assert outcome.majority["q0"] == ("42", True) and draft.running == 0


def test_a_close_vote_is_not_settled():
    outcome, *_ = scale(ATTS(alpha=0.0, samples=3, turns=8, draft_tokens=20, window=1), draft=Model("draft", right=0.0))
    ends = collections.defaultdict(list)
    for end in of(outcome, Ended):
        ends[end.question].append(end)
    for found in ends.values():
        if [e.answer for e in found[:2]] != [found[0].answer] * 2:
            assert found[2].reason == "answer"


def test_min_turns_agreement_and_nudge():
    options = SMALL | {"turns": 12, "alpha": 0.0}
    outcome, *_ = scale(ATTS(min_turns=6, nudge=" Wait,", **options))
    assert all(e.turn >= 5 for e in of(outcome, Ended))
    outcome, *_ = scale(ATTS(agreement=2, nudge=" Wait,", **options), draft=Model("draft", right=1.0))
    assert {(e.turn, e.reason) for e in of(outcome, Ended)} == {(4, "answer")}


def test_pass_and_majority_are_counted_apart():
    outcome, *_ = scale(ATTS(alpha=0.0, **SMALL), count=20, draft=Model("draft", right=0.55))
    found = summary(outcome)
    ends = collections.defaultdict(list)
    for end in of(outcome, Ended):
        ends[end.question].append(end.correct)
    assert found["pass@1"] == pytest.approx(sum(map(sum, ends.values())) / 80)
    assert found["pass@4"] == sum(map(any, ends.values())) / 20
    assert found["pass@1"] < found["maj@4"] < found["pass@4"]


def test_of_equal_votes_the_first_sample_has_it_whoever_came_first():
    run, at = Run(problems(1), Model(), Model(), ATTS(samples=2)), {"question": "q0", "turn": 0, "at_s": 0.0}
    run._ended["q0"] = [Ended(**at, sample=sample, reason="answer", answer=answer, correct=answer == "42")
                        for sample, answer in ((1, "7"), (0, "42"))]  # fmt: skip
    assert asyncio.run(run._majority("q0")) == ("42", True)


def test_a_tokenizer_that_fails_ends_its_chain_visibly():
    class Mute(Model):
        async def decode(self, ids):
            await self._work(("decode",), 0.0)
            return await super().decode(ids)

    outcome, *_ = scale(ATTS(**SMALL), draft=Mute("draft", fail=failing("", after=9, every=5)("decode", "http 500")))
    failed = of(outcome, Failed)
    assert failed and {(e.stage, e.policy, e.what) for e in failed} == {("text", "drop", "http 500: as ordered")}
    reasons = [e.reason for e in of(outcome, Ended)]
    assert len(reasons) == 12 and 0 < reasons.count("failed") == len(failed) < 12


def test_a_picture_takes_any_name(tmp_path):
    named = [p | {"id": rf"$\frac_{p['id']}$ <é>"} for p in problems(2)]
    outcome, _ = run_virtual(Run(named, Model("draft"), Model("target"), ATTS(**SMALL)).run())
    picture(outcome, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


# -- what both models read


class Letters(Model):
    """A vocabulary of its own: ids are code points above 1000, so that a mix-up cannot go unseen."""

    def __init__(self, name):
        super().__init__(name, vocabulary=name)

    async def prompt(self, problem):
        return [1] + await self.encode(problem["prompt"])  # a begin-of-sequence token, once

    async def encode(self, text):
        return [1000 + ord(c) for c in text]

    async def decode(self, ids):
        return "".join(chr(i - 1000) for i in ids if i > 1000)


def test_two_vocabularies_read_only_the_new_text_behind_what_is_there():
    async def work():
        bytes_, letters = Model("draft"), Letters("target")
        problem = {"prompt": "two two?"}
        context = Context([bytes_, letters], [await bytes_.prompt(problem), await letters.prompt(problem)])
        await context.push(0, list(b" two two "))  # text that was there before
        await context.push(1, await letters.encode("and "))
        await context.push(0, list("tw\u00e9".encode())[:-1])  # cut inside a character: that token is given back
        assert context.text == " two two and tw"
        assert bytes(context.ids[0]).decode() == "two two?" + context.text
        assert context.ids[1] == [1] + await letters.encode("two two?" + context.text)
        mark = context.mark()
        await context.push(0, list("\u00e9!".encode()))
        assert context.text.endswith("tw\u00e9!")
        context.reset(mark)
        assert context.text == " two two and tw" and bytes(context.ids[0]).decode() == "two two? two two and tw"

    run_virtual(work())


def test_one_vocabulary_keeps_half_a_character_for_the_other_to_finish():
    async def work():
        model = Model()
        context = Context([model, model], [list(b"?")] * 2)
        first, second = list("\u00e9".encode())
        await context.push(0, [97, first])
        assert context.text == "" and context.ids[0] is context.ids[1]
        await context.push(1, [second, 98])
        assert context.text == "a\u00e9b" and context.ids[0] == list("?a\u00e9b".encode())

    run_virtual(work())


def test_a_whole_run_across_two_vocabularies():
    class Target(Letters):
        def write(self, ids, ask):
            turn = Model.write(self, [i - 1000 for i in ids if i > 1000], ask)
            turn.ids = [i + 1000 for i in turn.ids]
            return turn

        async def score(self, ids, start):
            return await super().score([i % 256 for i in ids], start)

    outcome, _, _, target = scale(ATTS(alpha=0.5, **SMALL), target=Target("target"))
    assert not of(outcome, Failed) and {e.reason for e in of(outcome, Ended)} == {"answer"}
    prompt = 1 + len(problems()[0]["prompt"])
    scored = [call for call in target.log if call[0] == "score"]
    assert min(start for _, _, start in scored) == prompt  # the first token of the first turn is scored
    assert all(length - start == 20 for _, length, start in scored)


def test_seeds_do_not_depend_on_the_order():
    wide, *_ = scale(ATTS(alpha=0.0, **SMALL))
    narrow, *_ = scale(ATTS(alpha=0.0, window=1, draft_concurrency=1, **SMALL))
    assert texts(wide) == texts(narrow)


def test_backend_errors_have_a_kind():
    assert BackendError("nan", "x").kind == "nan"
