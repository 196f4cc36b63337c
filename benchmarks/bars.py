"""Every bar that a committed result was held to, met or missed: ``docs/bars.md``."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# What was asked, and the results that answer it, the newest of each question.
QUESTIONS = {
    "Decoding": ("h200/decode", "h200/decode_32b", "h200/operator_dense", "cpu/decode_cpu", "cpu/embedded_models"),
    "Sparse attention": ("h200/operator_sparse", "h200/decode_methods", "h200/accuracy"),
    "AsyncSpade": ("h200/asyncspade", "h200/asyncspade_accuracy", "cpu/asyncspade_cpu", "cpu/asyncspade_cpu_b1"),
    "AsyncTLS": ("h200/offload", "h200/asynctls_accuracy"),
    "A1 / ATTS": (
        "cpu/atts_replay", "h200/atts_schedule", "cpu/atts_schedule", "cpu/atts_schedule_full",
        "cpu/atts_schedule_simulated", "h200/atts_accuracy",
    ),
    "Server": ("cpu/serve", "cpu/soak"),
    "Latent attention": ("h200/operator_latent", "h200/asyncspade_latent", "h200/accuracy_latent"),
    "Deployment": ("cpu/entrance",),
}  # fmt: skip
HEAD = "| what | measured | asked | | result, commit |"
SIGNS = {">=": "at least", "<=": "at most"}


def bars() -> str:
    """One table for each question: what was measured, what was asked for, and the commit that was measured."""
    lines, counts = [], {True: 0, False: 0}
    for question, names in QUESTIONS.items():
        lines += [
            f"## {question}",
            "",
            "| what | measured | asked | | result, commit |",
            "| --- | ---: | ---: | --- | --- |",
        ]
        for name in names:
            result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            for bar in result["bars"]:
                counts[bar["ok"]] += 1
                lines.append(
                    f"| {bar['name']} | {bar['value']:.4g} | {SIGNS[bar['direction']]} {bar['limit']:g} "
                    f"| {'' if bar['ok'] else '**missed**'} | `{name}.json`, {result['commit']} |"
                )
        lines.append("")
    return "\n".join([f"{counts[True]} met, {counts[False]} missed.", "", *lines]).rstrip()
