"""The `tallymark` command in a process that kills itself at a chosen step of its writing files.

Called as `dying_server.py FILE ARGUMENTS…`. Once FILE holds a number of steps and a pattern of paths, the process dies
that many steps after it has begun to open a path that matches: too short a moment to be met from outside. A step is
whatever the interpreter's audit hooks tell of, so the code that runs is the product's, unchanged.
"""

import fnmatch
import os
import signal
import sys
from pathlib import Path

from tallymark_node.main import main


class Death:
    """An audit hook that ends the process without a chance to write or say anything more."""

    def __init__(self, order: Path) -> None:
        self._order = order
        self._is_looking = False
        self._steps_left: int | None = None

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.kill":
            return
        if self._steps_left is None:
            if event == "open":
                self._steps_left = self._ordered(str(arguments[0]))
        else:
            self._steps_left -= 1
        if self._steps_left is not None and self._steps_left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _ordered(self, path: str) -> int | None:
        if self._is_looking or not self._order.exists():  # reading the order opens a file, too
            return None
        self._is_looking = True
        try:
            steps, pattern = self._order.read_text().split(maxsplit=1)
            return int(steps) if fnmatch.fnmatch(path, pattern) else None
        finally:
            self._is_looking = False


if __name__ == "__main__":
    sys.addaudithook(Death(Path(sys.argv.pop(1))))
    main()
