"""What these tests share: other rooms' harnesses on ``sys.path``, and ranks as threads, for a process takes seconds."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "engine", HERE.parent / "models"):
    sys.path.insert(0, str(folder))


@pytest.fixture
def thread_ranks(monkeypatch):
    from thread_ranks import start

    from slipstream.scale import lead

    monkeypatch.setattr(lead, "start", start)
