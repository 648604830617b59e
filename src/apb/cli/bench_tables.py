"""Output of ``apb bench``: result tables, and a line for each result as it arrives."""

from __future__ import annotations

from typing import Any

from ..benchmarks.results import sessions_of


def named(row: dict[str, Any]) -> str:
    """The strategy of a prefill's row, and its propagation if there is one."""
    told = row.get("propagation")
    return row["strategy"] + (f", {told['share']:.0%} above layer {told['layer']}" if told else "")


def attention_line(row: dict[str, Any]) -> str:
    """Progress line of one kernel on one shape."""
    figure = row["note"] or f"{1e3 * row['seconds']:.3f} ms, error {row['error']:.1e}"
    return f"apb: {row['kernel']} on {row['shape']}: {figure}"


def print_attention(report: dict[str, Any]) -> None:
    """Print every kernel on every shape, and the reason for each one left out."""
    from rich.table import Table

    facts = report["fingerprint"]
    columns = ("heads, d, block, anchor, passing", "kernel", "ms", "of fastest", "TFLOP/s", "GB/s of K, V")
    table = Table(*columns, "error", "lse error", title=f"{facts['device']}, {facts['dtype']}")
    for row in report["rows"]:
        if row["note"] is None:
            figures = [f"{1e3 * row['seconds']:.3f}", f"{row['of_fastest']:.3f}", f"{row['tflops']:.3g}"]
            figures += [f"{row['kv_bytes_per_s'] / 1e9:.3g}", f"{row['error']:.1e}", f"{row['lse_error']:.1e}"]
            table.add_row(row["shape"], row["kernel"], *figures)
    console = _console()
    console.print(table)
    for kernel, note in {row["kernel"]: row["note"] for row in report["rows"] if row["note"]}.items():
        console.print(f"{kernel}: {note}")
    console.print(
        f"A copy moves {report['copy_bandwidth'] / 1e9:.3g} GB/s here; apb {facts['apb']}, torch {facts['torch']}."
    )


def line(row: dict[str, Any]) -> str:
    """Progress line of one prefill, or of decode at one length."""
    figure = row.get("note") or f"{row['seconds']:.4g} s"
    if "strategy" in row:
        return f"apb: {named(row)} at {row['length']:,} tokens: {figure}"
    how = f"{row['decode']} decode of {sessions_of(row)}{' by graph' * row['graph']}"
    return f"apb: {how} at {row['length']:,} tokens: {figure}"


def _console() -> Any:
    from rich.console import Console

    console = Console()
    # Files and logs have no width; rich would assume 80 columns.
    return console if console.is_terminal else Console(width=120)


def _title(report: dict[str, Any]) -> str:
    facts = report["fingerprint"]
    ranks = f"{report['ranks']} x {report['tensor_parallel']}" if report["tensor_parallel"] > 1 else report["ranks"]
    return f"{report['model']}, {report['layers']} layers, {ranks} x {facts['device']}, {facts['dtype']}"


def _versions(report: dict[str, Any]) -> str:
    facts = report["fingerprint"]
    return f"apb {facts['apb']}, torch {facts['torch']}, transformers {facts['transformers']}"


def print_decode(report: dict[str, Any]) -> None:
    """Print a row for each length, number of sessions and way to read their tokens."""
    from rich.table import Table

    columns = ("ms a token", "tokens/s", "limit ms", "of limit", "peak GiB", "same tokens", "keys read", "index s")
    table = Table("tokens", "sessions", "graph", *columns, title=_title(report))
    for row in report["rows"]:
        table.add_row(
            f"{row['length']:,}",
            sessions_of(row),
            "yes" if row["graph"] else "no",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{1e3 * row['limit_seconds']:.2f}",
            f"{row['of_limit']:.0%}",
            f"{row['peak_bytes'] / 2**30:.1f}",
            "" if row["same_tokens"] is None else ("yes" if row["same_tokens"] else "no"),
            f"{row['share']:.1%}",
            f"{row['index_seconds']:.2f}",
        )
    console = _console()
    console.print(table)
    console.print(
        "Of several sessions ms are of a token of each. Limit: caches, and weights for every pass, read at this run's "
        f"copy bandwidth, {report['copy_bandwidth'] / 1e12:.2f} TB/s; {_versions(report)}."
    )


def print_prefill(report: dict[str, Any]) -> None:
    """Print a row for each length and strategy, then the seconds by part."""
    from rich.table import Table

    ceilings = report["ceilings"]
    columns = (
        "tokens",
        "strategy",
        "blocks",
        "kernel",
        "seconds",
        "tokens/s",
        "floor s",
        "of floor",
        "predicted s",
        "speed-up",
        "peak GiB",
    )
    table = Table(*columns, title=_title(report))
    for row in report["rows"]:
        seconds = row["seconds"]
        table.add_row(
            f"{row['length']:,}",
            named(row),
            str(row["plan"].get("blocks", "")),
            row["backend"],
            "-" if seconds is None else f"{seconds:.3f}",
            "" if seconds is None else f"{row['tokens_per_s']:,.0f}",
            "" if row["floor_seconds"] is None else f"{row['floor_seconds']:.3f}",
            "" if seconds is None else f"{row['of_floor']:.0%}",
            "" if row["predicted_seconds"] is None else f"{row['predicted_seconds']:.3f}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}",
            "" if seconds is None else f"{row['peak_bytes'] / 2**30:.1f}",
        )
    console = _console()
    console.print(table)
    for row in report["rows"]:
        if row["note"]:
            console.print(f"{named(row)} at {row['length']:,} tokens: {row['note']}", highlight=False)
    parts = [row for row in report["rows"] if row["parts"]]
    if parts:
        names = list(parts[0]["parts"])
        shares = Table("tokens", "strategy", *names, title="Where a prefill's seconds go, on the first rank")
        for row in parts:
            shares.add_row(f"{row['length']:,}", named(row), *(f"{row['parts'][name]:.3f}" for name in names))
        console.print(shares)
    link = f", {ceilings['link'] / 1e9:.0f} GB/s between ranks" if ceilings["link"] else ""
    console.print(
        f"Ceilings of this run: {ceilings['linear'] / 1e12:.1f} TFLOP/s linear, "
        f"{ceilings['attention'] / 1e12:.1f} attention{link}; {_versions(report)}."
    )
