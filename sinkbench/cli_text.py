"""Plain text tables: the same in a terminal, a pipe and a log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows as aligned columns, two spaces apart; the last column is not padded."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        lines.append((indent + "  ".join([*cells, row[-1]])).rstrip())
    return "\n".join(lines)


def plain(value: Any) -> str:
    """A value as a recipe would write it on one line."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
