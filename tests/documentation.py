"""The code blocks of the documentation, so that tests can run what a reader would.

Two kinds of block matter: one with a title is a file of that name; one marked ``console`` is a session, in
which a line after ``$ `` is a command and what follows it is what the command prints, with ``...`` for what
may differ. All others are there to be read only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_FENCE = re.compile(
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Attributes:
    title: the file that the block is; None for others.
    line: where it is on its page.
    """

    page: str
    line: int
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"docs/{self.page}:{self.line}"

    def write(self, folder: Path) -> Path:
        """Makes the block's file."""
        assert self.title is not None
        path = folder / self.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text, encoding="utf-8")
        return path

    def commands(self) -> Iterator[tuple[str, str]]:
        """The commands of a session, each with what it prints according to the page."""
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            yield command, printed


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        Block(page=page, line=text.count("\n", 0, found.start()) + 1, **found.groupdict())
        for found in _FENCE.finditer(text)
    ]


def same_output(expected: str, printed: str) -> bool:
    """Whether a command printed what the page says. Amounts of white space do not count."""
    parts = [re.escape(" ".join(part.split())) for part in expected.split("...")]
    pattern = ".*".join(rf"\s*{part}\s*" for part in parts)
    return re.fullmatch(pattern, " ".join(printed.split())) is not None
