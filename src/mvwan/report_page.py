"""Sections of HTML -> one page that opens without network; tables and figures for its sections. Knows nothing of what they show."""

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple


class Section(NamedTuple):
    """A part of the page, which its navigation names."""

    name: str
    """Its anchor: letters only."""
    title: str
    body: str
    """HTML."""


def page(title: str, heading: str, lead: str, sections: Sequence[Section], version: str) -> str:
    """The whole page. `title` and `heading` are plain text, `lead` and the sections' bodies HTML."""
    from plotly.offline import get_plotlyjs

    assets = resources.files("mvwan") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    links = "".join(f'<a href="#{section.name}">{html.escape(section.title)}</a>' for section in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{style}</style></head><body>'
        '<button class="theme" type="button">light / dark</button>'
        f'<header class="top"><h1>{html.escape(heading)}</h1><p class="lead">{lead}</p><nav>{links}</nav></header>'
        f"<main>{''.join(map(_section, sections))}</main><footer>mvwan {html.escape(version)}. This page needs no network.</footer>"
        f"<script>{get_plotlyjs()}</script><script>{script}</script></body></html>"
    )


def _section(section: Section) -> str:
    title = html.escape(section.title)
    return f'<section id="{section.name}" data-title="{title}"><h2>{title}</h2>{section.body}</section>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = (), escape_head: bool = True) -> str:
    """An HTML table of plain texts; `marks` are the rows' classes. Without any text in `head` it has no head."""
    heads = "".join(f"<th>{html.escape(cell) if escape_head else cell}</th>" for cell in head)
    body = "".join(
        f'<tr class="{mark}">{"".join(f"<td>{html.escape(cell)}</td>" for cell in row)}</tr>'
        for row, mark in zip(rows, marks or [""] * len(rows), strict=True)
    )
    top = f"<thead><tr>{heads}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def plot(figure: Mapping[str, Any], height_px: int | None = None) -> str:
    """A figure that the page draws by itself; numbers in it are finite or None."""
    text = json.dumps(figure, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    height = f' style="height:{height_px}px"' if height_px else ""
    return f'<figure data-figure><script type="application/json">{text}</script><div class="plot"{height}></div></figure>'
