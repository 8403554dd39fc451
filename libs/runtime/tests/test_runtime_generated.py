"""The generated gRPC code is what the .proto files give."""

import importlib.util
from pathlib import Path

import tallymark_runtime


def test_the_generated_code_is_up_to_date(tmp_path):
    """Generating it anew gives the same files; where this fails, `make proto` renews them."""
    package = Path(tallymark_runtime.__file__).parent
    spec = importlib.util.spec_from_file_location("generate", package.parent / "proto" / "generate.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    generator.generate(tmp_path / "generated")

    def read(folder):
        return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))}

    assert read(tmp_path / "generated") == read(package / "generated")
