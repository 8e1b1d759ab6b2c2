"""Lists of models to measure one after the other, with published numbers to print beside ours."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from sinkbench.errors import DataError
from sinkbench.measure.inputs import Inputs


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ListedModel(_Strict):
    """One model of a list."""

    name: str = Field(min_length=1)
    """in the table."""
    target: str = Field(min_length=1)
    """a run, a checkpoint, a folder or .gguf file, or a name on the hub."""
    published: dict[Inputs, float] = {}
    """sink_1 in percent by kind of inputs."""


class ModelList(_Strict):
    """A file for ``sinkbench measure``. What the command line gives comes before ``length`` and so on."""

    source: str = Field(min_length=1)
    """where the published numbers come from."""
    inputs: tuple[Inputs, ...] = ("natural",)
    length: PositiveInt | None = None
    count: PositiveInt | None = None
    models: tuple[ListedModel, ...] = Field(min_length=1)


def read_model_list(path: Path) -> ModelList:
    """
    Raises:
        DataError: the file cannot be read or is no list of models.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        return ModelList.model_validate(value)
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise DataError(str(path), problem, "give a list of models") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        problem = getattr(error, "problem", None) or "it is not UTF-8"
        raise DataError(str(path), f"is not YAML ({problem})", "correct the file") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = f"is no list of models ({key + ': ' if key else ''}{first['msg']})"
        raise DataError(str(path), problem, "see recipes/measure/paper_models.yaml") from error
