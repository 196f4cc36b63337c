"""The main job from end to end, small: load, think aloud on one problem, solve a batch, check it, show the table."""

import json
import runpy
from pathlib import Path

from slipstream import LLM, SamplingParams, evaluation, tasks
from slipstream.cli import err, print_table

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_main_job(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(err, "width", 120)
    llm = LLM("slipstream-target", device="cpu", max_model_len=2048, kv_memory="64MiB")
    greedy = SamplingParams(temperature=0, max_tokens=None)

    problem = tasks.make("program", 3, steps=6)
    chunks = list(llm.stream(llm.encode(problem.prompt, chat=True), greedy))
    text = "".join(chunk.text for chunk in chunks)
    assert tasks.verify(problem, text) and len(chunks) > 50 and chunks[-1].finish_reason == "stop"
    assert text == problem.completion  # it thinks as it was taught

    cells = [evaluation.parse_cell(text, 512, 3) for text in ("needle_single", "program:steps=5", "expression")]
    done = []
    answers = evaluation.run(llm, cells, log=tmp_path / "log.jsonl", progress=lambda *news: done.append(news[:2]))
    assert done == [(i, 9) for i in range(1, 10)]
    rows = evaluation.summary(answers)
    assert [row["problems"] for row in rows] == [3, 3, 3] and sum(row["accuracy"] for row in rows) >= 3 * 0.75
    assert all(row["tpot_p50_ms"] <= row["tpot_p99_ms"] and row["ttft_p50_ms"] > 0 for row in rows)

    print_table("accuracy", rows)
    table = capsys.readouterr().err
    assert all(row["cell"] in table for row in rows) and "accuracy" in table
    assert json.loads(json.dumps(rows)) == rows

    stats = llm.stats()
    assert stats["finished_requests"] == 10 and stats["kv_pool_bytes"] == llm.pool.bytes > 0
    assert stats["decode_tokens"] + 10 == len(llm_tokens(chunks)) + sum(a.output_tokens for a in answers)
    assert stats["pages_used"] == 0
    llm.engine.table.check_integrity()


def llm_tokens(chunks):
    return [token for chunk in chunks for token in chunk.token_ids]


def test_the_quickstart_runs(capsys):
    path = EXAMPLES / "quickstart.py"
    assert len(path.read_text().splitlines()) < 40
    runpy.run_path(str(path))
    assert "4 of 4 needles found" in capsys.readouterr().out
