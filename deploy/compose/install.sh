#!/bin/sh
# Installs a part of the image: `install.sh dependencies`, `install.sh tallymark`; `install.sh requirements` lists what
# both need, pinned. Runs where pyproject.toml lies, with the Python that is to have it first on the path.
set -eu

# Wheels that came with this script are all there is.
here=$(cd "$(dirname "$0")" && pwd)
if ls "$here"/*.whl >/dev/null 2>&1; then
    PIP_NO_INDEX=1 PIP_FIND_LINKS=$here
    export PIP_NO_INDEX PIP_FIND_LINKS
fi

requirements() {
    # Where everyone else reads them.
    python3 -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    content = tomllib.load(file)
project = content["project"]
build = content["build-system"]["requires"]
print(*project["dependencies"], *project["optional-dependencies"]["server"], *build, sep="\n")
'
}

case "${1:-}" in
requirements)
    requirements
    ;;
dependencies)
    requirements >requirements.txt
    python3 -m pip install --quiet -r requirements.txt
    ;;
tallymark)
    python3 -m pip install --quiet --no-deps --no-build-isolation .
    # What built it has no place in it.
    python3 -m pip uninstall --quiet --yes hatchling pathspec pluggy trove-classifiers
    packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # Compiled kernels remember the time of their sources, and a layer of an image keeps whole seconds of it.
    find "$packages" -name '*.py' -exec touch -d @1600000000 {} +
    # The processes that run can't write here. Some packages carry files for other versions of Python: these fail.
    python3 -m compileall -q -f "$packages" >/dev/null || true
    ;;
*)
    echo "usage: install.sh requirements|dependencies|tallymark" >&2
    exit 2
    ;;
esac
