"""Check and build a release, and upload it if told so. Run: make release [UPLOAD=yes]

Nothing is built unless all places name the version, the tree is clean, its commit has the tag, and what CI runs passes
in a fresh clone. The files are built from that clone, and the wheel must answer in an environment of its own, with what
the package index has today: CI has the versions of constraints.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Files beside the changelog that name the version, and how.
NAMED = {"CITATION.cff": "version: {}\n", "docs/machines/job.yaml": "/apb:{}\n"}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """Release the version of a repository; SystemExit with what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--upload", action="store_true", help="upload to the package index by twine, which asks for a token"
    )
    given = parser.parse_args(arguments)
    version = version_of(root)
    if found := problems(root, version):
        raise SystemExit("\n".join([f"{version} cannot be released:", *found]))
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "apb")
        call(
            "git",
            "clone",
            "--quiet",
            "--branch",
            f"v{version}",
            "-c",
            "advice.detachedHead=false",
            str(root),
            str(clone),
        )
        call("bash", ".ci/run", cwd=clone)
        out = root / "dist" / version
        call(sys.executable, "-m", "build", "--outdir", str(out), str(clone))
        fresh = Path(folder, "installed")
        call(sys.executable, "-m", "venv", str(fresh))
        call(str(fresh / "bin/python"), "-m", "pip", "install", "--quiet", *map(str, out.glob("*.whl")))
        call(str(fresh / "bin/apb"), "demo")
    files = [str(path) for path in sorted(out.iterdir())]
    call(sys.executable, "-m", "twine", "check", "--strict", *files)
    for path in files:
        print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB")
    if given.upload:
        call(sys.executable, "-m", "twine", "upload", *files)
    else:
        print("Nothing was uploaded; make release UPLOAD=yes does it.")


def version_of(root: Path) -> str:
    """The version that the package has."""
    text = (root / "src/apb/__init__.py").read_text()
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


def problems(root: Path, version: str) -> list[str]:
    """What stands against a release, a sentence each; the tag is last, as it is set once the rest is right."""
    found = misnamed(root, version)
    if changed := git(root, "status", "--porcelain"):
        found.append(f"The tree is not clean; commit or remove {', '.join(line[3:] for line in changed.splitlines())}.")
    if f"v{version}" not in git(root, "tag", "--points-at", "HEAD").split():
        found.append(f"The commit has no tag v{version}; once the rest is right, git tag v{version}.")
    return found


def misnamed(root: Path, version: str) -> list[str]:
    """Files that do not name the version as they must, a sentence each."""
    found = []
    first = re.findall(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", first):
        found.append(f"CHANGELOG.md begins with {first!r}; its first heading must be {version} (YYYY-MM-DD).")
    for name, form in NAMED.items():
        if form.format(version) not in (root / name).read_text():
            found.append(f"{name} names another version; write {form.format(version).strip()!r} there.")
    return found


def git(root: Path, *arguments: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def call(*command: str, cwd: Path | None = None) -> None:
    """Run a command; SystemExit if it fails."""
    if (status := subprocess.run(command, cwd=cwd, check=False).returncode) != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {status}; nothing was released.")


if __name__ == "__main__":
    main()
