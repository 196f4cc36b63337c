"""What do the barriers cost? One trace of turns and take-overs through three schedulers on the same two engines.

    python benchmarks/atts_schedule.py --simulate                                  # a stopwatch, and its lower bound
    python benchmarks/atts_schedule.py --device cpu --problems 4 --scale 0.03      # the embedded pair
    python benchmarks/atts_schedule.py --models qwen --problems 8 --json benchmarks/results/h200/atts_schedule.json

The trace is stream ``pair`` of the published runs: for each chain, how many tokens the draft wrote in each turn (from
its characters), whether the target took over, and how many tokens it wrote. Texts are of the models here, lengths are
of the trace (the end token is ignored), so that every schedule does the same work: equal token counts are checked, and
equal tokens on a CPU. ``paper`` is the paper's own baseline and a comparison of another kind: per-turn barrier, and the
target generates for every sample in every turn.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import time
from collections import defaultdict

import numpy as np
from harness import Report, check

from slipstream import LLM, SamplingParams
from slipstream.atts.backends import Ask, LocalBackend, Turn
from slipstream.atts.config import ATTS
from slipstream.atts.conformal import Controller, Decision
from slipstream.atts.events import Decided, Drafted, Ended, Failed, TakenOver
from slipstream.atts.pipeline.chain import Chain
from slipstream.atts.pipeline.clock import run_virtual
from slipstream.atts.pipeline.run import Outcome, Run
from slipstream.atts.report import Cost, Machine, intensity
from slipstream.atts.scores import Score, perplexity
from slipstream.scaling import cost_of

Trace = dict[tuple[str, int], list[tuple[int, int]]]  # (question, sample) -> per turn: tokens drafted, taken over
QWEN = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128,
    "num_key_value_heads": 8, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 151645,
}  # fmt: skip
SHAPES = (
    {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
)
H200 = Machine(flops=989e12, bandwidth=4.8e12)
STAGES = ("draft", "target")
WRITE_S = (0.006, 0.02)  # of the stopwatch: seconds per token written
SEED = 0


def read_trace(path: str, problems: int, scale: float, characters: float) -> Trace:
    """The chains of the first problems; a turn of a chain that was tried again counts once, the last time."""
    most = max(1, round(500 * scale))
    with np.load(path) as arrays:
        names = ("problem", "sample", "turn", "draft_chars", "takeover", "target_chars")
        rows = list(zip(*(arrays[f"pair__{name}"].tolist() for name in names), strict=True))
    turns: dict[tuple[str, int], dict[int, tuple[int, int]]] = defaultdict(dict)
    for problem, sample, turn, drafted, takeover, written in rows:
        if problem < problems:
            own = [max(1, min(most, round(chars / characters * scale))) for chars in (drafted, written)]
            turns[str(problem), sample][turn] = (own[0], own[1] if takeover else 0)
    return {key: [own[turn] for turn in sorted(own)] for key, own in sorted(turns.items())}


def plan_of(trace: Trace, side: int, everywhere: bool) -> dict[int, tuple[int, str]]:
    """Seed of a turn -> its tokens, and ``stop`` for the last that is written of a chain."""
    plan = {}
    for (question, sample), turns in trace.items():
        for number, own in enumerate(turns):
            last = number == len(turns) - 1 and (side == 1 or not (own[1] or everywhere))
            chain = Chain(question, sample, turn=number)
            plan[chain.seed(SEED, STAGES[side])] = (own[side] or own[0], "stop" if last else "length")
    return plan


class Traced(LocalBackend):
    """Our engine; a turn is as long as the trace says."""

    def __init__(self, llm: LLM, side: int, prompts: dict[str, list[int]]) -> None:
        super().__init__(llm.asynchronous(), None, name=STAGES[side])
        self.prompts, self.plan = prompts, {}

    async def prompt(self, problem) -> list[int]:
        return self.prompts[problem["id"]]

    async def extend(self, ids, ask: Ask) -> Turn:
        tokens, finish = self.plan[ask.seed]
        params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=ask.seed, ignore_eos=True)
        completion = await self._generator.extend(ids, params)
        return Turn(list(completion.token_ids), len(completion.token_ids), finish)

    def counters(self) -> dict[str, float]:
        """With the engine's steps, and the seconds that they kept its thread busy outside waits for the device."""
        stats = self._generator.stats()
        steps = {name: stats[name] for name in ("graph_replays", "eager_steps")}
        return super().counters() | steps | {"host_s": stats["host_ms_mean"] * stats["steps"] / 1e3}


class Simulated(Traced):
    """A stopwatch instead of an engine: seconds per token written, and per token read."""

    def __init__(self, side: int, prompts: dict[str, list[int]]) -> None:
        self.name, self.vocabulary, self._codec = STAGES[side], "ids", None
        self.prompts, self.plan, self._write_s = prompts, {}, WRITE_S[side]

    async def extend(self, ids, ask: Ask) -> Turn:
        tokens, finish = self.plan[ask.seed]
        await asyncio.sleep(tokens * self._write_s)
        return Turn([1 + ask.seed % 997] * tokens, tokens, finish)

    async def score(self, ids, start) -> list[float]:
        await asyncio.sleep(0.03 + 0.0001 * (len(ids) - start))
        return [-1.0] * (len(ids) - start)

    def counters(self) -> dict[str, float]:
        return {}

    async def close(self) -> None:
        pass


class FollowsTheTrace(Controller):
    """Rejects what the score says: the trace's take-overs."""

    def decide(self, question, turn, score, alpha=None) -> Decision:
        decision = super().decide(question, turn, score, alpha)
        return decision._replace(rejected=score > 0)


def scored_as_traced(trace: Trace, everywhere: bool) -> Score:
    """The target reads every turn, as it would; what is decided is the trace's."""

    async def score(view) -> float:
        await perplexity(view)
        question, sample, turn = view.place
        return 1.0 if everywhere or trace[question, sample][turn][1] else -1.0

    return Score(score)


def lower_bound(trace: Trace, args: argparse.Namespace) -> float:
    """Seconds of the stopwatch that no scheduler can beat: all that a stage writes over its places, or one chain."""
    chains = [[WRITE_S[side] * sum(own[side] for own in turns) for side in (0, 1)] for turns in trace.values()]
    stages = [
        sum(column) / places
        for column, places in zip(zip(*chains, strict=True), (args.draft, args.target), strict=True)
    ]
    return max(*stages, *map(sum, chains))


def run_schedule(name: str, backends: list, trace: Trace, args: argparse.Namespace) -> tuple[Outcome, float]:
    everywhere = name == "paper"
    for side, backend in enumerate(backends):
        backend.plan = plan_of(trace, side, everywhere)
    config = ATTS(
        alpha=0.4, score=scored_as_traced(trace, everywhere), schedule="turn" if everywhere else name, samples=16,
        turns=99, takeover="continue", draft_tokens=500, target_tokens=500, settle=False, loop_ngram=0,
        window=args.window, seed=SEED, draft_concurrency=args.draft, score_concurrency=args.draft,
        target_concurrency=args.target, gather=args.gather, timeout_s=3600.0,
    )  # fmt: skip
    problems = [{"id": question} for question in dict.fromkeys(question for question, _ in trace)]
    work = Run(problems, *backends, config, controller=FollowsTheTrace(config.conformal)).run()
    if args.simulate:
        return run_virtual(work)
    began = time.perf_counter()
    return asyncio.run(work), time.perf_counter() - began


def check_work(outcome: Outcome, trace: Trace, everywhere: bool) -> str:
    """Every chain did what the trace says; a digest of all tokens written."""
    drafted, taken, digest = defaultdict(dict), defaultdict(dict), hashlib.sha256()
    check(not [e for e in outcome.events if isinstance(e, Failed)], "a stage failed")
    check(sum(isinstance(e, Ended) for e in outcome.events) == len(trace), "chains were lost")
    for event in sorted(outcome.events, key=lambda e: (e.question, e.sample, e.turn, e.kind)):
        if isinstance(event, Drafted | TakenOver):
            (drafted if isinstance(event, Drafted) else taken)[event.question, event.sample][event.turn] = event.tokens
            digest.update(repr(event.ids).encode())
    for key, turns in trace.items():
        check([drafted[key][t] for t in range(len(turns))] == [own[0] for own in turns], f"{key}: drafted otherwise")
        for number, (first, second) in enumerate(turns):
            want = (second or first) if everywhere else second
            check(taken[key].get(number, 0) == want, f"{key}, turn {number}: taken over otherwise")
    tests = sum(isinstance(e, Decided) for e in outcome.events)
    check(tests == sum(map(len, trace.values())), "not every turn was tested")
    return digest.hexdigest()[:16]


def open_models(args: argparse.Namespace) -> tuple[list[LLM], Machine]:
    options = {"device": args.device, "max_num_seqs": 64}
    memory = args.kv_memory.split(",") if args.kv_memory else [None, None]
    if args.models == "qwen":
        shapes = [QWEN | shape for shape in SHAPES]
        options |= {"load_format": "dummy", "max_model_len": 20480}
    else:
        shapes, options["max_model_len"] = ["slipstream-draft", "slipstream-target"], 20480
    models = [LLM(shape, kv_memory=own, **options) for shape, own in zip(shapes, memory, strict=True)]
    return models, H200 if models[0].device.type == "cuda" else Machine.measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", default="../shared/data/atts_traces_dev.npz")
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the trace's tokens")
    parser.add_argument("--characters", type=float, default=2.9, help="per token: 1,450 of them are a turn of 500")
    parser.add_argument("--models", choices=("embedded", "qwen"), default="embedded")
    parser.add_argument("--simulate", action="store_true", help="no engines: a virtual clock")
    parser.add_argument("--schedules", default="async,question,turn,paper")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--draft", type=int, default=16, help="drafts (and scores) at once; the published setting")
    parser.add_argument("--target", type=int, default=16, help="take-overs at once; the published setting is 4")
    parser.add_argument("--gather", type=int, default=16, help="scores, and take-overs, that begin together")
    parser.add_argument("--kv-memory", default=None, help="of draft and target, e.g. 30GiB,60GiB")
    parser.add_argument("--repeats", type=int, default=1, help="each schedule so often, in turn; the fastest counts")
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds; no schedule is begun after it")
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    started = time.perf_counter()
    trace = read_trace(args.traces, args.problems, args.scale, args.characters)
    draw = np.random.default_rng(0)
    prompts = {question: draw.integers(10, 1000, 150).tolist() for question in dict.fromkeys(q for q, _ in trace)}
    models: list[LLM] = []
    costs, machine = [Cost(6e8, 1.2e9, 114688), Cost(8e9, 16e9, 147456)], H200
    backends: list = [Simulated(side, prompts) for side in (0, 1)]
    if not args.simulate:
        models, machine = open_models(args)
        backends = [Traced(llm, side, prompts) for side, llm in enumerate(models)]
        costs = [cost_of(llm) for llm in models]
    kind = "simulated" if args.simulate else args.models
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "traces")}
    report = Report("atts_schedule", notes={"settings": settings, "chains": len(trace)})
    seconds, digests = {}, {}
    try:
        if models and models[0].device.type == "cuda":  # graphs, autotuning and caches are not the schedulers' business
            run_schedule("async", backends, {key: turns[:2] for key, turns in list(trace.items())[:32]}, args)
        for name in args.schedules.split(",") * args.repeats:
            if time.perf_counter() - started > args.time_limit:
                print(f"time is up before schedule {name}", flush=True)
                break
            before = [backend.counters() for backend in backends]
            outcome, took = run_schedule(name, backends, trace, args)
            seconds[name] = min(took, seconds.get(name, took))
            digests[name] = check_work(outcome, trace, name == "paper")
            prefill = {
                f"{stage}_{key}": after - old[key]
                for stage, backend, old in zip(STAGES, backends, before, strict=True)
                for key, after in backend.counters().items()
            }
            tokens = [sum(e.tokens for e in outcome.events if isinstance(e, kind)) for kind in (Drafted, TakenOver)]
            report.point(
                models=kind, schedule=name, seconds=took, draft_tokens=tokens[0], target_tokens=tokens[1],
                **prefill, **intensity(outcome, *costs, machine),
            )  # fmt: skip
            report.keep(args.json)
    finally:
        for model in models:
            model.close()
    alike = [digests[name] for name in digests if name != "paper"]
    on_gpu = bool(models) and models[0].device.type == "cuda"
    check(on_gpu or len(set(alike)) == 1, "the schedules wrote different texts")
    report.notes["equal_tokens"] = len(set(alike)) == 1
    for name, limit in (("question", 1.4), ("turn", 1.9)):
        if {"async", name} <= seconds.keys():
            report.bar(f"async over the per-{name} barrier, {kind}", seconds[name] / seconds["async"], limit, ">=")
    if args.simulate and "async" in seconds:
        bound = lower_bound(trace, args)
        report.point(models=kind, lower_bound=bound, async_over_lower_bound=seconds["async"] / bound, best_possible={
            name: round(took / bound, 3) for name, took in seconds.items() if name not in ("async", "paper")
        })  # fmt: skip
    if {"async", "paper"} <= seconds.keys():
        report.point(models=kind, async_over_the_papers_own_baseline=seconds["paper"] / seconds["async"],
                     note="other work: its target generates for every sample every turn")  # fmt: skip
    report.finish(args.json)


if __name__ == "__main__":
    main()
