"""Rows (dicts from column to value) and values as text: in the terminal, and for the cells of a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wellread.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console


def plain(value: Any, where: str, strict: bool = True) -> Any:
    """`value` as lists, dicts with str keys, str, int, float, bool and None. What is none of these is refused when strict, else worded."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each, f"{where}[{key!r}]", strict) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each, f"{where}[{i}]", strict) for i, each in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufU":
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name), f"{where}.{each.name}", strict) for each in fields(value)}
    for base in (bool, int, float, str):  # subclasses, such as a str enumeration
        if isinstance(value, base):
            return base(value)
    if strict:
        raise BadInput(f"{where} is a {type(value).__name__}, which cannot be saved: give numbers, text, lists and dicts of these")
    return str(value)


def print_parts(title: str, *parts: str | tuple[str, list[dict[str, Any]]]) -> None:
    """Print a title, paragraphs, and tables given as (heading, rows)."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, emoji=False, markup=False)
    console.print(Text(_printable(title, console), style="bold"))
    for part in parts:
        if isinstance(part, tuple):
            heading, rows = part
            if rows:
                console.print(_rich_table(heading, rows, console))
        elif part:
            console.print(Text(_printable(part, console)))


def _rich_table(heading: str, rows: list[dict[str, Any]], console: Console) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = {name: column_text(name, rows) for name in columns_of(rows)}
    widths = [min(20, max(len(text) for text in (name, *cells))) + 3 for name, cells in columns.items()]
    fitting = max(2, sum(end <= console.width for end in accumulate(widths)))  # a column of two letters is of no use
    title = heading + (f" (+ {len(columns) - fitting} more column{'s' if len(columns) - fitting > 1 else ''})" if len(columns) > fitting else "")
    columns = dict(list(columns.items())[:fitting])
    table = Table(title=Text(_printable(title, console)) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        right = is_numeric(name, rows)
        table.add_column(Text(_printable(name, console)), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(Text(_printable(cell, console)) for cell in cells))
    return table


def _printable(text: str, console: Console) -> str:
    """Without control characters (a file name must not command the terminal), and with nothing the terminal cannot write."""
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    encoding = console.encoding or "utf-8"
    return clean.encode(encoding, "replace").decode(encoding)


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_numeric(name: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    return all(_is_number(row.get(name)) or row.get(name) is None for row in rows)


def column_text(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A column as text; when one of its numbers needs all four digits, all show them, so that they stand beneath each other."""
    texts = [cell_text(name, row.get(name)) for row in rows]
    if any(isinstance(row.get(name), float) and len(text.strip("-0.").replace(".", "")) >= 4 for row, text in zip(rows, texts, strict=True)):
        for i, row in enumerate(rows):
            value = row.get(name)
            if isinstance(value, float) and 1e-4 <= abs(value) < 1000:
                texts[i] = f"{value:#.4g}"
    return texts


def cell_text(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value):
        return str(value) if name in ("index", "seed", "year") else number(value)
    return value if isinstance(value, str) else json.dumps(plain(value, name, strict=False), ensure_ascii=False)


def number(value: Any) -> str:
    """A number for people: whole numbers in full with thousands separated, others with four significant digits."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-4 <= abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
