"""What to do about losses that are not finite and losses that jump."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sinkbench.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sinkbench.megatron.training import StepResult

MEMORY = 100
"""Steps that the running mean and deviation look back on, and that pass before a loss can be a spike."""


@dataclass(kw_only=True)
class LossStatistics:
    """Exponentially weighted mean and variance of the losses so far. Equal on all ranks, kept in
    checkpoints."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def limit(self, sigmas: float) -> float:
        """A loss above this is a spike."""
        if self.count < MEMORY:
            return math.inf
        return self.mean + sigmas * math.sqrt(self.variance)

    def add(self, loss: float) -> None:
        self.count += 1
        weight = 1 / min(self.count, MEMORY)
        change = loss - self.mean
        self.mean += weight * change
        self.variance = (1 - weight) * (self.variance + weight * change * change)


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A step that was no ordinary one.

    Attributes:
        event: ``spike``, or ``skipped`` where there was no update.
        values: for metrics.jsonl.
        what: the trouble in words.
        remedy: what the user may do.
        stop: whether training ends here.
    """

    event: str
    values: dict[str, float]
    what: str
    remedy: str
    stop: bool


class Health:
    """Judges the loss of every step, before and after its update. The judgement depends on the losses alone,
    so that all ranks come to the same."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.statistics = LossStatistics()
        self.skipped = 0
        """Steps without an update since the last one with."""

    def acceptable(self, loss: Tensor) -> Tensor:
        """Whether the parameters may be updated from a step's gradients, bool, on the loss's device."""
        limit = math.inf if self.config.on_spike == "log" else self._limit
        return loss.isfinite() & (loss <= limit)

    def _is_spike(self, loss: float) -> bool:
        return loss > self._limit

    @property
    def _limit(self) -> float:
        return self.statistics.limit(self.config.spike_sigmas)

    def after(self, result: StepResult) -> Trouble | None:
        """Counts a step, and says what was wrong with it."""
        self.skipped = 0 if result.updated else self.skipped + 1
        trouble = self._trouble(result)
        if math.isfinite(result.loss):
            # A spike counts no more than the limit, or the next one would be none.
            self.statistics.add(min(result.loss, self._limit))
        return trouble

    def _trouble(self, result: StepResult) -> Trouble | None:
        finite = math.isfinite(result.loss)
        spike = finite and self._is_spike(result.loss)
        if result.updated and not spike:
            return None
        values = {"loss": result.loss, "grad_norm": result.grad_norm}
        if spike:
            mean, deviation = self.statistics.mean, math.sqrt(self.statistics.variance)
            values |= {"mean": mean, "deviation": deviation}
            what = f"the loss jumped to {result.loss:.4g} (mean {mean:.4g}, deviation {deviation:.2g})"
        else:
            what = f"the {'gradient' if finite else 'loss'} is not finite"
            if result.tokens == 0:
                what = "no token has a weight above 0"
        stop = self.skipped > self.config.max_skipped_steps or (spike and self.config.on_spike == "stop")
        if not result.updated and not stop:
            what += f"; no update ({self.skipped} of at most {self.config.max_skipped_steps} running)"
        elif self.skipped > 1:
            what += f", for {self.skipped} steps running"
        keys = "train.max_skipped_steps" + (" or change train.on_spike" if spike else "")
        return Trouble(
            event="spike" if result.updated else "skipped",
            values=values,
            what=what,
            remedy=f"look at these sequences, lower optim.lr, or raise {keys}",
            stop=stop,
        )

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self.statistics), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        self.statistics = LossStatistics(**{k: v for k, v in state.items() if k != "skipped"})
