"""``sinkbench report``: runs compared on one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from sinkbench.errors import DataError
from sinkbench.report.runs import find_runs, read_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="a run's folder, or a folder of runs or sweeps"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="the page (default: %(default)s)"
    )
    parser.add_argument(
        "--paper", action="store_true", help="print the runs of recipes/paper beside the paper's numbers"
    )


def run(args: argparse.Namespace) -> None:
    """Write the page and say where it is.

    Raises:
        DataError: a run's file is missing or damaged, or no run is named.
        HostError: the page cannot be written.
    """
    if args.paper:
        _print_paper(args.runs)
    if not args.runs:
        if args.paper:
            return
        raise DataError("sinkbench report", "no run is named", "give the folders of runs")
    from sinkbench.report.page import write_report  # matplotlib, which other commands do not need

    runs, waiting = find_runs(args.runs)
    write_report(runs, args.output)
    if waiting:
        print(f"left out, not started: {', '.join(str(path) for path in waiting)}")
    print(f"{args.output}: {len(runs)} run{'' if len(runs) == 1 else 's'}")


def _print_paper(paths: list[Path]) -> None:
    from sinkbench.report.paper import paper_table, read_results
    from sinkbench.report.table import narrowest, roomy_console

    runs = read_runs(find_runs(paths)[0]) if paths else []
    console = roomy_console()
    made = paper_table(runs, read_results(), console.width)
    console.width = max(console.width, narrowest(made))  # a narrow terminal folds lines: no column is lost
    console.print(made)
