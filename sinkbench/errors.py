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
        return " ".join(f"{self.where}: {self.problem}; {self.remedy}".split())


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


EXIT_CODE = 2
