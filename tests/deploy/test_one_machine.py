"""Who stays on one machine neither imports Ray nor needs it."""

import subprocess
import sys

SCRIPT = """
import sys
import slipstream.cli
from typer.testing import CliRunner

def run(*arguments):
    done = CliRunner().invoke(slipstream.cli.app, arguments)
    return done.output + repr(done.exception)

assert "deploy" in run("--help") and "restart" in run("deploy", "--help")
assert "ray" not in sys.modules and "uvicorn" not in sys.modules
sys.modules["ray"] = None  # as where it is not installed
print(run("status"))
"""


def test_ray_is_imported_by_nobody_who_did_not_ask_for_it():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "ray not installed: pip install 'slipstream[scale]'" in done.stdout
