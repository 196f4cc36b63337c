"""Makes ``toy_engine`` importable: pytest's importlib mode leaves the folders of tests off ``sys.path``."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
