"""scripts/release.py: what it refuses, what it runs, and that this repository names one version everywhere."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import apb

ROOT = Path(__file__).parents[2]
FILES = {
    "src/apb/__init__.py": '__version__ = "1.2.0"\n',
    "CHANGELOG.md": "# Changelog\n\n## 1.2.0 (2030-01-31)\n\n## 1.1.0 (2029-01-31)\n",
    "CITATION.cff": "version: 1.2.0\n",
    "docs/machines/job.yaml": "image: registry.example.com/apb:1.2.0\n",
    ".ci/run": "echo the suite >&2\n",
    ".gitignore": "dist/\n",
}


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("release")


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository that is ready but for its tag."""
    folder = tmp_path / "repository"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "All")
    return folder


def test_what_is_refused(release: Any, repository: Path) -> None:
    """Each thing by itself, in one sentence, and nothing is run."""
    assert release.problems(repository, "1.2.0") == [
        "The commit has no tag v1.2.0; once the rest is right, git tag v1.2.0."
    ]
    git(repository, "tag", "v1.2.0")
    assert release.problems(repository, "1.2.0") == []
    for name, wrong, said in (
        (
            "CHANGELOG.md",
            "## 1.2.0 (unreleased)\n",
            "begins with '1.2.0 (unreleased)'; its first heading must be 1.2.0",
        ),
        ("CHANGELOG.md", "## 1.1.0 (2029-01-31)\n", "begins with '1.1.0 (2029-01-31)'"),
        ("CITATION.cff", "version: 1.2.0.1\n", "CITATION.cff names another version; write 'version: 1.2.0' there."),
        ("docs/machines/job.yaml", "image: x/apb:1.1.0\n", "docs/machines/job.yaml names another version"),
    ):
        (repository / name).write_text(wrong)
        about, tree = release.problems(repository, "1.2.0")
        assert said in about and tree == f"The tree is not clean; commit or remove {name}."
        (repository / name).write_text(FILES[name])
    git(repository, "commit", "--allow-empty", "-m", "More")  # the tag stays where it was
    with pytest.raises(SystemExit, match=r"1.2.0 cannot be released:\nThe commit has no tag v1.2.0"):
        release.main([], repository)


@pytest.mark.parametrize("upload", [False, True])
def test_what_is_run(
    release: Any, repository: Path, upload: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """CI in a clone, then the build of that clone, then the wheel in a fresh environment, then twine's check; an upload
    only if asked for."""
    git(repository, "tag", "v1.2.0")
    call, seen = release.call, []

    def recorded(*command: str, **where: Any) -> None:
        if command[0] in ("git", "bash"):
            call(*command, **where)
        elif "build" in command:
            assert (Path(command[-1]) / "CITATION.cff").read_text() == FILES["CITATION.cff"]
            Path(command[4]).mkdir(parents=True)
            (Path(command[4]) / "apb_llm-1.2.0-py3-none-any.whl").write_bytes(b"0" * 200_000)
        elif "pip" in command:
            assert command[3:5] == ("install", "--quiet") and command[5].endswith("/apb_llm-1.2.0-py3-none-any.whl")
        seen.append((Path(command[0]).name, *command[1:3]) if command[0] not in ("git", "bash") else command[:2])

    monkeypatch.setattr(release, "call", recorded)
    release.main(["--upload"] if upload else [], repository)
    python = Path(sys.executable).name
    twice = [(python, "-m", "twine")] * (1 + upload)
    fresh = [(python, "-m", "venv"), ("python", "-m", "pip"), ("apb", "demo")]
    assert seen == [("git", "clone"), ("bash", ".ci/run"), (python, "-m", "build"), *fresh, *twice]
    said = capfd.readouterr()
    assert "the suite" in said.err and "1.2.0-py3-none-any.whl: 0.2 MB" in said.out
    assert ("Nothing was uploaded" in said.out) != upload


def test_a_failing_suite_ends_it(release: Any, repository: Path) -> None:
    """Nothing is built."""
    (repository / ".ci/run").write_text("exit 3\n")
    git(repository, "commit", "-am", "A bug")
    git(repository, "tag", "v1.2.0")
    with pytest.raises(SystemExit, match=r"bash \.ci/run ended with status 3; nothing was released"):
        release.main([], repository)
    assert not (repository / "dist").exists()


def test_this_repository_names_one_version(release: Any) -> None:
    """All but the date of a release that is still to come."""
    assert release.version_of(ROOT) == apb.__version__
    assert all("(unreleased)" in each for each in release.misnamed(ROOT, apb.__version__))
    assert f"\n## {apb.__version__} (" in (ROOT / "CHANGELOG.md").read_text()
