"""Train the embedded target and draft in one run of under ten minutes.

``python -m training.train --out DIR --seconds 380 --limit 590`` on an H200; with ``--model latent`` the third model
alone, the one with latent attention and experts. All schedules are functions of the elapsed
time, so that a run ends inside its limit whatever the machine does; weights are saved before anything is evaluated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import evaluate as ev
from .attention import choose
from .data import FAMILIES, Feed
from .export import export
from .latent import LatentDecoder, latent_config, tiny_latent_config
from .model import Decoder, draft_config, rotary_table, target_config, tiny_config, token_losses
from .muon import Muon
from .tokenizer import FastEncoder
from .weights import save_drafts, save_target

BEGAN = time.monotonic()
RETRIEVAL = ("shuffled", "needles")  # what must be found before the mix begins; recall is only an aid
SWITCHES = ((0.5, 2), (0.7, 3))  # (fraction of the run, stage from there on); stage 1 before
POSITIONS = 16384


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=("pair", "latent"), default="pair")
    parser.add_argument("--seconds", type=float, default=470, help="training ends this long after the start")
    parser.add_argument("--limit", type=float, default=590, help="the process ends itself this long after the start")
    parser.add_argument("--first-stage", type=float, default=90, help="longest first stage, in seconds of training")
    parser.add_argument("--workers", type=int, default=13, help="processes that make training documents")
    parser.add_argument("--inits", type=int, default=2, help="target initialisations tried in the first stage")
    parser.add_argument("--target-lr", type=float, default=0.01)
    parser.add_argument("--hold", type=float, default=0.5, help="fraction of the run after which the rates fall")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of one step")
    parser.add_argument("--problems", type=int, default=100, help="problems of one cell of the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draft-lr", type=float, default=0.02)
    parser.add_argument("--snapshots", default="0.35,0.5,0.65,0.8", help="fractions at which the draft is kept")
    parser.add_argument("--no-compile", action="store_true", help="eager mode: slower steps, no 20 s of compilation")
    parser.add_argument("--smoke", action="store_true", help="everything once, in about a minute, on the GPU")
    parser.add_argument("--tiny", action="store_true", help="everything once with tiny models, on the CPU")
    options = parser.parse_args()
    if options.smoke:
        options.seconds, options.limit, options.first_stage, options.problems = 75, 170, 12, 4
    if options.tiny:
        options.seconds, options.limit, options.first_stage, options.problems = 40, 200, 6, 2
        options.workers, options.tokens, options.no_compile = 1, 1024, True
    return options


class NotTurned(Exception):
    """The first stage ended without retrieval: more steps would not help, another seed or rate might."""


class Log:
    """Standard output and a file under --out (the pipe may be lost at the time limit)."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")

    def __call__(self, text: str) -> None:
        line = f"[{time.monotonic() - BEGAN:6.1f}] {text}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


@dataclass
class Learner:
    """One model, its optimiser, and its losses by family since the last report: [6, F] (see ``measure``)."""

    name: str
    model: Decoder
    optimiser: Muon
    sums: Tensor
    snapshots: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def measure(losses: Tensor, right: Tensor, weights: Tensor, onehot: Tensor) -> Tensor:
    """[6, F]: loss, right, count over supervised tokens, then over the hard ones (weight 4 and more)."""
    easy, hard = (weights > 0).float(), (weights >= 4).float()
    right = right.float()
    rows = torch.stack([losses * easy, right * easy, easy, losses * hard, right * hard, hard])
    return rows @ onehot


def to_device(batch: dict, device: torch.device) -> dict[str, Tensor]:
    cuda = device.type == "cuda"
    moved: dict[str, Tensor] = {}
    for name in ("tokens", "targets", "weights", "family", "starts", "positions"):
        tensor = torch.from_numpy(batch[name])
        moved[name] = tensor.pin_memory().to(device, non_blocking=True) if cuda else tensor
    for name in ("tokens", "targets", "positions"):
        moved[name] = moved[name].long()
    moved["onehot"] = torch.nn.functional.one_hot(moved["family"].long(), len(FAMILIES)).float()
    moved["sizes"] = torch.from_numpy(batch["sizes"])
    return moved


class Trainer:
    def __init__(self, options: argparse.Namespace, log: Log) -> None:
        self.options, self.log = options, log
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = FastEncoder()
        vocab = -(-self.encoder.size // 64) * 64
        if options.model == "latent":
            configs = [(tiny_latent_config if options.tiny else latent_config)(vocab)]
        elif options.tiny:
            configs = [tiny_config(vocab)] * 2
        else:
            configs = [target_config(vocab), draft_config(vocab)]
        self.targets = [
            self._learner(f"target{i}", configs[0], options.seed * 100 + i, options.target_lr)
            for i in range(options.inits)
        ]
        self.draft: Learner | None = None
        if options.model == "pair":
            self.draft = self._learner("draft", configs[1], options.seed * 100 + 50, options.draft_lr)
        self.table = rotary_table(configs[0], POSITIONS, self.device)
        self.losses = token_losses if options.no_compile else torch.compile(token_losses, dynamic=False)
        sizes = [config.num_parameters() for config in configs]
        log(f"vocabulary {self.encoder.size} -> {vocab}; parameters {sizes}")

    def _learner(self, name: str, config, seed: int, lr: float) -> Learner:
        model = (LatentDecoder if self.options.model == "latent" else Decoder)(config, seed).to(self.device)
        if not self.options.no_compile:
            for block in model.model.layers:
                block.compile(dynamic=False)
        return Learner(name, model, Muon(model, lr), torch.zeros(6, len(FAMILIES), device=self.device))

    @property
    def learners(self) -> list[Learner]:
        return [*self.targets, *([] if self.draft is None else [self.draft])]

    def backward(self, learner: Learner, batch: dict[str, Tensor], table: Tensor) -> None:
        model = learner.model
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            hidden = model.hidden(batch["tokens"], table, batch["starts"], batch["sizes"])
            losses, right = self.losses(hidden, model.model.embed_tokens.weight, batch["targets"])
        weights = batch["weights"]
        ((losses * weights).sum() / weights.sum().clamp(min=1)).backward()
        learner.sums += measure(losses.detach(), right, weights, batch["onehot"])

    def step(self, batch: dict[str, Tensor], scale: float | None) -> None:
        """Forward, backward and update of every model; ``scale`` None only warms up."""
        table = self.table[batch["positions"]]
        for learner in self.learners:
            self.backward(learner, batch, table)
            if scale is None:
                learner.optimiser.clear()
                learner.sums.zero_()
            else:
                learner.optimiser.step(scale)
                learner.model.balance()

    def report(self, learner: Learner) -> dict[str, float]:
        """Log losses and accuracies by family since the last report; returns the hard losses. Clears the sums."""
        sums = learner.sums.tolist()
        learner.sums.zero_()
        hard, parts = {}, []
        for i, name in enumerate(FAMILIES):
            count, hard_count = sums[2][i], sums[5][i]
            if count:
                part = f"{name} {sums[0][i] / count:.3f}/{sums[1][i] / count:.3f}"
                if hard_count:
                    hard[name] = sums[3][i] / hard_count
                    part += f" hard {hard[name]:.3f}/{sums[4][i] / hard_count:.3f}"
                parts.append(part)
        self.log(f"  {learner.name}: " + "; ".join(parts))
        return hard

    def pick(self, forced: bool) -> bool:
        """Keep the first target that retrieves (or the best one when time is up), drop the others."""
        hard = [self.report(t) for t in self.targets]
        worst = [max((h.get(name, 9.0) for name in RETRIEVAL), default=9.0) for h in hard]
        best = min(range(len(worst)), key=worst.__getitem__)
        if worst[best] > 0.15 and not forced:
            return False
        if worst[best] > 0.5 and not (self.options.smoke or self.options.tiny):
            raise NotTurned(f"retrieval losses {worst}")
        self.log(f"first stage over: keeping {self.targets[best].name}, retrieval losses {worst} (forced: {forced})")
        self.targets = [self.targets[best]]
        if self.draft is not None:
            self.report(self.draft)
        return True


def schedule(fraction: float, step: int, hold: float = 0.5) -> float:
    """Learning-rate factor: 100 steps of warm-up, constant until ``hold`` of the time is over, linear to 1 %."""
    decay = 1.0 if fraction < hold else 1.0 - 0.99 * (fraction - hold) / (1 - hold)
    return min(1.0, (step + 1) / 100) * max(decay, 0.01)


def warm_up(trainer: Trainer, feed: Feed) -> None:
    trainer.log("compiling")
    trainer.step(to_device(feed.next(), trainer.device), None)
    trainer.step(to_device(feed.next(), trainer.device), None)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    trainer.log("compiled")


def train(trainer: Trainer, feed: Feed) -> None:
    options, log = trainer.options, trainer.log
    warm_up(trainer, feed)
    began, end = time.monotonic(), BEGAN + options.seconds
    marks = sorted(float(f) for f in options.snapshots.split(",") if f)
    step, tokens, reported, waited, searching = 0, 0, began, 0.0, True
    next_check = 50 if options.seconds > 60 else 4
    while (now := time.monotonic()) < end:
        fraction = (now - began) / (end - began)
        if searching and step >= next_check:
            next_check = step + 25
            searching = not trainer.pick(forced=now - began > options.first_stage)
        if not searching:
            stage = 1 + sum(fraction >= at for at, _ in SWITCHES)
            if stage != feed.stage.value:
                log(f"stage {stage} at step {step}, fraction {fraction:.2f}")
                feed.stage.value = stage
        while marks and fraction >= marks[0]:
            save(trainer, f"{int(marks.pop(0) * 100):03d}")
        before = time.monotonic()
        batch = to_device(feed.next(), trainer.device)
        waited += time.monotonic() - before
        trainer.step(batch, schedule(fraction, step, options.hold))
        step += 1
        tokens += options.tokens
        if trainer.device.type == "cuda" and step % 4 == 0:
            torch.cuda.synchronize()  # the clock must see the device's time
        if now - reported > (30 if options.seconds > 120 else 8):
            rate = tokens / (now - began) / 1e6
            log(f"step {step} fraction {fraction:.2f} {tokens / 1e6:.0f} Mtok {rate:.2f} Mtok/s waited {waited:.1f}s")
            for learner in [] if searching else trainer.learners:
                trainer.report(learner)
            reported = now
    seconds = time.monotonic() - began
    log(f"trained {step} steps, {tokens / 1e6:.1f} Mtok in {seconds:.0f} s, waited {waited:.1f} s for data")


def save(trainer: Trainer, name: str) -> None:
    """A snapshot of the draft, under this name; without a draft the target as it is, in place of the last one."""
    draft, out = trainer.draft, trainer.options.out
    if draft is None:
        save_target(out, trainer.targets[0].model.state_dict())
        return
    state = draft.model.state_dict()
    draft.snapshots[name] = {key: value.detach().to("cpu", torch.bfloat16).clone() for key, value in state.items()}
    save_drafts(out, draft.snapshots)


def frozen(model: Decoder, state: dict[str, Tensor] | None = None) -> Decoder:
    """A copy for inference: bfloat16 on CUDA (what ships), float32 on the CPU; with other weights if given."""
    device = model.model.norm.weight.device
    fresh = type(model)(model.config).to(device).eval()
    fresh.load_state_dict(state if state is not None else model.state_dict())
    return fresh.to(torch.bfloat16).to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def assess(trainer: Trainer, results: dict) -> None:
    """The table: target first (its bars), then every draft snapshot from the last to the first."""
    options, text = trainer.options, ev.Text(trainer.encoder)
    deadline = BEGAN + options.limit - 12
    target = frozen(trainer.targets[0].model)
    plan = [("target", target, c) for c in (*ev.CORE, *ev.FAMILIES)]
    draft = trainer.draft
    drafts = {} if draft is None else {name: frozen(draft.model, state) for name, state in draft.snapshots.items()}
    names = sorted(drafts, reverse=True)
    plan += [(f"draft_{n}", drafts[n], c) for n in names for c in ev.DRAFT]
    plan += [("target", target, c) for c in (*ev.SAMPLED, *ev.EXTRA)]
    plan += [(f"draft_{n}", drafts[n], c) for n in names for c in ev.SAMPLED]
    plan += [(f"draft_{names[0]}", drafts[names[0]], c) for c in ev.DRAFT_EXTRA] if names else []
    if options.smoke:
        plan = [p for p in plan if p[0] in ("target", "draft_100") and p[2] not in ev.EXTRA]
    if options.tiny:
        plan = [p for p in plan if p[2].name in ("expression_4", "search_8_t08")]
    for who, model, what in plan:
        if time.monotonic() > deadline:
            trainer.log(f"SKIPPED for lack of time: {who} {what.name} and everything after it")
            break
        try:
            result = ev.evaluate(model, what, text, options.problems, deadline)
        except Exception:  # noqa: BLE001 - one broken cell must not cost the others, and the weights are already saved
            trainer.log(f"FAILED {who} {what.name}\n{traceback.format_exc()}")
            continue
        if time.monotonic() > deadline:
            trainer.log(f"CUT OFF at the deadline, not counted: {who} {what.name}")
            break
        results["cells"].setdefault(who, {})[what.name] = result
        bar = ev.BARS.get(what.name) if who == "target" else None
        verdict = "" if bar is None else (" ok" if result["accuracy"] >= bar else f" BELOW {bar}")
        trainer.log(f"{who} {what.name} {json.dumps(result)}{verdict}")


def finish(trainer: Trainer, feed: Feed, results: dict) -> None:
    """Save what there is, then evaluate."""
    feed.close()
    save(trainer, "100")
    target = trainer.targets[0].model
    save_target(trainer.options.out, target.state_dict())
    if isinstance(target, LatentDecoder):
        export(trainer.options.out / "slipstream-mla", target.state_dict(), target.config)
    trainer.log("saved")
    assess(trainer, results)


def guard(limit: float) -> None:
    """End the process at the limit, whatever hangs."""

    def end() -> None:
        print("hard time limit reached", flush=True)
        os._exit(3)

    timer = threading.Timer(max(limit - (time.monotonic() - BEGAN), 1), end)
    timer.daemon = True
    timer.start()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "train.log")
    feed = Feed(options.workers, options.tokens, options.seed)  # forks: before threads and CUDA
    guard(options.limit)
    log(f"{sys.version.split()[0]} torch {torch.__version__} {vars(options)}")
    torch.set_float32_matmul_precision("high")
    code = 0
    chosen = {name: str(value) for name, value in vars(options).items() if name != "out"}
    results: dict = {"cells": {}, "options": chosen}
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        log(f"attention: {choose(device)}")
        trainer = Trainer(options, log)
        try:
            train(trainer, feed)
        except NotTurned:
            raise  # nothing worth saving
        except Exception:  # noqa: BLE001 - a run that dies late must still save
            log("TRAINING FAILED\n" + traceback.format_exc())
            code = 1
        finish(trainer, feed, results)
    except Exception:  # noqa: BLE001 - report, then leave through os._exit
        log("FAILED\n" + traceback.format_exc())
        code = 1
    finally:
        feed.close()
        results["wall_s"] = round(time.monotonic() - BEGAN, 1)
        if "torch._inductor.async_compile" in sys.modules:
            sys.modules["torch._inductor.async_compile"].shutdown_compile_workers()  # they would hold the output open
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results), flush=True)
        os._exit(code)


if __name__ == "__main__":
    main()
