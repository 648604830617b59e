"""A plan as a picture: a row for each rank, with the parts of the document that it reads."""

from __future__ import annotations

from ..planning.itinerary import Kind
from ..planning.plan import Plan

# Inches of one rank's row, and of what stands around the rows of one strategy.
_ROW, _AROUND = 0.22, 0.75


def drawn(plans: list[Plan], title: str) -> str:
    """SVG text; InputError if matplotlib is not installed.

    A block is a bar at its place in the prompt; neighbours have two shades, so that cuts show. In front of the document
    is each rank's share of the anchor, drawn to the same scale.

    Args:
        plans: one for each strategy.
        title: is written above them.
    """
    from ..evaluation.plots import COLOURS, drawing, svg

    blue, orange, light = COLOURS[0], COLOURS[4], COLOURS[5]
    inches = [_AROUND + _ROW * plan.ranks for plan in plans]
    with drawing() as new_figure:
        figure = new_figure(figsize=(8.0, 0.4 + sum(inches)), layout="constrained")
        figure.suptitle(title)
        for axes, plan in zip(
            figure.subplots(len(plans), 1, squeeze=False, sharex=True, height_ratios=inches)[:, 0], plans, strict=True
        ):
            for rank in range(plan.ranks):
                for span in plan.document_spans(rank):
                    if span.kind is Kind.ANCHOR:
                        axes.broken_barh(
                            [(span.start - plan.anchor_length, len(span))], (rank - 0.4, 0.8), color=orange
                        )
                    else:
                        shade = light if span.block % 2 else blue
                        axes.broken_barh([(span.start, len(span))], (rank - 0.4, 0.8), color=shade)
            axes.set_title(named(plan), loc="left", fontsize=9)
            axes.set_yticks(range(plan.ranks), [f"rank {rank}" for rank in range(plan.ranks)])
            axes.set_ylim(plan.ranks - 0.5, -0.5)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        axes.set_xlabel("tokens of the prompt; orange: the anchor's rows, shared by the ranks")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 0 else "")
        return svg(figure, title)


def named(plan: Plan) -> str:
    """The strategy and what sets it apart."""
    parts = [f"{plan.blocks} block{'s'[: plan.blocks - 1]}", "exact" if plan.exact else "approximate"]
    parts += [f"{plan.rounds} rounds"] if plan.rounds > 1 else []
    parts += [f"anchor {plan.anchor_length:,}"] if plan.anchor_length else []
    parts += [f"passing {plan.passing_length:,}"] if plan.passing_length else []
    return f"{plan.strategy}: {', '.join(parts)}"
