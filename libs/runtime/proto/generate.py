"""Generate the gRPC code from the .proto files of this directory.

    python generate.py [FOLDER]

FOLDER is `tallymark_runtime/generated` where none is given. Everything in it is replaced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).resolve().parent
GENERATED = PROTO.parent / "tallymark_runtime" / "generated"


def generate(folder: Path) -> None:
    """Write the generated package into `folder`."""
    # The plugin, and the formatter that it calls, are beside this interpreter.
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={PROTO}",
        f"--python_betterproto2_out={folder}",
        "--python_betterproto2_opt=client_generation=async",
        "--python_betterproto2_opt=server_generation=async",
        *(str(path.relative_to(PROTO)) for path in sorted(PROTO.rglob("*.proto"))),
    ]
    # The generator formats its code by the settings it finds above its working directory: this project's.
    subprocess.run(command, cwd=PROTO, env=environment, check=True, capture_output=True)
    (folder / "py.typed").unlink(missing_ok=True)  # the package around it has one
    package = folder / "__init__.py"
    package.write_text(
        '"""Generated from the .proto files of `libs/runtime/proto`; `make proto` renews it."""\n'
    )


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else GENERATED)
