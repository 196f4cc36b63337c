"""The command line: what it prints where, what it refuses in one line, and an evaluation that survives Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from slipstream import LLM, SamplingParams, benchmark, cli, tasks
from slipstream.build import Options, embedded_models
from slipstream.evaluation import parse_cell, read_log, run

SOURCE = Path(__file__).parent.parent / "src"
SMALL = ("--device", "cpu", "--max-model-len", "2048", "--kv-memory", "64MiB")
PROBLEM = tasks.make("program", 0, steps=3)


@pytest.fixture
def slipstream(monkeypatch, capsys):
    """Runs a command in this process: ``slipstream(*arguments) -> (exit code, stdout, stderr)``."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(cli.err, "width", 160)  # a test runner's workers fix it when they start

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["slipstream", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return command


def subprocess_of(*arguments):
    """The same in a process of its own, as ``python -m slipstream``."""
    paths = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "slipstream", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


# generate


def test_generate_streams_the_answer(slipstream, draft):
    code, out, err = slipstream("generate", PROBLEM.prompt, "-m", "slipstream-draft", *SMALL)
    greedy = SamplingParams(temperature=0, max_tokens=None)
    (expected,) = draft.generate(draft.encode(PROBLEM.prompt, chat=True), greedy)[0].outputs
    assert (code, out) == (0, expected.text + "\n") and "slipstream-draft on cpu" in err
    code, out, _ = slipstream("generate", "L001", "--raw", "--max-tokens", 4, "-m", "slipstream-draft", *SMALL)
    raw = SamplingParams(temperature=0, max_tokens=4)
    assert out == draft.generate("L001", raw)[0].outputs[0].text + "\n"


def test_generate_several_chains(slipstream, draft):
    sampled = ("--n", 2, "--temperature", 4.0, "--request-seed", 6, "--max-tokens", 9, "--top-k", 40)
    code, out, _ = slipstream("generate", PROBLEM.prompt, *sampled, "-m", "slipstream-draft", *SMALL)
    params = SamplingParams(n=2, temperature=4.0, seed=6, max_tokens=9, top_k=40)
    chains = draft.generate(draft.encode(PROBLEM.prompt, chat=True), params)[0].outputs
    assert code == 0 and chains[0].text != chains[1].text
    assert out == "".join(f"--- chain {c.index} ({c.finish_reason})\n{c.text}\n" for c in chains)


def test_generate_from_a_file(slipstream, draft, tmp_path):
    ids = draft.encode(PROBLEM.prompt, chat=True)
    requests = [
        {"prompt": PROBLEM.prompt},
        {"messages": [{"role": "user", "content": PROBLEM.prompt}]},
        {"prompt_token_ids": ids},
    ]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n\n".join(map(json.dumps, requests)) + "\n")
    stop = SamplingParams(temperature=0, max_tokens=None, stop=";")
    (expected,) = draft.generate(ids, stop)[0].outputs
    arguments = ("generate", "--file", file, "--stop", ";", "-m", "slipstream-draft", *SMALL)
    code, printed, _ = slipstream(*arguments, "--out", out)
    assert (code, printed) == (0, "")
    answers = sorted(map(json.loads, out.read_text().splitlines()), key=lambda a: a["index"])
    chain = {"text": expected.text, "token_ids": expected.token_ids, "finish_reason": "stop"}
    assert answers == [{"index": i, "outputs": [chain]} for i in range(3)]
    assert sorted(slipstream(*arguments)[1].splitlines()) == sorted(out.read_text().splitlines())


@pytest.mark.parametrize("line, words", [
    ("{", "not JSON"),
    ("[1, 2]", "needs an object with exactly one of prompt, messages, prompt_token_ids"),
    ('{"prompt": "a", "messages": []}', "needs an object with exactly one of"),
    ('{"promt": "a"}', "needs an object with exactly one of"),
    ('{"prompt": 5}', "prompt must be a str"),
    ('{"prompt_token_ids": "abc"}', "prompt_token_ids must be a list"),
    ('{"prompt_token_ids": [99999]}', "token id 99999 is outside the vocabulary"),
    ('{"prompt_token_ids": []}', "the prompt is empty"),
    ('{"messages": [{"role": "user"}]}', "the chat template cannot take these messages"),
])  # fmt: skip
def test_a_bad_line_of_a_file_is_named_before_any_work(slipstream, tmp_path, line, words):
    file = tmp_path / "in[1].jsonl"  # brackets must not be read as colours
    file.write_text('{"prompt": "a"}\n\n' + line + "\n")
    code, out, err = slipstream("generate", "--file", file, "-m", "slipstream-draft", *SMALL)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {file}, line 3: ") and words in err.splitlines()[-1]


# mistakes


@pytest.mark.parametrize("arguments, words", [
    (["generate"], "give either a PROMPT or --file, not both and not neither"),
    (["generate", "a", "--file", "b"], "give either a PROMPT or --file"),
    (["generate", "a", "--out", "b"], "--out is where the answers of --file go"),
    (["generate", "--file", "no/such/file"], "No such file or directory: 'no/such/file'"),
    (["generate", "a", "--temperature", "-1"], "temperature must be >= 0 (0 is greedy), got -1.0"),
    (["generate", "a", "--temperature", "nan"], "temperature must be a finite number, got nan"),
    (["generate", "a", "--n", "0"], "n must be at least 1, got 0"),
    (["generate", "a", "--stop", ""], "stop strings must be non-empty text"),
    (["generate", "a", "-m", "slipstream-taget"], "did you mean 'slipstream-target'?"),
    (["generate", "a", "-m", "[/red]/x"], "there is no model directory [/red]/x"),
    (["generate", "a", "--device", "tpu"], "use 'cpu', 'cuda' or 'cuda:N'"),
    (["generate", "a", "--kernels", "triton", "--device", "cpu"], "kernels='triton' needs an NVIDIA GPU"),
    (["generate", "a", "--kv-memory", "lots"], "cannot read 'lots' as a size"),
    (["generate", "a", "--attention", "ful"], "attention method 'ful' is unknown; did you mean 'full'?"),
    (["eval", "--tasks", "progam"], "unknown task 'progam'; did you mean 'program'?"),
    (["eval", "--tasks", "program:stepz=3"], "task 'program' has no parameter 'stepz'; did you mean 'steps'?"),
    (["eval", "--tasks", ","], "--tasks names no task"),
    (["eval", "--samples", "0"], "samples must be at least 1, got 0"),
    (["eval", "--n", "4"], "--n 4 at temperature 0 gives 4 equal chains: set --temperature"),
    (["bench", "decode", "--batch", "1,x", *SMALL], "--batch takes comma-separated numbers, got '1,x'"),
    (["bench", "decode", "--context", "0", *SMALL], "--context takes positive numbers, got '0'"),
    (["bench", "decode", "--context", "4000", *SMALL], "do not fit max_model_len 2048"),
    (["eval", "--protocol", "C"], "protocol must be A"),
    (["eval", "--attention", "two_level", "--budget", "50"], "budget = 50 cannot hold sink + recent"),
    (["compare", "--budgets", "2/1x"], "a budget is a fraction of the context (1/8) or a number of tokens"),
    (["compare", "--methods", "qest"], "attention method 'qest' is unknown; did you mean 'quest'?"),
    (["compare", "--attention", "quest"], "compare takes --methods instead of --attention"),
    (["compare", "--tasks", ","], "no task is named"),
    (["calibrate", "some/where"], "some/where is no directory here: say with --out where the file goes"),
    (["bench", "crossover", *SMALL], "bench crossover needs a method that has min_context"),
    (["bench", "crossover", "--attention", "window", "--longest", "9999", *SMALL], "--longest 9999 x batch 1 does"),
    (["bench", "crossover", "--attention", "window", "--longest", "1500", *SMALL], "at least 2048 are needed"),
    (["bench", "decode", "--batch", "100", "--context", "64", *SMALL], "batch 100 exceeds max_num_seqs 64"),
    (["generate", "caf\udce9", "-m", "slipstream-draft", *SMALL], "surrogates not allowed"),  # a terminal in Latin-1
    (["bench", "offload", "--batch", "1", "--context", "256", "-m", "slipstream-draft", *SMALL], "all of 256 tokens"),
    (["bench", "serve", "--percentiles", "50,nan"], "numbers in 0..100, got '50,nan'"),
    (["bench", "serve", "--api-key-file", os.devnull], "holds no API key"),
    (["serve", "--host", ""], "host is empty"),
    (["scale", "problems.jsonl", "--timeout-s", "nan"], "timeout_s above 0"),
    (["calibrate", "slipstream-draft", "--prompts", "1", "--out", "."], "Is a directory: '.'"),
])  # fmt: skip
def test_a_mistake_is_one_line(slipstream, monkeypatch, arguments, words):
    monkeypatch.setattr(cli.err, "width", 40)
    monkeypatch.setenv("COLUMNS", "40")  # a narrow terminal does not cut it up
    code, out, err = slipstream(*arguments)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if " on cpu: " not in line]  # what was loaded
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], err


@pytest.mark.parametrize("arguments, words", [
    (["generate", "a", "--nope"], "--nope"),
    (["genrate"], "genrate"),
    (["eval", "--samples", "many"], "--samples"),
    (["bench", "decode", "--steps", "0"], "--steps"),
])  # fmt: skip
def test_a_wrong_flag_is_a_usage_error(slipstream, arguments, words):
    code, out, err = slipstream(*arguments)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_a_result_that_cannot_be_written_is_on_stdout(tmp_path, capsys):
    with pytest.raises(IsADirectoryError):
        cli.write_result({"hours": 9}, tmp_path)
    assert json.loads(capsys.readouterr().out) == {"hours": 9}


# eval, bench, models, help


def test_eval_writes_table_json_and_log(slipstream, tmp_path):
    path = tmp_path / "results" / "out.json"
    arguments = ("eval", "--tasks", "needle_single,program:steps=3", "--length", 256, "--samples", 2,
                 "-m", "slipstream-draft", *SMALL, "--json", path)  # fmt: skip
    code, out, err = slipstream(*arguments)
    result = json.loads(out)
    assert code == 0 and json.loads(path.read_text()) == result
    assert (result["model"], result["attention"], result["stats"]["finished_requests"]) == (
        "slipstream-draft",
        "full",
        4,
    )
    assert [(row["cell"], row["problems"]) for row in result["rows"]] == [
        ("needle_single num_tokens=256", 2), ("program steps=3", 2),
    ]  # fmt: skip
    assert result["rows"][0]["accuracy"] == 1.0 and result["rows"][0]["ttft_p50_ms"] > 0
    table = " ".join(err.split("accuracy", 1)[1].split())
    assert "needle_single num_tokens=256 2 1 0 0" in table and "program steps=3 2 1 0 0" in table
    log = path.with_suffix(".jsonl")
    answers = log.read_text()
    assert len(answers.splitlines()) == 4
    again = json.loads(slipstream(*arguments)[1])
    assert again["rows"] == result["rows"] and again["stats"]["finished_requests"] == 0 and log.read_text() == answers


def test_eval_samples_several_chains(slipstream):
    arguments = ("eval", "--tasks", "search", "--samples", 2, "--n", 2, "--temperature", 0.7)
    code, out, _ = slipstream(*arguments, "-m", "slipstream-draft", *SMALL)
    (row,) = json.loads(out)["rows"]
    assert code == 0 and row["pass@2"] >= row["accuracy"]
    (again,) = json.loads(slipstream(*arguments, "-m", "slipstream-draft", *SMALL)[1])["rows"]
    assert [again[name] for name in ("accuracy", "output_tokens")] == [row["accuracy"], row["output_tokens"]]


def test_eval_of_a_sparse_method_says_how_sparse_it_was(slipstream):
    sparse = ("--attention", "two_level", "--budget", 96, "--min-context", 96, "--recent", 16)
    arguments = ("eval", "--tasks", "needle_single", "--length", 256, "--samples", 1, "--protocol", "B")
    code, out, err = slipstream(*arguments, *sparse, "-m", "slipstream-draft", *SMALL)
    result = json.loads(out)
    assert code == 0 and result["rows"][0]["cell"] == "needle_single num_tokens=256 protocol=B"
    stats = result["stats"]
    assert stats["sparse_steps"] > 15 and stats["density"] == pytest.approx(96 / 270, abs=0.02)
    assert f"density {stats['density']:.3f}: {stats['tokens_attended']:,.0f} of" in err


def test_compare(slipstream, tmp_path):
    path, picture = tmp_path / "compared.json", tmp_path / "compared.png"
    arguments = ("compare", "--methods", "full,window", "--budgets", "1/2,1/8", "--tasks", "needle_single", "--lengths",
                 256, "--samples", 2, "--recent", 32, "--probe", 1, "--json", path, "--picture", picture,
                 "-m", "slipstream-draft", *SMALL)  # fmt: skip
    code, out, err = slipstream(*arguments)
    result = json.loads(out)
    assert code == 0 and json.loads(path.read_text()) == result and picture.read_bytes().startswith(b"\x89PNG")
    assert [(row["method"], row["budget"], row["tokens"]) for row in result["rows"]] == [
        ("full", "all", 0), ("window", "1/2", 128), ("window", "1/8", 32),
    ]  # fmt: skip
    table = " ".join(err.split("accuracy", 1)[1].split())
    assert "cell method all 1/2 1/8" in table and "needle_single num_tokens=256 full 1.00" in table
    assert "(1) skipped: budget = 32 cannot hold sink + recent + the newest token = 4 + 32 + 1" in table
    assert "recall of the oracle's tokens, attention mass" in table and f"picture: {picture}" in table
    assert len(read_log(path.with_suffix(".jsonl"))) == 4
    again = json.loads(slipstream(*arguments)[1])
    assert [row["accuracy"] for row in again["rows"][:2]] == [row["accuracy"] for row in result["rows"][:2]]
    assert again["rows"][1]["stats"]["decode_tokens"] == 0  # all of it was in the log


def test_calibrate_writes_what_double_sparsity_reads(slipstream, tmp_path):
    path = tmp_path / "new" / "channels.safetensors"
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps({"prompt": PROBLEM.prompt}) + "\n" + json.dumps({"prompt_token_ids": [5, 6, 7]}) + "\n")
    for arguments, prompts in ((("--prompts", 2), 2), (("--file", mine), 2)):
        code, out, err = slipstream("calibrate", "slipstream-draft", "--device", "cpu", "--out", path, *arguments)
        result = json.loads(out)
        assert code == 0 and (result["prompts"], result["calibration"]) == (prompts, str(path))
        assert f"{result['tokens']:,} tokens measured: {path}" in err
    use = ("generate", "L001", "--raw", "--max-tokens", 2, "--attention", "double_sparsity", "--calibration", path)
    assert slipstream(*use, "-m", "slipstream-draft", *SMALL)[0] == 0
    code, _, err = slipstream(*use, "-m", "slipstream-target", *SMALL)
    assert code == 2 and "is the calibration of slipstream-draft" in err and "not of slipstream-target" in err


def test_bench_crossover_stores_what_it_found(slipstream, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    sparse = ("--attention", "window", "--budget", 80, "--batch", "1,2", "--longest", 400, "--steps", 4)
    code, out, err = slipstream("bench", "crossover", *sparse, "-m", "slipstream-draft", *SMALL)
    result = json.loads(out)
    assert code == 0 and set(result["crossover"]) == {"1", "2"} and "decode step, ms" in err
    assert {(p["batch"], p["context"]) for p in result["points"]} >= {(1, 160), (2, 160)}
    assert all(80 < p["context"] <= 400 and p["dense_ms"] > 0 for p in result["points"])
    found = [tokens or 2048 for tokens in result["crossover"].values()]
    assert result["stored"] == max(found)
    (entry,) = json.loads((tmp_path / "crossover.json").read_text()).items()
    assert entry[1] == result["stored"] and "| window | budget 80" in entry[0]


@pytest.mark.parametrize("even, found", [(700, True), (90, True), (10_000, False)])
def test_a_crossover_is_bisected(monkeypatch, even, found):
    """On a machine where a dense step costs by its context and a sparse one as much as ``even`` tokens."""
    llm = LLM("slipstream-draft", attention={"method": "window", "budget": 80}, device="cpu", kv_memory="16MiB")
    backend = llm.engine.backend
    own_gate = backend.gate

    def decode_times(llm, batch, context, steps, **_):
        sparse = backend.gate == 80
        backend._counts["sparse_steps"] += sparse
        return benchmark.DecodeTimes([1e-3 * (even if sparse else context)] * steps, [], 0.0, 0)

    monkeypatch.setattr(benchmark, "decode_times", decode_times)
    rows = []
    crossover = benchmark.find_crossover(llm, 1, 1500, 4, rows)
    assert (crossover is not None) == found and backend.gate == own_gate
    if crossover is not None:
        assert even <= crossover <= even * benchmark.CROSSOVER_RATIO and 3 <= len(rows) <= 8
    else:
        assert [row["context"] for row in rows] == [160, 320, 640, 1280, 1500]


def test_bench_decode(slipstream, tmp_path):
    path = tmp_path / "new" / "bench.json"
    grid = ("--batch", "1,3", "--context", "32,64", "--steps", 4)
    code, out, err = slipstream("bench", "decode", *grid, "--json", path, "-m", "slipstream-draft", *SMALL)
    result = json.loads(out)
    assert code == 0 and json.loads(path.read_text()) == result and "tpot" in err
    assert (result["benchmark"], result["model"], result["device"]) == ("decode", "slipstream-draft", "cpu")
    points = [(p["batch"], p["context"]) for p in result["points"]]
    assert points == [(1, 32), (3, 32), (1, 64), (3, 64)]
    assert all(p["tokens_per_s"] == pytest.approx(1e3 * p["batch"] / p["tpot_p50_ms"]) for p in result["points"])


def test_models(slipstream, monkeypatch):
    monkeypatch.setattr(cli.err, "width", 40)
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = slipstream("models")
    assert code == 0
    for name, path in embedded_models().items():
        kind = "Glm4MoeLiteForCausalLM" if name == "slipstream-mla" else "Qwen3ForCausalLM"
        assert f"{name}: {kind}" in out and str(path) in out


COMMANDS = [["generate"], ["eval"], ["compare"], ["bench", "decode"], ["bench", "crossover"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_lists_every_engine_option(slipstream, command):
    code, out, _ = slipstream(*command, "--help")
    assert code == 0
    for option in fields(Options):
        (flag,) = option.metadata["flags"] or [f"--{option.name.replace('_', '-')}"]
        assert f"{flag} " in out, option.name
    own = {"generate": ["--file", "--out", "--stop", "--request-seed"], "eval": ["--tasks", "--json", "--log"],
           "compare": ["--methods", "--budgets", "--probe", "--picture"]}  # fmt: skip
    assert all(flag in out for flag in own.get(command[0], ["--batch", "--steps", "--json"]))


def test_help_of_the_rest(slipstream):
    code, out, _ = slipstream("--help")
    assert code == 0 and all(word in out for word in ("generate", "eval", "compare", "calibrate", "bench", "models"))
    assert slipstream("models", "--help")[0] == slipstream("bench", "--help")[0] == slipstream("demo", "--help")[0] == 0


def test_ctrl_c_keeps_what_is_done(slipstream, draft, tmp_path):
    log, json_out, count = tmp_path / "log.jsonl", tmp_path / "out.json", 12
    arguments = ("eval", "--tasks", "program:steps=8", "--samples", count, "--max-num-seqs", 1, "--log", log,
                 "--json", json_out, "-m", "slipstream-draft", *SMALL)  # fmt: skip
    process = subprocess_of(*arguments)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= 2:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert f"interrupted: {log} keeps what was done" in err and not json_out.exists()
    kept = log.read_text()
    done = len(kept.splitlines())
    assert 2 <= done < count and len(read_log(log)) == done

    code, out, _ = slipstream(*arguments)
    result = json.loads(out)
    assert code == 0 and json.loads(json_out.read_text()) == result
    assert result["stats"]["finished_requests"] == count - done  # what was done is not done again
    assert log.read_text().startswith(kept) and len(log.read_text().splitlines()) == count

    greedy = SamplingParams(temperature=0, max_tokens=None, seed=0)
    uninterrupted = run(draft, [parse_cell("program:steps=8", None, count)], params=greedy)
    resumed = {answer.key: answer for answer in read_log(log)}
    assert [resumed[a.key].correct for a in uninterrupted] == [a.correct for a in uninterrupted]
    assert [resumed[a.key].output_tokens for a in uninterrupted] == [a.output_tokens for a in uninterrupted]
    assert result["rows"][0]["accuracy"] == sum(a.correct[0] for a in uninterrupted) / count
