"""The Dockerfile and the compose file name what there is; no engine is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from apb.cli.main import app

ROOT = Path(__file__).parents[2]
STAGE = re.compile(r"^FROM (\S+) AS (\w+)$", re.MULTILINE)


def stages() -> dict[str, str]:
    """The instructions of every stage of the Dockerfile, with those of the stage that it begins from."""
    parts = STAGE.split((ROOT / "deploy/Dockerfile").read_text())[1:]
    found: dict[str, str] = {}
    for origin, name, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        found[name] = found.get(origin, "") + body
    return found


def taken(arguments: list[str]) -> dict[str, Any]:
    """The values of a command's options, as the command line takes them."""
    command = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    return dict(command.make_context(arguments[0], arguments[1:]).params)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images(target: str) -> None:
    """What is copied is there and not ignored, and the command is one that listens where the health check asks."""
    found = stages()
    lines = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (.*) \S+$", found["base"], re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists() and f"!{source}" in lines, source
    extras = re.search(r'"\.\[([\w,]+)\]"', found[target])
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(","))
    pinned = re.findall(r"grep '\^(\w+==)' constraints.txt", found[target])
    assert pinned and all(f"\n{name}" in (ROOT / "constraints.txt").read_text() for name in pinned)
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", found[target], re.MULTILINE)[0]) == ["apb"]
    asked = taken(json.loads(re.findall(r"^CMD (.*)$", found[target], re.MULTILINE)[0]))
    assert asked["host"] == "0.0.0.0" and f"127.0.0.1:{asked['port']}/ready" in found[target]
    assert f"EXPOSE {asked['port']}" in found[target] and "USER 1000" in found[target]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_services(name: str) -> None:
    """Every one is built from a stage that there is, and its command and ports are the server's."""
    service = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"][name]
    build = service["build"]
    assert build["target"] in stages() and (ROOT / "deploy" / build["context"] / build["dockerfile"]).is_file()
    asked = taken(service["command"])
    assert asked["host"] == "0.0.0.0" and service["ports"] == [f"127.0.0.1:8000:{asked['port']}"]
    assert service["volumes"][0].split(":")[-2] == "/model" and service["profiles"] == [name]
