"""The README shows the committed results and nothing else; no committed file knows the machine it was written on."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_tables_are_what_the_results_say():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_options_in_the_readme_exist():
    from slipstream.build import Options

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"LLM\([^)]*?\b(\w+)=", text))
    assert named <= set(Options.__dataclass_fields__), named
