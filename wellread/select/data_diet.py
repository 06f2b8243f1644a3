"""Data diet: which training examples carry the learning, from the errors of a few briefly trained networks (Paul, Ganguli and Dziugaite 2021).

Several networks with different starts are trained for a few epochs; an example's score is the mean size of its error (EL2N) or of its gradient
(GraNd). High scores are hard or mislabelled examples, low ones are learned at once and can go (arXiv 2107.07075; re-examined in arXiv 2303.14753).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor, nn

from wellread import runtime
from wellread.adapt.transfer import AUGMENTS, Augment
from wellread.batches import Batches, network_batches, tensor_batches
from wellread.data import Labelled, class_names, labels
from wellread.errors import BadInput
from wellread.features import example_batch, running, to_device
from wellread.gradients import gradient_norms
from wellread.inputs import ImageInput
from wellread.method import method
from wellread.network import Network
from wellread.results import Scores
from wellread.select.pruning import head, judged, pruning_curve, tables
from wellread.train import fit

MEANING = {
    "el2n": "Distance between the predicted probabilities and the label, 0 to 1.41",
    "grand": "Norm of the example's gradient over all trained parameters",
    "margin": "Probability of the likeliest wrong class minus that of the label, -1 to 1",
    "forgetting": "How often the example was right and then wrong again during training; infinite when it was never right",
}


# --- the scores


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """|| softmax(logits) - one-hot label ||_2 for each example (definition 2.2): float32 [B], 0 to the root of 2.

    logits: [B, C], of any precision; of a model that gives probabilities, their logarithm. labels: classes int64 [B].
    Raises `BadInput` for labels that are not class numbers of 0...C - 1, and for logits that are not finite.
    """
    return _errors(logits, labels).norm(dim=1)


def max_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest wrong probability minus that of the label: float32 [B], -1 to 1; above 0 where the prediction is wrong. Shapes as in `el2n`."""
    error = _errors(logits, labels)
    given = error.gather(1, labels[:, None]).squeeze(1) + 1
    return error.scatter(1, labels[:, None], -torch.inf).amax(1) - given


def grand(module: nn.Module, inputs: Tensor | Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Norm of the gradient of each example's cross-entropy over all trained parameters (definition 2.1), in evaluation mode: float32 [B].

    inputs: [B, ...] or a dict of such tensors, as the module takes them; labels: classes int64 [B]. The module is left as it was.
    Before training it says no more than chance and follows the norm of the input (arXiv 2303.14753): train for some epochs first.
    """
    return gradient_norms(module, inputs, labels)


def _errors(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(logits) - one-hot label in float32: [B, C]."""
    if labels.ndim != 1 or labels.is_floating_point():
        raise BadInput("one class number (int64) is needed for each example: several labels per example, or fractions, have no EL2N")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise BadInput(f"labels run from {int(labels.min())} to {int(labels.max())} and there are {logits.shape[1]} classes: correct the labels")
    bad = (~torch.isfinite(logits).all(1)).nonzero()
    if len(bad):
        raise BadInput(f"the logits of example {int(bad[0])} are not finite: lower the learning rate or look at the example")
    if logits.shape[1] > 1 and bool((logits >= 0).all()) and torch.allclose(logits.float().sum(1), torch.ones(()).to(logits.device), atol=1e-4):
        warnings.warn("these look like probabilities, not logits: give their logarithm", stacklevel=3)
    return logits.float().softmax(1) - nn.functional.one_hot(labels, logits.shape[1])


class ForgettingEvents(nn.Module):
    """Counts, for each of `rows` examples, how often it was classified right and then, when next seen, wrong (Toneva et al. 2019, arXiv 1812.05159).

    A module, so that a training that is stopped and resumed keeps its counts: train nn.ModuleDict({"network": ..., "events": ...}).
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.was_right: Tensor
        self.ever_right: Tensor
        self.events: Tensor
        self.register_buffer("was_right", torch.zeros(rows, dtype=torch.bool))
        self.register_buffer("ever_right", torch.zeros(rows, dtype=torch.bool))
        self.register_buffer("events", torch.zeros(rows, dtype=torch.int64))

    def update(self, index: Tensor, right: Tensor) -> None:
        """Note one batch: row numbers int64 [B], and whether each was right, bool [B]."""
        self.events[index] += self.was_right[index] & ~right
        self.was_right[index] = right
        self.ever_right[index] |= right

    def scores(self) -> Tensor:
        """float32 [N], infinite for an example that was never right."""
        return self.events.float().masked_fill(~self.ever_right, torch.inf)


# --- the method


@method
def data_diet(
    network: Network,
    train: Labelled,
    validation: Labelled | None = None,
    *,
    score: Literal["el2n", "grand", "margin", "forgetting"] = "el2n",
    runs: int = 5,
    epochs: int = 3,
    train_all: bool = False,
    hidden: int = 256,
    learning_rate: float | None = None,
    batch_size: int = 64,
    size: int | None = None,
    augment: Augment = "small+mirror",
    seed: int = 0,
) -> Scores:
    """One number for each training example: how much it still has to teach after a few epochs, which ones can go, and whose label to look at again.

    network: any network that reads the examples; its head is replaced. Features that never saw these labels judge them best.
    train: the examples to be scored, with their labels as they are, right or wrong.
    validation: if given, new heads are trained on the hardest, easiest, random and offset parts of several sizes, and what each loses is reported.
    score: el2n (size of the error) and grand (size of the gradient) are the paper's; margin (error against the likeliest wrong class) and forgetting
        (how often an example is unlearned, for trainings of ten epochs and more) are what it compares with. The others become columns.
    runs: networks with different starts and orders whose scores are averaged; one alone is noisy.
    epochs: passes over the data before scoring; 0 scores untrained heads, which says little.
    train_all: False trains new heads on the frozen features, in seconds; True fine-tunes all layers in each run.
    hidden: width of the hidden layer of the heads on frozen features; 0 makes them linear.
    learning_rate: of AdamW, constant; None is 0.001 for heads and 0.0001 for whole networks.
    batch_size: examples per step.
    size: side of the square that pictures are resized to, in pixels; by default the network's own input.
    augment: of the pictures in training with train_all; scores are always taken on the pictures as they are.
    seed: decides the starts and orders of all runs.

    The values are those of `score`, float32 [N] in the order of `train`: `keep(0.5)` are the hardest half, `highest(100)` the labels to look at first.
    Raises `BadInput` for settings out of range, a network that cannot read the examples or, with train_all, gives no logits once it has a new head,
    and a validation set of other classes; `Diverged` when a training does.
    Source: Paul, Ganguli and Dziugaite, NeurIPS 2021, arXiv 2107.07075. Its networks start from random weights; here the body is pre-trained.
    """
    names = class_names(train)
    _check(score, runs, epochs, hidden, learning_rate, batch_size, seed)
    if validation is not None and class_names(validation) != names:
        raise BadInput(f"validation has the classes {', '.join(class_names(validation)[:6])} and train {', '.join(names[:6])}: they must be the same")
    network = _sized(network, size)
    given = [train] if validation is None else [train, validation]
    frozen = [] if train_all and validation is None else tables(network, *given)
    rate = learning_rate or (1e-4 if train_all else 1e-3)

    def fresh() -> Network:
        if train_all:
            return network.with_head(names)
        return Network(head(frozen[0].x.shape[1], len(names), hidden), architecture={})

    def batches(order: int | None) -> Batches:
        """All rows, shuffled for training or as they are (None) for scoring."""
        shuffle = order is not None
        if train_all:
            changed = AUGMENTS[augment] if shuffle and isinstance(network.input, ImageInput) else None
            return network_batches(network, train, batch_size=batch_size, shuffle=shuffle, seed=order or 0, augment=changed, drop_last=shuffle)
        columns = {"inputs": frozen[0].x, "label": frozen[0].y}
        return tensor_batches(columns, batch_size=batch_size if shuffle else 1024, shuffle=shuffle, seed=order or 0)

    found: list[dict[str, np.ndarray]] = []
    probabilities = np.zeros((len(train), len(names)), np.float32)
    for run in range(runs):
        start = int(np.random.default_rng((seed, run)).integers(2**31))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(start)
            model = fresh()
        if train_all:
            _gives_logits(model, len(names))
        events = ForgettingEvents(len(train))
        if epochs:
            _train(model, events, batches(start), epochs=epochs, learning_rate=rate, seed=start, name=f"run {run + 1} of {runs}")
        scores, p = _scored(model, batches(None), gradients=not train_all or score == "grand")
        found.append({**scores, "forgetting": events.scores().numpy()})
        probabilities += p / runs
    result = _result(found, probabilities, train, score, epochs)
    if validation is not None:
        curve = pruning_curve(result, *frozen, classes=len(names), hidden=hidden, batch_size=batch_size, seed=seed)
        result.tables["accuracy (%) by share kept"] = [*curve]
        result.figures |= judged(curve, len(validation))
    return result


def _check(score: str, runs: int, epochs: int, hidden: int, learning_rate: float | None, batch_size: int, seed: int) -> None:
    for right, sentence in (
        (runs >= 1, f"runs is {runs}: give at least 1"),
        (epochs >= 0, f"epochs is {epochs}: give 0 or more"),
        (hidden >= 0, f"hidden is {hidden}: give 0 (linear heads) or more"),
        (seed >= 0, f"seed is {seed}: give 0 or more"),
        (batch_size >= 2, f"batch_size is {batch_size}: give at least 2"),
        (learning_rate is None or 0 < learning_rate < float("inf"), f"learning_rate is {learning_rate}: give a number above 0"),
        (score != "forgetting" or epochs >= 2, f"forgetting is counted from epoch to epoch, and epochs is {epochs}: give at least 2"),
        (score != "forgetting" or int(os.environ.get("WORLD_SIZE", 1)) == 1, "forgetting is counted in one process: run it without accelerate launch"),
    ):
        if not right:
            raise BadInput(sentence)


def _sized(network: Network, size: int | None) -> Network:
    if size is not None:
        if not isinstance(network.input, ImageInput):
            raise BadInput("size is for pictures, and this network does not read any: leave it out")
        if size < 1:
            raise BadInput(f"size is {size}: give the side of the pictures in pixels")
        network = network.edited(input=network.input.changed(size=(size, size), crop=1.0))
    try:
        with running(network, network.device), torch.inference_mode():
            network(example_batch(network))
    except (RuntimeError, AssertionError, IndexError) as failed:
        raise BadInput(f"the network cannot be fed its input ({str(failed).strip().splitlines()[0][:120]}): give another size or network") from None
    return network


def _gives_logits(model: Network, classes: int) -> None:
    with torch.inference_mode():
        out = model(example_batch(model))
    if tuple(out.shape) != (1, classes):
        raise BadInput(f"with a new head this network gives {list(out.shape)} for one example, not one logit per class: leave train_all out")


def _train(model: Network, events: ForgettingEvents, batches: Batches, **settings: Any) -> None:
    """Train in place at a constant rate, counting what is forgotten."""

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = model(batch["inputs"])
        events.update(batch["index"], logits.detach().argmax(1) == batch["label"])
        return nn.functional.cross_entropy(logits, batch["label"])

    fit(nn.ModuleDict({"network": model.module, "events": events}), batches, step, schedule="constant", **settings)


def _scored(model: Network, batches: Batches, gradients: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each score of each row, [N], with the norm of its input when that is a tensor; and the probabilities [N, C]."""
    parts: dict[str, list[Tensor]] = {}
    device = runtime.device()
    with running(model, device):
        for batch in runtime.track(batches.epoch(0), "scoring", total=len(batches)):
            inputs, y = to_device(batch["inputs"], device), batch["label"].to(device)
            with torch.inference_mode():
                logits = model(inputs)
                scores = {"el2n": el2n(logits, y), "margin": max_margin(logits, y), "p": logits.float().softmax(1)}
            if gradients:
                scores["grand"] = grand(model.module, inputs, y)
            if isinstance(inputs, Tensor):
                scores["input norm"] = inputs.flatten(1).norm(dim=1)
            for name, value in scores.items():
                parts.setdefault(name, []).append(value.cpu())
    found = {name: torch.cat(values).numpy() for name, values in parts.items()}
    return found, found.pop("p")


def _result(found: list[dict[str, np.ndarray]], probabilities: np.ndarray, train: Dataset, score: str, epochs: int) -> Scores:
    """Mean scores with what is to be known about them. found: for each run, each score of each row, [N]."""
    names, given, guess = class_names(train), labels(train), probabilities.argmax(1)
    means: dict[str, np.ndarray] = {name: np.mean([each[name] for each in found], 0).astype(np.float32) for name in found[0]}
    norm, values = means.pop("input norm", None), means.pop(score)
    columns: dict[str, list[Any]] = {"label": [names[c] for c in given], "predicted": [names[c] for c in guess]}
    halves = [np.mean([each[score] for each in found[half::2]], 0) for half in (0, 1)] if len(found) > 1 else None
    agreement = _rank_correlation(*halves) if halves else None
    meaning = (
        f"{MEANING[score]}: mean over {len(found)} runs of {epochs} epochs. High: hard to learn, at the very top often mislabelled; "
        "low: learned at once, the first to leave out."
    )
    files = list(train["file"]) if "file" in train.column_names else None
    result = Scores(values, score, meaning, files, columns | {name: mean.tolist() for name, mean in means.items()})
    figures: dict[str, Any] = {
        "agreement of two halves of the runs": agreement,
        "correlation with the norm of the input": None if norm is None else _rank_correlation(values, norm),
        "labels that the runs contradict": int((guess != given).sum()),
    }
    result.figures = figures
    in_half = np.isin(np.arange(len(given)), result.keep(0.5))
    present = [(name, given == c) for c, name in enumerate(names) if (given == c).any()]
    result.tables["by class"] = [
        {"class": name, "rows": int(of.sum()), "mean score": float(values[of].mean()), "in the hardest half": int(in_half[of].sum()),
         "contradicted": int((guess != given)[of].sum())}
        for name, of in present
    ]  # fmt: skip
    emptied = [name for name, of in present if in_half[of].mean() < 0.2]
    for wrong, sentence in (
        (epochs == 0, "the networks were not trained: such scores follow the input and choose no better than chance (arXiv 2303.14753)"),
        (len(found) == 1, "one run alone is noisy: whether another would agree was not measured"),
        (agreement is not None and agreement < 0.5, f"the runs hardly agree (rank correlation {agreement or 0:.2f}): give more runs or epochs"),
        (bool(emptied), f"the hardest half has less than a fifth of {', '.join(emptied[:5])}: choose inside each class, keep(0.5, labels=...)"),
    ):
        if wrong:
            result.warnings.append(sentence)
    return result


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's; None when one of them is the same everywhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = float(spearmanr(a, b).statistic)
    return found if np.isfinite(found) else None
