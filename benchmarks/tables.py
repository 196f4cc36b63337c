"""Write the tables of README and docs from the committed results, so that no number comes from anywhere else.

python benchmarks/tables.py          # rewrite them
python benchmarks/tables.py --check  # fail when one is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bars import bars

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MISSING = "Not measured yet."


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return result


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def decode_h200() -> str:
    result = load("h200/decode.json")
    rows, notes = [], []
    for p in result["points"]:
        if p.get("arm") == "transformers":
            where = f"{p['batch']} x {p['context']:,}"
            notes.append(
                f"transformers' `generate` (static cache, compiled) with the same weights at {where}: "
                f"{p['tpot_ms']:.2f} ms, {p['speedup_of_ours']:.2f} x ours."
            )
        elif "floor_ms" in p:
            rows.append(decode_row(p))
        else:
            notes.append(
                f"Host time per step outside the graph at {p['batch']} chains x {p['context']}: {p['host_ms']:.2f} ms."
            )
    for p in load("h200/decode_32b.json")["points"]:
        rows.append(decode_row(p, "Qwen3-32B, "))
    head = ["batch x context", "TPOT ms", "floor ms", "ratio", "tokens/s"]
    return table(head, rows) + "\n\n" + " ".join(notes)


def decode_row(p: dict[str, Any], shape: str = "") -> list[str]:
    return [
        f"{shape}{p['batch']} x {p['context']:,}",
        f"{p['tpot_ms']:.2f}",
        f"{p['floor_ms']:.2f}",
        f"**{p['ratio']:.2f}**",
        f"{p['batch'] / p['tpot_ms'] * 1e3:,.0f}",
    ]


def operator_dense() -> str:
    """Our decode attention against FlashInfer's faster variant on the same pages."""
    points = [p for p in load("h200/operator_dense.json")["points"] if p["name"] == "decode_attention"]
    rows = []
    for batch, context in dict.fromkeys((p["batch"], p["context"]) for p in points):
        times = {p["arm"]: p["us"] for p in points if (p["batch"], p["context"]) == (batch, context)}
        peer = min(us for arm, us in times.items() if arm != "ours")
        rows.append(
            [f"{batch} x {context:,}", f"{times['ours']:.1f}", f"{peer:.1f}", f"**{peer / times['ours']:.2f}**"]
        )
    return table(["batch x context", "ours, us", "FlashInfer, us", "ratio"], rows)


def decode_cpu() -> str:
    rows = [
        [
            str(p["batch"]),
            f"{p['ours_tokens_per_s']:.0f}",
            f"{p['transformers_tokens_per_s']:.0f}",
            f"**{p['ratio']:.2f}**",
        ]
        for p in load("cpu/decode_cpu.json")["points"]
    ]
    return table(["batch", "ours, tokens/s", "transformers, tokens/s", "ratio"], rows)


def operator_sparse() -> str:
    """Microseconds of one layer, by method."""
    points = [p for p in load("h200/operator_sparse.json")["points"] if not p.get("gated")]
    methods = ("full", "two_level", "quest", "double_sparsity")
    rows = []
    for context in sorted({p["context"] for p in points}):
        for batch in (1, 4, 8):
            at = {p["method"]: p for p in points if (p["batch"], p["context"]) == (batch, context)}
            ours = at["two_level"]
            times = [f"{at[name]['total_us']:.1f}" for name in methods]
            stages = " + ".join(f"{ours[stage]:.0f}" for stage in ("score_us", "select_us", "attend_us"))
            speedup = at["full"]["total_us"] / ours["total_us"]
            rows.append([f"{batch} x {context:,}", *times, stages, f"{ours['floor_us']:.1f}", f"**{speedup:.1f}**"])
    head = ["batch x context", "FlashInfer", "two_level", "quest", "double sparsity"]
    return table([*head, "score + select + attend", "bytes alone", "full / two_level"], rows)


def decode_methods() -> str:
    points = load("h200/decode_methods.json")["points"]
    rows = []
    for batch, context in dict.fromkeys((p["batch"], p["context"]) for p in points):
        at = {p["method"]: p["tpot_ms"] for p in points if (p["batch"], p["context"]) == (batch, context)}
        times = [f"{at[name]:.2f}" for name in ("full", "two_level", "quest", "double_sparsity")]
        rows.append([f"{batch} x {context:,}", *times, f"**{at['two_level'] / at['full']:.2f}**"])
    return table(["batch x context", "full", "two_level", "quest", "double sparsity", "two_level / full"], rows)


METHODS = {
    "two_level": "two_level",
    "quest:dense_layers=0": "quest",
    "double_sparsity:dense_layers=0": "double sparsity",
    "oracle": "oracle",
    "full": "full",
}


def accuracy_sparse() -> str:
    """Share of 100 problems right at 128 tokens, protocol B: where methods differ."""
    points = load("h200/accuracy.json")["points"]
    found = {(p["cell"].removesuffix(" protocol=B"), p["method"]): p["accuracy"] for p in points if _is_small(p)}
    rows = []
    for cell in sorted(
        {cell for cell, method in found if method == "two_level"}, key=lambda cell: (int(cell.split("=")[1]), cell)
    ):
        task, length = cell.split(" num_tokens=")
        if task != "needle_multivalue":  # the model cannot do it with full attention either
            shares = [f"{found[cell, method]:.2f}" for method in METHODS]
            rows.append([f"{task}, {int(length):,}, 1/{int(length) // 128}", *shares])
    return table(["task, context, budget", *METHODS.values()], rows)


def _is_small(point: dict[str, Any]) -> bool:
    return point["part"] == "retrieval" and point["method"] in METHODS and (
        point["method"] == "full" or (point["tokens"] == 128 and point["protocol"] == "B")
    )  # fmt: skip


def accuracy_chains() -> str:
    """Share of 100 problems right where the chain is long: programs at 256 tokens."""
    points = [p for p in load("h200/accuracy.json")["points"] if p["part"] == "programs"]
    names = METHODS | {"tova": "tova", "window": "window"}
    found = {(p["cell"], p["method"]): p["accuracy"] for p in points}
    rows = [[cell, *(f"{found[cell, method]:.2f}" for method in names)] for cell in dict.fromkeys(c for c, _ in found)]
    return table(["task", *names.values()], rows)


def newest(name: str) -> dict[str, Any] | None:
    """The result of this name, of a GPU where there is one."""
    found = [place for place in (f"h200/{name}", f"cpu/{name}") if (RESULTS / place).exists()]
    return load(found[0]) if found else None


def predictors() -> str:
    """Attention mass, and overlap of what is not always kept, at an eighth of the sequence."""
    result = newest("predictors.json")
    if result is None:
        return MISSING
    rows = [row for row in result["rows"] if row["budget"] == "1/8"]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    found = {(row["predictor"], row["cell"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["predictor"] for row in rows):
        own = [found[name, cell] for cell in cells]
        lines.append([f"`{name}`", *(f"{row['mass']:.3f} / {row['overlap_free']:.2f}" for row in own)])
    head = f"mass / overlap_free, {result['samples']} chains a task"
    return table([head, *(cell.split()[0] for cell in cells)], lines)


def asyncspade_accuracy() -> str:
    """Share of problems right at an eighth of the context: means of the retrieval and of the program cells."""
    result = newest("asyncspade_accuracy.json")
    if result is None:
        return MISSING
    lines, points = [], result["points"]
    exact = {point["cell"]: point["accuracy"] for point in points if point["method"] == "full"}
    for method in dict.fromkeys(point["method"] for point in points):
        own = {point["cell"]: point for point in points if point["method"] == method}
        shares = []
        for is_program in (False, True):
            group = [point for cell, point in own.items() if cell.startswith("program") == is_program]
            if not group:
                shares.append("-")
                continue
            error = sum(point["stderr"] ** 2 for point in group) ** 0.5 / len(group)
            mean = sum(point["accuracy"] for point in group) / len(group)
            shares.append(f"{mean:.3f} +- {error:.3f} ({len(group)} x {group[0]['problems']})")
        lost = max((exact[cell] - point["accuracy"], cell) for cell, point in own.items() if cell in exact)
        lines.append([f"`{method}`", *shares, f"{lost[0]:.2f}" + (f", {lost[1]}" if lost[0] > 0 else "")])
    return table(["method", "retrieval, 2k to 8k", "programs, 50 and 100 steps", "most lost to full in a cell"], lines)


def atts_accuracy() -> str:
    """pass@1, and the target's tokens as a share of the target alone's, by arm and alpha."""
    points = [p for p in load("h200/atts_accuracy.json")["points"] if p["takeover"] == "replace"]
    alone = {p["alpha"]: p for p in points if p["mode"] == "coin" and p["alpha"] in (0.0, 1.0)}
    lines = []
    for mode, score in dict.fromkeys((p["mode"], p["score"]) for p in points):
        own = {p["alpha"]: p for p in points if (p["mode"], p["score"]) == (mode, score)}
        cells = [f"{own[a]['pass@1']:.3f} ({own[a]['target_share']:.2f})" for a in (0.1, 0.2, 0.3, 0.5)]
        lines.append(
            [
                f"`{mode}`" + (f", `{score}`" if score != "none" else ""),
                *cells,
                str(min(p["seeds"] for p in own.values())),
            ]
        )
    lines.sort(key=lambda line: -float(line[3].split()[0]))
    ends = [f"{alone[a]['pass@1']:.3f}" for a in (0.0, 1.0)]
    lines += [["draft alone", ends[0], "", "", "", "5"], ["target alone", ends[1], "", "", "", "5"]]
    return table(["pass@1 (share of tokens) at alpha", "0.1", "0.2", "0.3", "0.5", "seeds, at least"], lines)


def latent_accuracy() -> str:
    """Mean over the retrieval tasks that the model can do, by length and budget."""
    points = [p for p in load("h200/accuracy_latent.json")["points"] if p["part"] == "retrieval"]
    able = ("needle_single", "needle_multikey", "needle_multiquery", "variable_tracking")
    lines = []
    for method in dict.fromkeys(p["method"] for p in points):
        cells = []
        for length in (2048, 4096, 8192):
            for budget in ("1/8", "1/16", "1/32"):
                want = [
                    p["accuracy"] for p in points
                    if p["method"] == method and f"={length}" in p["cell"] and p["budget"] in (budget, "all", "1")
                    and p["task"] in able and p["protocol"] == "A"
                ]  # fmt: skip
                cells.append(f"{sum(want) / len(want):.3f}" if len(want) == len(able) else "-")
        lines.append([f"`{method}`", *cells])
    head = [f"{length // 1024}k, {budget}" for length in (2048, 4096, 8192) for budget in ("1/8", "1/16", "1/32")]
    return table(["accuracy", *head], lines)


def sparse_probe() -> str:
    """Recall of the oracle's tokens / attention mass: means by length and of programs, then by layer at 8k."""
    every = load("h200/probe.json")["points"]
    points, programs = ([p for p in every if p["budget"] == budget] for budget in ("1/8", "256"))
    chains = sorted({p["cell"] for p in programs}, key=lambda cell: (cell.split()[0], int(cell.split("=")[1])))
    lengths, layers = (2048, 4096, 8192), list(points[0]["recall_by_layer"])
    lines = []
    for method in dict.fromkeys(p["method"] for p in points):
        groups = [[p for p in points if p["method"] == method and f"={n} " in p["cell"]] for n in lengths]
        groups += [[p for p in programs if p["method"] == method and p["cell"] == cell] for cell in chains]
        cells = [[sum(p[name] for p in own) / len(own) for name in ("recall", "mass")] for own in groups]
        groups = groups[: len(lengths)]
        cells += [
            [sum(p[f"{name}_by_layer"][layer] for p in groups[-1]) / len(groups[-1]) for name in ("recall", "mass")]
            for layer in layers
        ]
        lines.append([f"`{method}`", *(f"{recall:.2f} / {mass:.2f}" for recall, mass in cells)])
    head = [*(f"{n // 1024}k" for n in lengths), *(cell.replace("_", " ").replace("steps=", "of ") for cell in chains)]
    return table(["recall / mass", *head, *(f"8k, layer {x}" for x in layers)], lines)


def asyncspade_drift() -> str:
    """Gap to full attention, agreement of greedy tokens, overlap and repairs, by decoded tokens."""
    result = newest("asyncspade_drift.json")
    rows = [row for row in result["points"] if row["part"] == "accumulation"] if result else []
    if not rows:
        return MISSING
    edges = [edge for edge in (256, 1024, 2048, 4096, 16384) if any(row["decoded"] == edge for row in rows)]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["decoded"]: row for row in rows if row["method"] == method}
        cells = [[own[edge][name] for name in ("gap", "agreement", "overlap", "repaired")] for edge in edges]
        lines.append([f"`{method}`", *(" / ".join("-" if x is None else f"{x:.3f}" for x in cell) for cell in cells)])
    return table(["gap, nats / agreement / overlap / repaired", *(f"to {edge:,}" for edge in edges)], lines)


def is_quiet(points: list[dict[str, Any]]) -> bool:
    """Whether nothing else ran that would be in the wall clock's times."""
    return all(point.get("load", 0.0) < 3 for point in points)


def asyncspade_network() -> str:
    """What the link alone takes for a token, and where the machine was quiet what the token took."""
    result = newest("asyncspade_network.json")
    if result is None:
        return MISSING
    points = {(point["arm"], point["link"]): point for point in result["points"]}
    arms, links = (list(dict.fromkeys(key[i] for key in points if key[1] != "none")) for i in (0, 1))
    quiet, lines = is_quiet(result["points"]), []
    for arm in arms:
        own = [points[arm, link] for link in links]
        times = [f"{p['link_ms']:.2f}" + (f" of {p['tpot_ms']:.1f}" if quiet else "") for p in own]
        lines.append([f"`{arm}`", f"{own[0]['kb_out']:,.0f} / {own[0]['kb_in']:,.0f}", *times])
    head = "one chain of {context:,} tokens".format(**points["full", "none"])
    return table([head, "kB a token out / in", *(f"{link}, ms" for link in links)], lines)


def asyncspade_cost() -> str:
    """Memory, and where the machine was quiet times."""
    if not (RESULTS / "cpu/asyncspade_cost.json").exists():
        return MISSING
    points = load("cpu/asyncspade_cost.json")["points"]
    quiet, lines = is_quiet(points), []
    for p in points:
        rank = f" + {p['rank_peak_mb']:,.0f}" if "rank_peak_mb" in p else ""
        times = [f"{p['tpot_ms']:.1f}", f"{p['device_ms_per_token']:.2f}", f"{p['busy_ms_per_token']:.2f}"]
        lines.append(
            [f"`{p['arm']}`", f"{p['devices']}", f"{p['chains']}", f"{p['bytes_per_token']:,}", f"{p['seats_mb']:,.1f}",
             f"{p['needed_mb']:,.0f}{rank}", *(times if quiet else [])]
        )  # fmt: skip
    head = ["arm", "devices", "chains", "bytes a token of context", "windows and sets, MB", "peak memory, MB"]
    return table(head + ["TPOT, ms", "device ms a token", "busy ms a token"] * quiet, lines)


def asyncspade_h200() -> str:
    """TPOT in ms of the arms at each workload, at a budget of 1,024 tokens, and the ratios that have bars."""
    rows, floor = [], "asyncspade:predictor=last floor"
    ours = ("asyncspade", "asyncspade:predictor=last")
    for name, shape in (("h200/asyncspade.json", ""), ("h200/asyncspade_32b.json", "Qwen3-32B, ")):
        points = load(name)["points"] if (RESULTS / name).exists() else []
        at = {(p["arm"], p["batch"], p["context"]): p["tpot_ms"] for p in points if p["budget"] in (0, 1024)}
        for batch, context in dict.fromkeys((b, c) for _, b, c in at):
            arms = ("full", "quest", "double_sparsity", "two_level", *ours, floor)
            times = {arm: at[arm, batch, context] for arm in arms if (arm, batch, context) in at}
            ratios = [[times[arm] / times[rival] for arm in ours] for rival in ("full", "quest", floor)]
            cells = [f"{times[arm]:.2f}" if arm in times else "" for arm in arms]
            rows.append([f"{shape}{batch} x {context:,}", *cells, *(f"{a:.2f}, {b:.2f}" for a, b in ratios)])
    if not rows:
        return MISSING
    head = ["batch x context", "full", "quest", "double sparsity", "two_level", "in depth", "in time, `last`", "floor"]
    return table([*head, "both / full", "/ quest", "/ floor"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "decode-h200": decode_h200,
    "operator-dense": operator_dense,
    "decode-cpu": decode_cpu,
    "operator-sparse": operator_sparse,
    "decode-methods": decode_methods,
    "accuracy-sparse": accuracy_sparse,
    "accuracy-chains": accuracy_chains,
}


ASYNCSPADE: dict[str, Callable[[], str]] = {
    "predictors": predictors,
    "asyncspade-accuracy": asyncspade_accuracy,
    "asyncspade-drift": asyncspade_drift,
    "asyncspade-network": asyncspade_network,
    "asyncspade-cost": asyncspade_cost,
    "asyncspade-h200": asyncspade_h200,
}
PAGES = {
    "README.md": TABLES,
    "docs/sparse.md": {"sparse-probe": sparse_probe, "latent-accuracy": latent_accuracy},
    "docs/asyncspade.md": ASYNCSPADE,
    "docs/atts.md": {"atts-accuracy": atts_accuracy},
    "docs/bars.md": {"bars": bars},
}


def render(text: str, tables: dict[str, Callable[[], str]] = TABLES) -> str:
    """The text with everything between ``<!-- name -->`` and ``<!-- /name -->`` made anew."""
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, make=make: match[1] + make() + "\n" + match[2], text)
        if count != 1:
            raise ValueError(f"the page must have one place for the table {name!r}, found {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for name, tables in PAGES.items():
        page = ROOT / name
        before = page.read_text(encoding="utf-8")
        after = render(before, tables)
        if args.check and before != after:
            raise SystemExit(f"{name} does not show the committed results: run python benchmarks/tables.py")
        page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
