import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "engine", HERE.parent / "attention"):
    sys.path.append(str(folder))
