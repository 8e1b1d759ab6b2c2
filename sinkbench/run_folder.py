"""The folder of a run: locked while it lives, metrics cut back on resume, one schema of files.

recipe.yaml      the resolved recipe
manifest.json    versions, git commit, plugins, backends, parallel layout
metrics.jsonl    one JSON object a line: {"step", "event": "train" | "validation" | "probe", ...}
measure/         step_N.json: every number of a probe, per layer and head
checkpoints/     step_N/
summary.json     written when the run is complete
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO

from sinkbench import recipe
from sinkbench.config import Config
from sinkbench.errors import HostError, RecipeError
from sinkbench.explain import show
from sinkbench.files import write_atomically
from sinkbench.recipe_layers import flatten

MAY_CHANGE = ("output_dir", "parallel", "log", "checkpoint", "train.micro_batch_size", "train.recompute")
"""A resumed run may change these: they alter neither the model nor what it is trained on."""


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
        lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise HostError(
                str(self.path), "another run is writing here", "wait for it, or set another name"
            ) from None
        return lock

    def begin(self, start_step: int, manifest: dict[str, Any]) -> None:
        """Writes recipe and manifest, and drops metrics beyond the step that training resumes from."""
        write_atomically(self.path / "recipe.yaml", self.recipe_text)
        write_json(self.path / "manifest.json", manifest)
        metrics = self.path / "metrics.jsonl"
        kept = [line for line in _complete_lines(metrics) if json.loads(line)["step"] <= start_step]
        write_atomically(metrics, "".join(kept))
        self._metrics = metrics.open("a", buffering=1)

    def log(self, step: int, event: str, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        assert self._metrics is not None
        self._metrics.write(json.dumps({"step": step, "event": event, **values}) + "\n")

    def latest_events(self) -> dict[str, dict[str, Any]]:
        """The last line of each event in metrics.jsonl."""
        lines = map(json.loads, _complete_lines(self.path / "metrics.jsonl"))
        return {line["event"]: line for line in lines}

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._lock.close()


def refuse_other_recipe(folder: Path, config: Config) -> None:
    """Checks that a run folder is new or holds a run of this recipe.

    Raises:
        RecipeError: it holds a run of another one.
    """
    path = folder / "recipe.yaml"
    if not path.exists():
        return
    before = dict(flatten(recipe.to_config(recipe.load(path)).model_dump()))
    now = dict(flatten(config.model_dump()))
    changed = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and not any(_within(key, prefix) for prefix in MAY_CHANGE)
    )
    if changed:
        what = ", ".join(f"{k} {show(before.get(k))} -> {show(now.get(k))}" for k in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise RecipeError(
            str(folder),
            f"it holds a run of another recipe ({what}{more})",
            "set another name, or delete the folder",
        )


def folder_of(config: Config) -> Path:
    """output_dir/name, or output_dir/name/label for a run of a sweep."""
    folder = Path(config.output_dir).expanduser() / config.name
    return folder / config.label if config.label else folder


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + os.linesep)


def _within(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _complete_lines(path: Path) -> list[str]:
    """A process that was killed may have left half a line at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
