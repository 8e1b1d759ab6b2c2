"""Errors of pydantic in a user's words: which key, what is wrong, what to write instead."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Location = Sequence["int | str"]

MOST_SAME = 3
"""Keys of other sections that are proposed for one of the same last name."""

_REMEDIES = {
    "bool_type": "write true or false",
    "dict_type": "write a mapping, {key: value}",
    "float_type": "write a number",
    "int_type": "write a whole number",
    "list_type": "write a list, [a, b]",
    "model_type": "write a mapping, {key: value}",
    "string_type": "write a word, in quotes if it looks like a number",
    "tuple_type": "write a list, [a, b]",
}


_OTHER_NAMES = {
    "adam_betas": "betas",
    "batch_size": "global_batch_size",
    "context_length": "seq_length",
    "dtype": "precision",
    "grad_clip": "clip_grad",
    "hidden_dim": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "learning_rate": "lr",
    "max_grad_norm": "clip_grad",
    "max_seq_len": "seq_length",
    "max_steps": "steps",
    "num_heads": "num_attention_heads",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_query_groups",
    "num_steps": "steps",
    "wd": "weight_decay",
}
"""What other programs call some keys."""


@dataclass(frozen=True)
class Fault:
    """One error: the dotted key it concerns, relative to what was validated."""

    key: str
    problem: str
    remedy: str


def explain(
    error: ValidationError,
    schema: type[BaseModel],
    values: Any,
    also: Iterable[str] = (),
    most: int | None = None,
) -> list[Fault]:
    """The errors of a validation, the most telling first: wrong keys, then wrong values.

    Args:
        error: what pydantic raised.
        schema: the model that was validated.
        values: the plain values that it was given.
        also: keys of the top level that the model does not have.
        most: how many are explained; default: all.
    """
    details = sorted(error.errors(include_url=False), key=lambda d: d["type"] != "extra_forbidden")
    return [_fault(detail, schema, values, also) for detail in details[:most]]


def nearest(word: str, known: Iterable[str]) -> str:
    """The remedy for an unknown word: the most similar known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(known)}" if known else "there is none"


def dotted(parts: Location) -> str:
    """("data", "train", 0, "path") -> data.train[0].path"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def show(value: Any, limit: int = 40) -> str:
    """A value on one short line, strings in quotes."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _fault(detail: ErrorDetails, schema: type[BaseModel], values: Any, also: Iterable[str]) -> Fault:
    kind, context = detail["type"], detail.get("ctx", {})
    key = dotted(_written(detail["loc"], values, kind == "missing"))
    match kind:
        case "extra_forbidden":
            *section, word = detail["loc"]
            more = () if section else also
            return Fault(key, "unknown key", _nearest_key(key, str(word), section, schema, more))
        case "missing":
            return Fault(key, "is missing", "set it")
        case "union_tag_not_found":
            return Fault(f"{key}.{context['discriminator'].strip(chr(39))}", "is missing", "set it")
        case "union_tag_invalid":
            choices = re.findall(r"'(.*?)'", context["expected_tags"])
            tag = f"{key}.{context['discriminator'].strip(chr(39))}"
            return Fault(tag, f"{show(context['tag'])} is not known", nearest(str(context["tag"]), choices))
        case "literal_error":
            return Fault(key, f"{show(detail['input'])} is not known", f"use {context['expected']}")
        case "value_error":
            problem, _, remedy = str(context["error"]).partition("; ")
            return Fault(key, problem, remedy or "change it")
    should = detail["msg"].replace("Input should", "should").replace("String should", "should")
    should = should.replace("valid array", "list").replace("an object", "a mapping")
    return Fault(key, f"{show(detail['input'])} {should}", _REMEDIES.get(kind, "change it"))


def _written(location: Location, values: Any, missing: bool) -> list[int | str]:
    """The location without what pydantic adds to it, such as the tag of a union's member."""
    parts: list[int | str] = []
    for i, part in enumerate(location):
        known = isinstance(values, dict | list) and (
            part in values if isinstance(values, dict) else isinstance(part, int) and part < len(values)
        )
        if known:
            values = values[part]
        elif not (missing and i == len(location) - 1):
            continue
        parts.append(part)
    return parts


def unknown_key(key: str, schema: type[BaseModel]) -> str | None:
    """The remedy for a dotted key that no recipe has, as ``_nearest_key`` gives it; None for one that may be
    there, as any in a block whose keys the model does not name."""
    known = set(all_keys(schema))
    parts = key.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    if key in known or any(path in known and not _is_section(path, known) for path in above):
        return None
    return _nearest_key(key, parts[-1], parts[:-1], schema, ())


def _is_section(path: str, known: Collection[str]) -> bool:
    """A plugin's block has the keys of its own too, and is none."""
    return any(k.startswith(f"{path}.") for k in known) and f"{path}.params" not in known


def _nearest_key(key: str, word: str, section: Location, schema: type[BaseModel], also: Iterable[str]) -> str:
    """The remedy for an unknown key: a near one of its section, or of another."""
    here = {*_keys(_models_at(section, schema)), *also} - {word}  # a sweep cannot sweep its sweep
    if (usual := _OTHER_NAMES.get(word)) in here:
        return f"did you mean {usual}?"
    everywhere = set(all_keys(schema))
    # A key that exists under this path belongs to another member of a union.
    if key not in everywhere:
        elsewhere: dict[str, list[str]] = {}
        for path in sorted(everywhere):
            elsewhere.setdefault(path.split(".")[-1], []).append(path)
        if 0 < len(same := elsewhere.get(word, [])) <= MOST_SAME:
            return f"did you mean {' or '.join(same)}?"
        if not difflib.get_close_matches(word, here, n=1):
            close = difflib.get_close_matches(word, elsewhere, n=1, cutoff=0.8)
            if close:
                return f"did you mean {elsewhere[close[0]][-1]}?"
    return nearest(word, here)


def _models_at(section: Location, schema: type[BaseModel]) -> list[type[BaseModel]]:
    models = [schema]
    for part in section:
        if isinstance(part, int):
            continue
        fields = [field for model in models for key, field in _fields(model) if key == part]
        if fields:
            models = [inner for field in fields for inner in _models_in(field.annotation)]
        else:
            models = [model for model in models if part in _tags(model)]
    return models


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield field.alias or name, field


def _keys(models: Iterable[type[BaseModel]]) -> Iterator[str]:
    return (key for model in models for key, _ in _fields(model))


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a model may have, its sections among them."""
    for key, field in _fields(model):
        yield prefix + key
        for inner in _models_in(field.annotation):
            yield from all_keys(inner, f"{prefix}{key}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _tags(model: type[BaseModel]) -> set[Any]:
    """The values of a model's Literal fields, one of which tells it from others of a union."""
    literals = (f.annotation for f in model.model_fields.values() if get_origin(f.annotation) is Literal)
    return {value for literal in literals for value in get_args(literal)}
