"""The few HTML pieces a report is made of. Every text given to them is escaped."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

BREAKS = re.compile(r"(?<=[_,=/])")
"""Where a long label may be broken over lines."""


@dataclass(frozen=True)
class RunName:
    """A run's label with its colour in the figures."""

    label: str
    colour: str

    def html(self) -> str:
        swatch = f'<span class="swatch" style="background:{escape(self.colour)}"></span>'
        label = "<wbr>".join(escape(part) for part in BREAKS.split(self.label))
        return f'<span class="run">{swatch}<span>{label}</span></span>'


@dataclass(frozen=True)
class Heading:
    """A column's title and the CSS class of its cells: "", "number" or "code"."""

    title: str | RunName
    style: str = ""


def section(title: str, text: str, body: str) -> str:
    """A headed part of the page; nothing where ``body`` and ``text`` are empty."""
    paragraph = f"<p>{escape(text)}</p>\n" if text else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{paragraph}{body}</section>\n"


def figures(title: str, text: str, cards: Sequence[str]) -> str:
    """A part of the page with figures; nothing without a figure."""
    shown = [card for card in cards if card]
    return section(title, text, f'<div class="figures">\n{"".join(shown)}</div>\n') if shown else ""


def card(title: str, caption: str, svg: str) -> str:
    """A figure with its caption. As an image the SVG keeps its ids and styles to itself."""
    data = base64.b64encode(svg.encode()).decode()
    return (
        f"<figure>\n<figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption>\n"
        f'<img alt="{escape(f"{title}. {caption}")}" src="data:image/svg+xml;base64,{data}">\n</figure>\n'
    )


def table(headings: Sequence[Heading], rows: Sequence[Sequence[str | RunName]]) -> str:
    """A table that scrolls sideways where the screen is narrow; the first cell heads its row."""
    head = "".join(f"<th{_class(h)}>{_html(h.title)}</th>" for h in headings)
    body = "".join(f"<tr>{_row(headings, row)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def _row(headings: Sequence[Heading], row: Sequence[str | RunName]) -> str:
    cells = []
    for number, (heading, cell) in enumerate(zip(headings, row, strict=True)):
        tag, scope = ("td", "") if number else ("th", ' scope="row"')
        cells.append(f"<{tag}{scope}{_class(heading)}>{_html(cell)}</{tag}>")
    return "".join(cells)


def _class(heading: Heading) -> str:
    return f' class="{escape(heading.style)}"' if heading.style else ""


def _html(cell: str | RunName) -> str:
    return cell.html() if isinstance(cell, RunName) else escape(cell)
