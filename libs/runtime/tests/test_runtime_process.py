"""What a serving process asks of its surroundings."""

import subprocess
import sys

SCRIPT = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
from tallymark_runtime.process import tune
tune()
soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
assert (soft, most) == (hard, hard), (soft, most, hard)
"""


def test_as_many_files_may_be_open_as_the_system_lets() -> None:
    """The soft limit of a shell is for interactive programs."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)
