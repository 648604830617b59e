"""What the site has beside docs/: the README as its front page, other pages, the command line, and files they link to.

Links in docs/ are those that work in the repository. Files outside docs/ that pages link to are put on the site.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Pages that lie elsewhere in the repository, by their place on the site.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "needle.md": "models/needle/README.md",
    "examples.md": "examples/README.md",
    "tour.md": "examples/tour.ipynb",
    "results.md": "benchmarks/results/README.md",
}
COMMANDS = "reference/command-line.md"
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)|(?<=src=\")(?!\w+:)([^\"]+)|(?<=srcset=\")(?!\w+:)([^\"]+)")
_FORMULA = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
_ROLE = re.compile(r":(?:meth|class|func|data|mod|attr):<code>([^<]+)</code>")
_PLACES = {source: place for place, source in PAGES.items()}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and all that pages link to."""
    for place, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=notebook(text) if source.endswith(".ipynb") else text))
    files.append(File.generated(config, COMMANDS, content=command_line()))
    pages = list(files.documentation_pages())
    for file in pages:
        for link in _LINK.finditer(file.content_string):
            target = _target(file.src_uri, link[0])
            place = _place(target)
            if place == "files/" + target and (ROOT / target).is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, content=(ROOT / target).read_bytes()))
                if target.endswith(".md"):  # a page as well, with links of its own
                    pages.append(files.get_file_from_path(place))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the repository become links of the site."""
    source = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        place = _place(_target(source, link[0]))
        return posixpath.relpath(place, posixpath.dirname(source) or ".")

    return _FORMULA.sub(_formula, _LINK.sub(moved, markdown))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Roles of docstrings leave the name that they mark."""
    return _ROLE.sub(lambda role: "<code>" + role[1].removeprefix("~").removeprefix("apb.") + "</code>", html)


def _formula(formula: re.Match[str]) -> str:
    """TeX as MathML, which browsers draw themselves."""
    from latex2mathml.converter import convert

    return "\n" + convert(formula[1].strip(), display="block") + "\n"


def _target(source: str, link: str) -> str:
    """What a page's link means, as a path in the repository."""
    path = source.removeprefix("files/") if source.startswith("files/") else "docs/" + source
    home = posixpath.dirname(PAGES.get(source, path))
    return posixpath.normpath(posixpath.join(home, link))


def _place(target: str) -> str:
    """Where a file of the repository is on the site."""
    if target in _PLACES:
        return _PLACES[target]
    if (ROOT / target / "README.md").is_file():
        return _place(target + "/README.md")
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"files/{target}"


def notebook(text: str) -> str:
    """A Jupyter notebook as Markdown: its text, its code, and below each piece of code what that printed and drew."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text'])}```")
            elif picture := output["data"].get("image/png"):
                parts.append(f'<img alt="What the code above draws." src="data:image/png;base64,{picture.strip()}">')
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """Every command with its options, from the help texts that the command line prints."""
    import typer

    from apb.cli.main import app

    command = typer.main.get_command(app)
    parts = ["# Command line\n", "Every command says the same with `--help`.\n"]
    parts += _described(command, "apb", None)
    return "\n".join(parts)


def _described(command: Any, path: str, parent: Any) -> list[str]:
    context = type(command).context_class(command, info_name=path.split()[-1], parent=parent)
    if hasattr(command, "commands"):
        parts = []
        for name, each in command.commands.items():
            parts += _described(each, f"{path} {name}", context)
        return parts
    parts = [f"\n## {path}\n", (command.help or "") + "\n", "| option | |", "|---|---|"]
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            text = " ".join(record[1].split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
            names = record[0].replace("|", "\\|")
            parts.append(f"| `{names}` | {text} |")
    return parts
