"""The folder of a run: locked while any of its processes lives, metrics cut back on resume, one schema of
files.

recipe.yaml      the resolved recipe
manifest.json    versions, git commit, plugins, backends, parallel layout
metrics.jsonl    one JSON object a line: {"step", "event": "train" | "validation" | "probe" | "skipped" |
                 "spike", ...}; a number that is not finite is null, as in all these files
measure/         step_N.json: every number of a probe, per layer and head
checkpoints/     step_N/
tokenizer/       that of the data, unless these are a synthetic task
summary.json     written when the run is complete
stopped.json     at which step a run was stopped, and why; gone once it goes on
wandb_run_id     of the run at Weights & Biases, so that it goes on there
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sinkbench import recipe
from sinkbench.config import BigramBackcopyConfig, Config
from sinkbench.errors import HostError, RecipeError
from sinkbench.explain import show
from sinkbench.files import NO_LOCKS, write_atomically
from sinkbench.recipe_layers import flatten, is_within

MAY_CHANGE = (
    "output_dir",
    "parallel",
    "log",
    "checkpoint",
    "measure",
    "validation",
    "model.backend",
    "model.linears",
    "model.norms",
    "optim.implementation",
    "train.micro_batch_size",
    "train.recompute",
    "train.fused",
    "train.cuda_graph",
    "train.max_minutes",
    "train.max_skipped_steps",
    "train.on_spike",
    "train.spike_sigmas",
)
"""A resumed run may change these: they alter neither the model nor what it is trained on. It may raise
train.steps too, if the schedule is constant, and change what checkpoint.allow_change names."""
MUST_STAY = ("train.global_batch_size", "model.seq_length")
"""The position in the data counts in these."""
_DATA = ("data", "seed")
"""The order of the data comes from these."""
LOCK_WAIT_S = 2.0
"""A run that was killed a moment ago may not be gone yet."""
RANKS_WAIT_S = 30.0
"""So long the ranks of a run that lost its main process have to notice."""
LOCK, RANKS_LOCK, STOPPED = ".lock", ".lock.ranks", "stopped.json"
_SHOWN_CHANGES = 8

_log = logging.getLogger(__name__)


class RunFolder:
    """Opened by the main process of a run, which alone writes to it.

    Raises:
        HostError: the folder cannot be written, or another run lives in it.
        RecipeError: it holds a run of another recipe.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = folder_of(config)
        self.recipe_text = recipe.dump(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as error:
            raise HostError(
                str(self.path),
                f"cannot be written ({error.strerror or error})",
                "set output_dir to a folder you may write to",
            ) from error
        refuse_other_recipe(self.path, config)
        self._metrics: TextIO | None = None

    def _take_lock(self) -> TextIO:
        busy = "another run is writing here", "wait for it, or set another name"
        lock = _locked(self.path / LOCK, fcntl.LOCK_EX, LOCK_WAIT_S, busy)
        # None of an earlier run's ranks is left; this run's take their share after it (``join``).
        left = "a rank of an earlier run is still there", "end it, or set another name"
        try:
            _locked(self.path / RANKS_LOCK, fcntl.LOCK_EX, RANKS_WAIT_S, left).close()
        except BaseException:
            lock.close()
            raise
        return lock

    def refuse_other_defaults(self, manifest: dict[str, Any]) -> None:
        """Checks that plugins give the parameters that the recipe does not name the values that they had when
        the run began. A warning says whose source is another.

        Args:
            manifest: of the run as it is to go on.

        Raises:
            RecipeError: a default is another.
        """
        before = self._begun_with("plugins") or {}
        for path, now in manifest["plugins"].items():
            was = before.get(path, {})
            if was.get("name") != now["name"] or is_within(path, "measure"):
                continue
            if was.get("sources", now["sources"]) != now["sources"] and now["package"] != "sinkbench":
                _log.warning("%s: the source of %s has changed since this run began", path, now["name"])
            for key, value in now["defaults"].items():
                self._refuse_default(f"{path}.{key}", was.get("defaults", {}).get(key, value), value)

    def _refuse_default(self, key: str, before: Any, now: Any) -> None:
        allowed = any(is_within(key, prefix) for prefix in self.config.checkpoint.allow_change)
        if _finite(before) != _finite(now) and not allowed:
            raise RecipeError(
                key,
                f"its default was {show(before)} when the run in {self.path} began, and is {show(now)}",
                f"set another name, or go on with {key}={show(before)} 'checkpoint.allow_change=[{key}]'",
            )

    def refuse_other_data(self, manifest: dict[str, Any]) -> None:
        """Checks that the data under the recipe's paths are those that the run began with.

        Args:
            manifest: of the run as it is to go on from a checkpoint.

        Raises:
            RecipeError: they are others.
        """
        if isinstance(self.config.data, BigramBackcopyConfig):
            return  # the recipe says all of it
        allowed = any(
            is_within(key, section) for key in self.config.checkpoint.allow_change for section in _DATA
        )
        before = self._begun_with("data")
        if before is not None and before != manifest["data"] and not allowed:
            problem = f"these are not the data that the run in {self.path} began with"
            remedy = "put those back, set another name, or go on with 'checkpoint.allow_change=[data]'"
            raise RecipeError("data", problem, remedy)

    def _begun_with(self, part: str) -> Any:
        """A part of the manifest that is there; None for a new run, or one that was killed before it had
        begun."""
        try:
            return json.loads((self.path / "manifest.json").read_text())[part]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, start_step: int, manifest: dict[str, Any]) -> None:
        """Writes recipe and manifest, and drops metrics beyond the step that training resumes from, and
        what no longer holds of a run that goes on."""
        write_atomically(self.path / "recipe.yaml", self.recipe_text)
        write_json(self.path / "manifest.json", manifest)
        metrics = self.path / "metrics.jsonl"
        kept = [text for text, line in _lines(metrics) if 0 < start_step >= line["step"]]
        write_atomically(metrics, "".join(kept))
        (self.path / STOPPED).unlink(missing_ok=True)
        if start_step < self.config.train.steps:
            (self.path / "summary.json").unlink(missing_ok=True)
        for path in (self.path / "measure").glob("step_*.json"):
            found = re.fullmatch(r"step_(\d+)\.json", path.name)
            if found and int(found[1]) > start_step:
                path.unlink()
        self._metrics = metrics.open("a", buffering=1)

    def log(self, step: int, event: str, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        assert self._metrics is not None
        self._metrics.write(_json({"step": step, "event": event, **values}) + "\n")

    def flush(self) -> None:
        """Brings metrics.jsonl to the disk, so that no checkpoint is ahead of it."""
        assert self._metrics is not None
        os.fsync(self._metrics.fileno())

    def latest_events(self) -> dict[str, dict[str, Any]]:
        """The last line of each event in metrics.jsonl."""
        return {line["event"]: line for _, line in _lines(self.path / "metrics.jsonl")}

    def stopped(self, step: int, reason: str) -> None:
        """Says that the run was asked to end after a step that has a checkpoint."""
        write_json(self.path / STOPPED, {"step": step, "reason": reason})

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._lock.close()


def join(folder: Path) -> TextIO:
    """A rank's share in a run folder that its main process has opened: no other run can start there while
    any rank holds one.

    Raises:
        HostError: another run is starting there.
    """
    busy = "another run is starting here", "wait for it, or set another name"
    return _locked(folder / RANKS_LOCK, fcntl.LOCK_SH, LOCK_WAIT_S, busy)


def hold(folder: Path) -> TextIO:
    """A run folder for a command that changes it: no run can start there until the file is closed.

    Raises:
        HostError: a run lives there.
    """
    busy = "a run is writing here", "wait for it, or stop it"
    return _locked(folder / LOCK, fcntl.LOCK_EX, LOCK_WAIT_S, busy)


def _locked(path: Path, kind: int, wait_s: float, busy: tuple[str, str]) -> TextIO:
    """The file with a lock on it, which lasts until it is closed or the process ends."""
    file = path.open("a+")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise HostError(str(path.parent), *busy) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            _log.warning("%s: its file system has no locks; start no other run there", path.parent)
            return file
        time.sleep(0.05)


def refuse_other_recipe(folder: Path, config: Config) -> None:
    """Checks that a run folder is new, or holds a run of this recipe but for what may change.

    Raises:
        RecipeError: it holds a run of another one.
    """
    path = folder / "recipe.yaml"
    if not path.exists():
        return
    before = dict(flatten(recipe.to_config(recipe.load(path)).model_dump(by_alias=True)))
    now = dict(flatten(config.model_dump(by_alias=True)))
    may_change = _may_change(config, before)
    changed = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and not any(is_within(key, prefix) for prefix in may_change)
    )
    if changed:
        shown = changed[:_SHOWN_CHANGES]
        what = ", ".join(f"{k} {show(before.get(k))} -> {show(now.get(k))}" for k in shown)
        more = f" and {len(changed) - len(shown)} more" if len(changed) > len(shown) else ""
        keys = ", ".join(changed)
        raise RecipeError(
            str(folder),
            f"it holds a run of another recipe ({what}{more})",
            "set another name"
            if any(key in MUST_STAY for key in changed)
            else f"set another name, or allow the change: 'checkpoint.allow_change=[{keys}]'",
        )


def _may_change(config: Config, before: dict[str, Any]) -> list[str]:
    allowed = config.checkpoint.allow_change
    for key in MUST_STAY:
        if any(is_within(key, prefix) for prefix in allowed):
            problem = f"{key} cannot change within a run, whose position in the data counts in it"
            raise RecipeError("checkpoint.allow_change", problem, "name other keys, or set another name")
    constant = before["optim.schedule"] == config.optim.schedule == "constant"
    longer = config.train.steps >= before["train.steps"]
    return [*MAY_CHANGE, *allowed, *(["train.steps"] if constant and longer else [])]


def folder_of(config: Config) -> Path:
    """output_dir/name, or output_dir/name/label for a run of a sweep."""
    folder = Path(config.output_dir).expanduser() / config.name
    return folder / config.label if config.label else folder


def write_json(path: Path, value: Any) -> None:
    """Numbers that are not finite become null."""
    write_atomically(path, _json(value, indent=2) + os.linesep)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: nested values with null in their place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl with what they say. A process that was killed may have left half a line at
    the end, a machine that lost power other things; these are left out."""
    if not path.exists():
        return
    *complete_lines, _ = path.read_text(errors="replace").split("\n")
    for number, text in enumerate(complete_lines, start=1):
        try:
            line = json.loads(text)
            sound = isinstance(line["step"], int) and isinstance(line["event"], str)
        except (ValueError, TypeError, KeyError):
            sound = False
        if sound:
            yield text + "\n", line
        else:
            _log.warning("%s: line %d is damaged and left out", path, number)
