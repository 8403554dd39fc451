"""The modules of the load lie beside this folder; importlib mode doesn't put them on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
