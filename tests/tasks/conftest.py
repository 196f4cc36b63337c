"""Makes ``spoiling`` importable: pytest's importlib mode leaves the folders of tests off ``sys.path``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
