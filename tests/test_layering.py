"""The layering rule, as data: which room may import which (docs/architecture.md). Arrows point down."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "slipstream"

# room -> the rooms of ours that it may import. A room is a file or a folder of the package.
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "kernels": {"types"},
    "overlap": {"types"},
    "kvcache": {"types", "kernels", "overlap"},
    "selection": {"types", "kernels", "overlap", "kvcache"},
    "attention": {"types", "kernels", "overlap", "kvcache", "selection"},
    "models": {"types", "kernels", "attention.backend"},
    "engine": {"types", "kernels", "overlap", "kvcache", "selection", "attention", "models"},
    "scale": {"types", "overlap", "kvcache", "models", "engine"},
    "asyncspade": {"types", "kernels", "overlap", "kvcache", "selection", "attention"},
    "asynctls": {"types", "kernels", "overlap", "kvcache", "selection", "attention"},
    "atts": {"types"},
    "tasks": {"types"},
    "text": {"types"},
    "assets": set(),
    "split": {"asyncspade", "asynctls", "scale", "selection"},
    "build": {"*"},
    "rank": {"build", "scale"},
    "llm": {"build", "types", "text", "engine"},
    "evaluation": {"llm", "types", "tasks"},
    "benchmark": {"build", "llm", "types", "engine", "attention", "selection"},
    "compare": {"build", "llm", "types", "tasks", "evaluation", "attention"},
    "predictors": {"asyncspade", "evaluation", "kernels", "types"},
    "timeline": {"asyncspade", "benchmark", "kernels", "llm", "models", "overlap"},
    "console": {"llm"},
    "cli_asyncspade": {"asyncspade", "build", "compare", "console", "predictors", "timeline"},
    "cli_cache_rank": {"asyncspade", "build", "console"},
    "cli_sparse": {"build", "console", "compare", "evaluation", "benchmark", "tasks", "attention"},
    "demo": {"llm", "types", "tasks", "evaluation"},
    "scaling": {"atts", "llm", "text", "types"},
    "cli_scale": {"atts", "console", "deploy", "scaling", "types"},
    "cli": {
        "build",
        "llm",
        "types",
        "evaluation",
        "benchmark",
        "demo",
        "tasks",
        "console",
        "cli_asyncspade",
        "cli_cache_rank",
        "cli_deploy",
        "cli_scale",
        "cli_serve",
        "cli_sparse",
    },
    # atts and scaling: a chat request that asks for test-time scaling is a run of theirs (server/scaled.py)
    "server": {"atts", "build", "llm", "scaling", "types", "text"},
    "cli_serve": {"atts", "build", "console", "llm", "server", "types"},
    # processes of its own are servers and cache ranks; its entrance has the servers' door
    "deploy": {"asyncspade", "atts", "build", "kvcache", "llm", "server", "text", "types"},
    "cli_deploy": {"console", "deploy"},
    "__init__": {"*"},
    "__main__": {"cli"},
}
NEVER_BELOW_BUILD = {
    "build", "rank", "llm", "cli", "cli_scale", "deploy", "scaling", "server", "evaluation", "demo", "__init__"
}  # fmt: skip

# by-law (b): these appear only where time is somebody's business
TIME_MODULES = {"threading", "asyncio", "torch.distributed", "queue"}
TIME_ROOMS = {
    "overlap",
    "asyncspade/channel",
    "engine/asynchronous",
    "atts/pipeline",
    "atts/servers",
    "scaling",
    "scale",
    "rank",
    "server",
    "deploy",
    "llm",
}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports_of(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import at line {node.lineno}; name the room in full"
            found.append((node.module or "", node.lineno))
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def violations(path: Path) -> list[str]:
    room, allowed = room_of(path), MAY_IMPORT[room_of(path)]
    bad = []
    for name, line in imports_of(path):
        if not name.startswith("slipstream."):
            continue
        target = name.removeprefix("slipstream.")
        top = target.split(".")[0]
        ok = top == room or any(target == a or target.startswith(a + ".") for a in allowed)
        ok = ok or ("*" in allowed and (room == "__init__" or top not in NEVER_BELOW_BUILD))
        # `from slipstream.attention import backend` names the parent package first
        ok = ok or any(a.startswith(target + ".") for a in allowed)
        if not ok:
            bad.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    return bad


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    assert room_of(path) in MAY_IMPORT, f"{path} is in no room of the table"
    assert violations(path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_time_is_confined(path):
    where = "/".join(path.relative_to(PACKAGE).with_suffix("").parts)
    if any(where == room or where.startswith(room + "/") for room in TIME_ROOMS):
        return
    used = {name for name, _ in imports_of(path)} & TIME_MODULES
    assert not used, f"{where} uses {used}: streams, threads and asyncio live in {sorted(TIME_ROOMS)}"


def test_the_rule_can_fail(monkeypatch):
    """A rule that nothing can break is no rule."""
    bad = PACKAGE / "kernels" / "never_written.py"
    source = "from slipstream.engine import engine\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: source)
    assert violations(bad) == ["kernels/never_written.py:1 imports slipstream.engine"] + [
        "kernels/never_written.py:1 imports slipstream.engine.engine"
    ]


def test_files_stay_readable():
    """Complexity has a budget: no file of the package beyond 400 lines, and so many in all (docs/architecture.md)."""
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert {str(p): n for p, n in lines.items() if n > 400} == {}
    assert sum(lines.values()) < 31_300
