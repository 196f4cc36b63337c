"""Ranks as processes, and every way in which one can be lost: whoever waits is told, nothing hangs, nothing is left."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_ranks import QWEN

from slipstream import LLM, SamplingParams, split
from slipstream.scale.company import RankLost

SOURCES = str(Path(__file__).parent.parent.parent / "src")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
PROMPT = [5, 6, 7, 8]


def tiny_llm(**options):
    return LLM(QWEN, device="cpu", load_format="dummy", kv_memory="1MiB", **options)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid, seconds=15.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def member_of(llm):
    return llm._ranks.company._members[0]


def tokens(llm, params=GREEDY):
    return llm.generate([PROMPT], params)[0].outputs[0].token_ids


def test_a_killed_rank_ends_the_engine_with_a_word():
    with tiny_llm() as alone:
        expected = tokens(alone)
    llm = tiny_llm(tensor_parallel_size=2)
    pid, folder = member_of(llm).process.pid, llm._ranks.links._folder
    assert tokens(llm) == expected and folder.exists()
    began = None
    with pytest.raises(RankLost, match="rank 1 ended with exit code -9"):
        for _ in llm.stream(PROMPT, LONG):
            if began is None:
                os.kill(pid, signal.SIGKILL)
                began = time.monotonic()
    assert time.monotonic() - began < 20
    with pytest.raises(RankLost, match="needs to be loaded again"):
        tokens(llm)
    llm.close()
    llm.close()
    assert is_gone(pid) and not folder.exists()


def test_a_silent_rank_is_given_up_and_everyone_who_waits_is_told():
    llm = tiny_llm(tensor_parallel_size=2, step_timeout=3.0)
    pid, face = member_of(llm).process.pid, llm.asynchronous()

    async def use():
        await face.generate(PROMPT, GREEDY)
        assert face.failure is None
        os.kill(pid, signal.SIGSTOP)
        waiting = [asyncio.create_task(face.generate(PROMPT, LONG)) for _ in range(2)]
        return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 40)

    errors = asyncio.run(use())
    assert all(isinstance(error, RuntimeError) and "within 3 s" in str(error) for error in errors)
    assert isinstance(face.failure, RankLost)  # what /health reports
    assert is_gone(pid)
    llm.close()


def test_a_rank_that_cannot_start(monkeypatch):
    monkeypatch.setattr(split, "COMMAND", [sys.executable, "-c", "raise SystemExit(7)"])
    with pytest.raises(RankLost, match="rank 1 ended with exit code 7"):
        tiny_llm(tensor_parallel_size=2)


def test_the_error_of_another_rank_is_told(thread_ranks, monkeypatch):
    from slipstream.scale.wire import Mirror

    llm = tiny_llm(tensor_parallel_size=2)
    tokens(llm)

    def fail(self, numbers):
        raise RuntimeError("out of memory (as a test would have it)")

    monkeypatch.setattr(Mirror, "read_plan", fail)
    with pytest.raises(RankLost, match="rank 1: RuntimeError: out of memory"):
        tokens(llm)
    llm.close()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_step_that_rank_0_does_not_end_is_the_last(thread_ranks, error, monkeypatch):
    """The others may have run it: from then on their caches would differ from ours."""
    llm = tiny_llm(tensor_parallel_size=2)

    def fail(batch, backend):
        raise error

    monkeypatch.setattr(llm.model, "forward", fail)
    began = time.monotonic()
    with pytest.raises(RankLost if isinstance(error, RuntimeError) else KeyboardInterrupt):
        tokens(llm)
    monkeypatch.undo()
    with pytest.raises(RankLost, match="out of memory|interrupted"):
        tokens(llm)
    assert time.monotonic() - began < 15
    llm.close()


def test_an_engine_that_is_forgotten_leaves_no_process():
    import gc

    llm = tiny_llm(tensor_parallel_size=2)
    pid = member_of(llm).process.pid
    tokens(llm)
    del llm
    gc.collect()
    assert is_gone(pid)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_the_command_line_and_its_end_end_all(how):
    command = [sys.executable, "-m", "slipstream", "generate", "Tell me", "--model", "slipstream-draft"]
    command += ["--tensor-parallel", "2", "--device", "cpu", "--temperature", "1", "--request-seed", "3"]
    environment = os.environ | {"PYTHONPATH": SOURCES, "PYTHONUNBUFFERED": "1"}
    command += ["--max-model-len", "4096", "--kv-memory", "64MiB", "--max-tokens", "4000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.read(1), process.stderr.read().decode()
        (rank,) = children(process.pid)
        process.send_signal(how)
        process.wait(30)
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    assert is_gone(rank)
