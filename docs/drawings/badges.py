"""Draw what the package runs on and its licence, as pyproject.toml says them. Run: python docs/drawings/badges.py

Writes docs/images/badges-light.svg and badges-dark.svg. A test checks that the files are what this script draws.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from canvas import Colours, picture, rectangle, words, write

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
HEIGHT, PAD, GAP, LETTER = 20, 8, 10, 6.9


def facts() -> list[tuple[str, str]]:
    """(name, what is said of it)."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    least = dict(each.split(">=") for each in project["dependencies"])
    return [
        ("Python", ", ".join(versions)),
        ("torch", f"{least['torch']} or newer"),
        ("transformers", f"{least['transformers']} or newer"),
        ("licence", project["license"]),
    ]


def drawing(colours: Colours) -> str:
    """The whole strip as SVG."""
    parts, x = [], 0.0
    for name, said in facts():
        left, right = (len(text) * LETTER + 2 * PAD for text in (name, said))
        parts.append(rectangle(x, 0, left, HEIGHT, colours.unseen))
        parts.append(words(x + left / 2, 14.5, name, colours.text, "middle", size=12))
        parts.append(rectangle(x + left, 0, right, HEIGHT, colours.own))
        parts.append(words(x + left + right / 2, 14.5, said, "#ffffff", "middle", size=12))
        x += left + right + GAP
    return picture(parts, x - GAP, HEIGHT, "; ".join(f"{name} {said}" for name, said in facts()))


if __name__ == "__main__":
    write("badges", drawing)
