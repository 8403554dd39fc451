"""What the deployment page, the compose file and the units say is what the program knows."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from tallymark_node.config import ROLES, Settings, load

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
COMPOSE = (ROOT / "deploy" / "compose" / "compose.yaml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "deploy" / "compose" / "Dockerfile").read_text(encoding="utf-8")
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))


def rows(*, columns: int) -> list[list[str]]:
    """The cells of the page's tables that have so many columns, heads left out."""
    found = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in PAGE.splitlines()
        if line.startswith("| `")
    ]
    return [row for row in found if len(row) == columns]


def variables(text: str) -> set[str]:
    """The settings that a text gives as environment variables."""
    return set(re.findall(r"^\s*(?:Environment=|ENV )?(TALLYMARK_[A-Z_]+)[:=]", text, re.MULTILINE))


def test_the_table_has_every_setting_with_its_default() -> None:
    """One row for each field of `Settings`, in the same order, and no other."""
    table = rows(columns=5)
    fields = msgspec.structs.fields(Settings)
    assert [row[0] for row in table] == [f"`{field.name}`" for field in fields]
    for row, field in zip(table, fields, strict=True):
        assert row[1] == f"`TALLYMARK_{field.name.upper()}`"
        assert row[2] == (f"`{field.default}`" if field.default != "" else ""), field.name
        assert row[3] in {"all", *ROLES}
        assert len(row[4]) > 10


def test_the_table_of_the_compose_file_has_its_variables() -> None:
    """Each variable that the file takes is in the table, with the file's default."""
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE))
    told: dict[str, str] = {}
    for names, values, _ in rows(columns=3):
        listed = re.findall(r"`(\w+)`", names)
        told.update(zip(listed, values.replace("`", "").split(", "), strict=True))
    assert set(told) == set(used)
    assert told.pop("ETCD_IMAGE") == "the etcd project's"
    assert told == {name: used[name] for name in told}


@pytest.mark.parametrize(
    "path", [*UNITS, Path("compose"), Path("image"), Path("page")], ids=lambda path: path.stem
)
def test_only_settings_that_exist_are_given(path: Path) -> None:
    """A misspelt environment variable would be passed over in silence."""
    text = {"compose": COMPOSE, "image": DOCKERFILE, "page": PAGE}.get(str(path)) or path.read_text()
    given = variables(text) - {"TALLYMARK_ROLE"}  # of the unit itself
    assert given <= {f"TALLYMARK_{field.name.upper()}" for field in msgspec.structs.fields(Settings)}


def test_the_environments_of_the_compose_file_are_valid() -> None:
    """Each service's environment, with the file's defaults filled in, is a configuration that the program takes."""
    filled = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE)
    common = dict(re.findall(r"^  (TALLYMARK_\w+): (.*)$", filled, re.MULTILINE))
    assert "TALLYMARK_COORDINATOR" in common
    services = re.findall(r"^  (\w+):\n((?:    .*\n)+)", filled.split("\nservices:\n", 1)[1], re.MULTILINE)
    seen = []
    for name, body in services:
        role = re.search(r'command: \["run", "--role", "(\w+)"\]', body)
        if role is None:
            assert name.startswith("etcd")
            continue
        own = dict(re.findall(r"^      (TALLYMARK_\w+): (.*)$", body, re.MULTILINE))
        settings = load(None, common | own)
        assert settings.node_id == name
        assert settings.replication_factor == 3
        assert settings.advertise.endswith(f":{settings.port}")
        assert ("ports: [" in body) == (role.group(1) != "store"), "what applications use is published"
        seen.append(role.group(1))
    assert seen == ["store"] * 3 + ["ingest"] * 2 + ["query"] * 2 + ["alerts"] * 2


def test_ports_are_published_on_one_address() -> None:
    """Never on all of them, unless somebody says so."""
    published = re.findall(r'ports: \["(.*?)"\]', COMPOSE)
    assert len(published) == 6
    assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in published)
