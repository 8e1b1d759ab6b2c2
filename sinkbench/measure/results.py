"""The JSON files that measurements are kept in.

``sinkbench measure --json`` writes ``Results``; the probe of a run writes ``StepMetrics`` to
measure/step_N.json. A number that is not finite is null in the file and NaN in Python.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)
from typing_extensions import TypeAliasType

from sinkbench.errors import DataError
from sinkbench.files import write_atomically

SCHEMA_VERSION: Literal[1] = 1


def _nan_for_null(value: Any) -> Any:
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(_nan_for_null)]
Nested = TypeAliasType("Nested", "Number | list[Nested]")
Metrics = dict[str, Nested]
"""A metric's name -> a number, or numbers nested by layer, head, key position."""


OF_A_RUN = frozenset(
    {"attention", "event", "label", "loss", "mfu", "name", "seconds", "step", "time", "tokens"}
    | {"tokens_per_second", "train_loss"}
)
"""Keys of a run's own in metrics.jsonl, its summary and tables, beside loss/DOMAIN."""


class Document(BaseModel):
    """A file of this module: unknown keys are errors, numbers that are not finite become null."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")

    schema_version: Literal[1] = SCHEMA_VERSION


class Result(BaseModel):
    """What was measured of one target on one kind of input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(min_length=1)
    """run folder, checkpoint, model folder or hub name, as the user wrote it."""
    inputs: str = Field(min_length=1)
    """kind of token sequences: natural, random, repeat."""
    length: PositiveInt
    """tokens of a sequence."""
    count: PositiveInt
    """sequences."""
    bos: bool
    """whether a beginning-of-sequence token was put in front, as the first of the tokens."""
    step: NonNegativeInt | None = None
    """of the checkpoint, if a run was measured."""
    texts: str | None = None
    """where natural text came from."""
    seed: NonNegativeInt | None = None
    """of what was drawn at random."""
    dtype: str | None = None
    """of the weights while measuring."""
    layers_without_attention: NonNegativeInt = 0
    """layers that were left out: those of recurrence or convolution in a hybrid model."""
    metrics: Metrics


class Skipped(BaseModel):
    """What was left out of a list of models, or of a run's checkpoints."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(min_length=1)
    """as in Result."""
    step: NonNegativeInt | None = None
    """of the checkpoint, if it is one of a run."""
    reason: str = Field(min_length=1)


class Results(Document):
    """What one call of ``sinkbench measure`` found."""

    results: list[Result]
    skipped: list[Skipped] = []


class StepMetrics(Document):
    """What the probe of a run found after a step; percentages are 0-100."""

    step: NonNegativeInt
    metrics: Metrics


AnyDocument = TypeVar("AnyDocument", bound=Document)


def write(path: Path, document: Document) -> None:
    """Write a document, whole or not at all.

    Raises:
        HostError: the file cannot be written.
    """
    write_atomically(path, document.model_dump_json() + "\n")


def read(path: Path, kind: type[AnyDocument]) -> AnyDocument:
    """Read a document of a kind, ``Results`` or ``StepMetrics``.

    Raises:
        DataError: the file is absent, unreadable, damaged, or of another schema version.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            str(path), f"cannot be read ({error.strerror or error})", "give a file that measure wrote"
        ) from error
    except ValidationError as error:
        problem = f"is not a measurement of schema version {SCHEMA_VERSION} ({_first_fault(error)})"
        raise DataError(str(path), problem, "measure again") from error


def _first_fault(error: ValidationError) -> str:
    first = error.errors()[0]
    # pydantic also names the branches of a union, as in "list[nested]": no part of the file
    keys = [str(part) for part in first["loc"] if "[" not in str(part)]
    return ": ".join([".".join(keys), first["msg"]] if keys else [first["msg"]])
