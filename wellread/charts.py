"""Charts and pictures as PNG bytes, with matplotlib, for reports and pages."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wellread.errors import BadInput
from wellread.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from wellread.results import Front

Array = np.ndarray[Any, np.dtype[Any]]
COLORS = ("#0b5cad", "#d9480f", "#2b8a3e", "#862e9c", "#b58900", "#495057")


def image_png(image: Array) -> bytes:
    """PNG bytes of uint8 [H, W, 3] or [H, W]."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def thumbnail(image: Array, side: int = 240) -> Array:
    """`image` with its longer side at most `side`, or enlarged in whole steps when it is tiny, so that its pixels stay pixels."""
    from PIL import Image

    longer = max(image.shape[:2])
    if longer > side:
        size = (max(1, round(image.shape[1] * side / longer)), max(1, round(image.shape[0] * side / longer)))
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    times = max(1, side // longer)
    return image.repeat(times, axis=0).repeat(times, axis=1)


def colormap(name: str, values: Array) -> Array:
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
