"""What the points of ``offload.py`` come to: bars, and the weights that a step reads."""

from __future__ import annotations

import math

from harness import Report
from shapes import SHAPES

from slipstream.models.config import DecoderConfig
from slipstream.models.parameters import parameters


def weight_bytes(model: DecoderConfig, batch: int) -> float:
    """Weights that a decode step of so many chains reads, in their number; experts as often as chance chooses them."""
    experts = model.experts
    share = 1.0 if experts is None else 1 - (1 - experts.chosen / experts.count) ** batch
    read = [p for p in parameters(model) if p.name != "embedding"]
    return sum(math.prod(p.shape) * (share if ".experts_" in p.name else 1) for p in read)


def bars(report: Report, bandwidth: float) -> None:
    """Those of issue 5, of a latent cache that of issue 8, of the points so far."""
    report.bars.clear()
    own = [p for p in report.points if "tpot_ms" in p]
    ours = [p for p in own if p["method"] == "asynctls"]
    near = {(p["shape"], p["context"], p["batch"]): p["tpot_ms"] for p in own if p["method"] == "two_level"}
    same = ("shape", "context", "batch", "cap", "slots")
    still = {tuple(p[key] for key in same): p["tpot_ms"] for p in ours if p["overlap"] == 1}
    report.bar("kernel that loads blocks of pinned memory, GB/s", report.notes["gather_bytes_per_s"] / 1e9, 45, ">=")
    for p in ours:
        where = (p["shape"], p["context"], p["batch"])
        name = f"{p['shape']} {p['batch']} x {p['context']} cap {p['cap']} slots {p['slots']} overlap {p['overlap']}"
        if where in near:
            limit = max(near[where], 1e3 * p["step_bytes"] / bandwidth)
            report.bar(f"TPOT / max(two_level, bytes / bandwidth), {name}", p["tpot_ms"] / limit, 1.10, "<=")
        if p["overlap"] == 0.97 and tuple(p[key] for key in same) in still:
            longer = 1 - still[tuple(p[key] for key in same)] / p["tpot_ms"]
            report.bar(f"exposed share of a step, by its clock, {name}", p["exposed_ms"] / p["tpot_ms"], 0.05, "<=")
            report.bar(f"exposed share of a step, against overlap 1, {name}", longer, 0.05, "<=")
        if p["overlap"] == 0.8:
            report.bar(f"host to device while busy, GB/s, {name}", p["busy_gb_s"], 45, ">=")
    for p in [p for p in own if p["method"] == "full" and p["cap"] is not None]:
        rivals = [x for x in ours if all(x[key] == p[key] for key in ("shape", "context", "cap"))]
        for overlap, limit in ((0.9, 3.5), (0.97, 3.5)) if is_latent(p["shape"]) else ((0.9, 4), (0.97, 7)):
            best = max((x for x in rivals if x["overlap"] == overlap), key=lambda x: x["tokens_per_s"], default=None)
            if best is not None:
                name = f"{p['shape']} {p['context']} cap {p['cap']} overlap {overlap}"
                ratio = best["tokens_per_s"] / p["tokens_per_s"]
                report.bar(f"asynctls x{best['batch']} / full x{p['batch']}, {name}", ratio, limit, ">=")


def is_latent(shape: str) -> bool:
    return "latent" in shape or "kv_lora_rank" in SHAPES.get(shape, {})
