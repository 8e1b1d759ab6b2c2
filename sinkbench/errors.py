"""Errors a user can act on. Each prints as one line: ``where: problem; what to do``."""

from __future__ import annotations


class SinkbenchError(Exception):
    """A fault of the input or of the environment, not of sinkbench.

    Args:
        where: the file, key, package or folder that is wrong.
        problem: what is wrong with it.
        remedy: what to write or do instead.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        self.where = where
        self.problem = problem
        self.remedy = remedy
        super().__init__(where, problem, remedy)

    def __str__(self) -> str:
        line = " ".join(f"{self.where}: {self.problem}; {self.remedy}".split())
        # What a file holds must not steer the terminal that shows it.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


class RecipeError(SinkbenchError):
    """A recipe, an override or a combination of values that cannot run."""


class PluginError(SinkbenchError):
    """A plugin that is unknown, ambiguous, broken or given wrong parameters."""


class DataError(SinkbenchError):
    """A document, token file, tokenizer or manifest that cannot be used."""


class CheckpointError(SinkbenchError):
    """A checkpoint that is absent, damaged or does not fit the recipe."""


class HostError(SinkbenchError):
    """The machine lacks what the recipe asks for: processes, devices, packages, a writable folder."""


class DivergedError(SinkbenchError):
    """Training itself went wrong: losses or gradients that are not finite, a loss that jumped."""


class Stopped(Exception):
    """A run that ended early because it was asked to. Nothing is lost: the same command goes on.

    Args:
        where: the run folder, or the recipe.
        what: how far it came and who asked.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where = where
        self.what = what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; the same command goes on"


EXIT_CODE = 2
"""Of a command after a user's error."""
STOPPED_EXIT_CODE = 75
"""Of training that was stopped and can go on: EX_TEMPFAIL, "try again", of sysexits.h."""
DEBUG = "SINKBENCH_DEBUG"
"""Environment variable: 1 shows the traceback of a user's error too."""
