"""The report: one HTML file that compares runs, with nothing to load from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sinkbench import __version__
from sinkbench.files import write_atomically
from sinkbench.measure.results import OF_A_RUN
from sinkbench.report import columns, figures, markup
from sinkbench.report.columns import ABSENT, Added, Column
from sinkbench.report.figures import Curve
from sinkbench.report.markup import Heading, RunName
from sinkbench.report.runs import PROBE, TRAIN, VALIDATION, Run, read_runs, written

CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The page may load nothing: what it shows is in it."""

SUMMARY = (
    columns.ATTENTION,
    columns.STEP,
    columns.LOSS,
    columns.VALIDATION,
    *columns.SINK,
    columns.ROW_SUM,
    *columns.ATTENTION_TO_FIRST,
    columns.VALUE_DRAIN,
    columns.ACTIVATION_RATIO,
    columns.TOKENS_PER_SECOND,
    columns.MFU,
)

IDENTITY = ("name", "label", "output_dir")
"""Recipe keys that differ between any two runs and explain nothing."""

LOG_SPREAD = 20
"""Ratios that span more than this factor are drawn on a logarithmic axis."""


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write the report of run folders to ``out``.

    Raises:
        DataError: a run's file is missing or damaged.
        HostError: ``out`` cannot be written.
    """
    write_atomically(out, page(read_runs(runs)))


def page(runs: Sequence[Run]) -> str:
    """The HTML of a report; sections for which no run has data are left out."""
    sections = (
        _summary(runs),
        _domains(runs),
        _training(runs),
        _heads(runs),
        _layers(runs),
        _differences(runs),
        _environment(runs),
    )
    names = ", ".join(run.label for run in runs[:3]) + (" and others" if len(runs) > 3 else "")
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    made = f"{count}, written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by sinkbench {__version__}"
    return document("Attention sink report", made, "".join(sections), title=f"sinkbench report: {names}")


def document(heading: str, made: str, body: str, *, title: str | None = None) -> str:
    """A whole HTML page.

    Args:
        made: how and when, in one line under the heading.
        body: sections, as HTML.
        title: of the window; default: the heading.
    """
    css = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<title>{escape(title or heading)}</title>
<style>
{css}</style>
</head>
<body>
<h1>{escape(heading)}</h1>
<p>{escape(made)}</p>
{body}</body>
</html>
"""


# --- sections -----------------------------------------------------------------------------------


def _summary(runs: Sequence[Run]) -> str:
    rows = [run.row() for run in runs]
    text = (
        "Sink_1 is the share of heads and probe sequences whose first token has an importance above the "
        "threshold: raw from the attention weights as the model used them, proxy after scaling each row "
        "to sum to 1 (meaningless where the row sum is nearly 0). To first token: mean attention weight. "
        "Value drain and activation ratio: norm of the first token's value and hidden state over the mean "
        "norm of the others. Numbers are those of the last step, the loss a held-out one where there is one; "
        "tokens/s and MFU are medians."
    )
    others = _other_metrics(runs)
    text = f"{text} {others.note('metrics.jsonl of the runs')}".rstrip()
    shown = columns.with_values((*SUMMARY, *others.columns), rows)
    return markup.section("Summary", text, _run_table(shown, rows, runs))


def _other_metrics(runs: Sequence[Run]) -> Added:
    """The scalars of metrics that are not sinkbench's own."""
    return columns.added(SUMMARY, (line for run in runs for line in run.lines.get(PROBE, ())), OF_A_RUN)


def _domains(runs: Sequence[Run]) -> str:
    prefix = "loss/"
    lines = [run.lines.get(VALIDATION) or [{}] for run in runs]
    rows = [{key: loss for key, loss in each[-1].items() if key.startswith(prefix)} for each in lines]
    keys = sorted({key for row in rows for key in row})
    if len(keys) < 2:
        return ""
    shown = [Column(key, key.removeprefix(prefix), columns.LOSS.write) for key in keys]
    return markup.section(
        "Validation loss by domain", "At the last validation.", _run_table(shown, rows, runs)
    )


def _training(runs: Sequence[Run]) -> str:
    validated = _against_steps(runs, VALIDATION, "loss", dashed=True)
    cards = [
        _curves(
            "Loss",
            "Training loss; dashed: validation loss." if validated else "Training loss.",
            _against_steps(runs, TRAIN, "loss") + validated,
            y_label="loss",
            solid="training" if validated else None,
            dashed="validation" if validated else None,
        ),
        _curves(
            "Attention sink",
            "Sink_1 at each probe. Solid: raw weights; dashed: rows scaled to sum to 1.",
            _against_steps(runs, PROBE, "sink_1_raw")
            + _against_steps(runs, PROBE, "sink_1_proxy", dashed=True),
            y_label="Sink_1 (%)",
            solid="raw",
            dashed="proxy",
            percent=True,
        ),
        _curves(
            "Attention to the first token",
            "Mean weight on the first token. Solid: from trigger tokens; dashed: from all others.",
            _against_steps(runs, PROBE, "first_token_attention_trigger")
            + _against_steps(runs, PROBE, "first_token_attention_nontrigger", dashed=True),
            y_label="attention weight",
            solid="triggers",
            dashed="others",
        ),
    ]
    for column in _other_metrics(runs).columns:
        drawn = _against_steps(runs, PROBE, column.key)
        cards.append(_curves(column.title, "At each probe.", drawn, y_label=column.title))
    return markup.figures("Training", "", cards)


def _heads(runs: Sequence[Run]) -> str:
    cards = []
    for run in runs:
        arrays = [(kind, run.array(f"importance_{kind}", ndim=3)) for kind in ("raw", "proxy")]
        maps = [(kind, array[:, :, 0]) for kind, array in arrays if array is not None]
        if maps and run.measure is not None:
            cards.append(markup.card(run.label, f"Step {run.measure.step:,}.", figures.heat_maps(maps)))
    text = "Importance of the first token, its mean attention weight over all queries, by layer and head."
    return markup.figures("Where the sink sits", text, cards)


def _layers(runs: Sequence[Run]) -> str:
    ratio = _against_layers(runs, "activation_ratio_layers", ndim=1)
    drain = _against_layers(runs, "value_drain_heads", ndim=2)
    positive = [value for curve in ratio for value in curve.y if value > 0]
    spread = max(positive, default=1) / min(positive, default=1)
    cards = [
        _curves(
            "Hidden states",
            "Norm of the first token over the mean norm of the others, after each layer.",
            ratio,
            x_label="layer",
            y_label="hidden-state norm ratio",
            log=spread > LOG_SPREAD,
            points=True,
        ),
        _curves(
            "Value drain",
            "The same ratio for values, mean over kv heads; near 0 the first token adds nothing.",
            drain,
            x_label="layer",
            y_label="value norm ratio",
            points=True,
        ),
    ]
    return markup.figures("Norms by layer", "At the last probe.", cards)


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    flat = [_flat({key: run.recipe[key] for key in run.recipe if key not in IDENTITY}) for run in runs]
    keys = _differing(flat)
    text = "The keys in which the recipes differ." if keys else "The recipes are the same."
    return markup.section("Recipe differences", text, _key_table(keys, flat, runs) if keys else "")


def _environment(runs: Sequence[Run]) -> str:
    flat = [_flat(run.manifest) for run in runs]
    differing = _differing(flat)
    shared = [key for key in flat[0] if key not in differing]
    rows = [[key, flat[0][key]] for key in shared]
    headings = [Heading("key", "code"), Heading("value" if len(runs) == 1 else "all runs", "code")]
    body = markup.table(headings, rows) if rows else ""
    if differing:
        body = _key_table(differing, flat, runs) + body
    return markup.section("Environment", "From the runs' manifests.", body) if body else ""


# --- data of figures and tables -----------------------------------------------------------------


def _against_steps(runs: Sequence[Run], event: str, key: str, dashed: bool = False) -> list[Curve]:
    drawn = []
    for number, run in enumerate(runs):
        steps, values = run.series(event, key)
        if steps:
            drawn.append(Curve(run=number, label=run.label, x=steps, y=values, dashed=dashed))
    return drawn


def _against_layers(runs: Sequence[Run], key: str, ndim: int) -> list[Curve]:
    drawn = []
    for number, run in enumerate(runs):
        array = run.array(key, ndim)
        if array is not None:
            values = array.reshape(len(array), -1).mean(axis=1)
            layers = np.arange(1, len(values) + 1).tolist()
            drawn.append(Curve(run=number, label=run.label, x=layers, y=values.tolist()))
    return drawn


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots -> values as text."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            flat |= _flat(item, f"{name}.")
        else:
            flat[name] = written(item)
    return flat


def _differing(flat: Sequence[Mapping[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for values in flat for key in values)
    return [key for key in keys if len({values.get(key) for values in flat}) > 1]


# --- tables and figures -------------------------------------------------------------------------


def _names(runs: Sequence[Run]) -> list[RunName]:
    return [RunName(run.label, figures.colour(number)) for number, run in enumerate(runs)]


def _run_table(shown: Sequence[Column], rows: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> str:
    headings = [Heading(column.title, "number" if column.numeric else "") for column in shown]
    cells: list[list[str | RunName]] = [
        [name, *(column.cell(row) for column in shown)] for name, row in zip(_names(runs), rows, strict=True)
    ]
    return markup.table([Heading("run"), *headings], cells)


def _key_table(keys: Sequence[str], flat: Sequence[Mapping[str, str]], runs: Sequence[Run]) -> str:
    headings = [Heading("key", "code"), *(Heading(name, "code") for name in _names(runs))]
    return markup.table(headings, [[key, *(values.get(key, ABSENT) for values in flat)] for key in keys])


def _curves(title: str, caption: str, drawn: Sequence[Curve], *, x_label: str = "step", **axes: Any) -> str:
    return markup.card(title, caption, figures.curves(drawn, x_label=x_label, **axes)) if drawn else ""
