"""What the drawings of docs/ share: themes, shapes, and the files that they are written to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "images"


@dataclass(frozen=True)
class Colours:
    """One theme."""

    name: str
    text: str
    faint: str
    unseen: str
    anchor: str
    passed: str
    own: str
    question: str


THEMES = (
    Colours("light", "#1f2328", "#59636e", "#d8dee4", "#bf8700", "#cf222e", "#0969da", "#1a7f37"),
    Colours("dark", "#f0f6fc", "#9198a1", "#30363d", "#d29922", "#f85149", "#4493f8", "#3fb950"),
)


def rectangle(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}"/>'


def words(x: float, y: float, text: str, fill: str, anchor: str = "start", size: int = 13) -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def picture(parts: list[str], width: float, height: float, described: str) -> str:
    """SVG text of shapes, with a description for those who do not see them."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" font-family="system-ui, sans-serif"><title>{escape(described)}</title>'
        + "".join(parts)
        + "</svg>\n"
    )


def write(name: str, drawing: Callable[[Colours], str]) -> None:
    """Write a drawing in every theme, as NAME-light.svg and NAME-dark.svg."""
    IMAGES.mkdir(exist_ok=True)
    for colours in THEMES:
        (IMAGES / f"{name}-{colours.name}.svg").write_text(drawing(colours))
