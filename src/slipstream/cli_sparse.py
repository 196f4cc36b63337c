"""The commands of sparse attention: ``compare``, ``calibrate`` and ``bench crossover``. See docs/sparse.md."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from slipstream.build import DEFAULT_MODEL, find_model
from slipstream.console import Model, err, ids_of, load, numbers, print_table, progress_bar, read_requests, write_result

TASKS = "needle_multikey,needle_multiquery,variable_tracking,program_shuffled:steps=50"
CALIBRATION_TASKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("needle_multikey", {"num_tokens": 2048}),
    ("program_shuffled", {"steps": 50}),
    ("needle_multiquery", {"num_tokens": 2048}),
    ("variable_tracking", {"num_tokens": 2048}),
    ("program", {"steps": 50}),
)


def compare(
    engine: dict[str, Any],
    methods: Annotated[
        str, typer.Option(help="Comma-separated; with options as in two_level:block_score=mean:sink=16")
    ] = "full,window,oracle,quest,double_sparsity,tova,two_level",
    budgets: Annotated[
        str, typer.Option(help="Fractions of the context (1/8), or tokens (512).")
    ] = "1/4,1/8,1/16,1/32",
    tasks: Annotated[str, typer.Option(help="Comma-separated, as of eval.")] = TASKS,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens of the tasks that have one.")] = "2048,4096",
    protocol: Annotated[str, typer.Option(help="A: prompts are dense. B: only contexts are. Or A,B.")] = "A",
    samples: Annotated[int, typer.Option(help="Problems per cell.")] = 20,
    probe: Annotated[
        int, typer.Option(min=0, help="Problems per cell to measure recall and attention mass on; 0 is none.")
    ] = 0,
    sink: Annotated[int | None, typer.Option(help="First tokens always attended, of all methods.")] = None,
    recent: Annotated[int | None, typer.Option(help="Last tokens always attended, of all methods.")] = None,
    dense_layers: Annotated[int | None, typer.Option(help="First layers that stay dense, of all methods.")] = None,
    model: Model = DEFAULT_MODEL,
    problem_seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 0,
    log: Annotated[Path | None, typer.Option(help="JSON lines of answers; an interrupted run goes on from it.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all rows as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw accuracy against tokens read, e.g. out.png.")] = None,
) -> None:
    """Attention methods x budgets x tasks: a table and a picture. Resumable with --log or --json."""
    from slipstream import compare as comparison

    if picture and find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib: pip install 'slipstream[eval]'")
    if engine.pop("attention") != "full":
        raise ValueError("compare takes --methods instead of --attention")
    given = {"sink": sink, "recent": recent, "dense_layers": dense_layers}
    chosen = comparison.parse_methods(methods, {name: value for name, value in given.items() if value is not None})
    protocols = [part.strip().upper() for part in protocol.split(",")]
    cells = comparison.cells_of(tasks, numbers(lengths, "lengths"), protocols, samples)
    arms, skipped = comparison.plan(chosen, [comparison.parse_budget(text) for text in budgets.split(",")], cells)
    rows: list[dict[str, Any]] = []
    log = log or (json_out.with_suffix(".jsonl") if json_out else None)
    try:
        with progress_bar() as bar:
            for i, arm in enumerate(arms, 1):
                task = bar.add_task(f"{escape(arm.name)} ({i}/{len(arms)})", total=None)
                advance = partial(_advance, bar, task)
                rows += comparison.run_arm(
                    model, arm, engine=engine, seed=problem_seed, log=log, probe=probe, progress=advance
                )
    except KeyboardInterrupt:
        kept = f"{log} keeps what was done, the same command goes on from it" if log else "nothing was kept (no --log)"
        err.print(f"interrupted: {escape(kept)}", soft_wrap=True, highlight=False)
        raise
    rows += skipped
    show(rows, comparison)
    write_result({"comparison": model, "budgets": budgets, "samples": samples, "rows": rows}, json_out)
    if picture:
        comparison.draw(rows, picture, f"{model}, greedy, {samples} problems a cell")
        err.print(f"picture: {escape(str(picture))}", soft_wrap=True)


def _advance(bar: Any, task: Any, done: int, total: int, cell: str) -> None:
    bar.update(task, completed=done, total=total)


def show(rows: list[dict[str, Any]], comparison: Any) -> None:
    """Accuracy, and where a probe looked recall and mass: a line per cell and method, a column per budget."""
    lines, notes = comparison.pivot(rows, lambda row: f"{row['accuracy']:.2f}")
    print_table("accuracy", lines)
    for note in notes:
        err.print(escape(note), soft_wrap=True, highlight=False)
    if any("recall" in row for row in rows):
        probed = [row for row in rows if "recall" in row]
        lines, _ = comparison.pivot(probed, lambda row: f"{row['recall']:.2f} {row['mass']:.2f}")
        print_table("recall of the oracle's tokens, attention mass", lines)


def calibrate(
    model: Annotated[str, typer.Argument(help="Embedded model, directory or hub id.")] = DEFAULT_MODEL,
    out: Annotated[Path | None, typer.Option(help="Where the channels go; default: the model's directory.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Generated prompts with their ideal chains.")] = 32,
    file: Annotated[Path | None, typer.Option(help="JSON lines of your own prompts instead.")] = None,
    device: Annotated[str | None, typer.Option(help="'cuda', 'cpu'; default: a GPU where there is one.")] = None,
) -> None:
    """Measure which channels of the keys matter, for the labels of two_level and double_sparsity."""
    from slipstream.attention.calibration import FILE_NAME
    from slipstream.attention.calibration import calibrate as accumulate

    source = find_model(model)
    if out is None:
        if not Path(source).is_dir():
            raise ValueError(f"{model} is no directory here: say with --out where the file goes")
        out = Path(source) / FILE_NAME
    requests = list(read_requests(file)) if file else []
    if file and not requests:
        raise ValueError(f"{file} holds no prompts")
    # A window needs no labels itself; a prompt whose KV is reused would not be seen.
    llm = load(model, {"attention": "window", "device": device, "prefix_cache": False, "cuda_graphs": False})
    texts = [ids_of(llm, request, chat=True) for _, request in requests] or generated_texts(llm, prompts)
    total = sum(map(len, texts))
    with err.status(f"calibrating on {len(texts)} prompts, {total:,} tokens"):
        found = accumulate(llm, texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    found.save(out)
    err.print(f"{found.num_tokens:,} tokens measured: {escape(str(out))}", soft_wrap=True, highlight=False)
    write_result({"calibration": str(out), "model": llm.name, "prompts": len(texts), "tokens": found.num_tokens}, None)


def generated_texts(llm: Any, count: int) -> list[list[int]]:
    """Token ids of task prompts, each followed by its ideal chain: what the model reads, and what it will write."""
    from slipstream import tasks
    from slipstream.evaluation import prompt_ids

    texts = []
    for i in range(count):
        name, parameters = CALIBRATION_TASKS[i % len(CALIBRATION_TASKS)]
        problem = tasks.make(name, 7_000_000 + i, **parameters)  # far from the seeds of evaluations
        chain = llm.codec.tokenizer.encode(problem.completion, add_special_tokens=False)
        texts.append([*prompt_ids(llm, problem), *chain])
    return texts


def offload(
    engine: dict[str, Any],
    model: Model = DEFAULT_MODEL,
    batch: Annotated[int, typer.Option(min=1, help="Chains decoded together, of every method.")] = 4,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each chain.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed.")] = 64,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
) -> None:
    """What does KV on the host cost, and how many chains more does it allow? Options are those of asynctls."""
    from slipstream.benchmark import offload_rows

    given = engine.pop("attention")
    options = {name: value for name, value in given.items() if name != "method"} if isinstance(given, dict) else {}
    method = given["method"] if isinstance(given, dict) else given
    if method not in ("full", "asynctls"):
        raise ValueError(f"bench offload measures asynctls, not {method}: leave --attention out")
    options = {"min_context": 0, **options}

    def make(attention: Any) -> Any:
        return load(model, {**engine, "attention": attention})

    rows = offload_rows(make, options, batch, context, steps)
    print_table("decode with KV on the host", rows)
    write_result({"benchmark": "offload", "model": model, "options": options, "points": rows}, json_out)


def crossover(
    engine: dict[str, Any],
    model: Model = DEFAULT_MODEL,
    batch: Annotated[str, typer.Option(help="Comma-separated batch sizes; the largest crossover is stored.")] = "1,8",
    longest: Annotated[
        int | None, typer.Option(help="Longest context tried; default: 4096 on a CPU, else what fits up to 131072.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed at each point.")] = 16,
    keep: Annotated[bool, typer.Option(help="Store the result as this machine's default min_context.")] = True,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result as JSON.")] = None,
) -> None:
    """From which context length on does a method pay? The answer becomes its default min_context here."""
    from slipstream.benchmark import find_crossover, store_crossover

    batches = numbers(batch, "batch")
    engine["max_num_seqs"] = max(engine["max_num_seqs"], *batches)
    llm = load(model, engine)
    rows: list[dict[str, Any]] = []
    found: dict[int, int | None] = {}
    with err.status("measuring") as status:
        for size in batches:
            found[size] = find_crossover(llm, size, longest, steps, rows, status.update)
    print_table("decode step, ms", rows)
    for size, tokens in found.items():
        text = f"pays above {tokens} tokens" if tokens else "does not pay at any length tried"
        err.print(f"batch {size}: {text}", highlight=False)
    stored = max(tokens or llm.spec.max_position for tokens in found.values())
    path = store_crossover(llm, stored) if keep else None
    if path:
        meaning = "dense always" if stored == llm.spec.max_position else f"min_context {stored}"
        err.print(f"{meaning}: stored in {escape(str(path))}", soft_wrap=True, highlight=False)
    write_result(
        {"benchmark": "crossover", "model": llm.name, "device": str(llm.device), "crossover": found, "stored": stored,
         "points": rows}, json_out,
    )  # fmt: skip
