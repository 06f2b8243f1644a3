"""The law of a training's loss: loss = E + A / N^alpha + B / D^beta, N live weights averaged over D tokens, fitted to a table of runs.

Hoffmann et al. 2022 (arXiv 2203.15556) for dense networks; with the average number of weights for those that are pruned on the way, Jin et al.
2025 (arXiv 2501.12486).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from wellread.errors import BadInput

NAMES = ("E", "A", "B", "alpha", "beta")  # the law's constants
EXPONENTS = (1e-3, 5.0)  # beyond these a term is a constant or a wall, and its constant no number that can be written


@dataclass(frozen=True)
class Law:
    """The modified Chinchilla law, loss = E + A / N^alpha + B / D^beta: N the average number of live parameters, D tokens; nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    parameters: tuple[float, float] = (0.0, math.inf)  # range of N that was fitted
    tokens: tuple[float, float] = (0.0, math.inf)

    def loss(self, average_parameters: float, tokens: float) -> float:
        return float(self.E + self.A / average_parameters**self.alpha + self.B / tokens**self.beta)

    def extrapolates(self, average_parameters: float, tokens: float) -> bool:
        inside = self.parameters[0] <= average_parameters <= self.parameters[1] and self.tokens[0] <= tokens <= self.tokens[1]
        return not inside


@dataclass(frozen=True)
class Fit:
    """A fitted law, with what is known of its constants."""

    law: Law
    intervals: dict[str, tuple[float, float]]  # of each constant; an end is 0 or infinite where the runs set no limit; empty without runs to spare
    error: float  # root mean square of the misses, in log loss
    condition: float  # of the fit's Jacobian, columns at unit length; above 1e3 the constants are not determined, predictions may still be
    surprise: Callable[[str, float], float]  # (constant, value): how far the value is from the fit; for the true one about Student's t


def average_parameters(trajectory: Sequence[float], tokens: Sequence[float] | None = None, *, nested: bool = True) -> float:
    """Mean number of live parameters over the training tokens; tokens of each entry, equal when left out. Raises `BadInput` if it grows."""
    counts = np.asarray(trajectory, float)
    if nested and (np.diff(counts) > 0).any():
        raise BadInput(f"the number of parameters grows at entry {int((np.diff(counts) > 0).argmax()) + 1}: nested masks can only lose weights")
    return float(np.average(counts, weights=None if tokens is None else np.asarray(tokens, float)))


class Misses:
    """The law against a table [runs, (parameters, tokens, loss)], in log loss.

    Unknowns x [5]: the logs of the three terms at the middle of the runs, alpha, beta. So log A = x[1] + alpha * middle, and with log E and log B
    all five constants are `axes` [5, 5] times x.
    """

    def __init__(self, table: np.ndarray, delta: float) -> None:
        logs = np.log(table)
        middle = logs[:, :2].mean(0)
        self.n, self.d = (logs[:, :2] - middle).T
        self.losses = logs[:, 2]
        self.delta = delta
        self.nothing = float(self.losses.min()) + math.log(1e-6)  # log of a term too small to be seen
        self.axes = np.eye(5)
        self.axes[1, 3], self.axes[2, 4] = middle

    def terms(self, x: np.ndarray) -> np.ndarray:
        """Logs of the law's three terms, [3, runs]."""
        return np.stack([np.full_like(self.n, x[0]), x[1] - x[3] * self.n, x[2] - x[4] * self.d])

    def at(self, x: np.ndarray) -> np.ndarray:
        """Log of the law minus log loss, [runs]."""
        return np.logaddexp.reduce(self.terms(x), axis=0) - self.losses

    def slopes(self, x: np.ndarray) -> np.ndarray:
        """Its derivative, [runs, 5]."""
        terms = self.terms(x)
        share = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
        return np.stack([*share, -share[1] * self.n, -share[2] * self.d], axis=1)

    def least(self, x: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, float]:
        """Where the Huber loss is least among x + free z, `free` [5, unknowns], and how much it is there."""
        from scipy.optimize import least_squares

        exact: dict[str, Any] = {"xtol": 1e-10, "ftol": 1e-10, "gtol": 1e-12, "max_nfev": 200}
        shape: dict[str, Any] = {"loss": "huber", "f_scale": self.delta, "x_scale": "jac"}
        start = np.zeros(free.shape[1])
        with np.errstate(all="ignore"):  # far out, where nothing is determined
            found = least_squares(lambda z: self.at(x + free @ z), start, jac=lambda z: self.slopes(x + free @ z) @ free, **shape, **exact)
        return x + free @ found.x, float(found.cost)

    def starts(self, alphas: Sequence[float], betas: Sequence[float], count: int = 4) -> list[np.ndarray]:
        """The best of a grid of exponents: with them the law is linear, and E, A and B are a least-squares problem with one solution."""
        from scipy.optimize import nnls

        found = []
        weight = np.exp(-self.losses)
        for alpha, beta in product(alphas, betas):
            columns = np.stack([np.ones_like(self.n), np.exp(-alpha * self.n), np.exp(-beta * self.d)], axis=1) * weight[:, None]
            terms, miss = nnls(columns, np.ones_like(weight))
            found.append((miss, np.array([*np.log(np.maximum(terms, math.exp(self.nothing))), alpha, beta])))
        return [x for _, x in sorted(found, key=lambda each: each[0])[:count]]


def fit_law(
    runs: Sequence[Mapping[str, float]],
    *,
    alpha: float | None = None,
    beta: float | None = None,
    delta: float | None = None,
    confidence: float | None = 0.9,
) -> Fit:
    """The law of a table of runs, each with `parameters` (average, live), `tokens` and `loss`.

    Least Huber loss of log loss, as Hoffmann et al. fit theirs, from the best of a grid of 64 exponents; exponents end at 0.001 and 5. alpha, beta:
    given instead of fitted.
    delta: where a miss begins to count as an outlier; by default 1.345 standard deviations of the misses and at least Hoffmann's 1e-3.
    confidence: of the intervals, None for no intervals. They are of profile likelihood: a constant is moved, and the others fitted anew, until the
        Huber loss is too high for chance.
    Raises `BadInput` with fewer than 8 runs and no given exponents, fewer runs than constants, missing columns, losses that are not positive,
    or runs that all have the same size or the same tokens.
    """
    from scipy.linalg import null_space
    from scipy.optimize import brentq
    from scipy.stats import t as student

    table = _table(runs)
    unknowns = 5 - (alpha is not None) - (beta is not None)
    if len(table) < (8 if unknowns > 3 else unknowns):
        raise BadInput(f"{len(table)} runs cannot determine {unknowns} constants: give 8 runs, or fix alpha and beta and give {min(unknowns, 3)}")
    if any(given is not None and not 0 < given < math.inf for given in (alpha, beta, delta)) or not (confidence is None or 0 < confidence < 1):
        raise BadInput("alpha, beta and delta are numbers above 0, and confidence lies between 0 and 1")
    for column, what in ((0, "average parameters"), (1, "tokens")):
        if len(np.unique(table[:, column])) < 2:
            raise BadInput(f"all runs have the same {what}, so that what they do cannot be seen: add runs with others")
    free = np.eye(5)[:, [True, True, True, alpha is None, beta is None]]
    grid = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.1, 1.8)
    spare = max(1, len(table) - unknowns)
    misses = Misses(table, delta or 0.1)
    starts = misses.starts([alpha] if alpha else grid, [beta] if beta else grid)
    x, least = min((misses.least(start, free) for start in starts), key=lambda each: each[1])
    for _ in range(0 if delta else 3):  # the outliers and the deviation without them find each other
        deviation = 1.4826 * float(np.median(np.abs(misses.at(x)))) * math.sqrt(len(table) / spare)
        misses.delta = max(1e-3, 1.345 * deviation)
        x, least = misses.least(x, free)
    for number in (3, 4):
        if not EXPONENTS[0] <= x[number] <= EXPONENTS[1]:  # the runs say nothing of it
            x[number] = np.clip(x[number], *EXPONENTS)
            x, least = misses.least(x, free[:, free[number] == 0])
    x[:3] = np.maximum(x[:3], misses.nothing)

    missed, slopes = misses.at(x), misses.slopes(x) @ free
    clipped = np.clip(missed, -misses.delta, misses.delta)
    inside = max(float((np.abs(missed) < misses.delta).mean()), 1 / len(table))
    correction = 1 + unknowns / len(table) * (1 - inside) / inside
    variance = max(correction * float(clipped @ clipped) / spare / inside, 1e-18)  # of noise, as the Huber loss sees it (Huber 1981, section 7.6)
    _, stretch, ways = np.linalg.svd(slopes, full_matrices=False)
    reach = free @ (ways.T / np.maximum(stretch, 1e-9 * stretch[0]))  # a way that changes nothing reaches far
    spread = reach @ reach.T
    condition = float(np.linalg.cond(slopes / np.maximum(np.linalg.norm(slopes, axis=0), 1e-300)))
    best = misses.axes @ x

    def towards(number: int) -> tuple[np.ndarray, float]:
        """How x moves when a constant does, by one, and that constant's standard error."""
        axis = misses.axes[number]
        along = spread @ axis
        width = float(axis @ along)
        return (along / width, math.sqrt(width * variance)) if width > 0 else (axis / (axis @ axis), 1.0)

    def rise(number: int, value: float) -> float:
        away = value - best[number]
        held = free @ null_space(misses.axes[number][None] @ free)
        axis = misses.axes[number]
        moves = [towards(number)[0], axis / (axis @ axis)][: 1 if condition < 1e3 else 2]  # where slopes say nothing, straight on as well
        more = min(misses.least(x + away * move, held)[1] for move in moves) - least
        return math.copysign(math.sqrt(max(0.0, 2 * more / variance)), away)

    def surprise(name: str, value: float) -> float:
        number = NAMES.index(name)
        return rise(number, math.log(value) if number < 3 else value)

    def end(number: int, side: int) -> float:
        """Of an interval, in the constant's own unit."""
        wide = float(student.ppf((1 + (confidence or 0)) / 2, spare))
        near, step = best[number], side * min(wide * towards(number)[1], 2.0)
        for _ in range(10):
            far = max(near + step, 1e-3) if number > 2 else near + step  # exponents are positive
            if abs(rise(number, far)) > wide:
                found = float(brentq(lambda value: abs(rise(number, value)) - wide, near, far, xtol=1e-2 * min(1.0, abs(far - near))))
                return found if number > 2 else math.exp(min(found, 700.0))
            near, step = far, 2 * step
        return math.inf if side > 0 else 0.0

    fitted = [number for number, row in enumerate(free) if row.any()]
    intervals = {NAMES[number]: (end(number, -1), end(number, 1)) for number in fitted if confidence and len(table) > unknowns}
    ranges = [(float(column.min()), float(column.max())) for column in table[:, :2].T]
    law = Law(*map(float, np.exp(best[:3])), *map(float, best[3:]), *ranges)  # type: ignore[arg-type]
    return Fit(law, intervals, float(np.sqrt((missed**2).mean())), condition, surprise)


def left_out(runs: Sequence[Mapping[str, float]], **options: Any) -> list[float]:
    """For each run, by what share the law misses its loss when it is fitted without this run and all others of its size and tokens.

    options: those of `fit_law`, which is called as often as there are different runs.
    """
    options = {**options, "confidence": None}
    kinds = [(run["parameters"], run["tokens"]) for run in runs]
    laws = {kind: fit_law([run for run, other in zip(runs, kinds, strict=True) if other != kind], **options).law for kind in set(kinds)}
    return [laws[kind].loss(*kind) / run["loss"] - 1 for run, kind in zip(runs, kinds, strict=True)]


def _table(runs: Sequence[Mapping[str, float]]) -> np.ndarray:
    """[runs, (parameters, tokens, loss)]"""
    names = ("parameters", "tokens", "loss")
    for row, run in enumerate(runs):
        if missing := next((name for name in names if name not in run), None):
            raise BadInput(f"run {row} has no column {missing!r}: give parameters, tokens and loss")
        if wrong := next((name for name in names if not 0 < float(run[name]) < math.inf), None):
            raise BadInput(f"{wrong} of run {row} is {run[wrong]}: give a number above 0")
    return np.asarray([[float(run[name]) for name in names] for run in runs]).reshape(-1, 3)


def predict(law: Law, trajectory: Sequence[float], tokens: float) -> tuple[float, bool]:
    """The loss after `tokens` of training with these live parameters over time, and whether that is outside the fitted runs."""
    average = average_parameters(trajectory)
    return law.loss(average, tokens), law.extrapolates(average, tokens)
