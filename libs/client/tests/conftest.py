"""The fake gateway lies beside the tests; importlib mode doesn't put it on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
