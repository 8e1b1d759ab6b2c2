"""What ``check_plugin`` found, as an author reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One check.

    Attributes:
        name: of the check.
        status: whether it passed, failed, or was left out.
        detail: passed: what was seen; failed: what, where and how much; skipped: why.
        usually: what a failure of this check usually means.
    """

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    usually: str

    def __str__(self) -> str:
        return f"{self.status:8}{self.name}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """All checks of a plugin, in the order they were made.

    Attributes:
        subject: kind, name and parameters.
    """

    subject: str
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(self._with("failed"))

    @property
    def skipped(self) -> tuple[Outcome, ...]:
        return tuple(self._with("skipped"))

    def __getitem__(self, name: str) -> Outcome:
        """The outcome of one check."""
        return next(outcome for outcome in self.outcomes if outcome.name == name)

    def __str__(self) -> str:
        return "\n".join([self.subject, *(f"  {outcome}" for outcome in self.outcomes)])

    def failures(self) -> str:
        """What failed, and what that usually means."""
        lines = [f"{self.subject}: {len(self.failed)} of {len(self.outcomes)} checks failed"]
        for outcome in self.failed:
            lines += [f"  {outcome.name}: {outcome.detail}", f"    usually: {outcome.usually}"]
        return "\n".join(lines)

    def _with(self, status: str) -> Iterator[Outcome]:
        return (outcome for outcome in self.outcomes if outcome.status == status)
