"""Draw the method: which keys each block of a text attends to. Run: python docs/drawings/method.py

Writes docs/images/method-light.svg and method-dark.svg: rows are the parts of the prompt that are read, columns the
keys that they see. A test checks that the files are what this script draws.
"""

from __future__ import annotations

from canvas import Colours, picture, rectangle, words, write

BLOCKS = 4
# Blocks a rank, in the drawing's two ranks.
PER_RANK = 2
# Widths of the columns: the anchor in front of every block, a block, a pair that it passes on, the question.
ANCHOR, BLOCK, PASSED, QUESTION = 56, 112, 5, 56
LEFT, TOP, GAP, LEGEND = 132, 34, 6, 40


def triangle(x: float, y: float, side: float, height: float, fill: str) -> str:
    """The lower left half of a cell: each row sees the keys up to its own."""
    return f'<path d="M{x:g} {y:g} L{x + side:g} {y + height:g} L{x:g} {y + height:g} Z" fill="{fill}"/>'


def drawing(colours: Colours) -> str:
    """The whole picture as SVG."""
    starts = [LEFT + ANCHOR + GAP + block * (BLOCK + GAP) for block in range(BLOCKS)]
    question = starts[-1] + BLOCK + GAP
    right = question + QUESTION
    row_height = 52
    rows = [TOP + block * (row_height + GAP) for block in range(BLOCKS)]
    last = rows[-1] + row_height + GAP
    width, height = right + 24, last + row_height + LEGEND + 12
    parts = [words(LEFT + ANCHOR / 2, TOP - 12, "anchor", colours.faint, "middle")]
    parts += [words(x + BLOCK / 2, TOP - 12, f"block {n + 1}", colours.faint, "middle") for n, x in enumerate(starts)]
    parts += [words(question + QUESTION / 2, TOP - 12, "question", colours.faint, "middle")]
    for block, y in enumerate(rows):
        rank = block // PER_RANK
        parts += [words(LEFT - 12, y + 22, f"block {block + 1} reads", colours.text, "end")]
        parts += [words(LEFT - 12, y + 40, f"on rank {rank}", colours.faint, "end", 11)]
        for x in starts[:block]:
            parts += [rectangle(x, y, BLOCK, row_height, colours.unseen)]
            parts += [rectangle(x + BLOCK * share, y, PASSED, row_height, colours.passed) for share in SHARES]
        # The first block has the document's beginning in itself.
        if block:
            parts += [rectangle(LEFT, y, ANCHOR, row_height, colours.anchor)]
        parts += [triangle(starts[block], y, BLOCK, row_height, colours.own)]
    parts += [words(LEFT - 12, last + 22, "question reads", colours.text, "end")]
    parts += [words(LEFT - 12, last + 40, "on every rank", colours.faint, "end", 11)]
    parts += [rectangle(x, last, BLOCK, row_height, colours.question) for x in starts]
    parts += [triangle(question, last, QUESTION, row_height, colours.question)]
    x, y = LEFT, last + row_height + LEGEND
    for fill, text in (
        (colours.anchor, "question and beginning"),
        (colours.passed, "passed on by blocks"),
        (colours.own, "itself"),
        (colours.question, "all blocks"),
        (colours.unseen, "skipped"),
    ):
        parts += [rectangle(x, y - 11, 12, 12, fill), words(x + 18, y, text, colours.text)]
        x += 40 + 6.6 * len(text)
    described = (
        "Each block of the text attends to a small anchor, to the pairs that earlier blocks pass on, and to itself; "
        "the question's rows attend to all blocks."
    )
    return picture(parts, width, height, described)


# Where in an earlier block the passed pairs of the drawing stand.
SHARES = (0.14, 0.38, 0.46, 0.79)


if __name__ == "__main__":
    write("method", drawing)
