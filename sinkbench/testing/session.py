"""What all checks of one plugin share: its declarations, and what the ranks found, each made once."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from sinkbench.config import Config
from sinkbench.errors import SinkbenchError
from sinkbench.model import Declarations
from sinkbench.plugins import Resolved
from sinkbench.testing import ranks
from sinkbench.testing.distributed import RankFailure, run_distributed
from sinkbench.testing.subject import Subject

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_RANK = re.compile(r"^(?:rank \d+ of \d+: |then killed)", re.MULTILINE)
_ERROR = re.compile(r"[\w.]+(?:Error|Exception|Exit|Interrupt|Failure)\b")
_NOT_THE_CAUSE = re.compile(r"/(torch|megatron|multiprocessing|transformers|sinkbench)/|/contextlib\.py$")


CHANGE = 1e-6
"""Relative; sums in another order make less of a difference."""


class Failed(Exception):
    """A check failed: what, where and how much."""


class Skipped(Exception):
    """A check was not made, and why."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Attributes:
        run: returns what it saw; raises Failed or Skipped.
        usually: what a failure usually means.
        needs: checks without which this one says nothing.
    """

    name: str
    kinds: frozenset[str]
    run: Callable[[Session], str]
    usually: str
    needs: tuple[str, ...] = ("build",)


@dataclass
class Session:
    """
    Attributes:
        folder: for checkpoints and exports; removed afterwards.
    """

    subject: Subject
    folder: Path

    @cached_property
    def parts(self) -> tuple[Config, Resolved, Declarations]:
        return self.subject.declare()

    @property
    def config(self) -> Config:
        return self.parts[0]

    @property
    def declared(self) -> Declarations:
        return self.parts[2]

    def build(self) -> Any:
        """What the plugin builds for the tiny model, anew."""
        _, resolved, declared = self.parts
        chosen = self.subject.chosen(resolved)
        return chosen.plugin.build(chosen.params, declared.context)

    @cached_property
    def alone(self) -> ranks.Trained:
        """Trained in one process."""
        (trained,) = self.on_ranks(1, ranks.rank_trains, ())
        found: ranks.Trained = trained
        return found

    @cached_property
    def drift(self) -> dict[str, list[float]]:
        """How far a small change of the weights moves losses and norms of each step, relatively."""
        (changed,) = self.on_ranks(1, ranks.rank_trains, (), CHANGE)
        alone = {"losses": self.alone.losses, "norms": self.alone.norms}
        moved = {"losses": changed.losses, "norms": changed.norms}
        return {
            key: [abs(a - b) / abs(b) for a, b in zip(moved[key], alone[key], strict=True)] for key in alone
        }

    @cached_property
    def inspected(self) -> ranks.Inspected:
        (inspected,) = self.on_ranks(1, ranks.rank_inspects)
        found: ranks.Inspected = inspected
        return found

    def on_ranks(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``run_distributed`` with the subject as the first argument.

        Raises:
            Failed: a rank failed; its traceback is printed.
        """
        try:
            return run_distributed(world_size, function, self.subject, *args)
        except RankFailure as failure:
            print(failure)
            raise Failed(_last_error(str(failure))) from failure

    def refuse_layout(self, *overrides: str) -> None:
        """Raises Skipped if the plugin, or the core, says in one line that this layout cannot be."""
        try:
            self.subject.declare(*overrides)
        except SinkbenchError as error:
            raise Skipped(f"refused: {error}") from error


def describe_exception(error: BaseException) -> str:
    """An exception of a plugin's code in one line, with the place in it."""
    text = "".join(traceback.format_exception(error))
    print(text)
    return _last_error(text)


def _last_error(text: str) -> str:
    """The error that the first rank's traceback ends with, and the innermost place outside the
    libraries."""
    first_rank = next(part for part in _RANK.split(text) if part.strip())
    lines = [line for line in first_rank.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    error = errors[-1] if errors else lines[-1 if "Traceback" in lines[0] else 0]
    frames = [match for line in lines if (match := _FRAME.search(line))]
    places = [frame for frame in frames if not _NOT_THE_CAUSE.search(frame["file"])] or frames
    at = f" (in {places[-1]['function']}, {places[-1]['file']}:{places[-1]['line']})" if places else ""
    return f"{error.strip()}{at}"


def compare(
    what: str, found: Tensor, expected: Tensor, *, relative: float = 1e-5, absolute: float = 1e-6
) -> str:
    """Says how near two tensors are.

    Raises:
        Failed: their shapes differ, or their values by more than the tolerance anywhere.
    """
    if found.shape != expected.shape:
        raise Failed(f"{what} has shape {list(found.shape)} instead of {list(expected.shape)}")
    error = (found.detach().double() - expected.detach().double()).abs()
    wrong = ~(error <= absolute + relative * expected.double().abs())
    if wrong.any():
        report_difference(what, found, expected, error, int(wrong.sum()))
    return f"{what} within {float(error.max() if error.numel() else 0):.1e}"


def report_difference(what: str, found: Tensor, expected: Tensor, error: Tensor, count: int) -> NoReturn:
    """Raises Failed with the place where two tensors differ most."""
    index = int(error.nan_to_num(nan=torch.inf).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(index), error.shape)] if error.dim() else []
    a, b = found.flatten()[index].item(), expected.flatten()[index].item()
    raise Failed(f"{what} differs in {count} of {error.numel()} values, most at {place}: {a:.6g} for {b:.6g}")
