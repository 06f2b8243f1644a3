"""Which rows are learned from, which decide when to stop, and which judge. No group of rows that belong together is ever split."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from wellread.data import class_names, labels, subset
from wellread.errors import BadInput
from wellread.features import embed
from wellread.network import Network

HOLD_OUT = 0.2  # of train, judged when there are no validation data
STOP = 0.1  # of what a fold learns from, kept to choose epochs and penalties


@dataclass(frozen=True)
class Part:
    """Some rows of a table. Features are computed and kept for the whole table, whatever the split."""

    table: Dataset
    rows: np.ndarray
    names: tuple[str, ...]

    @property
    def data(self) -> Dataset:
        return self.table if np.array_equal(self.rows, np.arange(len(self.table))) else subset(self.table, self.rows)

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], numbers in `names`."""
        return np.array([self.names.index(name) for name in class_names(self.table)])[labels(self.table)][self.rows]

    def features(self, network: Network) -> np.ndarray:
        """float32 [N, d]."""
        return embed(network, self.table)[self.rows]


def group_of(table: Dataset, column: str) -> np.ndarray:
    """The group of each row as text [N], whatever the type of the column."""
    return np.array([str(value) for value in table[column]])


def held_out(truth: np.ndarray, share: float, groups: np.ndarray | None = None, *, seed: int = 0) -> np.ndarray:
    """Sorted row numbers of a part with this share of every class (at least one row of a class that has two), no group in it and outside.

    truth: int [N]; groups: [N].
    """
    if groups is not None:
        parts = _stratified(truth, min(round(1 / share), len(np.unique(groups))), groups, seed)
        rest = [len(np.unique(np.delete(truth, rows))) for rows in parts]
        usable = [rows for rows, classes in zip(parts, rest, strict=True) if len(rows) and classes == len(np.unique(truth))]
        if not usable:
            raise BadInput("no part of the groups can be held out without taking all rows of a class: give finer groups, or validation data")
        return np.sort(max(usable, key=lambda rows: len(np.unique(truth[rows]))))
    random, chosen = np.random.default_rng(seed), []
    for one in np.unique(truth):
        rows = np.flatnonzero(truth == one)
        chosen.append(random.permutation(rows)[: min(max(1, round(share * len(rows))), len(rows) - 1)])
    return np.sort(np.concatenate(chosen))


def fold_numbers(truth: np.ndarray, folds: int, groups: np.ndarray | None = None, *, seed: int = 0) -> np.ndarray:
    """The fold of each row, int [N], from 0: stratified, each class within one row, or as well as whole groups allow.

    truth: int [N]; groups: [N]. Raises `BadInput` when the rest of a fold would lack a class.
    """
    number = np.empty(len(truth), np.int64)
    for fold, rows in enumerate(_stratified(truth, folds, groups, seed)):
        number[rows] = fold
    for fold in range(folds):
        if len(np.unique(truth[number != fold])) < len(np.unique(truth)) or not (number == fold).any():
            raise BadInput(f"without fold {fold + 1} a class has no rows, because its groups are too large: choose fewer folds or finer groups")
    return number


def _stratified(truth: np.ndarray, folds: int, groups: np.ndarray | None, seed: int) -> list[np.ndarray]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if groups is not None and len(np.unique(groups)) < max(2, folds):
        raise BadInput(f"the groups have {len(np.unique(groups))} different values and {max(2, folds)} parts are needed: choose fewer folds or finer groups")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class smaller than the number of folds is refused in our own words
        return [rows for _, rows in kind(folds, shuffle=True, random_state=seed).split(np.zeros(len(truth)), truth, groups)]


def splits_of(
    train: Dataset, validation: Dataset | None, names: tuple[str, ...], folds: int, group: str | None, seed: int
) -> tuple[list[tuple[Part, Part, Part]], np.ndarray | None, list[str]]:
    """(learned from, stopped by, judged on) for each split, the fold of each row of train, and warnings."""
    truth = labels(train, "train")
    counts = np.bincount(truth, minlength=len(names))
    least = max(2, folds) if folds or validation is None else 1
    small = next((k for k in range(len(names)) if counts[k] < least), None)
    if small is not None:
        raise BadInput(f"train has {counts[small]} rows of class {names[small]!r} and at least {least} are needed: add some, or remove the class")
    if validation is not None:
        strange = [name for name in class_names(validation) if name not in names]
        if strange:
            raise BadInput(f"validation has the class {strange[0]!r} that train does not have ({', '.join(names[:6])}): give data with the same classes")
    groups, said = None, []
    if group is not None:
        if group not in train.column_names:
            raise BadInput(f"train has no column {group!r} to group by (it has {', '.join(train.column_names)})")
        groups = group_of(train, group)
        mixed = sum(len(np.unique(truth[groups == each])) > 1 for each in np.unique(groups))
        if mixed:
            said.append(f"{mixed} of {len(np.unique(groups))} values of {group!r} have rows of more than one class: check the labels or the column")
        shared = set(groups) & set(group_of(validation, group)) if validation is not None and group in validation.column_names else set()
        if shared:
            said.append(f"{len(shared)} values of {group!r} are in train and in validation: figures on validation are optimistic")
    everything = np.arange(len(train))

    def parts(learn: np.ndarray, stop: np.ndarray) -> tuple[Part, Part]:
        return Part(train, learn, names), Part(train, stop, names)

    if not folds:
        if validation is not None:
            judged = Part(validation, np.arange(len(validation)), names)
            return [(Part(train, everything, names), judged, judged)], None, said
        kept = held_out(truth, HOLD_OUT, groups)
        learn, judged = parts(np.setdiff1d(everything, kept), kept)
        return [(learn, judged, judged)], None, said
    fold_of = fold_numbers(truth, folds, groups, seed=seed)
    splits = []
    for fold in range(folds):
        test, rest = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
        stop = rest[held_out(truth[rest], STOP, None if groups is None else groups[rest], seed=seed)]
        splits.append((*parts(np.setdiff1d(rest, stop), stop), Part(train, test, names)))
    return splits, fold_of, said
