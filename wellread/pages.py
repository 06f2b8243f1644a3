"""Self-contained HTML pages: `page(title, [(heading, html), ...])`, with tables and pictures. Text is escaped where it enters."""

from __future__ import annotations

import base64
import html as markup
from collections.abc import Mapping, Sequence
from typing import Any

from wellread import __version__
from wellread.tables import cell_text, column_text, columns_of, is_numeric, number, plain

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; color: #1d2329; background: #fff;
  max-width: 960px; margin: 0 auto; padding: 24px 16px 48px; overflow-wrap: anywhere; }
h1 { font-size: 28px; line-height: 1.2; margin: 8px 0 12px; }
h2 { font-size: 20px; margin: 36px 0 8px; padding-bottom: 4px; border-bottom: 1px solid #dde2e6; }
p { max-width: 72ch; } p.lead { font-size: 17px; color: #3d4750; }
a { color: #0b5cad; } nav { font-size: 14px; margin: 12px 0; } nav a { margin-right: 14px; }
table { border-collapse: collapse; font-size: 14px; margin: 10px 0; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid #e8ebee; vertical-align: top; }
th { color: #56616b; font-weight: 600; overflow-wrap: normal; }
td:first-child { overflow-wrap: break-word; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 14px 0; } figure > img { display: block; } img { max-width: 100%; }
figcaption, .note, .key { font-size: 14px; color: #56616b; } .key img { vertical-align: middle; margin: 0 6px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 16px; } .sheet figure { margin: 0; }
.sheet img { width: 100%; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 14px 0; }
.tile { border: 1px solid #dde2e6; border-radius: 8px; padding: 10px 16px; min-width: 110px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; } .tile span { font-size: 13px; color: #56616b; }
.warning { border-left: 4px solid #d9480f; background: #fff4ec; padding: 8px 12px; }
.flag { color: #b02a08; font-weight: 600; white-space: nowrap; } footer { margin-top: 48px; color: #66717b; font-size: 13px; }
@media print { h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


def page(title: str, sections: Sequence[tuple[str, str]], lead: str = "", footer: str = "") -> str:
    """A complete HTML page that loads nothing: `sections` are (heading, html); title, headings, lead and footer are text and are escaped.

    The page forbids itself scripts and outside sources, so that whatever stands in file names and labels stays text.
    """
    links = "".join(f'<a href="#s{i}">{escape(heading)}</a>' for i, (heading, _) in enumerate(sections))
    body = "".join(f'<section id="s{i}"><h2>{escape(heading)}</h2>{content}</section>\n' for i, (heading, content) in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        + (f'<p class="lead">{escape(lead)}</p>\n' if lead else "")
        + (f"<nav>{links}</nav>\n" if len(sections) > 4 else "")
        + f"<main>{body}</main>\n<footer>{escape(footer or f'Written by wellread {__version__}')}</footer></body></html>\n"
    )


def escape(text: object) -> str:
    """`text` for use inside HTML, also inside a quoted attribute."""
    return markup.escape(str(text), quote=True)


def paragraphs(text: str) -> str:
    """Plain text as HTML: a blank line begins a paragraph."""
    return "".join(f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def table_html(rows: Sequence[Mapping[str, Any]], caption: str = "", limit: int | None = None) -> str:
    """A table of `rows`, with the columns in the order in which they first appear; at most `limit` rows, and then a note."""
    if not rows:
        return '<p class="note">nothing to list</p>'
    names = columns_of(rows)
    shown = rows[:limit]
    numeric = {name for name in names if is_numeric(name, shown)}
    head = "".join(f'<th{_right(name in numeric)} scope="col">{escape(name)}</th>' for name in names)
    columns = ([f"<td{_right(name in numeric)}>{escape(cell)}</td>" for cell in column_text(name, shown)] for name in names)
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in zip(*columns, strict=True))
    words = [caption] if caption else []
    if limit is not None and len(rows) > limit:
        words.append(f"The first {number(limit)} of {number(len(rows))} rows.")
    note = f'<p class="note">{escape(" ".join(words))}</p>' if words else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def figure_html(png: bytes, caption: str) -> str:
    """A picture inside the page with its caption (text)."""
    return f'<figure><img src="{data_url(png)}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _right(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def tiles(figures: Mapping[str, Any]) -> str:
    cells = ((escape(cell_text(name, value)), escape(name)) for name, value in figures.items())
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in cells) + "</div>"


def made_by_section(made_by: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not made_by:
        return []
    made = plain(made_by, "made_by", strict=False)
    rows = [{"what": name, "value": words(value)} for name, value in made.items() if value not in (None, [], {}, "")]
    return [("How it was made", table_html(rows))]


def words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(words(each) for each in value)
    return cell_text("index", value)
