"""Accuracy of each strategy and compressor on the shipped model: the table of its model card.

    python benchmarks/needle_strategies.py --jobs 16 --out benchmarks/results/needle_strategies.json

Prints the table and writes JSON.
"""

from __future__ import annotations

from needle_cells import Cell, arguments_of, measure

from apb.evaluation.synthetic import Setting

BLOCKS = 8
NEEDLES = ("single", "multikey")
NEED_EARLIER = ("headings", "variable_tracking")


def settings(task: str, length: int) -> dict[str, Setting]:
    """Settings by the name of their row."""
    block = length // BLOCKS
    rows = {
        "full": Setting.of("full"),
        "star": Setting.of("star", blocks=BLOCKS),
        "blocks alone": Setting.of("star", blocks=BLOCKS, anchor_length=0),
        "apb, query, l_p = block/8": Setting.of("apb", "query", blocks=BLOCKS),
        "apb, query, l_p = block/32": Setting.of("apb", "query", blocks=BLOCKS, passing_length=block // 32),
    }
    if task in NEED_EARLIER:
        rows["apb, recent, l_p = block/8"] = Setting.of("apb", "recent", blocks=BLOCKS)
        rows["apb, random, l_p = block/8"] = Setting.of("apb", "random", blocks=BLOCKS)
        rows["apb, random, l_p = block/32"] = Setting.of("apb", "random", blocks=BLOCKS, passing_length=block // 32)
        rows["apb, nothing passed"] = Setting.of("apb", "query", blocks=BLOCKS, passing_length=0)
    return rows


def main() -> None:
    arguments = arguments_of(
        __doc__,
        lengths={"type": int, "nargs": "+", "default": [16384, 32768]},
        tasks={"nargs": "+", "default": [*NEEDLES, *NEED_EARLIER]},
    )
    cells = [
        Cell(task, length, name, setting)
        for task in arguments.tasks
        for length in arguments.lengths
        for name, setting in settings(task, length).items()
    ]
    results = measure(cells, arguments)
    found = {(row["task"], row["length"], row["setting"]): f"{row['score']:.1f}" for row in results}
    columns = [(task, length) for task in arguments.tasks for length in arguments.lengths]
    print("setting".ljust(30), *(f"{task[:9]} {length // 1024}K".rjust(14) for task, length in columns))
    for name in dict.fromkeys(cell.name for cell in cells):
        print(name.ljust(30), *(found.get((*column, name), "").rjust(14) for column in columns))


if __name__ == "__main__":
    main()
