"""The report of a transfer: leaderboard, figures per class, curves, predictions row by row, and the checks for leaks and shortcuts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wellread.adapt import clinical, shortcuts
from wellread.adapt.probe import PENALTIES, Probe, fit_probe
from wellread.adapt.splits import Part
from wellread.charts import line_chart, roc_chart
from wellread.data import duplicates, name_of
from wellread.evaluate import accuracy_interval, metrics, probabilities
from wellread.inputs import ImageInput
from wellread.network import Network
from wellread.results import Report
from wellread.train import History

CONTROL_MARGIN = 0.10  # a control this near to the network makes a warning


@dataclass
class Trial:
    """What one network gave on the rows it was judged on. Arrays have one row per judged row, lists one entry per split."""

    name: str
    logits: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)  # size and speed
    network: Network | None = None  # as it came, fed as it will be; given up when it is beaten
    said: np.ndarray | None = None  # bool [N]: above the threshold chosen for the positive class
    adapted: Network | None = None  # when there is one split
    frozen: list[float] = field(default_factory=list)  # score of the probe
    scores: list[float] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    histories: list[History] = field(default_factory=list)


def report_of(
    trials: list[Trial],
    failed: dict[str, str],
    judged: Part,
    fold_of: np.ndarray | None,
    *,
    metric: str,
    positive: int | None,
    target: float,
    groups: np.ndarray | None,
    mode: str,
) -> Report:
    """The findings of all trials, best first, on the rows `judged`; `fold_of` [rows of the table] when they were judged in folds."""
    from sklearn.metrics import auc, roc_curve

    truth, names, best = judged.labels, judged.names, trials[0]
    p = probabilities(best.logits)
    matrix = clinical.confusion(truth, p.argmax(1), len(names))
    per_class = clinical.by_class(matrix, names)
    rows = [_line(trial, truth, groups) for trial in trials] + [{"network": name, "failed": why} for name, why in failed.items()]
    figures: dict[str, Any] = {"network": best.name, "rows": len(truth)}
    figures |= {name: rows[0][name] for name in ("accuracy", "balanced_accuracy", "auroc") if name in rows[0]}
    tables: dict[str, list[dict[str, Any]]] = {
        "leaderboard": rows,
        "by class": per_class,
        "averages": clinical.averages(per_class),
        "confusion matrix (rows: true class)": [{"true class": name} | dict(zip(names, row.tolist(), strict=True)) for name, row in zip(names, matrix, strict=True)],
    }
    if positive is not None and best.said is not None:
        found = clinical.rates(best.said, truth == positive)
        limit = clinical.operating_point(p[:, positive], truth == positive, target)
        figures |= {"threshold": limit, "sensitivity": found["sensitivity"], "specificity": found["specificity"]}
        tables["operating point"] = [{"positive class": names[positive], "target_sensitivity": target, "threshold": limit} | found]
    if len(trials) > 1:
        tables["best against next"] = [_compared(trials[0], trials[1], truth, fold_of)]
    if best.probes:
        tables["penalties of the probe"] = best.probes[0].tried
    if any(trial.histories for trial in trials):
        tables["epochs"] = [
            {"network": trial.name, "fold": fold, "epoch": epoch, metric: score} if fold_of is not None else {"network": trial.name, "epoch": epoch, metric: score}
            for trial in trials for fold, history in enumerate(trial.histories, 1) for epoch, score in enumerate(history.validation, 1)
        ]  # fmt: skip
    tables["predictions"] = _predictions(judged, p, fold_of)

    shown = [positive] if positive is not None else [1] if len(names) == 2 else [k for k in range(len(names)) if (truth == k).any()][:6]
    curves = {}
    for k in shown:
        if 0 < (truth == k).sum() < len(truth):
            false, true, _ = roc_curve(truth == k, p[:, k])
            curves[names[k]] = (false, true, float(auc(false, true)))
    pictures = {f"ROC of {best.name}": roc_chart(curves, positive="class")} if curves else {}
    losses = {trial.name: trial.histories[0].loss for trial in trials if trial.histories}
    if losses:
        steps = max(map(len, losses.values()))
        pictures["training loss" + (" of the first fold" if fold_of is not None else "")] = line_chart(losses, x="step", y="loss", smooth=max(1, steps // 20))
        scores = {trial.name: trial.histories[0].validation for trial in trials if trial.histories and trial.histories[0].validation}
        if scores:
            pictures[f"{metric} after each epoch of training, on the rows that stop it"] = line_chart(scores, x="epoch", y=metric.replace("_", " "))
    title = f"{'Fine-tuning' if mode == 'fine-tune' else 'Linear probing'} on {name_of(judged.table)}"
    warnings = [f"{name} could not be adapted: {why}" for name, why in failed.items()]
    return Report(title, figures, tables, _words(trials, failed, judged, fold_of, metric), pictures, warnings)


def _line(trial: Trial, truth: np.ndarray, groups: np.ndarray | None) -> dict[str, Any]:
    """One network's line of the leaderboard."""
    wilson = accuracy_interval(int((trial.logits.argmax(1) == truth).sum()), len(truth))
    intervals = {"accuracy": wilson} | clinical.bootstrap(probabilities(trial.logits), truth, groups)
    line: dict[str, Any] = {"network": trial.name} | metrics(trial.logits, truth)
    if len(trial.scores) > 1:
        line["fold_sd"] = float(np.std(trial.scores, ddof=1))
    if trial.frozen and trial.histories:
        line["frozen"] = float(np.mean(trial.frozen))
    return line | trial.facts | {f"{name} 95 %": f"{low:.3f} to {high:.3f}" for name, (low, high) in intervals.items()}


def _compared(best: Trial, other: Trial, truth: np.ndarray, fold_of: np.ndarray | None) -> dict[str, Any]:
    right, right_other = best.logits.argmax(1) == truth, other.logits.argmax(1) == truth
    found: dict[str, Any] = {"best": best.name, "next": other.name} | clinical.mcnemar(right, right_other)
    if fold_of is not None:
        gains = [float(right[fold_of == fold].mean() - right_other[fold_of == fold].mean()) for fold in np.unique(fold_of)]
        found["p_corrected_t"] = clinical.corrected_t(gains, 1 / (len(gains) - 1))
    return found


def _predictions(judged: Part, p: np.ndarray, fold_of: np.ndarray | None) -> list[dict[str, Any]]:
    """One line per judged row, in the order of the table."""
    files = judged.table["file"] if "file" in judged.table.column_names else None
    truth = judged.labels
    lines = []
    for place, row in enumerate(judged.rows.tolist()):
        line: dict[str, Any] = {"row": row} | ({"file": files[row]} if files is not None else {})
        if fold_of is not None:
            line["fold"] = int(fold_of[row]) + 1
        line |= {"class": judged.names[truth[place]], "predicted": judged.names[int(p[place].argmax())]}
        chosen = range(len(judged.names)) if len(judged.names) <= 20 else [int(p[place].argmax())]
        lines.append(line | {f"p({judged.names[k]})" if len(judged.names) <= 20 else "p(predicted)": float(p[place, k]) for k in chosen})
    return lines


def _words(trials: list[Trial], failed: dict[str, str], judged: Part, fold_of: np.ndarray | None, metric: str) -> str:
    from scipy.stats import spearmanr

    if fold_of is not None:
        said = ["Every row was predicted once, by a network that had not seen it or its fold; figures are of all these predictions together."]
    else:
        said = [f"All figures are on {len(judged.rows)} rows of {name_of(judged.table)} that no network learned from."]
        said.append("The same rows chose epoch, penalty and threshold, so the figures are a little optimistic: measure once more on a test set.")
    if len(trials) + len(failed) > 1:
        said.append(f"The first network is the best of {len(trials)} by {metric.replace('_', ' ')}: a maximum, which promises more than it keeps.")
    if all(trial.frozen and trial.histories for trial in trials) and len(trials) > 2:
        rho = spearmanr([np.mean(trial.frozen) for trial in trials], [np.mean(trial.scores) for trial in trials]).statistic
        said.append(f"Rank correlation between frozen probe and fine-tuning over the networks: {rho:.2f}.")
    frozen, tuned = trials[0].frozen, trials[0].scores
    if frozen and trials[0].histories and np.mean(frozen) >= np.mean(tuned):
        said.append(f"Fine-tuning {trials[0].name} brought nothing over its frozen probe ({np.mean(tuned):.3f} against {np.mean(frozen):.3f}).")
    said.append(f"Classes in order: {', '.join(judged.names[:20])}.")
    return " ".join(said)


def checked(
    best: Trial, splits: list[tuple[Part, Part, Part]], fold_of: np.ndarray | None, judged: Part, groups: np.ndarray | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The table of controls, and a warning for each leak and each shortcut."""
    assert best.network is not None
    learned, pictures = splits[0][0], isinstance(best.network.input, ImageInput)
    a, b = learned.table, judged.table
    same = a is b
    place = fold_of if fold_of is not None else np.isin(np.arange(len(b)), judged.rows).astype(int) if same else None

    def across(i: int, j: int) -> bool:
        return place is None or bool(place[i] != place[j])

    where = "across folds" if fold_of is not None else "in what was learned from and in what is judged"
    exact = {(i, j) for i, j in duplicates(a, b) if across(i, j)}
    warnings = []
    if exact:
        i, j = min(exact)
        warnings.append(f"leak: {len(exact)} pairs of identical examples stand {where} (first: rows {i} and {j}): figures are optimistic")
    table: list[dict[str, Any]] = [{"check": "identical examples", "pairs": len(exact)}]
    if pictures:
        hashes = shortcuts.difference_hash(a)
        near = shortcuts.near_duplicates(hashes, hashes if same else shortcuts.difference_hash(b), same=same)
        near = [(i, j, bits) for i, j, bits in near if across(i, j) and (i, j) not in exact]
        if near:
            i, j, _ = near[0]
            warnings.append(f"leak? {len(near)} pairs of pictures that look almost alike stand {where} (nearest: rows {i} and {j}): look at them")
        table.append({"check": "pictures almost alike", "pairs": len(near)})
    found = float(metrics(best.logits, judged.labels)["balanced_accuracy"])
    for name, p, mostly in _controls(best.network, splits, len(judged.rows), pictures):
        low, high = clinical.bootstrap(p, judged.labels, groups)["balanced_accuracy"]
        value = float(metrics(np.log(p + 1e-12), judged.labels)["balanced_accuracy"])
        table.append({"check": name, "balanced_accuracy": value, "low": low, "high": high, "network": found} | ({"mostly by": mostly} if mostly else {}))
        if value >= found - CONTROL_MARGIN and low > 1 / len(judged.names):
            warnings.append(
                f"shortcut? {name} alone gives balanced accuracy {value:.2f} ({low:.2f} to {high:.2f}), the network {found:.2f}"
                + (f" (mostly by {mostly})" if mostly else "")
                + ": the classes may differ in how the examples were made, not in what they show"
            )
    return table, warnings


def _controls(network: Network, splits: list[tuple[Part, Part, Part]], total: int, pictures: bool) -> list[tuple[str, np.ndarray, str]]:
    """(name, probabilities [N, K] of the judged rows, what decided most) for each control, trained on the same splits."""
    classes = len(splits[0][0].names)
    tables = {id(part.table): part.table for split in splits for part in split}
    facts = {key: shortcuts.metadata(table) for key, table in tables.items()}
    borders = {key: shortcuts.border_features(network, table) for key, table in tables.items()} if pictures else {}
    by_facts, by_border = np.zeros((total, classes)), np.zeros((total, classes))
    columns = next(iter(facts.values()))[1]
    weight = np.zeros(len(columns))
    for learn, stop, judged in splits:
        rows = judged.rows if len(splits) > 1 else np.arange(total)
        by_facts[rows], importance = shortcuts.metadata_classifier(
            facts[id(learn.table)][0][learn.rows], learn.labels, classes, facts[id(judged.table)][0][judged.rows]
        )
        weight += importance
        if pictures:
            chosen = (borders[id(stop.table)][stop.rows], stop.labels)
            head = fit_probe(borders[id(learn.table)][learn.rows], learn.labels, classes, validation=chosen, penalties=PENALTIES[::2])
            by_border[rows] = probabilities(head.logits(borders[id(judged.table)][judged.rows]))
    controls = [("what is known of the files (size, shape, brightness)" if pictures else "the length of the texts", by_facts, columns[int(np.argmax(weight))])]
    return [*controls, ("the outer border of the pictures", by_border, "")] if pictures else controls
