"""Predictions of a network and what they are worth, by scikit-learn's metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wellread import runtime
from wellread.batches import network_batches
from wellread.data import class_names, labels, name_of
from wellread.errors import BadInput
from wellread.features import running, to_device

if TYPE_CHECKING:
    from datasets import Dataset

    from wellread.network import Network
    from wellread.results import Report

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "log_loss")


def outputs(network: Network, inputs: Iterable[Any]) -> np.ndarray:
    """float32 outputs for all rows of these inputs (tensors, or dicts of token tensors, a batch each), in order; they may hold nan."""
    device = runtime.device()
    with running(network, device), torch.inference_mode(), runtime.autocast(device):
        return np.concatenate([network(to_device(each, device)).float().cpu().numpy() for each in inputs])


def predict(network: Network, data: Dataset, *, batch_size: int = 64) -> np.ndarray:
    """float32 outputs for every row, in order: logits [N, K], embeddings [N, d] or anomaly scores [N]."""
    batches = network_batches(network, data, batch_size=batch_size, label=False)
    tracked = runtime.track(batches.epoch(0), f"predicting {name_of(data)}", total=len(batches))
    found = outputs(network, (batch["inputs"] for batch in tracked))
    bad = np.flatnonzero(~np.isfinite(found.reshape(len(found), -1)).all(1))
    if len(bad):
        raise BadInput(f"the network's output for row {bad[0]} of {name_of(data)} is not finite: its weights or the input are damaged")
    return found


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def metrics(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """All of METRICS from logits [N, K] and classes [N]. AUROC is of class 1 for two classes, else one against the rest, macro mean."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss, roc_auc_score

    p = probabilities(logits)
    guess = p.argmax(1)
    classes = np.arange(p.shape[1])
    found = {
        "accuracy": accuracy_score(truth, guess),
        "balanced_accuracy": balanced_accuracy_score(truth, guess) if len(np.unique(truth)) > 1 else accuracy_score(truth, guess),
        "macro_f1": f1_score(truth, guess, average="macro", zero_division=0),
        "log_loss": log_loss(truth, p, labels=classes),
    }
    present = np.unique(truth)
    if len(present) == len(classes) == 2:
        found["auroc"] = roc_auc_score(truth, p[:, 1])
    elif len(present) > 1:  # a class without examples has no curve
        found["auroc"] = float(np.mean([roc_auc_score(truth == c, p[:, c]) for c in present]))
    return {name: float(value) for name, value in found.items()}


def score(network: Network, data: Dataset, metric: str = "accuracy") -> float:
    """One figure, higher is better (log_loss comes negated)."""
    if metric not in METRICS:
        raise BadInput(f"the metric {metric!r} is not known: choose {', '.join(METRICS)}")
    found = metrics(predict(network, data), labels(data))
    if metric not in found:
        raise BadInput(f"{metric} cannot be computed on {name_of(data)}: it holds one class only")
    return -found[metric] if metric == "log_loss" else found[metric]


def accuracy_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a proportion."""
    from scipy.stats import binomtest

    found = binomtest(int(correct), int(total)).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def evaluate(network: Network, data: Dataset) -> Report:
    """What `network` is worth on labelled `data`.

    Classifiers: accuracy with its 95 % interval, balanced accuracy, macro F1, AUROC, log loss, one line per class.
    Anomaly scores: AUROC and average precision against "not the first class".
    Raises `BadInput` for a network whose output is neither.
    """
    from wellread.charts import roc_chart
    from wellread.results import Report

    truth, names = labels(data), class_names(data)
    figures: dict[str, Any] = {"rows": len(truth)}
    if network.output == "anomaly_score":
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

        found = predict(network, data)
        strange = truth != names.index(network.labels[0]) if network.labels and network.labels[0] in names else truth != 0
        if len(np.unique(strange)) < 2:
            raise BadInput(f"{name_of(data)} holds only one kind of examples: AUROC needs normal and anomalous ones")
        figures |= {"auroc": float(roc_auc_score(strange, found)), "average_precision": float(average_precision_score(strange, found))}
        threshold = getattr(network.module, "threshold", None)
        if threshold is not None:
            alarm = found > float(threshold)
            figures |= {
                "false_alarm_rate": float(alarm[~strange].mean()),
                "detection_rate": float(alarm[strange].mean()),
                "threshold": float(threshold),
            }
        false, true, _ = roc_curve(strange, found)
        return Report(f"{name_of(data)}: anomaly scores", figures, pictures={"roc": roc_chart({"anomaly score": (false, true, figures["auroc"])})})
    if network.output != "logits":
        raise BadInput(f"this network gives {network.output.replace('_', ' ')}: train a classifier on it first (wellread run transfer ...)")
    logits = predict(network, data)
    if logits.shape[1] < len(names):
        raise BadInput(f"the network has {logits.shape[1]} classes and {name_of(data)} has {len(names)}: they do not belong together")
    if network.labels and list(network.labels[: len(names)]) != names and set(names) <= set(network.labels):
        truth = np.asarray([network.labels.index(name) for name in names])[truth]  # same classes in another order
    elif network.labels and not set(names) <= set(network.labels) and not all(name.isdigit() for name in names):
        raise BadInput(
            f"the network knows {', '.join(network.labels[:5])}... and {name_of(data)} holds {', '.join(names[:5])}...: they do not belong together"
        )
    found_metrics = metrics(logits, truth)
    correct = int((logits.argmax(1) == truth).sum())
    low, high = accuracy_interval(correct, len(truth))
    figures |= found_metrics | {"accuracy_low": low, "accuracy_high": high}
    from sklearn.metrics import precision_recall_fscore_support

    shown = list(network.labels or names)
    precision, recall, f1, support = precision_recall_fscore_support(truth, logits.argmax(1), labels=np.arange(len(shown)), zero_division=0)
    table = [
        {"class": shown[c], "rows": int(support[c]), "precision": float(precision[c]), "recall": float(recall[c]), "f1": float(f1[c])}
        for c in range(len(shown))
        if support[c] or len(shown) <= 100
    ]
    return Report(f"{name_of(data)}: classification", figures, tables={"by class": table})


def record(network: Network, data: Dataset, report: Report) -> None:
    """Note an evaluation in the network, from where it gets into the model card."""
    keep = {name: float(value) for name, value in report.figures.items() if name != "rows" and isinstance(value, int | float)}
    network.measured = [m for m in network.measured if m["data"] != name_of(data)] + [{"data": name_of(data), "rows": len(data), "metrics": keep}]
