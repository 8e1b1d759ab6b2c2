"""``sinkbench checkpoint``: the checkpoints of a run, whether they are as they were written, and which go."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sinkbench.checkpoint import INFO, Checkpoint, CheckpointStore, open_checkpoint, verify_files
from sinkbench.cli_text import columns
from sinkbench.errors import EXIT_CODE, CheckpointError, HostError

_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Row:
    """Attributes:
    checkpoint: None if it cannot be opened.
    error: what is wrong with it.
    """

    folder: Path
    checkpoint: Checkpoint | None
    error: CheckpointError | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="action")
    for action, text, target in (
        ("list", "the checkpoints of a run; files are compared by their sizes", "RUN"),
        ("verify", "compare every file with its checksum", "RUN_OR_CHECKPOINT"),
        ("prune", "delete old checkpoints, never the newest good one", "RUN"),
    ):
        command = commands.add_parser(action, help=text, description=text)
        command.add_argument("target", type=Path, metavar=target)
        command.add_argument("--json", action="store_true", help="print JSON")
        if action == "prune":
            last = "keep so many of the newest good ones (default: as the run's recipe says)"
            command.add_argument("--keep-last", type=int, metavar="N", help=last)
            every = "keep those whose step M divides, too; 0: none (default: as the run's recipe says)"
            command.add_argument("--keep-every", type=int, metavar="M", help=every)
            command.add_argument("--dry-run", action="store_true", help="only say what would go")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand that was chosen.

    Returns:
        The exit code: 2 if a checkpoint is damaged, which is said in a line.

    Raises:
        CheckpointError: the target is no run and no checkpoint.
        HostError: a run that is to be pruned lives, or its folder cannot be changed.
    """
    if args.action == "prune":
        _prune(args)
        return 0
    verify = args.action == "verify"
    folders = _checkpoints(args.target.expanduser(), alone=verify)
    rows = [_examine(folder, verify=verify) for folder in folders]
    state = "verified" if verify else "complete"
    if args.json:
        print(json.dumps({"checkpoints": [_as_json(row, state) for row in rows]}, indent=2))
    else:
        print(_table(rows, state))
    errors = [row.error for row in rows if row.error is not None]
    for error in errors:
        print(error, file=sys.stderr)
    return EXIT_CODE if errors else 0


def _checkpoints(target: Path, *, alone: bool) -> list[Path]:
    """The folders of a run's checkpoints, or that of one."""
    if alone and ((target / INFO).exists() or target.name.startswith("step_")):
        return [target]
    store = _store(target)
    return [store.folder / f"step_{step}" for step in store.steps()]


def _store(run: Path) -> CheckpointStore:
    store = CheckpointStore(run / "checkpoints")
    if not store.steps():
        raise CheckpointError(str(run), "is no run with checkpoints", "give the folder of a run")
    return store


def _examine(folder: Path, *, verify: bool) -> Row:
    checkpoint = None
    try:
        if folder.parent.name == "checkpoints" and folder.name.removeprefix("step_").isdigit():
            checkpoint = CheckpointStore(folder.parent).open(int(folder.name.removeprefix("step_")))
        else:
            checkpoint = open_checkpoint(folder)
        if verify:
            verify_files(checkpoint)
    except CheckpointError as error:
        return Row(folder, checkpoint, error)
    return Row(folder, checkpoint, None)


def _as_json(row: Row, state: str) -> dict[str, Any]:
    checkpoint = row.checkpoint
    return {
        "folder": str(row.folder),
        "step": checkpoint.step if checkpoint else None,
        "bytes": checkpoint.size if checkpoint else None,
        "layout": checkpoint.layout if checkpoint else None,
        "state": "damaged" if row.error else state,
        "problem": str(row.error) if row.error else None,
    }


def _table(rows: list[Row], state: str) -> str:
    lines = [("CHECKPOINT", "SIZE", "WRITTEN", "LAYOUT", "STATE")]
    for row in rows:
        shown = ("", "", "")
        if row.checkpoint is not None:
            written = datetime.fromtimestamp((row.folder / INFO).stat().st_mtime, UTC)
            sizes = row.checkpoint.layout
            layout = " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
            layout = layout or ("one process" if sizes else "any")
            shown = (_size(row.checkpoint.size), f"{written:%Y-%m-%d %H:%M}", layout)
        lines.append((row.folder.name, *shown, "DAMAGED" if row.error else state))
    return columns(lines)


def _size(count: float) -> str:
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {_UNITS[unit]}"


def _prune(args: argparse.Namespace) -> None:
    run = args.target.expanduser()
    store = _store(run)
    keep_last, keep_every = _policy(run, args.keep_last, args.keep_every)
    from sinkbench.run_folder import hold

    try:
        with hold(run):
            going = store.superseded(keep_last, keep_every, verify=True)
            if not args.dry_run:
                store.recover()
                for step in going:
                    store.delete(step)
    except OSError as error:
        problem = f"cannot be changed ({error.strerror or error})"
        raise HostError(str(error.filename or store.folder), problem, "make it writable") from error
    staying = [step for step in store.steps() if step not in going]
    if args.json:
        print(json.dumps({"deleted": going, "kept": staying, "dry_run": args.dry_run}, indent=2))
        return
    verb = "would delete" if args.dry_run else "deleted"
    print(f"{verb} {_named(going)}; kept {_named(staying)}")


def _policy(run: Path, keep_last: int | None, keep_every: int | None) -> tuple[int, int]:
    if keep_last is not None and keep_last < 1:
        raise CheckpointError("--keep-last", f"{keep_last} is below 1", "keep at least one")
    if keep_every is not None and keep_every < 0:
        raise CheckpointError("--keep-every", f"{keep_every} is below 0", "give 0 for none, or more")
    if keep_last is None or keep_every is None:
        from sinkbench import recipe

        written = recipe.to_config(recipe.load(run / "recipe.yaml")).checkpoint
        keep_last = written.keep_last if keep_last is None else keep_last
        keep_every = written.keep_every if keep_every is None else keep_every
    return keep_last, keep_every


def _named(steps: list[int]) -> str:
    return ", ".join(f"step_{step}" for step in steps) or "none"
