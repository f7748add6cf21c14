"""A document as a list of blocks, written once and rendered twice: one self-contained HTML file, and Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """A paragraph, or a list where there are several; **bold** and `code` are understood."""

    lines: tuple[str, ...]

    @classmethod
    def of(cls, *lines: str) -> Text:
        return cls(lines)


@dataclass(frozen=True)
class Table:
    """Cells of plain text, the first column names; a cell's second line (after a newline) is shown small under the first.

    `marked` holds the (row, column) of the cells to make bold, `words` the columns that are text and not numbers.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[tuple[int, int]] = frozenset()
    note: str = ""
    words: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """An image or a clip. `name` is its file beside the Markdown; `svg`, where given, is what the HTML shows instead."""

    name: str
    data: bytes
    caption: str
    svg: bytes | None = None


@dataclass
class Section:
    """A heading and what is under it. `folded` sections are closed at first where the format can do that."""

    title: str
    blocks: list[Text | Table | Picture] = field(default_factory=list)
    folded: bool = False


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 74rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 2px solid #1a1a1a; }
p, li { max-width: 56rem; }
li { margin: .25rem 0; }
code { font: .9em ui-monospace, monospace; background: #f2f2f2; padding: 0 .25em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0 .2rem; font-size: .92rem; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid #ccc; white-space: nowrap; }
th.words, td.words { white-space: normal; text-align: left; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; white-space: pre-line; font-weight: 600; }
td small { display: block; color: #555; font-size: .8rem; }
td.marked { font-weight: 700; background: #e3eefb; }
td.marked small { font-weight: 400; }
.note, figcaption { color: #444; font-size: .88rem; max-width: 56rem; }
figure { margin: 1.2rem 0; }
figure img, figure video { max-width: 100%; height: auto; display: block; }
figure .wide img { max-width: none; width: max(100%, 60rem); }
summary { cursor: pointer; font-weight: 600; margin: 1.2rem 0 .4rem; }
nav a { margin-right: 1rem; white-space: nowrap; }
@media (max-width: 40rem) { body { padding: .8rem; font-size: 15px; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } .wide { overflow: visible; } figure .wide img { width: 100%; } table { font-size: 8pt; }
  td small { font-size: 7pt; } figure:has(video) { display: none; } details::details-content { content-visibility: visible; }
  th, td { padding: .2rem .35rem; } td.marked { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""


def _inline(text: str) -> str:
    """HTML of a line: escaped, with **bold** and `code`."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text, quote=False))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _html_block(block: Text | Table | Picture) -> str:
    if isinstance(block, Text):
        if len(block.lines) == 1:
            return f"<p>{_inline(block.lines[0])}</p>"
        return "<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in block.lines) + "</ul>"
    if isinstance(block, Table):
        rows = [
            "<tr>"
            + "".join(
                f'<th scope=col class="{"words" if j in block.words else ""}">{escape(cell)}</th>'
                for j, cell in enumerate(block.head)
            )
            + "</tr>"
        ]
        body = []
        for i, row in enumerate(block.rows):
            cells = []
            for j, cell in enumerate(row):
                first, _, second = cell.partition("\n")
                kind = "marked" if (i, j) in block.marked else "words" if j in block.words else ""
                small = f"<small>{escape(second)}</small>" if second else ""
                cells.append(f'<td class="{kind}">{escape(first)}{small}</td>')
            body.append(f"<tr>{''.join(cells)}</tr>")
        note = f"<p class=note>{_inline(block.note)}</p>" if block.note else ""
        return f"<div class=wide><table><thead>{rows[0]}</thead><tbody>{''.join(body)}</tbody></table></div>{note}"
    caption = f"<figcaption>{_inline(block.caption)}</figcaption>"
    alt = escape(block.caption)
    if block.name.endswith(".mp4"):
        source = _uri("video/mp4", block.data)
        return f'<figure><video src="{source}" controls loop muted playsinline aria-label="{alt}"></video>{caption}</figure>'
    source = _uri("image/svg+xml", block.svg) if block.svg else _uri("image/png", block.data)
    return f'<figure><div class=wide><img src="{source}" alt="{alt}"></div>{caption}</figure>'


def html(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole document as one HTML file that asks for nothing from elsewhere."""
    parts = [
        f'<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title><meta name=viewport content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1><p>{_inline(lead)}</p><nav>",
        *(f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(sections)),
        "</nav>",
    ]
    for i, section in enumerate(sections):
        inner = "".join(_html_block(block) for block in section.blocks)
        if section.folded:
            inner = f"<details><summary>Show</summary>{inner}</details>"
        parts.append(f'<section id="s{i}"><h2>{escape(section.title)}</h2>{inner}</section>')
    return "\n".join([*parts, "</body></html>\n"])


def markdown(title: str, lead: str, sections: Sequence[Section], folder: Path) -> str:
    """The same in Markdown; pictures and clips are written to `folder` and named from there."""
    lines = [f"# {title}", "", lead, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, Text):
                lines += block.lines if len(block.lines) == 1 else [f"- {line}" for line in block.lines]
            elif isinstance(block, Table):
                for i, row in enumerate([block.head, ["---"] * len(block.head), *block.rows]):
                    cells = [_markdown_cell(cell, (i - 2, j) in block.marked) for j, cell in enumerate(row)]
                    lines.append(f"| {' | '.join(cells)} |")
                lines += ["", block.note] if block.note else []
            else:
                (folder / block.name).write_bytes(block.data)
                if block.name.endswith(".mp4"):
                    lines.append(f"[{block.name}]({block.name}): {block.caption}")
                else:
                    alt = re.sub(r"[\[\]*`]", "", block.caption)
                    lines += [f"![{alt}]({block.name})", "", block.caption]
            lines.append("")
    return "\n".join(lines)


def _markdown_cell(cell: str, marked: bool) -> str:
    first, _, second = cell.replace("|", "\\|").partition("\n")
    return f"{f'**{first}**' if marked else first}{f' ({second})' if second else ''}"
