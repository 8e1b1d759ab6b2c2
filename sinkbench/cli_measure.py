"""``sinkbench measure TARGET ...``: the sink of trained runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track

from sinkbench.measure.results import Result, Results, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="+", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--step", type=int, help="checkpoint of this step (default: the last)")
    parser.add_argument("--length", type=int, help="tokens of a probe sequence (default: the recipe's)")
    parser.add_argument("--count", type=int, help="probe sequences (default: the recipe's)")
    parser.add_argument("--metrics", nargs="+", default=[], help="metric plugins (default: the recipe's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")


def run(arguments: argparse.Namespace) -> None:
    from sinkbench.measure.runs import measure_run
    from sinkbench.report.table import comparison_table

    console = Console(stderr=True)
    # The bar is gone when an error prints its one line, and is never written to a file.
    hidden = not console.is_terminal
    targets = track(arguments.target, "measuring", console=console, transient=True, disable=hidden)
    results = [
        measure_run(
            target,
            step=arguments.step,
            length=arguments.length,
            count=arguments.count,
            metrics=arguments.metrics,
            device=arguments.device,
        )
        for target in targets
    ]
    if arguments.json:
        write(arguments.json, Results(results=results))
    Console().print(comparison_table([_row(result) for result in results]))


def _row(result: Result) -> dict[str, object]:
    return {"label": result.target, **result.metrics}
