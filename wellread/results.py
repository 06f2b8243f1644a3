"""What a method finds when it does not return a network: Scores, Ranking, Front, Heatmaps, Report.

Each has `save(folder)`, `show()` (short, in the terminal), `html()` (one page that needs nothing else) and `to_dict()`;
`load_result(folder)` brings it back bit for bit. A saved result is `result.json`, `arrays.safetensors` and
`report.html`; nothing is pickled. Reports of one's own are made with `pages.py` and `charts.py`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wellread import __version__
from wellread.charts import bar_chart, colormap, front_chart, histogram_chart, image_png, thumbnail
from wellread.errors import BadInput
from wellread.folders import new_folder
from wellread.pages import data_url, escape, figure_html, made_by_section, page, paragraphs, table_html, tiles
from wellread.tables import columns_of, number, plain, print_parts

if TYPE_CHECKING:
    pass

Array = np.ndarray[Any, np.dtype[Any]]
Result = Any  # one of the five below
FORMAT = 1
PICTURES = 64  # at most so many heatmaps are drawn


# ---- the five kinds ------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Scores:
    """One number for every example.

    values: float [N], in the order of the data; infinities are allowed, NaN is not.
    what: the name of the score ("el2n"); meaning: one sentence that says what a high value means.
    items: a name for each example; columns: more about each example, lists of length N (missing values: None or NaN).
    figures: named numbers or words about all of them; tables: named lists of rows; warnings: one sentence each, shown first.
    """

    values: Array
    what: str = "score"
    meaning: str = ""
    items: list[str] | None = field(default=None, repr=False)
    columns: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    made_by: dict[str, Any] | None = field(default=None, repr=False)
    figures: dict[str, float | str | int] = field(default_factory=dict, repr=False)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = _numbers(self.values, "values", infinite=True)
        self.items = _names(self.items, len(self.values))
        self.columns = {str(name): plain(_listed(column), f"columns[{name!r}]") for name, column in self.columns.items()}
        for name, column in self.columns.items():
            _same_length(column, len(self.values), f"columns[{name!r}]")
        findings = self._findings()
        self.figures, self.tables, self.warnings = findings.figures, findings.tables, findings.warnings

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
        """Print the findings, the spread, the five highest and the three lowest."""
        print_parts(
            f"{self.what}, {number(len(self))} examples",
            self.meaning,
            *(f"warning: {warning}" for warning in self.warnings),
            ("", [self._spread()]),
            ("", [{"figure": name, "value": value} for name, value in self.figures.items()]),
            *((name, rows[:12]) for name, rows in self.tables.items()),
            ("highest", self._rows(self.highest(5))),
            ("lowest", self._rows(self.lowest(3))),
        )

    def html(self) -> str:
        """One page: histogram, spread, the twenty highest and lowest."""
        picture = histogram_chart(self.values, x=self.what, y="examples")
        drawn = figure_html(picture, f"How the {number(len(self))} examples spread over {self.what}.")
        return page(
            self.what,
            [
                *self._findings().sections(),
                ("Spread", drawn + table_html([self._spread()])),
                ("Highest", table_html(self._rows(self.highest(20)))),
                ("Lowest", table_html(self._rows(self.lowest(20)))),
                *made_by_section(self.made_by),
            ],
            lead=self.meaning + (" All values are in scores.csv, beside this page." if len(self) > 40 else ""),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, values as a list; what is not a number becomes None."""
        return _to_dict(self)

    def _findings(self) -> Report:
        return Report("", self.figures, self.tables, warnings=self.warnings)

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
        print_parts(f"{number(len(self))} ranked by {self.what} ({self._better()} is better)", ("", self._rows()[:10]), more)

    def html(self) -> str:
        """One page: bars of the best twenty and the table."""
        best = self.order()[:20]
        bars: list[tuple[str, float]] = [(self.items[i], float(self.scores[i])) for i in best if np.isfinite(self.scores[i])]
        picture = [("Best", figure_html(bar_chart(bars, x=self.what), f"{self.what}: {self._better()} is better."))] if bars else []
        return page(f"Ranking by {self.what}", [*picture, ("All", table_html(self._rows(), limit=500)), *made_by_section(self.made_by)])

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
        self.points = plain(list(self.points), "points")
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
        print_parts(f"{self.quality} against {self.cost}: {len(rows)} of {len(self)} choices are efficient", ("", shown), more)

    def html(self) -> str:
        """One page: the front drawn, and the points as a table."""
        caption = f"Each dot is one choice. On the line, more {self.quality} is only to be had for more {self.cost}."
        drawn = figure_html(front_chart(self), caption)
        table = table_html(self._rows(efficient_only=False), limit=500)
        return page(f"{self.quality} against {self.cost}", [("The front", drawn), ("Choices", table), *made_by_section(self.made_by)])

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
        self.figures = plain(dict(self.figures), "figures")
        self.columns = {str(name): plain(_listed(column), f"columns[{name!r}]") for name, column in self.columns.items()}
        for name, column in self.columns.items():
            _same_length(column, len(self.maps), f"columns[{name!r}]")
        self.warnings = [str(warning) for warning in self.warnings]

    def __len__(self) -> int:
        return len(self.maps)

    def overlay(self, i: int, strength: float = 0.55, colors: str = "inferno") -> Array:
        """Picture `i` with its map over it, uint8 [H, W, 3]: the more evidence, the less of the picture shines through.

        strength: opacity where the map is 1. colors: a matplotlib colormap.
        Where the map is 0 or less the picture is unchanged.
        """
        if not -len(self) <= i < len(self):
            raise BadInput(f"there is no heatmap {i}: there are {len(self)}")
        _is_fraction(strength, "strength", low_included=True)
        heat = np.clip(self.maps[i], 0, None)
        heat = heat / max(1.0, float(heat.max()))
        opacity = (strength * heat)[..., None]
        mixed: Array = np.rint((1 - opacity) * self.images[i] + opacity * 255 * colormap(colors, heat)).astype(np.uint8)
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
        print_parts(f"{number(len(self))} heatmaps", *warned, ("", found), ("", rows), more, flag, "save it and open report.html to see them")

    def html(self) -> str:
        """One page: picture and overlay side by side for the first 64."""
        cells = []
        for i in range(min(PICTURES, len(self))):
            left, right = thumbnail(self.images[i]), thumbnail(self.overlay(i))
            pair = image_png(np.concatenate([left, np.full((len(left), 6, 3), 255, np.uint8), right], axis=1))
            item, note = escape(self._row(i)["item"]), self._note(i)
            words = f"<b>{item}</b><br>for {escape(self.targets[i])}, peak {number(self.peak[i])}"
            flag = f' <span class="flag">{escape(note)}</span>' if note else ""
            cells.append(f'<figure><img src="{data_url(pair)}" alt="{item}"><figcaption>{words}{flag}</figcaption></figure>')
        scale = np.repeat(np.linspace(0, 1, 256)[None], 12, axis=0)
        bar = image_png(np.rint(255 * colormap("inferno", scale)).astype(np.uint8))
        key = f'<p class="key">little evidence <img src="{data_url(bar)}" alt="color scale" width="160" height="12"> much evidence</p>'
        shown = f" The first {PICTURES} of {number(len(self))} are shown." if len(self) > PICTURES else ""
        findings = Report("", figures=self.figures, warnings=self.warnings).sections()
        return page(
            "Heatmaps",
            [*findings, ("Pictures", key + f'<div class="sheet">{"".join(cells)}</div>'), *made_by_section(self.made_by)],
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
    figures: dict[str, Any] = field(default_factory=dict)  # float, int or str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    text: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict, repr=False)
    warnings: list[str] = field(default_factory=list)
    made_by: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.figures = plain(dict(self.figures), "figures")
        self.tables = {str(name): plain(list(rows), f"tables[{name!r}]") for name, rows in self.tables.items()}
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
        print_parts(self.title, *parts)

    def html(self) -> str:
        """One page of everything in it."""
        return page(self.title, [*self.sections(), *made_by_section(self.made_by)])

    def sections(self) -> list[tuple[str, str]]:
        """The parts of the page as (heading, html), to be put into a larger page."""
        warned = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in self.warnings)
        rows = [{"figure": name, "value": value} for name, value in self.figures.items()]
        measured = tiles(self.figures) if len(rows) <= 8 else table_html(rows)
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
        content["made_by"] = _pack(plain(result.made_by, "made_by", strict=False), arrays, "made_by")
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


def _to_dict(result: Result) -> dict[str, Any]:
    content = {each.name: _json(getattr(result, each.name)) for each in fields(result) if each.name != "made_by"}
    return {"kind": type(result).__name__, **content, "made_by": _json(plain(result.made_by, "made_by", strict=False))}


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
        writer = csv.DictWriter(file, columns_of(rows), restval="")
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
