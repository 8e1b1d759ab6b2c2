"""Dialogues of chat and instruction data: how they are written as text, and what of it is a response.

A message is ``<|role|>``, a line end, its content and a line end, where the roles are those of the data
(system, user, assistant). The content of an assistant is the response: EOS ends it in the place of the
line end, and it is what ``response_lm`` predicts. The marks are plain text, so that any tokenizer does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sinkbench.errors import DataError

RESPONDENT = "assistant"

_FIELDS = (("messages",), ("prompt", "response"))
_REMEDY = "correct or remove the record"


@dataclass(frozen=True)
class Segment:
    """A stretch of a document; one that is a response ends with EOS."""

    text: str
    response: bool


class Dialogue(str):
    """The text of a dialogue, which knows its segments."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, messages: Iterable[tuple[str, str]]) -> Dialogue:
        """Writes (role, content) pairs."""
        segments: list[Segment] = []
        pending = ""
        for role, content in messages:
            if role == RESPONDENT:
                segments += [Segment(f"{pending}<|{role}|>\n", False), Segment(content, True)]
                pending = ""
            else:
                pending += f"<|{role}|>\n{content}\n"
        if pending:
            segments.append(Segment(pending, False))
        dialogue = cls("".join(segment.text for segment in segments))
        dialogue.segments = tuple(segments)
        return dialogue


def segments(document: str) -> tuple[Segment, ...]:
    """Those of a dialogue; a document that is none is one response, all of which is to be predicted."""
    return document.segments if isinstance(document, Dialogue) else (Segment(document, True),)


def fields(known: Collection[str]) -> tuple[str, ...]:
    """Which of a record's fields hold a dialogue: messages, or prompt and response; none if neither."""
    return next((names for names in _FIELDS if all(name in known for name in names)), ())


def read(record: Mapping[str, Any], where: str) -> Dialogue:
    """The dialogue of a record that has its fields.

    Raises:
        DataError: they do not hold one, or nobody responds.
    """
    if fields(record) == ("messages",):
        messages = _messages(record["messages"], where)
    else:
        roles = {"prompt": "user", "response": RESPONDENT}
        messages = [(role, _text(record[name], name, where)) for name, role in roles.items()]
    if not any(role == RESPONDENT and content.strip() for role, content in messages):
        raise DataError(where, f"no message of role {RESPONDENT!r} says anything", _REMEDY)
    return Dialogue.of(messages)


def _messages(value: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(value, list):
        raise DataError(where, "'messages' is not a list", _REMEDY)
    messages = []
    for number, message in enumerate(value):
        name = f"messages[{number}]"
        if not isinstance(message, dict):
            raise DataError(where, f"{name} is not an object with role and content", _REMEDY)
        role, content = (_text(message.get(key), f"{name}.{key}", where) for key in ("role", "content"))
        messages.append((role, content))
    return messages


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(where, f"{name!r} is not a string", _REMEDY)
    return encodable(value)


def encodable(text: str) -> str:
    """The text with question marks for what UTF-8 cannot carry: lone surrogates, which JSON can spell."""
    return text.encode("utf-8", "replace").decode("utf-8")
