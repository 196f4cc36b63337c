"""The log: what a run leaves behind when it is killed, and how it goes on."""

import asyncio
import collections
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from simulated import Model, problems, scale

from slipstream.atts import events as room
from slipstream.atts.config import ATTS
from slipstream.atts.conformal import Conformal, Controller
from slipstream.atts.events import Decided, Drafted, Ended, Failed, Log, LogFailed, TakenOver
from slipstream.atts.pipeline.run import Run
from slipstream.atts.replay import read_tests, replay

HERE = Path(__file__).parent
SMALL = {"samples": 4, "turns": 8, "draft_tokens": 20, "target_tokens": 20}
SCRIPT = """
import asyncio, sys
sys.path.insert(0, {here!r})
from simulated import Model, problems
from slipstream.atts.config import ATTS
from slipstream.atts.pipeline.run import Run
draft, target = Model("draft", seconds=0.0005), Model("target", seconds=0.0005, right=0.9)
config = ATTS(samples=4, turns=8, draft_tokens=20, target_tokens=20)
outcome = asyncio.run(Run(problems(12), draft, target, config, log={log!r}, resume={resume}).run())
print(outcome.certificate.as_dict())
"""


def start(log, resume=False):
    script = SCRIPT.format(here=str(HERE), log=str(log), resume=resume)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_kill_nine_in_mid_run_and_resume(tmp_path):
    """The same certificate, nothing decided twice, nothing lost."""
    log = tmp_path / "run.jsonl"
    process = start(log)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not log.exists() or log.stat().st_size < 15000):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = lines_of(log)
    assert 20 < len(killed) and sum(e["kind"] == "ended" for e in killed) < 48, "killed too late to test anything"
    with log.open("ab") as file:
        file.write(b'{"kind": "decided", "question": "q')  # a line half written
    resumed = start(log, resume=True)
    printed = resumed.communicate(timeout=100)[0]
    assert resumed.returncode == 0
    found = lines_of(log)
    assert found[: len(killed)] == killed
    for kind in ("drafted", "decided", "taken_over"):
        keys = collections.Counter((e["question"], e["sample"], e["turn"]) for e in found if e["kind"] == kind)
        assert max(keys.values()) == 1, f"{kind} twice"
    ends = collections.Counter((e["question"], e["sample"]) for e in found if e["kind"] == "ended")
    assert len(ends) == 48 and max(ends.values()) == 1
    assert [e["number"] for e in found if e["kind"] == "decided"] == list(
        range(sum(e["kind"] == "decided" for e in found))
    )
    times = [e["at_s"] for e in found[1:]]
    assert times == sorted(times)
    rejected, certificate = replay(read_tests(log), Conformal(alpha=0.3, mode="marginal"))
    assert rejected == [e["rejected"] for e in found if e["kind"] == "decided"]
    assert printed.strip() == str(certificate.as_dict())


def test_a_run_cut_anywhere_ends_in_the_same_place(tmp_path):
    """One chain at a time: the order is fixed, so every cut must give the very log of the run that was not cut."""
    whole = tmp_path / "whole.jsonl"
    config = ATTS(window=1, **SMALL)
    scale(config, count=2, log=whole)
    text = whole.read_bytes()
    lines = text.splitlines(keepends=True)
    for cut in range(1, len(lines), 3):
        path = tmp_path / f"cut{cut}.jsonl"
        path.write_bytes(b"".join(lines[:cut]) + lines[cut][: cut % 7])
        outcome, _, draft, target = scale(config, count=2, log=path, resume=True)
        again = [{k: v for k, v in row.items() if k not in ("at_s", "wait_s", "busy_s")} for row in lines_of(path)]
        first = [{k: v for k, v in row.items() if k not in ("at_s", "wait_s", "busy_s")} for row in lines_of(whole)]
        assert again == first
        done = sum(b'"drafted"' in line for line in lines[:cut])
        assert sum(call[0] == "extend" for call in draft.log) == sum(b'"drafted"' in x for x in lines) - done


def test_a_finished_run_resumes_to_its_result_without_work(tmp_path):
    first, *_ = scale(ATTS(**SMALL), log=tmp_path / "a.jsonl")
    again, _, draft, target = scale(ATTS(**SMALL), log=tmp_path / "a.jsonl", resume=True)
    assert again.certificate == first.certificate and again.majority == first.majority
    assert [call[0] for call in draft.log + target.log] == ["open", "open"]


@pytest.mark.parametrize("schedule", ["question", "turn"])
def test_the_twins_resume_too(tmp_path, schedule):
    config = ATTS(schedule=schedule, alpha=0.5, **SMALL)
    scale(config, log=tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    outcome, *_ = scale(config, log=tmp_path / "b.jsonl", resume=True)
    assert len([e for e in outcome.events if isinstance(e, Ended)]) == 12


def test_budgets_resume_with_the_alphas_they_had(tmp_path):
    config = ATTS(token_budget=300, window=4, **SMALL)
    scale(config, log=tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    outcome, *_ = scale(config, log=tmp_path / "b.jsonl", resume=True)
    assert sum(e.tokens for e in outcome.events if isinstance(e, TakenOver)) <= 300
    assert len({e.alpha for e in outcome.events if isinstance(e, Decided)}) > 3


def test_another_runs_log_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    scale(ATTS(**SMALL), log=path)
    with pytest.raises(ValueError, match="--resume goes on with it"):
        scale(ATTS(**SMALL), log=path)
    with pytest.raises(ValueError, match="alpha differ"):
        scale(ATTS(alpha=0.4, **SMALL), log=path, resume=True)
    with pytest.raises(ValueError, match="problems differ"):
        scale(ATTS(**SMALL), count=4, log=path, resume=True)
    with pytest.raises(ValueError, match="draft differ"):
        scale(ATTS(**SMALL), draft=Model("another"), log=path, resume=True)
    scale(ATTS(window=3, **SMALL), log=path, resume=True)  # how many at once is nobody's business


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    scale(ATTS(**SMALL), log=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], b"{}\n", *lines[6:]]))
    with pytest.raises(ValueError, match="line 6"):
        scale(ATTS(**SMALL), log=path, resume=True)


def test_a_log_whose_decisions_cannot_be_had_again_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    scale(ATTS(**SMALL), log=path)
    text = path.read_text()
    assert '"rejected": false' in text
    path.write_text(text.replace('"rejected": false', '"rejected": true', 1))
    with pytest.raises(ValueError, match="decided otherwise"):
        scale(ATTS(**SMALL), log=path, resume=True)


def test_a_full_disk_stops_the_run_with_an_event_and_a_whole_log(tmp_path, monkeypatch):
    real, room_left = os.write, [4000]

    def write(file, data):
        if room_left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(file, data[: room_left[0]])  # what still fits
        room_left[0] -= written
        return written

    monkeypatch.setattr(room.os, "write", write)
    seen = []
    with pytest.raises(LogFailed, match="No space left"):
        scale(ATTS(**SMALL), log=tmp_path / "a.jsonl", on_event=seen.append)
    assert isinstance(seen[-1], Failed) and (seen[-1].stage, seen[-1].policy) == ("log", "stop")
    monkeypatch.undo()
    kept = lines_of(tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes().endswith(b"\n") and len(kept) - 1 == len(seen) - 1 > 5
    outcome, *_ = scale(ATTS(**SMALL), log=tmp_path / "a.jsonl", resume=True)
    assert len([e for e in outcome.events if isinstance(e, Ended)]) == 12


def test_lines_are_with_the_system_before_they_are_acted_on_and_on_disk_soon(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(room.os, "fsync", lambda file: synced.append((tmp_path / "a.jsonl").read_bytes().count(b"\n")))
    log = Log(tmp_path / "a.jsonl", {"a": 1}, fsync_s=0.0)
    for number in range(3):
        log.append(Ended(question="q", sample=number, turn=0, at_s=0.0, reason="turns"))
        assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == number + 2
    log.close()
    assert synced == [1, 2, 3, 4, 4]
    lazy = Log(tmp_path / "b.jsonl", {}, fsync_s=1000.0)
    lazy.append(Ended(question="q", sample=0, turn=0, at_s=0.0, reason="turns"))
    assert len(synced) == 5


def test_events_survive_their_lines():
    event = Drafted(question="q", sample=1, turn=2, at_s=0.5, ids=[1, 2], tokens=2, finish="stop", logprob=-1.0)
    row = json.loads(event.line())
    assert room.KINDS[row.pop("kind")](**row) == event


def test_the_callback_sees_every_new_event(tmp_path):
    seen = []
    outcome, *_ = scale(ATTS(**SMALL), log=tmp_path / "a.jsonl", on_event=seen.append)
    assert seen == outcome.events and len(lines_of(tmp_path / "a.jsonl")) == len(seen) + 1


def test_the_certificate_of_a_run_is_that_of_its_stream():
    outcome, *_ = scale(ATTS(**SMALL), count=6)
    controller = Controller(Conformal(mode="marginal"))
    for event in outcome.events:
        if isinstance(event, Decided):
            assert controller.decide(event.question, event.turn, event.nll)[0] == event.number
    assert controller.certificate() == outcome.certificate


def test_two_runs_on_one_log_are_refused_and_a_killed_one_lets_go(tmp_path):
    log = tmp_path / "run.jsonl"
    process = start(log)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not log.exists() or not log.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    config = ATTS(samples=4, turns=8, draft_tokens=20, target_tokens=20)
    second = Run(problems(12), Model("draft"), Model("target"), config, log=log, resume=True)
    with pytest.raises(ValueError, match="written by a run that goes on"):
        asyncio.run(second.run())
    process.send_signal(signal.SIGKILL)
    process.wait()
    Log(log, second._header(), resume=True).close()


def test_a_file_that_is_no_log_is_not_emptied(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("what I know")
    with pytest.raises(ValueError, match="line 1: not the header of a run"):
        scale(ATTS(**SMALL), log=path, resume=True)
    assert path.read_text() == "what I know"
    path.write_text('{"kind": "ru')  # killed while it wrote its first line
    assert len(scale(ATTS(**SMALL), log=path, resume=True)[0].events) + 1 == len(lines_of(path))


def test_nothing_is_kept_without_a_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Run(problems(), Model(), Model(), ATTS(**SMALL))
    scale(ATTS(**SMALL))
    assert list(tmp_path.iterdir()) == []
