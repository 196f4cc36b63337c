"""Our own engine behind the backend, and the whole of it on the embedded pair."""

import asyncio
import json
import sys

import pytest
from typer.testing import CliRunner

from slipstream import SamplingParams, tasks
from slipstream.atts.backends import Ask, BackendError, LocalBackend
from slipstream.atts.config import ATTS
from slipstream.atts.conformal import Conformal, Controller
from slipstream.atts.events import Decided, Drafted, Ended, TakenOver
from slipstream.atts.pipeline.run import Outcome
from slipstream.atts.report import Cost, Machine, intensity, picture, summary
from slipstream.cli_scale import app
from slipstream.scaling import cost_of, local, open_model, scale, scale_sync


def do(work):
    return asyncio.run(work)


def easy(count, operations=3):
    made = [tasks.make("expression", i, operations=operations) for i in range(count)]
    return [{"id": f"e{i}", "prompt": p.prompt, "answer": p.answer} for i, p in enumerate(made)]


OPTIONS = {"samples": 2, "turns": 8, "draft_tokens": 16, "target_tokens": 16, "answers": "tagged"}


def test_extend_and_score_are_the_generators(draft):
    backend, ids = local(draft), draft.encode(easy(1)[0]["prompt"], chat=True)
    generator = draft.asynchronous()

    async def work():
        turn = await backend.extend(ids, Ask(12, 0.8, 1.0, seed=3, tops=20))
        same = await generator.extend(ids, SamplingParams(max_tokens=12, temperature=0.8, seed=3))
        assert turn.ids == same.token_ids and turn.finish == "length" and 0 <= turn.entropy < 8
        scores = await backend.score([*ids, *turn.ids], len(ids))
        assert len(scores) == 12 and sum(scores) == pytest.approx(turn.logprob, abs=1e-3)
        assert await backend.decode(turn.ids) == draft.codec.decode(turn.ids)
        assert await backend.prompt(easy(1)[0]) == ids and len(turn.first_tops) >= 20

    do(work())


def test_the_end_token_is_cut_off_and_can_be_banned(draft):
    problem = tasks.make("expression", 0, operations=1)
    whole = [*draft.encode(problem.prompt, chat=True), *draft.codec.encode(problem.completion)]

    async def work():
        backend = local(draft)
        turn = await backend.extend(whole, Ask(8))
        assert (turn.ids, turn.tokens, turn.finish) == ([], 0, "stop")
        for temperature in (0.0, 0.8):
            for most in (1, 4):
                banned = await backend.extend(whole, Ask(most, temperature, ban_end=True, seed=5))
                assert 1 <= len(banned.ids) <= most and banned.ids[0] not in draft.spec.eos_token_ids
                assert banned.tokens == len(banned.ids)

    do(work())


def test_what_was_scored_is_not_prefilled_again(target):
    """A rejected turn pays for less than one page; and the chains of a question share their prompt."""
    page = target.options.page_size
    ids = target.encode(tasks.make("expression", 1, operations=20).prompt, chat=True)
    turn = target.codec.encode(tasks.make("expression", 1, operations=20).completion)[: 2 * page]

    async def work():
        backend = local(target)
        await backend.score([*ids, *turn], len(ids))
        before = backend.counters()
        await backend.extend([*ids, *turn], Ask(4))
        after = backend.counters()
        assert after["prefill_tokens"] - before["prefill_tokens"] <= page
        assert after["cached_tokens"] - before["cached_tokens"] >= len(ids) + len(turn) - page
        await backend.extend(ids, Ask(2, seed=1))
        assert backend.counters()["prefill_tokens"] - after["prefill_tokens"] <= page

    do(work())


def test_what_the_engine_refuses_is_a_backend_error(tiny):
    llm = tiny()

    async def work():
        backend = LocalBackend(llm.asynchronous(), None)
        with pytest.raises(BackendError, match="max_model_len") as caught:
            await backend.extend([1] * 400, Ask(2))
        assert caught.value.kind == "refused"
        with pytest.raises(BackendError):
            await backend.score([1, 2], 2)
        with pytest.raises(ValueError, match="prompt_token_ids"):
            await backend.prompt({"prompt": "text"})
        assert await backend.prompt({"prompt_token_ids": [3]}) == [3]
        llm.close()
        with pytest.raises(BackendError) as caught:
            await backend.extend([1], Ask(2))
        assert caught.value.kind == "engine"

    do(work())


def test_a_run_on_the_embedded_pair(draft, target, tmp_path):
    assert local(draft).vocabulary == local(target).vocabulary
    problems = easy(3)
    for problem in problems:
        problem["check"] = lambda answer, want=problem["answer"]: answer == want
    config = ATTS(alpha=0.5, takeover="replace", **OPTIONS)
    outcome = scale_sync(problems, draft=draft, target=target, config=config)
    found = summary(outcome)
    assert found["chains"] == 6 and found["pass@2"] == 1.0 and found["failures"] == {}
    assert found["target_tokens"] > 0 and found["scored_tokens"] > 0
    assert outcome.config.chain_tokens == 2048
    times = intensity(outcome, cost_of(draft), cost_of(target), Machine.measure())
    assert all(value > 0 for name, value in times.items() if name != "sync_s") and times["sync_s"] >= 0
    assert times["r"] == pytest.approx(times["compute_s"] / (times["memory_s"] + times["sync_s"]))
    picture(outcome, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_alpha_one_is_the_target_alone_token_for_token(draft, target):
    config = ATTS(alpha=1.0, temperature=0.0, **{**OPTIONS, "samples": 1})
    outcome = scale_sync(easy(1), draft=draft, target=target, config=config)
    written = [i for e in outcome.events if isinstance(e, TakenOver) for i in e.ids]
    target.close()
    whole = target.generate(
        target.encode(easy(1)[0]["prompt"], chat=True), SamplingParams(temperature=0, max_tokens=128)
    )
    assert written == whole[0].outputs[0].token_ids[:-1]  # without the end token


def test_a_callback_sees_events_and_cancelling_frees_the_engine(draft, target):
    seen = []

    async def work():
        task = asyncio.create_task(
            scale(easy(2), draft=draft, target=target, config=ATTS(**OPTIONS), on_event=seen.append)
        )
        while len(seen) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    do(work())
    assert not any(isinstance(e, Ended) and e.reason == "settled" for e in seen)


def test_models_by_name_directory_and_address():
    from slipstream.atts.servers import OpenAIServer, SGLangServer, VLLMServer

    for address, kind in (
        ("http://a:1", OpenAIServer),
        ("vllm+http://a:1", VLLMServer),
        ("sglang+https://a#m", SGLangServer),
    ):
        assert type(open_model(address)) is kind
    assert open_model("vllm+http://a:1/v1#big").name == "big"
    with pytest.raises(ValueError, match="address begins"):
        open_model("ollama+http://a")
    with pytest.raises(ValueError, match="did you mean"):
        open_model("slipstream-drafft")
    assert open_model(own := object()) is own


def test_intensity_falls_with_waiting():
    from simulated import scale as simulate

    cost, machine = Cost(1e6, 2e6, 100.0), Machine(1e9, 1e9)
    options = {"samples": 8, "turns": 6, "draft_tokens": 20, "target_tokens": 20, "alpha": 0.5, "settle": False,
               "draft_concurrency": 3, "target_concurrency": 2}  # fmt: skip
    found = {}
    for schedule in ("async", "turn"):
        outcome, *_ = simulate(ATTS(schedule=schedule, **options), count=4)
        found[schedule] = intensity(outcome, cost, cost, machine)
    assert found["turn"]["sync_s"] > found["async"]["sync_s"] or found["turn"]["r"] < found["async"]["r"]


def test_intensity_counts_the_work_that_was_done():
    """A turn of 100 tokens that the target writes anew in 10, and one of 10 behind it; a test that read nothing."""
    at = {"question": "q", "sample": 0, "turn": 0, "at_s": 1.0}
    events = [
        Drafted(**at, ids=[], tokens=100, finish="length"),
        Decided(**at, number=0, nll=0.0, alpha=0.5, p=0.1, threshold=0.5, rejected=True),
        TakenOver(**at, ids=[], tokens=10, finish="length"),
        Drafted(**at | {"turn": 1}, ids=[], tokens=10, finish="length"),
    ]
    cost, machine, found = Cost(1.0, 1.0, 1.0), Machine(1.0, 1.0), {}
    for takeover in ("replace", "continue"):
        outcome = Outcome(ATTS(takeover=takeover), Controller(Conformal()).certificate(), events)
        found[takeover] = intensity(outcome, cost, cost, machine)
        assert found[takeover]["compute_s"] == 2 * 120
        assert found[takeover]["r"] == 240 / (found[takeover]["memory_s"] + found[takeover]["sync_s"])
    assert found["replace"]["memory_s"] == 120 + 10 * 10  # weights once a token, and what was before it
    assert found["continue"]["memory_s"] == 120 + 10 * 100 + 10 * 110


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_command_line_end_to_end_and_resume(tmp_path):
    problems = write(tmp_path / "p.jsonl", easy(2, 2))
    log, out, shown = tmp_path / "run.jsonl", tmp_path / "out.json", tmp_path / "a.png"
    flags = ["--samples", "2", "--draft-tokens", "16", "--target-tokens", "16", "--turns", "6", "--device", "cpu",
             "--kv-memory", "64MiB", "--log", str(log), "--json", str(out), "--picture", str(shown)]  # fmt: skip
    done = CliRunner().invoke(app, [problems, *flags])
    assert done.exit_code == 0, done.output
    first = json.loads(out.read_text())
    assert first["questions"] == 2 and first["certificate"]["tests"] == sum(
        '"kind": "decided"' in line for line in log.read_text().splitlines()
    )
    assert "guaranteed: 0.060" in done.output and "target_tokens" in done.output and shown.exists()
    refused = CliRunner().invoke(app, [problems, *flags])
    assert isinstance(refused.exception, ValueError) and "--resume" in str(refused.exception)
    again = CliRunner().invoke(app, ["run", problems, *flags, "--resume"])
    assert again.exit_code == 0 and json.loads(out.read_text())["certificate"] == first["certificate"]
    replayed = CliRunner().invoke(app, ["replay", str(log), "--alpha", "0.3"])
    assert replayed.exit_code == 0
    last = json.loads(replayed.stdout.strip().splitlines()[-1])
    assert last["rate"] == first["certificate"]["rate"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1"),
        (['{"id": "a", "prompt": "x"}', '{"id": "a", "prompt": "y"}'], "line 2: id 'a' is also that of line 1"),
        (['{"id": "a"}'], "line 1: needs an object with exactly one of"),
        (['{"prompt": ""}'], "line 1: prompt must be a non-empty str"),
        (['{"prompt": "x", "choices": ["a", "b"], "answer": "b"}'], "line 1: choices need"),
        ([""], "holds no problems"),
        (['{"messages": ["x"]}'], "line 1: messages are a list of"),
        (['{"prompt_token_ids": [1, true]}'], "line 1: prompt_token_ids are integers"),
        (['{"prompt": "x"}', '{"prompt": "\\ud800"}'], "line 2: 'utf-8' codec can't encode"),
        (["[" * 100_000], "line 1: maximum recursion"),
    ],
)
def test_bad_problem_files_are_named_before_any_model_is_loaded(tmp_path, lines, message, monkeypatch):
    monkeypatch.setattr("slipstream.scaling.LLM", None)
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines) + "\n")
    done = CliRunner().invoke(app, [str(path)])
    assert isinstance(done.exception, ValueError) and message in str(done.exception)


def test_bad_flags_are_refused_before_any_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("slipstream.scaling.LLM", None)
    problems = write(tmp_path / "p.jsonl", easy(1))
    for flags, message in ((["--alpha", "2"], "[0, 1]"), (["--resume"], "--log"), (["--mode", "x"], "mode"),
                           (["--score", "x"], "score")):  # fmt: skip
        done = CliRunner().invoke(app, [problems, *flags])
        assert isinstance(done.exception, ValueError) and message in str(done.exception)


def test_choices_become_letters(tmp_path):
    from slipstream.atts.problems import read_problems

    row = {"prompt": "Which?", "choices": ["no", "yes", "never"], "answer": 1}
    problem = read_problems(write(tmp_path / "p.jsonl", [row]), seed=4)[0]
    assert problem["id"] == "1" and f"{problem['answer']}) yes" in problem["prompt"].splitlines()


def test_symbolic_answers_vote_together():
    """Through the process pool: spelled differently, equal for math-verify."""
    from simulated import Model, problems

    from slipstream.atts.backends import Turn
    from slipstream.atts.pipeline.run import Run

    class Halves(Model):
        def write(self, ids, ask):
            return Turn(list(b"\\boxed{%s}" % (b"\\frac{1}{2}" if ask.seed % 2 else b"0.5")), 3, "stop", -1.0)

    problem = [{**problems(1)[0], "answer": "1/2"}]
    config = ATTS(alpha=0.0, samples=8, symbolic=True, settle=False)
    outcome = asyncio.run(Run(problem, Halves(seconds=0), Halves(seconds=0), config).run())
    answers = {e.answer for e in outcome.events if isinstance(e, Ended)}
    assert answers == {"0.5", r"\frac{1}{2}"} and all(e.correct for e in outcome.events if isinstance(e, Ended))
    assert summary(outcome)["pass@1"] == 1.0 and not [e for e in outcome.events if isinstance(e, Decided)]


def test_engines_of_one_process_take_turns_sooner(monkeypatch):
    set_to = []
    monkeypatch.setattr(sys, "getswitchinterval", lambda: 5e-3)
    monkeypatch.setattr(sys, "setswitchinterval", set_to.append)
    LocalBackend(None)
    monkeypatch.setattr(sys, "getswitchinterval", lambda: 1e-4)
    LocalBackend(None)
    assert set_to == [5e-4, 1e-4]  # what is shorter already stays
