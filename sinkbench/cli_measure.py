"""``sinkbench measure TARGET ...``: the sink of trained runs and of open models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sinkbench import recipe_files
from sinkbench.errors import CheckpointError, SinkbenchError
from sinkbench.files import write_atomically
from sinkbench.measure.finished import CACHE, Finished
from sinkbench.measure.inputs import INPUTS
from sinkbench.measure.model_list import ModelList, read_model_list
from sinkbench.measure.results import Result, Results, Skipped, write
from sinkbench.measure.settings import Settings
from sinkbench.redaction import redact

LIST_SUFFIXES = (".yaml", ".yml")


def positive(text: str) -> int:
    """A count on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole(text: str) -> int:
    """A seed on the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def step(text: str) -> int | str:
    """A checkpoint's step, or all of them."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor all")
    return text if text == "all" else int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "target",
        nargs="+",
        help="a run, one of its checkpoints, a sweep's folder of runs, a Hugging Face folder, a .gguf file, "
        "a name on the hub, or a list of models (.yaml)",
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--inputs", nargs="+", choices=INPUTS, help="kinds of token sequences (default: natural)"
    )
    what.add_argument(
        "--prompts", type=Path, metavar="FILE", help="natural text, one prompt a line (or .jsonl)"
    )
    what.add_argument("--length", type=positive, help="tokens of a sequence (default: 64, or the recipe's)")
    what.add_argument("--count", type=positive, help="sequences (default: 100, or the recipe's)")
    what.add_argument("--seed", type=whole, default=0, help="of what is drawn at random (default: 0)")
    what.add_argument("--bos", action="store_true", help="put the beginning-of-sequence token in front")
    what.add_argument("--step", type=step, help="checkpoint of this step, or all (default: the last)")
    what.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        help="metric plugins, by name or as '{name: sink, k: [1, 2]}' (default: sink norms, or the recipe's)",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    how.add_argument("--batch-size", type=positive, help="sequences per forward (default: 4096 tokens)")
    how.add_argument(
        "--attention",
        choices=("auto", "whole", "streaming"),
        default="auto",
        help="hold a layer's attention weights, or never (auto: up to 512 tokens)",
    )
    how.add_argument("--allow-pickle", action="store_true", help="read pickled weights, which can run code")
    how.add_argument("--allow-code", action="store_true", help="run the code that comes with a model")
    how.add_argument("--cache", type=Path, default=CACHE, help="finished results (default: %(default)s)")
    how.add_argument("--again", action="store_true", help="measure anew what is in the cache")
    out = parser.add_argument_group("what is written")
    out.add_argument("--json", type=Path, metavar="FILE", help="all results")
    out.add_argument("--csv", type=Path, metavar="FILE", help="all results, one number a line")
    out.add_argument("--report", type=Path, metavar="FILE", help="tables and figures on one HTML page")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One target with its settings.

    Attributes:
        name: in tables.
        listed: it is of a list, from which models may be left out.
    """

    target: str
    name: str
    settings: Settings
    listed: bool = False


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print and write what was found.

    Raises:
        SinkbenchError: the only target cannot be measured, or a file cannot be written; or, after all is
            written, some of several targets, or all of a list's, were left out.
        CheckpointError: the same of checkpoints of ``--step all``.
    """
    lists = [read_model_list(recipe_files.find(t)) for t in arguments.target if t.endswith(LIST_SUFFIXES)]
    jobs = list(_jobs(arguments, iter(lists)))
    _find(jobs)
    _note_unused(jobs)
    kept = Finished(arguments.cache, again=arguments.again)
    results: list[Result] = []
    skipped: list[Skipped] = []
    missing: list[Job] = []
    with _bars(len(jobs)) as bars:
        for job in jobs:
            try:
                results += bars.measure(job, kept)
            except SinkbenchError as error:
                if len(jobs) == 1 and not job.listed:
                    raise
                missing += [] if job.listed else [job]
                reason = str(error).removeprefix(f"{job.target}: ")
                skipped.append(Skipped(target=job.name, step=job.settings.step, reason=reason))
    _write(arguments, results, skipped)
    _print(results, lists, skipped)
    texts = {result.texts or "a run's own held-out data" for result in results if result.inputs == "natural"}
    if len(texts) > 1:
        note = f"natural text is not the same for all: {', '.join(sorted(texts))}"
        print(f"sinkbench measure: {note}; --prompts FILE gives all the same", file=sys.stderr)
    if kept.taken:
        note = f"{kept.taken} of the results taken from {kept.folder}, where they were kept"
        print(f"sinkbench measure: {note}; --again measures anew", file=sys.stderr)
    if arguments.step == "all" and missing:
        steps = ", ".join(str(job.settings.step) for job in missing)
        problem = f"checkpoints left out of --step all: {steps}"
        raise CheckpointError("sinkbench measure", problem, "see the reasons above")
    if missing or not results:
        names = ", ".join(job.name for job in missing or jobs)
        raise SinkbenchError("sinkbench measure", f"not measured: {names}", "see the reasons above")


def _jobs(arguments: argparse.Namespace, lists: Iterator[ModelList]) -> Iterator[Job]:
    from sinkbench.measure.targets import checkpoint_steps

    inputs = tuple(dict.fromkeys(arguments.inputs or ("natural",)))
    common = Settings(
        prompts=arguments.prompts,
        length=arguments.length,
        count=arguments.count,
        seed=arguments.seed,
        bos=arguments.bos,
        metrics=tuple(arguments.metrics),
        inputs=inputs,
        step=None if arguments.step == "all" else arguments.step,
        device=arguments.device,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        attention=arguments.attention,
        allow_pickle=arguments.allow_pickle,
        allow_code=arguments.allow_code,
    )
    for target in _targets(arguments.target):
        settings = common
        if target.endswith(LIST_SUFFIXES):
            models = next(lists)
            settings = replace(
                settings,
                inputs=inputs if arguments.inputs else models.inputs,
                length=arguments.length or models.length,
                count=arguments.count or models.count,
            )
            for model in models.models:
                yield Job(target=model.target, name=model.name, settings=settings, listed=True)
        elif arguments.step == "all":
            for number in checkpoint_steps(target):
                yield Job(target=target, name=target, settings=replace(settings, step=number))
        else:
            yield Job(target=target, name=target, settings=settings)


def _targets(named: Sequence[str]) -> Iterator[str]:
    """The targets, with the runs of a sweep for its folder."""
    from sinkbench.measure.targets import is_sweep

    for target in named:
        if not is_sweep(target):
            yield target
            continue
        from sinkbench.report.runs import find_runs

        started, waiting = find_runs([Path(target).expanduser()])
        yield from map(str, started)
        if waiting:
            left_out = ", ".join(map(str, waiting))
            print(f"sinkbench measure: left out, not started: {left_out}", file=sys.stderr)


def _find(jobs: Sequence[Job]) -> None:
    """Before any is measured, which may take hours.

    Raises:
        SinkbenchError: a target is not there that is not to be skipped.
    """
    from sinkbench.measure.targets import find_target

    needed = {job.target: job.settings for job in jobs if not job.listed}
    for target, settings in needed.items():
        find_target(target, settings)


def _note_unused(jobs: Sequence[Job]) -> None:
    """Says which options do nothing to runs."""
    from sinkbench.measure.targets import is_run

    runs = list(dict.fromkeys(job.target for job in jobs if is_run(job.target)))
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("dtype", "batch_size", "attention")
        if getattr(jobs[0].settings, name) != getattr(Settings, name)
    ]
    if runs and given:
        note = f"{', '.join(given)}: for open models only, without effect on {', '.join(runs)}"
        print(f"sinkbench measure: {note}", file=sys.stderr)


class _Bars:
    """A bar over the targets and one over the sequences of the current one."""

    def __init__(self, progress: Progress, targets: int) -> None:
        self.progress = progress
        self.targets = progress.add_task("measuring", total=targets)
        self.sequences = progress.add_task("", total=None, visible=False)

    def measure(self, job: Job, kept: Finished) -> list[Result]:
        from sinkbench.measure.targets import measure_target

        self.progress.update(self.targets, description=job.name)
        results = []
        for result in measure_target(job.target, job.settings, kept, self._advance):
            results.append(result.model_copy(update={"target": job.name}))
        self.progress.update(self.targets, advance=1)
        self.progress.update(self.sequences, visible=False)
        return results

    def _advance(self, done: int, total: int) -> None:
        self.progress.update(
            self.sequences, completed=done, total=total, description="  sequences", visible=True
        )


@contextmanager
def _bars(targets: int) -> Iterator[_Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _Bars(progress, targets)


def _write(arguments: argparse.Namespace, results: Sequence[Result], skipped: Sequence[Skipped]) -> None:
    if arguments.json:
        write(arguments.json, Results(results=list(results), skipped=list(skipped)))
    if arguments.csv:
        from sinkbench.measure.tidy import to_csv

        write_atomically(arguments.csv, to_csv(results))
    if arguments.report:
        from sinkbench.report.measurements import measurements_page

        write_atomically(arguments.report, measurements_page(results, redact(" ".join(sys.argv[1:]))))


def _print(results: Sequence[Result], lists: Sequence[ModelList], skipped: Sequence[Skipped]) -> None:
    from sinkbench.report.table import measurement_table, roomy_console

    published = {model.name: dict(model.published) for models in lists for model in models.models}
    console = roomy_console()
    if results:
        console.print(measurement_table(results, published))
    for models in lists:
        console.print(f"published: {models.source}", markup=False, highlight=False)
    for one in skipped:
        step = "" if one.step is None else f", step {one.step}"
        line = f"skipped {one.target}{step}: {one.reason}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
