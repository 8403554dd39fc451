"""The fenced blocks of a page, and running them as a reader would."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def blocks_of(page: str) -> list[tuple[str, str]]:
    """The kind and the text of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


async def run_python(source: str, address: str) -> None:
    """Execute a snippet as if it stood in an async function; blocking clients and whole programs get a thread."""
    source = source.replace("localhost:7001", address)
    code = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, Any] = {}
    if "asyncio.run(" not in source and ("await" in source or "async " in source):
        result = eval(code, names)  # an expression evaluates to a coroutine where the code awaits
        if result is not None:
            await result
    else:
        await asyncio.to_thread(exec, code, names)


async def run_command(line: str, address: str, folder: Path) -> None:
    """Run one command line as a user would."""
    words = shlex.split(line)
    assert words[0] == "tallymark", line
    environment = dict(os.environ, TALLYMARK_SERVER=address)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tallymark_node.main",
        *words[1:],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, f"{line}\n{out.decode()}\n{err.decode()}"
