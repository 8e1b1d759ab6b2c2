"""``sinkbench report``: runs compared on one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from sinkbench.report.runs import find_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a sweep's folder of runs"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="the page (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Write the page and say where it is.

    Raises:
        DataError: a run's file is missing or damaged.
        HostError: the page cannot be written.
    """
    from sinkbench.report.page import write_report  # matplotlib, which other commands do not need

    runs, waiting = find_runs(args.runs)
    write_report(runs, args.output)
    if waiting:
        print(f"left out, not started: {', '.join(str(path) for path in waiting)}")
    print(f"{args.output}: {len(runs)} run{'' if len(runs) == 1 else 's'}")
