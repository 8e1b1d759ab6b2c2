"""The token sequences that a model is probed with: natural text, random tokens, repeated tokens."""

from __future__ import annotations

import json
import random
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from sinkbench.data.python_text import reference_documents
from sinkbench.errors import DataError

Inputs: TypeAlias = Literal["natural", "random", "repeat"]
INPUTS: tuple[Inputs, ...] = ("natural", "random", "repeat")

Tokens: TypeAlias = npt.NDArray[np.int64]
Encode: TypeAlias = Callable[[str], Sequence[int]]
"""Text to token ids, without any special token."""

MAX_LINE_BYTES = 16 * 2**20
"""A longer line of a prompt file is a mistake, and would have to be held in memory."""

CHARS_PER_TOKEN = 64
"""Text is cut before it is encoded, to what is sure to hold enough tokens unless they are very long."""

PARAGRAPH_CHARS = 150
"""Shorter ones are headings and fragments."""


def from_prompts(path: Path, encode: Encode, *, length: int, count: int | None) -> Tokens:
    """The first ``length`` tokens of the first ``count`` prompts that have so many, [count, length].

    Args:
        path: one prompt a line, or JSON lines with a field ``text``.
        count: None takes all, at most 100.

    Raises:
        DataError: the file cannot be read or has a bad line, or too few prompts are long enough.
    """
    wanted = 100 if count is None else count
    rows: list[Sequence[int]] = []
    prompts = 0
    for text in read_prompts(path):
        prompts += 1
        tokens = _head(text, encode, length)
        if len(tokens) == length:
            rows.append(tokens)
        if len(rows) == wanted:
            break
    needed = 1 if count is None else count
    if len(rows) < needed:
        problem = f"{len(rows)} of its {prompts} prompts have {length} tokens, at least {needed} must"
        raise DataError(str(path), problem, "lower --length or --count, or give more and longer prompts")
    return np.array(rows, dtype=np.int64)


def read_prompts(path: Path) -> Iterator[str]:
    """The texts of a prompt file, one a line; blank lines are skipped. A file that ends in .jsonl has
    JSON objects with a field ``text``.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or a line is too long or no such object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                where = f"{path}:{number}"
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(where, "is longer than 16 MiB", "write one prompt a line")
                try:
                    text = line.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    problem = f"is not UTF-8 (byte {error.start})"
                    raise DataError(where, problem, "convert the file to UTF-8") from error
                if text:
                    yield _text_field(text, where) if path.suffix == ".jsonl" else text
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise DataError(str(path), problem, "give a file with one prompt a line") from error


def _text_field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(where, f"is not JSON ({error})", 'write {"text": ...}') from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(where, "has no text", 'write {"text": ...}')
    return text


def _head(text: str, encode: Encode, length: int) -> Sequence[int]:
    """The first tokens of a text, fewer if it has fewer."""
    tokens = encode(text[: length * CHARS_PER_TOKEN])
    if len(tokens) < length and len(text) > length * CHARS_PER_TOKEN:
        tokens = encode(text)
    return tokens[:length]


def from_python_documentation(encode: Encode, *, length: int, count: int, seed: int) -> Tokens:
    """Sequences of English prose out of the running Python's reference documentation (Python licence),
    each from the beginning of a paragraph, running on into the next ones, [count, length].

    Raises:
        DataError: there is not so much of it.
    """
    paragraphs = list(prose(text for where, text in reference_documents() if where.startswith("topic ")))
    random.Random(seed).shuffle(paragraphs)
    remaining = iter(paragraphs)
    rows: list[Sequence[int]] = []
    while len(rows) < count:
        text: list[str] = []
        tokens: Sequence[int] = []
        expected = 0
        while len(tokens) < length:
            paragraph = next(remaining, None)
            if paragraph is None:
                problem = f"Python's documentation holds {len(rows)} texts of {length} tokens, not {count}"
                raise DataError("natural inputs", problem, "lower --count or --length, or give --prompts")
            text.append(paragraph)
            expected += len(encode(paragraph))
            if expected >= length:  # encoded together they may be a little less
                tokens = encode("\n\n".join(text))
        rows.append(tokens[:length])
    return np.array(rows, dtype=np.int64)


def prose(texts: Iterable[str]) -> Iterator[str]:
    """The paragraphs of running text, each in one line: no lists, tables, code, grammar or headings."""
    for text in texts:
        for block in re.split(r"\n\s*\n", text):
            lines = textwrap.dedent(block).strip().splitlines()
            paragraph = " ".join(lines)
            if len(paragraph) < PARAGRAPH_CHARS or not paragraph.endswith("."):
                continue
            if not any(line.startswith((" ", "*", "+", "|", "-", ">>>", "...")) for line in lines):
                yield re.sub(" +", " ", paragraph)


def usable_tokens(count: int, special: Collection[int]) -> Tokens:
    """The token ids that are drawn from: those below ``count`` but the special ones."""
    return np.setdiff1d(np.arange(count), np.array([*special], dtype=np.int64))


def random_tokens(usable: Tokens, *, length: int, count: int, seed: int) -> Tokens:
    """Tokens drawn evenly and independently, as the paper's random inputs, [count, length].

    Args:
        usable: token ids to draw from.
    """
    return np.random.default_rng([seed, 1]).choice(usable, (count, length))


def repeated_tokens(usable: Tokens, *, length: int, count: int, seed: int) -> Tokens:
    """One token over and over, another one in each sequence, as the paper's repeated inputs,
    [count, length]."""
    tokens = np.random.default_rng([seed, 2]).choice(usable, count, replace=len(usable) < count)
    return np.repeat(tokens[:, None], length, axis=1)
