"""Stands in for pydantic and pluggy in exported models, whose parameters were validated when they were
trained: a plugin's parameters are plain objects, its validators and hook markers do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class BaseModel:
    """An object with the given attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def Field(default: Any = None, **_: Any) -> Any:
    return default


def _unchanged(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda function: function


model_validator = field_validator = model_serializer = field_serializer = _unchanged
ConfigDict = dict


class pluggy:
    """The module's one name that plugins need."""

    @staticmethod
    def HookimplMarker(project: str) -> Callable[[Any], Any]:
        return lambda function: function


def __getattr__(name: str) -> Any:
    """Constrained types, which stand in annotations only."""
    return Any
