"""The figures of a report, each a standalone SVG that follows the reader's light or dark mode.

Matplotlib's object API only: no pyplot, no global state. This module imports matplotlib, so import
it where a report is written, not beside a command.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Style: TypeAlias = tuple[str, Literal["-", "--"]]
"""What a line style means, and the style."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
"""Colour-blind safe (Okabe and Ito, without yellow and black, which one of the two modes hides)."""

MARKERS = ("", "s", "^", "D", "v")
"""Tell runs apart after the palette has been used up."""

INK = "#010203"
"""Stands for the colour of text and axes; ``_svg`` replaces it by the reader's."""

WIDTH = 4.8
"""Inches: text of 9 points stays readable when a phone shrinks the figure to its screen."""

LONG_LABEL = 24
"""Characters beyond which the legend has one column instead of two."""

ANNOTATED_CELLS = 64
"""Heat maps up to this many cells have their values written in."""

SETTINGS: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "svg.hashsalt": "sinkbench",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

THEME = """<style>
svg { color: #24292f }
@media screen and (prefers-color-scheme: dark) { svg { color: #d5dae1 } }
</style>"""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values of one run against steps or layers; ``run`` is its number in the report."""

    run: int
    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def colour(run: int) -> str:
    """A run's colour in every figure and table."""
    return PALETTE[run % len(PALETTE)]


def curves(
    drawn: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    solid: str | None = None,
    dashed: str | None = None,
    percent: bool = False,
    log: bool = False,
    points: bool = False,
) -> str:
    """All runs in one pair of axes; a run's curves share its colour.

    Args:
        solid, dashed: what the two line styles mean, for the legend.
        percent: the y axis is 0-100.
        log: logarithmic y axis.
        points: mark each value, at x = 1, 2, ...

    Returns:
        SVG text.
    """
    with mpl.rc_context(SETTINGS):
        styles: list[Style] = [(solid, "-")] if solid else []
        styles += [(dashed, "--")] if dashed else []
        handles = _legend_handles(drawn, styles, points)
        columns = 1 if max(len(str(handle.get_label())) for handle in handles) > LONG_LABEL else 2
        figure, axes = _figure(height=2.9 + 0.17 * -(-len(handles) // columns))
        for curve in drawn:
            axes.plot(
                curve.x,
                curve.y,
                linestyle="--" if curve.dashed else "-",
                color=colour(curve.run),
                marker=_marker(curve, points),
                markevery=max(1, len(curve.x) // 12),
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(_shortened(y_label, 40))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        if percent:
            axes.set_ylim(-3, 103)
        if points:  # the first and last lie clear of the edge, and one alone has a tick of its own
            axes.set_xlim(0.5, max(max(curve.x) for curve in drawn) + 0.5)
        if log:
            axes.set_yscale("log", nonpositive="mask")
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False)
        return _svg(figure)


def heat_maps(maps: Sequence[tuple[str, NDArray[np.float64]]]) -> str:
    """Values from 0 to 1 by layer and head side by side, on one scale; others take the end colours.

    Args:
        maps: title and values [layer, head] of each.

    Returns:
        SVG text.
    """
    layers = max(values.shape[0] for _, values in maps)
    with mpl.rc_context({**SETTINGS, "axes.spines.right": True, "axes.spines.top": True}):
        figure = Figure(figsize=(WIDTH, min(5.0, 1.3 + 0.17 * layers)), layout="constrained")
        FigureCanvasAgg(figure)
        image = None
        row = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
        for axes, (title, values) in zip(row, maps, strict=True):
            count, heads = values.shape
            image = axes.imshow(
                values,
                cmap="cividis",
                vmin=0,
                vmax=1,
                aspect="auto",
                origin="lower",
                extent=(0.5, heads + 0.5, 0.5, count + 0.5),
                interpolation="nearest",
            )
            axes.set_title(title)
            axes.set_xlabel("head")
            for axis, size in ((axes.xaxis, heads), (axes.yaxis, count)):
                axis.set_major_locator(MaxNLocator(nbins=min(size, 8), integer=True, min_n_ticks=1))
            _annotate(axes, values)
        row[0].set_ylabel("layer")
        assert image is not None
        figure.colorbar(image, ax=list(row), shrink=0.9).outline.set_visible(False)
        return _svg(figure)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _marker(curve: Curve, points: bool) -> str:
    marker = MARKERS[curve.run // len(PALETTE) % len(MARKERS)]
    # one value alone makes no line
    return marker or ("o" if points or len(curve.x) == 1 else "")


def _legend_handles(drawn: Sequence[Curve], styles: Sequence[Style], points: bool) -> list[Line2D]:
    runs = {curve.run: curve for curve in reversed(drawn)}
    handles = [
        Line2D([], [], color=colour(run), marker=_marker(curve, points), label=_shortened(curve.label))
        for run, curve in sorted(runs.items())
    ]
    return handles + [Line2D([], [], color=INK, linestyle=style, label=name) for name, style in styles]


def _shortened(label: str, limit: int = 60) -> str:
    """Both ends of a long label, escaped for matplotlib, to which $ begins a formula."""
    if len(label) > limit:
        half = (limit - 1) // 2
        label = f"{label[:half]}…{label[-half:]}"
    return label.replace("$", r"\$")


def _annotate(axes: Axes, values: NDArray[np.float64]) -> None:
    if values.size > ANNOTATED_CELLS:
        return
    for (layer, head), value in np.ndenumerate(values):
        axes.text(
            head + 1,
            layer + 1,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=7,
            color="#111111" if value > 0.55 else "#f5f5f5",
        )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    head, opening, rest = text[text.index("<svg") :].partition(">")
    return (head + opening + THEME + rest).replace(INK, "currentColor")
