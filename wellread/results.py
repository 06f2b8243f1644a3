"""What a method finds when it does not return a network: Scores, Ranking, Front, Heatmaps, Report.

Each has `save(folder)`, `show()` (short, in the terminal), `html()` (one page that needs nothing else) and `to_dict()`;
`load_result(folder)` brings it back bit for bit. A saved result is `result.json`, `arrays.safetensors` and
`report.html`; nothing is pickled. The page, tables and charts at the end of the file are for reports of one's own:
`page(title, [(heading, html), ...])`.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html as markup
import io
import json
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wellread import __version__
from wellread.errors import BadInput
from wellread.folders import new_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

Array = np.ndarray[Any, np.dtype[Any]]
Result = Any  # one of the five below
FORMAT = 1
PICTURES = 64  # at most so many heatmaps are drawn
COLORS = ("#0b5cad", "#d9480f", "#2b8a3e", "#862e9c", "#b58900", "#495057")


# ---- the five kinds ------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Scores:
    """One number for every example.

    values: float [N], in the order of the data; infinities are allowed, NaN is not.
    what: the name of the score ("el2n"); meaning: one sentence that says what a high value means.
    items: a name for each example; columns: more about each example, lists of length N (missing values: None or NaN).
    """

    values: Array
    what: str = "score"
    meaning: str = ""
    items: list[str] | None = field(default=None, repr=False)
    columns: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    made_by: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.values = _numbers(self.values, "values", infinite=True)
        self.items = _names(self.items, len(self.values))
        self.columns = {str(name): _plain(_listed(column), f"columns[{name!r}]") for name, column in self.columns.items()}
        for name, column in self.columns.items():
            _same_length(column, len(self.values), f"columns[{name!r}]")

    def __len__(self) -> int:
        return len(self.values)

    def highest(self, n: int) -> Array:
        """Indices int64 of the `n` highest, highest first, ties by index; all of them when there are fewer."""
        return np.argsort(-self.values, kind="stable")[: _count(n)].astype(np.int64)

    def lowest(self, n: int) -> Array:
        """Indices int64 of the `n` lowest, lowest first, ties by index."""
        return np.argsort(self.values, kind="stable")[: _count(n)].astype(np.int64)

    def keep(
        self,
        fraction: float,
        rule: Literal["hardest", "easiest", "random", "offset"] = "hardest",
        *,
        offset: float | None = None,
        seed: int = 0,
        labels: Sequence[int] | Array | None = None,
    ) -> Array:
        """Which examples to keep: sorted indices int64 (Paul et al. 2021, arXiv 2107.07075).

        fraction: of all examples, in (0, 1]; at least one is kept.
        rule: "hardest" keeps the highest scores, "easiest" the lowest, "random" ignores them; "offset" drops the easiest part, `offset`
        of all examples, and keeps the next ones, hence drops the very hardest, where the wrong labels are.
        labels: int [N]; when given, the rule is applied inside each class, so none is emptied.
        Examples are sorted by score and then by index, so ties never depend on the machine.
        """
        _is_fraction(fraction, "fraction", low_included=False)
        if rule not in ("hardest", "easiest", "random", "offset"):
            raise BadInput(f"rule {rule!r} is not known: choose hardest, easiest, random or offset")
        if (offset is not None) != (rule == "offset"):
            raise BadInput("offset and rule='offset' belong together: offset=0.1 drops the easiest tenth before the rest are kept")
        if offset is not None:
            _is_fraction(offset, "offset", low_included=True)
            if offset + fraction > 1 + 1e-9:
                raise BadInput(f"offset {offset:g} and fraction {fraction:g} ask for more than all the examples: lower one of them")
        random = np.random.default_rng(seed)

        def chosen(of: Array) -> Array:
            size = len(of)
            kept = max(1, math.floor(fraction * size + 0.5))
            if rule == "random":
                return random.permutation(of)[:kept]
            ordered = of[np.argsort(self.values[of], kind="stable")]
            if rule == "hardest":
                return ordered[size - kept :]
            start = min(math.floor((offset or 0.0) * size + 0.5), size - kept)
            return ordered[start : start + kept]

        everything = np.arange(len(self.values), dtype=np.int64)
        if labels is None:
            return np.sort(chosen(everything))
        classes = np.asarray(labels)
        _same_length(classes, len(self.values), "labels")
        return np.sort(np.concatenate([chosen(everything[classes == one]) for one in np.unique(classes)]))

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write the result as a folder, with the values as scores.csv. Refused when the folder exists, unless `force`."""
        return _save(self, folder, force)

    def show(self) -> None:
        """Print the spread and the five highest and lowest."""
        _show(
            f"{self.what}, {number(len(self))} examples",
            self.meaning,
            ("", [self._spread()]),
            ("highest", self._rows(self.highest(5))),
            ("lowest", self._rows(self.lowest(5))),
        )

    def html(self) -> str:
        """One page: histogram, spread, the twenty highest and lowest."""
        picture = histogram_chart(self.values, x=self.what, y="examples")
        drawn = figure_html(picture, f"How the {number(len(self))} examples spread over {self.what}.")
        return page(
            self.what,
            [
                ("Spread", drawn + table_html([self._spread()])),
                ("Highest", table_html(self._rows(self.highest(20)))),
                ("Lowest", table_html(self._rows(self.lowest(20)))),
                *_made_by(self),
            ],
            lead=self.meaning + (" All values are in scores.csv, beside this page." if len(self) > 40 else ""),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, values as a list; what is not a number becomes None."""
        return _to_dict(self)

    def _spread(self) -> dict[str, Any]:
        finite = self.values[np.isfinite(self.values)]
        if not len(finite):
            return {"infinite": len(self)}
        quantiles = dict(zip(("min", "5 %", "median", "95 %", "max"), np.quantile(finite, (0, 0.05, 0.5, 0.95, 1)).tolist(), strict=True))
        spread = {**quantiles, "mean": float(finite.mean()), "sd": float(finite.std())}
        return spread | ({"infinite": len(self) - len(finite)} if len(finite) < len(self) else {})

    def _rows(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {"index": int(i)}
            | {self.what: self.values[i].item()}
            | ({"item": self.items[i]} if self.items else {})
            | {name: column[i] for name, column in self.columns.items()}
            for i in indices
        ]


@dataclass(eq=False)
class Ranking:
    """Things compared by one number, in the order given; `order()` sorts them.

    items: names; scores: float [N], no NaN; what: the name of the number; higher_is_better: which end wins.
    """

    items: list[str] = field(repr=False)
    scores: Array
    what: str = "score"
    higher_is_better: bool = True
    made_by: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.scores = _numbers(self.scores, "scores", infinite=True)
        self.items = _names(self.items, len(self.scores)) or []

    def __len__(self) -> int:
        return len(self.items)

    def order(self) -> Array:
        """Indices int64, best first, ties by index."""
        return np.argsort(-self.scores if self.higher_is_better else self.scores, kind="stable").astype(np.int64)

    @property
    def best(self) -> str:
        """The name of the winner."""
        return self.items[int(self.order()[0])]

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write the result as a folder, with the ranking as scores.csv. Refused when the folder exists, unless `force`."""
        return _save(self, folder, force)

    def show(self) -> None:
        """Print the ten best."""
        more = f"and {number(len(self) - 10)} more" if len(self) > 10 else ""
        _show(f"{number(len(self))} ranked by {self.what} ({self._better()} is better)", ("", self._rows()[:10]), more)

    def html(self) -> str:
        """One page: bars of the best twenty and the table."""
        best = self.order()[:20]
        bars: list[tuple[str, float]] = [(self.items[i], float(self.scores[i])) for i in best if np.isfinite(self.scores[i])]
        picture = [("Best", figure_html(bar_chart(bars, x=self.what), f"{self.what}: {self._better()} is better."))] if bars else []
        return page(f"Ranking by {self.what}", [*picture, ("All", table_html(self._rows(), limit=500)), *_made_by(self)])

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; what is not a finite number becomes None."""
        return _to_dict(self)

    def _better(self) -> str:
        return "higher" if self.higher_is_better else "lower"

    def _rows(self) -> list[dict[str, Any]]:
        return [{"rank": rank, self.what: self.scores[i].item(), "item": self.items[i]} for rank, i in enumerate(self.order(), 1)]


@dataclass(eq=False)
class Front:
    """Choices that trade one thing for another, such as accuracy against milliseconds.

    points: one dict for each choice, of plain JSON values; keep what rebuilds the choice (an edit, a setting) in it.
    cost: the key of what should be low; quality: the key of what should be high. Both must be finite numbers in every point.
    """

    points: list[dict[str, Any]] = field(repr=False)
    cost: str
    quality: str
    made_by: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.points, Sequence) or not self.points:
            raise BadInput("a front needs at least one point: a dict with its cost and quality")
        self.points = _plain(list(self.points), "points")
        for i, point in enumerate(self.points):
            for key in (self.cost, self.quality):
                value = point.get(key) if isinstance(point, dict) else None
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise BadInput(f"points[{i}][{key!r}] is {value!r}: every point needs a finite {self.cost!r} and {self.quality!r}")

    def __len__(self) -> int:
        return len(self.points)

    def efficient(self) -> list[int]:
        """Indices, cheapest first, of the points that no other beats in one thing without losing in the other."""
        reached = -math.inf
        found = []
        for i in sorted(range(len(self.points)), key=lambda i: (self.points[i][self.cost], -self.points[i][self.quality])):
            if self.points[i][self.quality] > reached:
                found.append(i)
                reached = self.points[i][self.quality]
        return found

    def best(self, cost_at_most: float | None = None) -> dict[str, Any]:
        """The point of highest quality that costs no more; the cheaper of two equals. Raises `BadInput` when all cost more."""
        affordable = [self.points[i] for i in self.efficient() if cost_at_most is None or self.points[i][self.cost] <= cost_at_most]
        if not affordable:
            cheapest = min(point[self.cost] for point in self.points)
            raise BadInput(f"no point has {self.cost} of at most {cost_at_most}: the cheapest has {number(cheapest)}")
        return affordable[-1]

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write the result as a folder, with the points as scores.csv. Refused when the folder exists, unless `force`."""
        return _save(self, folder, force)

    def show(self) -> None:
        """Print the efficient points, cheapest first, at most twelve."""
        rows = self._rows(efficient_only=True)
        shown = [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(12, len(rows)))})]
        more = f"{len(shown)} of {len(rows)} efficient choices shown" if len(shown) < len(rows) else ""
        _show(f"{self.quality} against {self.cost}: {len(rows)} of {len(self)} choices are efficient", ("", shown), more)

    def html(self) -> str:
        """One page: the front drawn, and the points as a table."""
        caption = f"Each dot is one choice. On the line, more {self.quality} is only to be had for more {self.cost}."
        drawn = figure_html(front_chart(self), caption)
        table = table_html(self._rows(efficient_only=False), limit=500)
        return page(f"{self.quality} against {self.cost}", [("The front", drawn), ("Choices", table), *_made_by(self)])

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, and the indices of the efficient points."""
        return _to_dict(self) | {"efficient": self.efficient()}

    def _rows(self, *, efficient_only: bool) -> list[dict[str, Any]]:
        good = self.efficient()
        order = good if efficient_only else sorted(range(len(self.points)), key=lambda i: float(self.points[i][self.cost]))
        names = [self.cost, self.quality]
        efficient = set(good)
        return [
            {name: self.points[i][name] for name in names}
            | ({} if efficient_only else {"efficient": i in efficient})
            | {name: value for name, value in self.points[i].items() if name not in names}
            for i in order
        ]


@dataclass(eq=False)
class Heatmaps:
    """Where in each picture the evidence lies.

    maps: float32 [N, H, W], finite, usually 0 to 1; images: uint8 [N, H, W, 3] (grey [N, H, W] is accepted), what the network was shown.
    targets: [N], what each map speaks for ("defective"); peak: float [N], the highest value before the map was normalised:
    zero or less says that nothing in the picture spoke for the target. items: a name for each picture.
    figures: named numbers or words about all of them; columns: more about each picture, lists of length N, of which single values are shown;
    warnings: one sentence each, shown first.
    """

    maps: Array = field(repr=False)
    images: Array = field(repr=False)
    targets: list[str]
    peak: Array
    items: list[str] | None = field(default=None, repr=False)
    made_by: dict[str, Any] | None = field(default=None, repr=False)
    figures: dict[str, float | str | int] = field(default_factory=dict, repr=False)
    columns: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.maps = _numbers(self.maps, "maps", dimensions=3).astype(np.float32, copy=False)
        self.images = _array(self.images)
        if self.images.ndim == 3:
            self.images = np.repeat(self.images[..., None], 3, axis=-1)
        if self.images.dtype != np.uint8 or self.images.shape != (*self.maps.shape, 3):
            raise BadInput(
                f"images are {self.images.dtype} {list(self.images.shape)} and maps {list(self.maps.shape)}: "
                "images must be uint8 [N, H, W, 3] for maps [N, H, W]"
            )
        self.images = np.ascontiguousarray(self.images)
        self.peak = _numbers(self.peak, "peak")
        _same_length(self.peak, len(self.maps), "peak")
        _same_length(self.targets, len(self.maps), "targets")
        self.targets = [str(target) for target in self.targets]
        self.items = _names(self.items, len(self.maps))
        self.figures = _plain(dict(self.figures), "figures")
        self.columns = {str(name): _plain(_listed(column), f"columns[{name!r}]") for name, column in self.columns.items()}
        for name, column in self.columns.items():
            _same_length(column, len(self.maps), f"columns[{name!r}]")
        self.warnings = [str(warning) for warning in self.warnings]

    def __len__(self) -> int:
        return len(self.maps)

    def overlay(self, i: int, strength: float = 0.75, colors: str = "inferno") -> Array:
        """Picture `i` with its map over it, uint8 [H, W, 3]: the more evidence, the less of the picture shines through.

        strength: opacity where the map is 1. colors: a matplotlib colormap.
        Where the map is 0 or less the picture is unchanged.
        """
        if not -len(self) <= i < len(self):
            raise BadInput(f"there is no heatmap {i}: there are {len(self)}")
        _is_fraction(strength, "strength", low_included=True)
        heat = np.clip(self.maps[i], 0, None)
        heat = heat / max(1.0, float(heat.max()))
        opacity = (strength * np.sqrt(heat))[..., None]
        mixed: Array = np.rint((1 - opacity) * self.images[i] + opacity * 255 * _colormap(colors, heat)).astype(np.uint8)
        return mixed

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write the result as a folder, with up to 64 overlays as pictures/*.png. Refused when the folder exists, unless `force`."""
        return _save(self, folder, force)

    def show(self) -> None:
        """Print what each of the first ten maps speaks for, and how strongly."""
        more = "" if len(self) <= 10 else f"and {number(len(self) - 10)} more"
        without = int((self.peak <= 0).sum())
        flag = f"{without} of {len(self)} without positive evidence" if without else ""
        rows = [self._row(i) | ({"note": self._note(i)} if without else {}) for i in range(min(10, len(self)))]
        warned = [f"warning: {warning}" for warning in self.warnings]
        found = [{"figure": name, "value": value} for name, value in self.figures.items()]
        _show(f"{number(len(self))} heatmaps", *warned, ("", found), ("", rows), more, flag, "save it and open report.html to see them")

    def html(self) -> str:
        """One page: picture and overlay side by side for the first 64."""
        cells = []
        for i in range(min(PICTURES, len(self))):
            left, right = _small(self.images[i]), _small(self.overlay(i))
            pair = image_png(np.concatenate([left, np.full((len(left), 6, 3), 255, np.uint8), right], axis=1))
            item, note = escape(self._row(i)["item"]), self._note(i)
            words = f"<b>{item}</b><br>for {escape(self.targets[i])}, peak {number(self.peak[i])}"
            flag = f' <span class="flag">{escape(note)}</span>' if note else ""
            cells.append(f'<figure><img src="{_data(pair)}" alt="{item}"><figcaption>{words}{flag}</figcaption></figure>')
        scale = np.repeat(np.linspace(0, 1, 256)[None], 12, axis=0)
        bar = image_png(np.rint(255 * _colormap("inferno", scale)).astype(np.uint8))
        key = f'<p class="key">little evidence <img src="{_data(bar)}" alt="color scale" width="160" height="12"> much evidence</p>'
        shown = f" The first {PICTURES} of {number(len(self))} are shown." if len(self) > PICTURES else ""
        findings = Report("", figures=self.figures, warnings=self.warnings).sections()
        return page(
            "Heatmaps",
            [*findings, ("Pictures", key + f'<div class="sheet">{"".join(cells)}</div>'), *_made_by(self)],
            lead="Left the picture, right the same picture with the evidence over it: the brighter the color, the more that place spoke "
            "for what is named below. The peak is the strongest evidence, in the network's own units." + shown,
        )

    def to_dict(self) -> dict[str, Any]:
        """Names, targets and peaks as JSON values; of maps and images only the shapes."""
        return _to_dict(self)

    def _row(self, i: int) -> dict[str, Any]:
        return {"item": self.items[i] if self.items else f"picture {i}", "target": self.targets[i], "peak": self.peak[i].item()} | {
            name: column[i] for name, column in self.columns.items() if not isinstance(column[i], (list, dict))
        }

    def _note(self, i: int) -> str:
        return "no positive evidence" if self.peak[i] <= 0 else ""


@dataclass(eq=False)
class Report:
    """Findings to read.

    figures: named numbers or words; tables: named lists of rows; text: plain paragraphs; pictures: PNG bytes by caption;
    warnings: one sentence each, shown first. Figures and tables may hold None and NaN ("could not be measured").
    """

    title: str
    figures: dict[str, float | str | int] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    text: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict, repr=False)
    warnings: list[str] = field(default_factory=list)
    made_by: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.figures = _plain(dict(self.figures), "figures")
        self.tables = {str(name): _plain(list(rows), f"tables[{name!r}]") for name, rows in self.tables.items()}
        self.warnings = [str(warning) for warning in self.warnings]
        for name, rows in self.tables.items():
            for i, row in enumerate(rows):
                if not isinstance(row, dict):
                    raise BadInput(f"tables[{name!r}][{i}] is a {type(row).__name__}: every row must be a dict from column to value")
        for name, picture in self.pictures.items():
            if not isinstance(picture, bytes) or not picture.startswith(b"\x89PNG"):
                raise BadInput(f"pictures[{name!r}] is not a PNG: give the bytes of one, for example of line_chart()")

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write the report as a folder; open its report.html. Refused when the folder exists, unless `force`."""
        return _save(self, folder, force)

    def show(self) -> None:
        """Print warnings, figures, text and the first rows of the tables."""
        parts: list[Any] = [f"warning: {warning}" for warning in self.warnings]
        if self.figures:
            parts.append(("", [{"figure": name, "value": value} for name, value in self.figures.items()]))
        parts.append(self.text)
        for name, rows in self.tables.items():
            parts += [(name, rows[:12]), f"and {number(len(rows) - 12)} more rows" if len(rows) > 12 else ""]
        if self.pictures:
            parts.append(f"{len(self.pictures)} pictures: save it and open report.html to see them")
        _show(self.title, *parts)

    def html(self) -> str:
        """One page of everything in it."""
        return page(self.title, [*self.sections(), *_made_by(self)])

    def sections(self) -> list[tuple[str, str]]:
        """The parts of the page as (heading, html), to be put into a larger page."""
        warned = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in self.warnings)
        rows = [{"figure": name, "value": value} for name, value in self.figures.items()]
        measured = _tiles(self.figures) if len(rows) <= 8 else table_html(rows)
        first = warned + (measured if rows else "") + paragraphs(self.text)
        parts = [("Findings", first)] if first else []
        parts += [("Pictures", "".join(figure_html(picture, name) for name, picture in self.pictures.items()))] if self.pictures else []
        return parts + [(name, table_html(rows, limit=500)) for name, rows in self.tables.items()]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; of pictures only the sizes, and None for what is not a finite number."""
        return _to_dict(self)


KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Scores, Ranking, Front, Heatmaps, Report)}


# ---- saved and loaded ----------------------------------------------------------------------------------------------------------------


def load_result(folder: str | Path) -> Result:
    """The result that `save` wrote into `folder`. Raises `BadInput` when there is none, or when it is not what was written."""
    place = Path(folder).expanduser()
    if not (place / "result.json").is_file():
        raise BadInput(f"{place} holds no result: give a folder that a result was saved to (one with a result.json)")
    damaged = BadInput(f"the result in {place} is damaged or was changed after it was written: make it again")
    try:
        record = json.loads((place / "result.json").read_text(encoding="utf-8"))
        kind, written, content = record["kind"], int(record["format"]), record["fields"]
        checksum = record["checksum"]
    except (OSError, ValueError, KeyError, TypeError):
        raise damaged from None
    if written > FORMAT or kind not in KINDS:
        raise BadInput(f"the result in {place} needs wellread {record.get('wellread')} or later: pip install -U wellread")
    if checksum != _checksum(record, place / "arrays.safetensors"):
        raise damaged
    arrays: dict[str, Array] = {}
    if (place / "arrays.safetensors").exists():
        from safetensors.numpy import load_file

        arrays = load_file(place / "arrays.safetensors")
    result: Result = KINDS[kind](**_unpack(content, arrays))
    return result


def _save(result: Result, folder: str | Path, force: bool) -> Path:
    with new_folder(folder, force) as place:
        arrays: dict[str, Array] = {}
        content = {each.name: _pack(getattr(result, each.name), arrays, each.name) for each in fields(result) if each.name != "made_by"}
        content["made_by"] = _pack(_plain(result.made_by, "made_by", strict=False), arrays, "made_by")
        record = {"kind": type(result).__name__, "format": FORMAT, "wellread": __version__, "fields": content}
        if arrays:
            from safetensors.numpy import save_file

            save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, place / "arrays.safetensors")
        record["checksum"] = _checksum(record, place / "arrays.safetensors")
        (place / "result.json").write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
        (place / "report.html").write_text(result.html(), encoding="utf-8", errors="replace")
        if isinstance(result, Scores):
            _write_csv(place / "scores.csv", result._rows(range(len(result))))
        elif isinstance(result, Ranking):
            _write_csv(place / "scores.csv", result._rows())
        elif isinstance(result, Front):
            _write_csv(place / "scores.csv", result._rows(efficient_only=False))
        elif isinstance(result, Heatmaps):
            (place / "pictures").mkdir()
            for i in range(min(PICTURES, len(result))):
                (place / "pictures" / f"{i:03d}.png").write_bytes(image_png(result.overlay(i)))
    return Path(folder).expanduser()


def _checksum(record: dict[str, Any], arrays: Path) -> str:
    """sha256 of what was found and of the arrays as they lie on the disk."""
    digest = hashlib.sha256(json.dumps([record["kind"], record["fields"]], sort_keys=True).encode())
    if arrays.exists():
        with arrays.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _pack(value: Any, arrays: dict[str, Array], name: str) -> Any:
    """JSON for a plain value; arrays, bytes and long lists of numbers go to `arrays` under `name`, in their place stands {"$...": name}."""
    if isinstance(value, np.ndarray):
        arrays[name] = value
        return {"$array": name}
    if isinstance(value, bytes):
        arrays[name] = np.frombuffer(value, np.uint8)
        return {"$bytes": name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if isinstance(value, dict):
        packed = {key: _pack(each, arrays, f"{name}/{i}") for i, (key, each) in enumerate(value.items())}
        return {"$" + key if key.startswith("$") else key: each for key, each in packed.items()}  # never taken for one of ours
    if isinstance(value, list):
        kinds = {type(each) for each in value} if len(value) > 100 else set()
        if kinds == {float} or kinds == {bool} or (kinds == {int} and max(map(abs, value)) < 2**63):
            arrays[name] = np.array(value)
            return {"$list": name}
        return [_pack(each, arrays, f"{name}/{i}") for i, each in enumerate(value)]
    return value


def _unpack(value: Any, arrays: dict[str, Array]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(mark, name)] = value.items()
        if mark == "$array":
            return arrays[name]
        if mark == "$bytes":
            return arrays[name].tobytes()
        if mark == "$list":
            return arrays[name].tolist()
        if mark == "$float":
            return float(name)
    return {key[1:] if key.startswith("$") else key: _unpack(each, arrays) for key, each in value.items()}


def _plain(value: Any, where: str, strict: bool = True) -> Any:
    """`value` as lists, dicts with str keys, str, int, float, bool and None. What is none of these is refused when strict, else worded."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{where}[{key!r}]", strict) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{where}[{i}]", strict) for i, each in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufU":
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name), f"{where}.{each.name}", strict) for each in fields(value)}
    for base in (bool, int, float, str):  # subclasses, such as a str enumeration
        if isinstance(value, base):
            return base(value)
    if strict:
        raise BadInput(f"{where} is a {type(value).__name__}, which cannot be saved: give numbers, text, lists and dicts of these")
    return str(value)


def _to_dict(result: Result) -> dict[str, Any]:
    content = {each.name: _json(getattr(result, each.name)) for each in fields(result) if each.name != "made_by"}
    return {"kind": type(result).__name__, **content, "made_by": _json(_plain(result.made_by, "made_by", strict=False))}


def _json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _json(value.tolist()) if value.ndim == 1 else {"shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, bytes):
        return {"bytes": len(value)}
    if isinstance(value, dict):
        return {key: _json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, _columns(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)


# ---- checks --------------------------------------------------------------------------------------------------------------------------


def _array(value: Any) -> Array:
    if hasattr(value, "detach"):  # a torch tensor, of any device and type
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = value.numpy()
    try:
        return np.asarray(value)
    except ValueError:  # rows of different lengths
        raise BadInput("these values do not form an array: give one number for each place") from None


def _numbers(value: Any, where: str, dimensions: int = 1, infinite: bool = False) -> Array:
    """A contiguous float array without NaN: float32 and float64 stay as they are, other numbers become float64."""
    array = _array(value)
    if array.dtype.kind not in "biuf" or array.ndim != dimensions or 0 in array.shape:
        shape = "[N]" if dimensions == 1 else "[N, H, W]"
        raise BadInput(f"{where} must be numbers {shape} and not empty: got {array.dtype} {list(array.shape)}")
    array = np.ascontiguousarray(array, dtype=np.float32 if array.dtype in (np.float32, np.float16) else np.float64)
    bad = np.isnan(array) if infinite else ~np.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise BadInput(f"{where}[{', '.join(map(str, first))}] is {array[first]}: repair what made it so, or leave that one out")
    return array


def _names(names: Any, length: int) -> list[str] | None:
    if names is None:
        return None
    _same_length(names, length, "items")
    return [str(name) for name in names]


def _listed(column: Any) -> list[Any]:
    values: list[Any] = _array(column).tolist() if hasattr(column, "tolist") else list(column)
    return values


def _same_length(values: Any, length: int, where: str) -> None:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or len(values) != length:
        had = f"{len(values)} long" if hasattr(values, "__len__") else f"a {type(values).__name__}"
        raise BadInput(f"{where} must hold one entry for each of the {length}: it is {had}")


def _count(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise BadInput(f"{n!r} is not a number of examples: give 1 or more")
    return int(n)


def _is_fraction(value: float, name: str, low_included: bool) -> None:
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not real or not (0 <= value <= 1 if low_included else 0 < value <= 1):
        raise BadInput(f"{name} {value!r} must lie in {'[' if low_included else '('}0, 1]")


# ---- in the terminal -----------------------------------------------------------------------------------------------------------------


def _show(title: str, *parts: str | tuple[str, list[dict[str, Any]]]) -> None:
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

    columns = {name: _cells(name, rows) for name in _columns(rows)}
    widths = [min(20, max(len(text) for text in (name, *cells))) + 3 for name, cells in columns.items()]
    fitting = max(2, sum(end <= console.width for end in accumulate(widths)))  # a column of two letters is of no use
    title = heading + (f" (+ {len(columns) - fitting} more columns)" if len(columns) > fitting else "")
    columns = dict(list(columns.items())[:fitting])
    table = Table(title=Text(_printable(title, console)) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        right = _numeric(name, rows)
        table.add_column(Text(_printable(name, console)), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(Text(_printable(cell, console)) for cell in cells))
    return table


def _printable(text: str, console: Console) -> str:
    """Without control characters (a file name must not command the terminal), and with nothing the terminal cannot write."""
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    encoding = console.encoding or "utf-8"
    return clean.encode(encoding, "replace").decode(encoding)


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numeric(name: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    return all(_is_number(row.get(name)) or row.get(name) is None for row in rows)


def _cells(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A column as text; when one of its numbers needs all four digits, all show them, so that they stand beneath each other."""
    texts = [_cell(name, row.get(name)) for row in rows]
    if any(
        isinstance(row.get(name), float) and len(text.strip("-0.").replace(".", "")) >= 4 for row, text in zip(rows, texts, strict=True)
    ):
        for i, row in enumerate(rows):
            value = row.get(name)
            if isinstance(value, float) and 1e-4 <= abs(value) < 1000:
                texts[i] = f"{value:#.4g}"
    return texts


def _cell(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value):
        return str(value) if name in ("index", "seed", "year") else number(value)
    return value if isinstance(value, str) else json.dumps(_plain(value, name, strict=False), ensure_ascii=False)


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


# ---- pages ---------------------------------------------------------------------------------------------------------------------------

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
    names = _columns(rows)
    shown = rows[:limit]
    numeric = {name for name in names if _numeric(name, shown)}
    head = "".join(f'<th{_right(name in numeric)} scope="col">{escape(name)}</th>' for name in names)
    columns = ([f"<td{_right(name in numeric)}>{escape(cell)}</td>" for cell in _cells(name, shown)] for name in names)
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in zip(*columns, strict=True))
    words = [caption] if caption else []
    if limit is not None and len(rows) > limit:
        words.append(f"The first {number(limit)} of {number(len(rows))} rows.")
    note = f'<p class="note">{escape(" ".join(words))}</p>' if words else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def figure_html(png: bytes, caption: str) -> str:
    """A picture inside the page with its caption (text)."""
    return f'<figure><img src="{_data(png)}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _right(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _tiles(figures: Mapping[str, Any]) -> str:
    cells = ((escape(_cell(name, value)), escape(name)) for name, value in figures.items())
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in cells) + "</div>"


def _made_by(result: Result) -> list[tuple[str, str]]:
    if not result.made_by:
        return []
    made = _plain(result.made_by, "made_by", strict=False)
    rows = [{"what": name, "value": _words(value)} for name, value in made.items() if value not in (None, [], {}, "")]
    return [("How it was made", table_html(rows))]


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(_words(each) for each in value)
    return _cell("index", value)


# ---- pictures ------------------------------------------------------------------------------------------------------------------------


def image_png(image: Array) -> bytes:
    """PNG bytes of uint8 [H, W, 3] or [H, W]."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _small(image: Array, side: int = 240) -> Array:
    """`image` with its longer side at most `side`, or enlarged in whole steps when it is tiny, so that its pixels stay pixels."""
    from PIL import Image

    longer = max(image.shape[:2])
    if longer > side:
        size = (max(1, round(image.shape[1] * side / longer)), max(1, round(image.shape[0] * side / longer)))
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    times = max(1, side // longer)
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _colormap(name: str, values: Array) -> Array:
    """Colors 0..1 [..., 3] for values 0..1 [...]."""
    import matplotlib

    if name not in matplotlib.colormaps:
        raise BadInput(f"colormap {name!r} is not known to matplotlib: take inferno, viridis or turbo")
    return np.asarray(matplotlib.colormaps[name](values))[..., :3]


def _drawn(draw: Callable[[Axes], None], x: str, y: str, title: str = "", height: float = 4.2) -> bytes:
    """PNG of a chart 9 inches wide: at the page's width its letters are as large as the text around it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")  # not pyplot: no window system (Agg), nothing shared between threads
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    draw(axes)
    axes.set_xlabel(_label(x), fontsize=11)
    axes.set_ylabel(_label(y), fontsize=11)
    axes.tick_params(labelsize=10)
    if title:
        axes.set_title(_label(title), fontsize=12, loc="left")
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # scripts the font lacks are drawn as boxes; the table beside has the name
        figure.savefig(stream, format="png", dpi=200, metadata={"Software": None})
    return stream.getvalue()


def _label(text: str) -> str:
    """Text for matplotlib: a dollar is a dollar, not the start of a formula, and a leading underscore does not hide a line."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _legend(axes: Axes, handles: list[Any], names: Iterable[str]) -> None:
    names = [textwrap.fill(_label(name), 34) for name in names]
    if len(names) > 1:
        axes.legend(handles, names, fontsize=10, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif names[0].strip():
        axes.legend(handles, names, fontsize=10, frameon=False, loc="best")


def _styles(n: int) -> Iterable[dict[str, Any]]:
    """A color and, after six, another dash for each line."""
    dashes = ("-", "--", ":", "-.")
    return ({"color": COLORS[i % len(COLORS)], "linestyle": dashes[i // len(COLORS) % len(dashes)]} for i in range(n))


def line_chart(
    lines: Mapping[str, Sequence[float]],
    *,
    x: str,
    y: str,
    at: Sequence[float] | None = None,
    spread: Mapping[str, Sequence[float]] | None = None,
    smooth: int = 1,
    title: str = "",
    log_y: bool = False,
) -> bytes:
    """PNG of one line for each name. NaN leaves a gap.

    x, y: what the axes show, with units. at: places on the x axis, 1, 2, ... when left out.
    spread: for some names, plus or minus how much, drawn as a band.
    smooth: for the losses of single steps, draw the mean of so many neighbors, and the values themselves faintly.
    """
    from matplotlib.ticker import MaxNLocator

    _not_empty(lines)

    def draw(axes: Axes) -> None:
        handles = []
        for (name, values), style in zip(lines.items(), _styles(len(lines)), strict=True):
            heights = np.asarray(values, float)
            places = np.arange(1, len(heights) + 1) if at is None else np.asarray(at, float)[: len(heights)]
            window = min(smooth, len(heights))
            if window > 1:
                axes.plot(places, heights, linewidth=0.8, alpha=0.25, **style)
                half = (window - 1) // 2
                places = places[half : len(heights) - (window - 1 - half)]
                heights = np.convolve(heights, np.full(window, 1 / window), mode="valid")
            handles += axes.plot(places, heights, linewidth=1.8, marker="o" if len(heights) <= 20 else None, markersize=4, **style)
            if spread and name in spread and window <= 1:
                around = np.asarray(spread[name], float)
                axes.fill_between(places, heights - around, heights + around, color=style["color"], alpha=0.15, linewidth=0)
        if log_y:
            axes.set_yscale("log")
        if at is None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes, handles, lines)

    return _drawn(draw, x, y, title)


def roc_chart(
    curves: Mapping[str, tuple[Sequence[float] | Array, Sequence[float] | Array, float]], *, positive: str = "positives", title: str = ""
) -> bytes:
    """PNG of one ROC curve for each name, from (false alarm rates, detection rates, area), as scikit-learn's roc_curve gives them.
    positive: what is to be found, in the plural ("defects")."""
    _not_empty(curves)

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#adb5bd", linewidth=1, linestyle=":")
        styles = zip(curves.values(), _styles(len(curves)), strict=True)
        handles = [axes.plot(false, true, linewidth=1.8, **style)[0] for (false, true, _), style in styles]
        axes.set(xlim=(-0.01, 1), ylim=(0, 1.01), aspect="equal", anchor="W")
        _legend(axes, handles, [f"{name}: area {area:.3f}" for name, (_, _, area) in curves.items()])

    return _drawn(draw, "false alarms (fraction of the rest)", f"found (fraction of the {positive})", title, height=4.8)


def bar_chart(
    bars: Mapping[str, float] | Sequence[tuple[str, float]],
    *,
    x: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    from_zero: bool = True,
    title: str = "",
) -> bytes:
    """PNG of horizontal bars, first on top, each with its value.

    x: what they measure, with its unit. intervals: (low, high) by name.
    from_zero: False draws points on a narrower axis instead, for values that lie close together (a bar cut off below misleads).
    """
    pairs = list(bars.items()) if isinstance(bars, Mapping) else list(bars)
    _not_empty(pairs)
    values = [float(value) for _, value in pairs]
    ends = [(intervals or {}).get(name, (value, value)) for (name, _), value in zip(pairs, values, strict=True)]

    def draw(axes: Axes) -> None:
        places = np.arange(len(pairs))
        if from_zero:
            axes.barh(places, values, color=COLORS[0], height=0.62)
        else:
            axes.plot(values, places, "o", color=COLORS[0], markersize=8)
        if intervals:
            below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
            above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
            axes.errorbar(values, places, xerr=[below, above], fmt="none", ecolor="#1d2329", elinewidth=1.2, capsize=4)
        for place, value, (_, high) in zip(places, values, ends, strict=True):
            end = max(value, high, 0.0) if from_zero else max(value, high)
            axes.annotate(number(value), (end, place), (6, 0), textcoords="offset points", va="center", fontsize=10)
        axes.set_yticks(places, [_label(name if len(name) <= 40 else name[:39] + "…") for name, _ in pairs])
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")

    return _drawn(draw, x, "", title, height=1.1 + 0.42 * len(pairs))


def histogram_chart(values: Sequence[float] | Array, *, x: str, y: str, title: str = "") -> bytes:
    """PNG of how `values` [N] spread; those that are not finite are left out."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]

    def draw(axes: Axes) -> None:
        bins = min(60, max(8, math.isqrt(len(finite))))
        if len(finite):
            low, high = float(finite.min()), float(finite.max())
            close = high - low <= 1e-9 * max(abs(low), abs(high))  # closer together than the axis could show
            axes.hist(finite, bins=1 if close else bins, color=COLORS[0], edgecolor="white", linewidth=0.6)

    return _drawn(draw, x, y, title, height=3.4)


def front_chart(front: Front, title: str = "") -> bytes:
    """PNG of all points of a `Front`, with a line through the efficient ones."""
    costs = [float(point[front.cost]) for point in front.points]
    qualities = [float(point[front.quality]) for point in front.points]
    good = front.efficient()

    def draw(axes: Axes) -> None:
        beaten = axes.plot(costs, qualities, "o", color="#adb5bd", markersize=5)
        line = [costs[i] for i in good], [qualities[i] for i in good]
        best = axes.plot(*line, "o-", color=COLORS[0], markersize=6, drawstyle="steps-post")
        axes.legend(beaten + best, ["beaten by another", "efficient"], fontsize=10, frameon=False, loc="lower right")

    return _drawn(draw, front.cost, front.quality, title)


def _not_empty(values: Any) -> None:
    if not len(values):
        raise BadInput("a chart needs at least one thing to draw")
