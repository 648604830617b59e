"""Draw what a user gains, from committed figures: seconds to read 131,072 tokens. Run: python docs/drawings/speed.py

Writes docs/images/speed-light.svg and speed-dark.svg. A test checks that the files are what this script draws.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from canvas import Colours, picture, rectangle, words, write

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"
TOKENS = 131_072
LEFT, BAR, ROW, WIDTH = 268, 16, 26, 400


def seconds_of(file: str, strategy: str) -> float:
    """Seconds of prefill in a file that `apb bench prefill --out` wrote."""
    rows = json.loads((RESULTS / file).read_text())["rows"]
    return next(row["seconds"] for row in rows if (row["strategy"], row["length"]) == (strategy, TOKENS))


def of_vllm(workers: int, store: bool) -> float:
    """Seconds to vLLM's first token, the median, by itself or from what apb has stored."""
    parts = json.loads((RESULTS / "vllm_hand_over_h200.json").read_text())["parts"]
    wanted = ("answer", TOKENS, workers, store)
    names = ("part", "length", "tensor_parallel", "store")
    (row,) = (part for part in parts if tuple(part.get(name) for name in names) == wanted)
    return statistics.median(row["first_token_s"])


def figures() -> list[tuple[str, list[tuple[str, float, str]]]]:
    """Groups of bars: (title, [(label, seconds, colour's name)])."""
    (kept,) = json.loads((RESULTS / "follow_up_h200.json").read_text())["rows"]
    one: list[tuple[str, float, str]] = [
        ("vLLM 0.26, to its first token", of_vllm(1, store=False), "faint"),
        ("full attention", seconds_of("prefill_bf16_h200.json", "full"), "faint"),
        ("apb", seconds_of("prefill_bf16_h200.json", "apb"), "own"),
        ("apb, --quantization fp8", seconds_of("prefill_fp8_h200.json", "apb"), "own"),
    ]
    two: list[tuple[str, float, str]] = [
        ("vLLM 0.26, tensor parallel", of_vllm(2, store=False), "faint"),
        ("ring attention", seconds_of("prefill_two_merged_h200.json", "ring"), "faint"),
        ("star, 8 blocks", seconds_of("prefill_two_h200.json", "star"), "faint"),
        ("apb", seconds_of("prefill_two_merged_h200.json", "apb"), "own"),
    ]
    asking: list[tuple[str, float, str]] = [
        ("vLLM 0.26, from apb's store", of_vllm(1, store=True), "question"),
        ("from disk (files in the page cache)", kept["disk"]["page_cache"]["first_token_s"], "question"),
        ("from host memory", kept["host"]["first_token_s"], "question"),
        ("from the GPU", kept["device"]["first_token_s"], "question"),
    ]
    return [
        (f"Seconds to read {TOKENS:,} tokens, one H200", one),
        ("on two", two),
        ("Seconds to the first token of the next question about them, one H200", asking),
    ]


def drawing(colours: Colours) -> str:
    """The whole picture as SVG."""
    groups: Any = figures()
    scale = WIDTH / max(seconds for _, bars in groups for _, seconds, _ in bars)
    parts, y = [], 18
    for title, bars in groups:
        parts.append(words(0, y, title, colours.text, size=14))
        y += 14
        for label, seconds, colour in bars:
            parts.append(words(LEFT - 10, y + 13, label, colours.text, "end"))
            length = max(seconds * scale, 1.5)
            parts.append(rectangle(LEFT, y, length, BAR, getattr(colours, colour)))
            parts.append(words(LEFT + length + 8, y + 13, f"{seconds:.2f}", colours.text))
            y += ROW
        y += 24
    parts.append(words(0, y - 4, "Llama-3.1-8B's shape, random weights, bf16", colours.faint, size=12))
    return picture(
        parts, LEFT + WIDTH + 60, y + 8, "Seconds of vLLM, of full attention, of apb, and of a further question."
    )


if __name__ == "__main__":
    write("speed", drawing)
