"""What a classifier's predictions are worth, with intervals: sensitivity and specificity per class, operating points, paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from wellread.evaluate import accuracy_interval


def confusion(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """int64 [K, K]: rows are the true classes, columns the predicted ones."""
    return np.bincount(truth * classes + guess, minlength=classes**2).reshape(classes, classes)


def by_class(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """One line per class, the class against all others; a rate over no rows is NaN.

    Sensitivity is the recall of the class, specificity the recall of "not this class".
    """
    total, rows = int(matrix.sum()), []
    for k, name in enumerate(names):
        hit, support, said = int(matrix[k, k]), int(matrix[k].sum()), int(matrix[:, k].sum())
        right_no = total - support - said + hit
        rows.append(
            {
                "class": name,
                "rows": support,
                "accuracy": (hit + right_no) / total,
                "precision": _ratio(hit, said),
                "sensitivity": _ratio(hit, support),
                "specificity": _ratio(right_no, total - support),
                "f1": _ratio(2 * hit, said + support),
            }
        )
    return rows


def averages(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the lines of `by_class`: "macro", every class the same, and "weighted", by rows. Classes without rows are left out.

    Weighted sensitivity is the accuracy. Weighted specificity is mostly that of the largest class's complement: read the macro one.
    """
    present = [row for row in rows if row["rows"]]
    names = [name for name in present[0] if name not in ("class", "rows")]
    weights = {"macro": [1.0] * len(present), "weighted": [float(row["rows"]) for row in present]}
    return [
        {"average": kind, "rows": sum(row["rows"] for row in present)}
        | {name: float(np.average(np.nan_to_num([row[name] for row in present]), weights=weight)) for name in names}
        for kind, weight in weights.items()
    ]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def bootstrap(
    probabilities: np.ndarray, truth: np.ndarray, groups: np.ndarray | None = None, *, draws: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of balanced accuracy, macro F1 and AUROC (as `evaluate.metrics` defines them).

    probabilities: [N, K]; truth: int64 [N]. groups: [N], rows that belong together (a patient) are drawn together.
    """
    n, classes = probabilities.shape
    group = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    random, guess = np.random.default_rng(seed), probabilities.argmax(1)
    is_class, is_guess = np.eye(classes)[truth], np.eye(classes)[guess]
    curves = [1] if classes == 2 else [c for c in range(classes) if is_class[:, c].any()]
    found: dict[str, list[np.ndarray]] = {"balanced_accuracy": [], "macro_f1": [], "auroc": []}
    for start in range(0, draws, 100):
        count = group.max() + 1
        weight = random.multinomial(count, np.full(count, 1 / count), size=min(100, draws - start))[:, group].astype(np.float64)
        hit, support, said = weight @ (is_class * is_guess), weight @ is_class, weight @ is_guess
        with np.errstate(divide="ignore", invalid="ignore"):
            found["balanced_accuracy"].append(np.nanmean(hit / support, 1))
            found["macro_f1"].append(np.nanmean(2 * hit / (said + support), 1))
            found["auroc"].append(np.mean([_weighted_auroc(probabilities[:, c], truth == c, weight) for c in curves], 0))
    intervals = {}
    for name, parts in found.items():
        low, high = np.nanpercentile(np.concatenate(parts), (2.5, 97.5))
        intervals[name] = (float(low), float(high))
    return intervals


def _weighted_auroc(scores: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[draws], from scores [N], positive bool [N] and row weights [draws, N]; ties count half."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    weight, positive = weight[:, order], positive[order]
    up = np.add.reduceat(weight * positive, starts, axis=1)
    down = np.add.reduceat(weight * ~positive, starts, axis=1)
    won = (up * (down.cumsum(1) - down / 2)).sum(1)
    return won / (up.sum(1) * down.sum(1))


def operating_point(scores: np.ndarray, positive: np.ndarray, sensitivity: float) -> float:
    """The highest threshold t at which `scores >= t` [N] finds at least this share of the positives, bool [N]; a half when there are none."""
    if not positive.any():
        return 0.5
    found = np.sort(scores[positive])[::-1]
    return float(found[max(1, math.ceil(sensitivity * len(found) - 1e-9)) - 1])


def rates(said: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Sensitivity and specificity of yes/no decisions [N], with Wilson's 95 % intervals."""
    found: dict[str, float] = {}
    for name, right, total in (
        ("sensitivity", int((said & positive).sum()), int(positive.sum())),
        ("specificity", int((~said & ~positive).sum()), int((~positive).sum())),
    ):
        low, high = accuracy_interval(right, total) if total else (math.nan, math.nan)
        found |= {name: _ratio(right, total), f"{name}_low": low, f"{name}_high": high}
    return found


def mcnemar(right: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Exact two-sided McNemar test on the same rows: right, other are bool [N], whether each of two classifiers was right."""
    from scipy.stats import binomtest

    only, only_other = int((right & ~other).sum()), int((other & ~right).sum())
    p = float(binomtest(only, only + only_other).pvalue) if only + only_other else 1.0
    return {"only_best_right": only, "only_next_right": only_other, "p_mcnemar": p}


def corrected_t(differences: Sequence[float], test_share: float) -> float:
    """Two-sided p of a mean difference over folds, with the variance raised for the overlap of their training parts (Nadeau and Bengio 2003).

    test_share: rows of the test part divided by rows of the training part.
    """
    from scipy.stats import t

    d = np.asarray(differences, np.float64)
    spread = d.std(ddof=1)
    if spread == 0:
        return 1.0 if d.mean() == 0 else 0.0
    return float(2 * t.sf(abs(d.mean()) / (spread * math.sqrt(1 / len(d) + test_share)), len(d) - 1))
