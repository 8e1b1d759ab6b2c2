"""``sinkbench sweep``: every run of a recipe's sweep, each in a process and a folder of its own."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from sinkbench import plugins, recipe
from sinkbench.config import Config
from sinkbench.errors import STOPPED_EXIT_CODE, DataError, RecipeError
from sinkbench.files import write_atomically
from sinkbench.recipe import Recipe
from sinkbench.report.table import comparison_table, roomy_console
from sinkbench.run_folder import STOPPED, folder_of, refuse_other_recipe, write_json

POLL_S = 0.2
END_WAIT_S = 120.0
"""Time for a run to finish its step and to save after it is asked to end."""


@dataclass(frozen=True, eq=False)
class SweepRun:
    """One run: its folder, validated recipe, and what tables call it.

    Attributes:
        attention: the label where that is a person's and the sweep varies the attention, else the plugin.
    """

    label: str
    attention: str
    folder: Path
    config: Config

    @property
    def finished(self) -> bool:
        """Whether its summary is of its last step. One that cannot be read counts; ``read_summary`` tells."""
        path = self.folder / "summary.json"
        if not path.exists():
            return False
        try:
            return bool(json.loads(path.read_text(encoding="utf-8"))["step"] >= self.config.train.steps)
        except (OSError, ValueError, KeyError, TypeError):
            return True

    @property
    def stopped(self) -> bool:
        """Whether it was asked to end, and can go on."""
        return (self.folder / STOPPED).exists()

    @property
    def started(self) -> bool:
        return (self.folder / "manifest.json").exists()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe with a sweep")
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="KEY=VALUE", help="as for training, for every run"
    )
    parser.add_argument("--plan", action="store_true", help="write the runs' recipes, print their commands")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument(
        "--nproc-per-node", type=_positive, default=1, metavar="N", help="processes of each run (torchrun)"
    )


def run(args: argparse.Namespace) -> int:
    """Run a sweep; the exit code is 1 if any of its runs failed, else 75 if any was stopped and can go on.

    Raises:
        RecipeError: the recipe has no sweep, or a run of it is wrong; nothing was written then.
        PluginError: a plugin of some run is wrong.
        HostError: a folder cannot be written.
    """
    loaded = recipe.load(args.recipe, args.overrides)
    runs = plan(loaded)
    for item in runs:
        if not item.finished:
            write_atomically(item.folder / "recipe.yaml", recipe.dump(item.config))
    if args.plan:
        for item in runs:
            print(shlex.join(command(item, args.nproc_per_node)))
        return 0
    waiting = [item for item in runs if not item.finished]
    for item in runs:
        if item.finished:
            print(f"{item.folder}: already finished", file=sys.stderr)
    ended = Jobs(args.jobs, args.nproc_per_node).run(waiting) if waiting else {}
    failed = {item: code for item, code in ended.items() if not item.stopped}
    stopped = [item for item in ended if item.stopped]
    rows = [read_summary(item) for item in runs if item.finished]
    write_json(runs[0].folder.parent / "summary.json", rows)
    if rows:
        print_table(rows)
    if failed:
        names = ", ".join(f"{item.label} (exit code {code})" for item, code in failed.items())
        where = "see their log.txt" if args.jobs > 1 else "see above"
        print(f"{len(failed)} of {len(runs)} runs failed: {names}; {where}", file=sys.stderr)
    if stopped:
        names = ", ".join(item.label for item in stopped)
        print(
            f"{len(stopped)} of {len(runs)} runs were stopped: {names}; the same command goes on with them",
            file=sys.stderr,
        )
    if failed:
        return 1
    return STOPPED_EXIT_CODE if stopped else 0


def plan(loaded: Recipe) -> list[SweepRun]:
    """The runs of a recipe, all of them checked.

    Raises:
        RecipeError: there is no sweep, a run is wrong, or its folder holds another recipe's run.
        PluginError: a plugin of some run is wrong.
    """
    if loaded.sweep is None:
        where = recipe.display(loaded.path)
        raise RecipeError(where, "it has no sweep", f"train it: python -m sinkbench.pretrain {where}")
    index = plugins.discover()
    singles = recipe.expand(loaded)
    configs = []
    for single in singles:
        configs.append(recipe.to_config(single))
        plugins.resolve(configs[-1], index, single.provenance)
    varied = any(config.model.attention != configs[0].model.attention for config in configs)
    runs = []
    for single, config in zip(singles, configs, strict=True):
        assert config.label is not None
        named = varied and single.provenance["label"] != recipe.GENERATED
        attention = config.label if named else config.model.attention.name
        runs.append(SweepRun(config.label, attention, folder_of(config), config))
    if len({item.folder.parent for item in runs}) > 1:
        where = f"{loaded.provenance['sweep']}: sweep"
        raise RecipeError(where, "it varies name or output_dir", "leave both out; each run has its label")
    for item in runs:
        if item.started:
            refuse_other_recipe(item.folder, item.config)
    return runs


def command(item: SweepRun, processes: int) -> list[str]:
    """The command line that trains a run."""
    launcher = ["-m"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [sys.executable, *launcher, "sinkbench.pretrain", str(item.folder / "recipe.yaml")]


def visible_cards() -> list[str]:
    """The CUDA cards of this host that may be used, as CUDA_VISIBLE_DEVICES names them. torch is not asked:
    importing it takes seconds."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return [card for part in asked.split(",") if (card := part.strip())]
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((number for number in numbers if number.isdigit()), key=int)


class Jobs:
    """Runs training processes, some at a time. Each has cards of its own as far as there are enough.

    What a run prints goes to log.txt in its folder. A single job shows its own progress on the
    terminal; several are shown by one bar each, from their metrics.jsonl.
    """

    def __init__(self, jobs: int, processes: int) -> None:
        self.jobs = jobs
        self.processes = processes
        self.cards = visible_cards()
        self.running: dict[SweepRun, subprocess.Popen[bytes]] = {}
        self.places: dict[SweepRun, int] = {}
        self.logs: dict[SweepRun, IO[bytes]] = {}

    def run(self, runs: Sequence[SweepRun]) -> dict[SweepRun, int]:
        """Train all; one that fails or is stopped does not stop the others.

        Returns:
            Exit codes of those that did not finish.
        """
        waiting = list(runs)
        unfinished: dict[SweepRun, int] = {}
        with _terminate_as_exit(), Bars(runs, shown=self.jobs > 1) as bars:
            try:
                while waiting or self.running:
                    while waiting and len(self.running) < self.jobs:
                        self._start(waiting.pop(0))
                    time.sleep(POLL_S)
                    for item, process in list(self.running.items()):
                        code = process.poll()
                        bars.update(item)
                        if code is None:
                            continue
                        self._forget(item)
                        if code != 0:
                            unfinished[item] = code
                        bars.end(item, code)
            finally:
                self._end_all()
        return unfinished

    def _start(self, item: SweepRun) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // (self.jobs * self.processes))
        (item.folder / STOPPED).unlink(missing_ok=True)  # of an earlier start, if this one does not get far
        log = (item.folder / "log.txt").open("ab")
        self.logs[item] = log
        self.places[item] = min(set(range(self.jobs)) - set(self.places.values()))
        self.running[item] = subprocess.Popen(
            command(item, self.processes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log if self.jobs > 1 else None,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ | self._cards_of(self.places[item]),
        )

    def _cards_of(self, place: int) -> dict[str, str]:
        if self.jobs == 1 or not self.cards:
            return {}
        count = min(self.processes, len(self.cards))
        cards = (self.cards[(place * count + n) % len(self.cards)] for n in range(count))
        return {"CUDA_VISIBLE_DEVICES": ",".join(cards)}

    def _forget(self, item: SweepRun) -> None:
        del self.running[item], self.places[item]
        self.logs.pop(item).close()

    def _end_all(self) -> None:
        for process in self.running.values():
            process.terminate()
        deadline = time.monotonic() + END_WAIT_S
        for item, process in list(self.running.items()):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._forget(item)


class Bars:
    """A progress bar per run on a terminal; elsewhere a line when a run ends."""

    def __init__(self, runs: Sequence[SweepRun], shown: bool) -> None:
        self.console = Console(stderr=True)
        texts = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self.progress = Progress(
            *texts, console=self.console, disable=not (shown and self.console.is_terminal)
        )
        self.shown = shown
        self.tasks: dict[SweepRun, TaskID] = {
            item: self.progress.add_task(item.label, total=item.config.train.steps, loss="") for item in runs
        }

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self, item: SweepRun) -> None:
        """Read how far a run is."""
        if self.progress.disable:
            return
        line = _last_line(item.folder / "metrics.jsonl")
        self.progress.update(self.tasks[item], completed=line.get("step", 0))
        if isinstance(line.get("loss"), float):
            self.progress.update(self.tasks[item], loss=f"loss {line['loss']:.4f}")

    def end(self, item: SweepRun, code: int) -> None:
        """Say that a run ended."""
        if self.shown:
            state = "finished" if code == 0 else f"failed with exit code {code}, see {item.folder}/log.txt"
            if code != 0 and item.stopped:
                state = "stopped, and can go on"
            self.console.print(f"{item.label}: {state}", highlight=False)


def read_summary(item: SweepRun) -> dict[str, Any]:
    """A finished run's numbers under its label.

    Raises:
        DataError: summary.json is damaged.
    """
    path = item.folder / "summary.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            str(path), f"is damaged ({error})", "delete the file to finish the run again"
        ) from error
    return {"label": item.label, **values, "attention": item.attention}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The main numbers of each run; labels only where they say more than the attention."""
    if all(row["label"] == row["attention"] for row in rows):
        rows = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    roomy_console().print(comparison_table(rows))


def _last_line(path: Path) -> dict[str, Any]:
    """The newest complete line of a JSON-lines file that is being written; {} if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    try:
        line = json.loads(lines[-1]) if lines else {}
    except ValueError:  # a line longer than the tail
        return {}
    return line if isinstance(line, dict) else {}


@contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does: by way of ``finally``, so that no run is left behind."""

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
