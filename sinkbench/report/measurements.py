"""One HTML page of what ``sinkbench measure`` found, with nothing to load from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from sinkbench import __version__
from sinkbench.measure.results import Result
from sinkbench.report import columns, figures, markup
from sinkbench.report.figures import Curve
from sinkbench.report.markup import Heading
from sinkbench.report.page import document
from sinkbench.report.table import MEASURED, MEASUREMENTS, measurement_row


def measurements_page(results: Sequence[Result], command: str) -> str:
    """The HTML page.

    Args:
        command: how the results were made.
    """
    sections = (_table(results), _heads(results), _positions(results), _layers(results), _steps(results))
    made = f"sinkbench {command}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; sinkbench {__version__}"
    return document("Attention sink measurements", made, "".join(sections))


def _label(result: Result) -> str:
    step = "" if result.step is None else f", step {result.step:,}"
    return f"{result.target}{step}, {result.inputs}"


def _table(results: Sequence[Result]) -> str:
    rows = [measurement_row(result, {}) for result in results]
    others = columns.added(MEASURED, rows)
    shown = columns.with_values((*MEASURED, *others.columns), rows)
    headings = [Heading(column.title, "number" if column.numeric else "") for column in shown]
    protocols = dict.fromkeys(
        f"{r.count} sequences of {r.length} tokens, {'with' if r.bos else 'without'} BOS"
        + (f", {r.dtype}" if r.dtype else "")
        + (f", natural text: {r.texts}" if r.texts else "")
        for r in results
    )
    body = markup.table(headings, [[column.cell(row) for column in shown] for row in rows])
    text = f"{'. '.join(protocols)}. {others.note(MEASUREMENTS)}".rstrip()
    return markup.section("Measurements", text, body)


def _array(result: Result, key: str, ndim: int) -> NDArray[np.float64] | None:
    if key not in result.metrics:
        return None
    array = np.asarray(result.metrics[key], dtype=np.float64)
    return array if array.ndim == ndim and array.size else None


def _heads(results: Sequence[Result]) -> str:
    cards = []
    for result in results:
        arrays = [(kind, _array(result, f"importance_{kind}", 3)) for kind in ("raw", "proxy")]
        maps = [(kind, array[:, :, 0]) for kind, array in arrays if array is not None]
        slot = _array(result, "importance_slot_heads", 2)
        if slot is not None:
            maps.append(("slot", slot))
        if maps:
            cards.append(markup.card(_label(result), "", figures.heat_maps(maps)))
    text = "Importance of the first token, its mean attention weight over all queries, by layer and head."
    return markup.figures("Where the sink sits", text, cards)


def _curves(results: Sequence[Result], key: str, ndim: int, *, by_position: bool = False) -> list[Curve]:
    drawn = []
    for number, result in enumerate(results):
        array = _array(result, key, ndim)
        if array is not None:
            values = array.reshape(-1, array.shape[-1]).mean(0) if by_position else _by_layer(array)
            x = np.arange(1, len(values) + 1).tolist()
            drawn.append(Curve(run=number, label=_label(result), x=x, y=values.tolist()))
    return drawn


def _by_layer(array: NDArray[np.float64]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = array.reshape(len(array), -1).mean(axis=1)
    return mean


def _card(title: str, caption: str, drawn: list[Curve], x_label: str, y_label: str, log: bool = False) -> str:
    if not drawn:
        return ""
    svg = figures.curves(drawn, x_label=x_label, y_label=y_label, log=log, points=x_label == "layer")
    return markup.card(title, caption, svg)


def _positions(results: Sequence[Result]) -> str:
    drawn = _curves(results, "importance_raw", 3, by_position=True)
    caption = "Mean over layers and heads; late positions have few queries."
    card = _card("Importance by position", caption, drawn, "key position", "importance", log=True)
    return markup.figures("Which token", "", [card])


def _layers(results: Sequence[Result]) -> str:
    shown = (
        (
            "Hidden states",
            "Norm of the first token over the mean of the others.",
            "activation_ratio_layers",
            1,
        ),
        ("Value drain", "The same ratio of values, mean over kv heads.", "value_drain_heads", 2),
        ("Keys", "The same ratio of keys, mean over kv heads.", "key_norm_ratio_heads", 2),
        ("Massive activations", "Sequences with one, in percent.", "massive_activations_layers", 1),
        ("Kurtosis", "Of the residual stream.", "kurtosis_layers", 1),
    )
    logarithmic = ("activation_ratio_layers", "kurtosis_layers")
    cards = [
        _card(title, caption, _curves(results, key, ndim), "layer", title.lower(), log=key in logarithmic)
        for title, caption, key, ndim in shown
    ]
    return markup.figures("By layer", "", cards)


def _steps(results: Sequence[Result]) -> str:
    """Sink against step, for targets of which several checkpoints were measured."""
    drawn = []
    for number, (target, kind) in enumerate(dict.fromkeys((r.target, r.inputs) for r in results)):
        points = [
            (r.step, value)
            for r in results
            if (r.target, r.inputs) == (target, kind)
            and r.step is not None
            and isinstance(value := r.metrics.get("sink_1_raw"), float)
        ]
        if len(points) > 1:
            steps, values = zip(*sorted(points), strict=True)
            drawn.append(Curve(run=number, label=f"{target}, {kind}", x=steps, y=values))
    if not drawn:
        return ""
    svg = figures.curves(drawn, x_label="step", y_label="Sink_1 (%)", percent=True)
    return markup.figures("Sink against step", "", [markup.card("Sink_1", "At each checkpoint.", svg)])
