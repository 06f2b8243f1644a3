"""Which pre-trained network to adapt to a small labelled set, and what may honestly be claimed for it.

A working form of the benchmark of Chowdhury et al. 2020 (arXiv 2003.13145): several networks, fine-tuned or frozen under a linear head, compared
on rows that none of them learned from, with clinical metrics, paired tests, and checks for leaks and shortcuts. Fine-tuning starts from the
linear probe, so that the first steps do not spoil the features (Kumar et al. 2022, arXiv 2202.10054).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from wellread import runtime
from wellread.adapt import clinical
from wellread.adapt.leaderboard import Trial, checked, report_of
from wellread.adapt.probe import Probe, class_weights, fit_probe
from wellread.adapt.splits import Part, group_of, splits_of
from wellread.batches import network_batches
from wellread.data import Labelled, class_names, fingerprint, name_of, subset
from wellread.errors import BadInput
from wellread.evaluate import accuracy_interval, metrics, predict, probabilities
from wellread.features import example_batch, running, to_device
from wellread.inputs import ImageInput
from wellread.method import method
from wellread.network import Network
from wellread.structure import layer_of
from wellread.train import History, fit

Augment = Literal["none", "small", "small+mirror", "small+flips"]
Metric = Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc", "log_loss"]


# --- training


def augmented(images: Tensor, *, degrees: float = 10, shift: float = 0.1, zoom: float = 0.1, mirror: bool = False, upside_down: bool = False) -> Tensor:
    """Each picture turned, moved and scaled by its own random amount; the edges are reflected into what comes free.

    images: uint8 [B, C, H, W]. degrees: largest turn; shift: largest move, as a share of each side; zoom: largest change of scale.
    mirror, upside_down: exchange left and right, top and bottom, of half of the pictures.
    torchvision's transforms draw one amount for a whole batch; here every picture has its own.
    """
    count, (height, width) = len(images), images.shape[-2:]

    def draw(largest: float) -> Tensor:
        return (torch.rand(count) * 2 - 1) * largest

    angle, scale = torch.deg2rad(draw(degrees)), 1 / (1 + draw(zoom))
    across, down = (torch.where(torch.rand(count) < 0.5, -1.0, 1.0) if wanted else torch.ones(count) for wanted in (mirror, upside_down))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    ratio = height / width  # the grid runs from -1 to 1 along both sides, so a turn of a picture that is not square needs it
    rows = [torch.stack([across * cos, -across * sin * ratio, draw(2 * shift)], 1), torch.stack([down * sin / ratio, down * cos, draw(2 * shift)], 1)]
    grid = nn.functional.affine_grid(torch.stack(rows, 1).to(images.device), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)


AUGMENTS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "small": augmented,
    "small+mirror": partial(augmented, mirror=True),
    "small+flips": partial(augmented, mirror=True, upside_down=True),
}


def with_probe(network: Network, names: Sequence[str], probe: Probe) -> Network:
    """A copy of the network whose head is the probe: a plain classifier of these classes."""
    other = network.with_head(names)
    head = layer_of(other.module, other.head or "")
    with torch.no_grad():
        head.weight.copy_(probe.weight)  # type: ignore[operator,union-attr]
        head.bias.copy_(probe.bias)  # type: ignore[operator,union-attr]
    return other


def fine_tune(
    network: Network,
    train: Part,
    validation: Part | None,
    *,
    epochs: int,
    learning_rate: float = 1e-4,
    head_learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    batch_size: int = 32,
    augment: Augment = "small",
    balance: bool = True,
    label_smoothing: float = 0.0,
    keep_norm: bool = True,
    patience: int | None = 3,
    metric: Metric = "balanced_accuracy",
    seed: int = 0,
    name: str = "fine-tuning",
) -> History:
    """Train all layers of a classifier in place: AdamW, one rate for the body and one for the head, the epoch that is best on validation.

    The rates rise over the first tenth of the steps (at full size Adam's first steps would throw away the head that was solved for), then a cosine.

    Without validation it trains for all epochs. Vectors (biases, norms) have no weight decay. Pictures of `validation` are never augmented.
    keep_norm: batch norms go on using (and keep) the means and variances that they came with, as they did when the head was solved for.
    """
    picture = isinstance(network.input, ImageInput)
    batches = network_batches(
        network, train.data, batch_size=batch_size, shuffle=True, seed=seed, augment=AUGMENTS[augment] if picture else None, drop_last=True
    )
    by_class = torch.from_numpy(class_weights(train.labels, len(train.names))).float() if balance else None

    norms = [layer for layer in network.module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats]

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        for layer in norms if keep_norm else ():
            layer.eval()
        target = batch["label"]
        loss = nn.functional.cross_entropy(network(batch["inputs"]), target, reduction="none", label_smoothing=label_smoothing)
        return (loss if by_class is None else loss * by_class.to(target.device)[target]).mean()

    def validate(module: nn.Module) -> float:
        assert validation is not None
        with runtime.using(progress=False):
            return _score(predict(network, validation.data), validation.labels, metric)

    head = set(layer_of(network.module, network.head or "").parameters())
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in network.module.parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter in head, parameter.ndim > 1), []).append(parameter)
    rates = [
        {"params": found, "lr": head_learning_rate if in_head else learning_rate, "weight_decay": weight_decay if decays else 0.0}
        for (in_head, decays), found in groups.items()
    ]
    return fit(
        network.module,
        batches,
        step,
        epochs=epochs,
        learning_rate=learning_rate,
        warmup=0.1,
        parameters=rates,
        validate=validate if validation is not None else None,
        patience=patience if validation is not None else None,
        seed=seed,
        name=name,
    )


def _score(logits: np.ndarray, truth: np.ndarray, metric: Metric) -> float:
    """Higher is better."""
    found = metrics(logits, truth)
    return -found["log_loss"] if metric == "log_loss" else found.get(metric, found["accuracy"])  # no AUROC for a part of one class


# --- one network on all splits


def _tried(
    name: str,
    network: Network,
    splits: list[tuple[Part, Part, Part]],
    *,
    tune: Callable[..., History] | None,
    solve: Callable[..., Probe],
    metric: Metric,
    positive: int | None,
    target_sensitivity: float,
) -> Trial:
    names = splits[0][0].names
    total = sum(len(judged.rows) for _, _, judged in splits)
    trial = Trial(name, np.full((total, len(names)), np.nan, np.float32), network=network)
    at = [np.arange(total)] if len(splits) == 1 else [judged.rows for _, _, judged in splits]
    trial.said = None if positive is None else np.zeros(total, bool)
    # a head that was trained for these classes is kept, except inside folds, where it would know the judged rows
    keep = tune is not None and len(splits) == 1 and network.output == "logits" and tuple(network.labels or ()) == names
    for number, (rows, (train, stop, judged)) in enumerate(zip(at, splits, strict=True), 1):
        if keep:
            adapted = network.copy()
        else:
            probe = solve(train.features(network), train.labels, len(names), validation=(stop.features(network), stop.labels))
            adapted = with_probe(network, names, probe)
            trial.probes.append(probe)
            trial.logits[rows], stop_logits = probe.logits(judged.features(network)), probe.logits(stop.features(network))
            trial.frozen.append(_score(trial.logits[rows], judged.labels, metric))
        if tune is not None:
            title = f"fine-tuning {name}" + (f", fold {number} of {len(splits)}" if len(splits) > 1 else "")
            trial.histories.append(tune(adapted, train, stop, name=title))
            trial.logits[rows] = predict(adapted, judged.data)
            stop_logits = trial.logits[rows] if stop is judged else predict(adapted, stop.data)
        trial.scores.append(_score(trial.logits[rows], judged.labels, metric))
        if positive is not None and trial.said is not None:
            limit = clinical.operating_point(probabilities(stop_logits)[:, positive], stop.labels == positive, target_sensitivity)
            trial.said[rows] = probabilities(trial.logits[rows])[:, positive] >= limit
        if number == 1:
            pixels = {"pixels": "{} x {}".format(*network.input.size)} if isinstance(network.input, ImageInput) else {}
            size = sum(parameter.numel() for parameter in network.module.parameters()) / 1e6
            trial.facts = {**pixels, "million_parameters": size, "ms_per_example": milliseconds(adapted, judged.data)}
    trial.adapted = adapted if len(splits) == 1 else None
    return trial


def milliseconds(network: Network, data: Dataset, rows: int = 32, repeats: int = 3) -> float:
    """Time of a forward pass for one row of a batch of `rows`, after one that is not counted; the fastest of some."""
    device, times = runtime.device(), []
    batches = network_batches(network, subset(data, range(min(rows, len(data)))), batch_size=rows, label=False)
    with running(network, device), torch.inference_mode(), runtime.autocast(device):
        batch = to_device(next(batches.epoch(0))["inputs"], device)
        for _ in range(repeats + 1):
            started = time.perf_counter()
            network(batch).sum().item()  # the number must arrive: a GPU works on after the call
            times.append(time.perf_counter() - started)
    return 1000 * min(times[1:]) / batches.rows


def _refitted(trial: Trial, everything: Part, *, tune: Callable[..., History] | None, solve: Callable[..., Probe]) -> Network:
    """The network on all rows, with the median penalty and the median best epoch of the folds."""
    assert trial.network is not None
    penalty = float(np.exp(statistics.median(np.log(probe.penalty) for probe in trial.probes)))
    head = solve(everything.features(trial.network), everything.labels, len(everything.names), penalties=(penalty,))
    adapted = with_probe(trial.network, everything.names, head)
    if tune is not None:
        best = [(history.best_epoch or 0) + 1 for history in trial.histories]
        trial.histories.append(tune(adapted, everything, None, epochs=round(statistics.median(best)), name=f"fine-tuning {trial.name} on all rows"))
    return adapted


# --- the method


@method
def transfer(
    networks: list[Network],
    train: Labelled,
    validation: Labelled | None = None,
    *,
    mode: Literal["fine-tune", "probe"] = "fine-tune",
    folds: int = 0,
    epochs: int = 10,
    learning_rate: float = 1e-4,
    head_learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    batch_size: int = 32,
    augment: Augment = "small",
    size: int | None = None,
    probe: Literal["logistic", "ridge"] = "logistic",
    balance: bool = True,
    label_smoothing: float = 0.0,
    keep_norm: bool = True,
    patience: int | None = 3,
    metric: Metric = "balanced_accuracy",
    positive: str | None = None,
    target_sensitivity: float = 0.95,
    group: str | None = None,
    checks: bool = True,
    seed: int = 0,
) -> Network:
    """The pre-trained network that adapts best to your labelled examples, adapted, with a report of what may be claimed for it.

    networks: one or several, for pictures or text; their heads are exchanged for one of your classes. One that fails does not stop the others.
    train: what is learned from.
    validation: decides epochs, penalties and the winner, so figures on it are a little optimistic; keep a test set apart. Without it (and
        without folds) a fifth of train is held out, class by class, always the same rows.
    mode: "fine-tune" trains every layer, from the linear probe on; "probe" solves for a linear head on frozen features, in seconds.
    folds: 0, or k for k-fold cross-validation on train: every row is predicted once by a network that has not seen it, then the best
        network is trained on all rows. A tenth of the rest of each fold decides epochs and penalties; validation, if given, is left for a last look.
    epochs: passes over train, at most.
    learning_rate: of the body, at the top of a cosine after a short rise.
    head_learning_rate: of the head.
    weight_decay: of matrices and kernels.
    batch_size: rows per step.
    augment: of training pictures: "small" turns (10 degrees), moves (10 %) and scales (10 %); "small+mirror" also exchanges left and right,
        "small+flips" also top and bottom. Text is never augmented.
    size: side in pixels to which whole pictures are resized; by default as each network was made. The network keeps it.
    probe: the loss of the linear head: "logistic", penalty chosen by log loss on validation, or "ridge", by leave-one-out error.
    balance: every class counts the same in the loss, n / (K n_k) per row.
    label_smoothing: between 0 and 1.
    keep_norm: batch norms keep the means and variances that they came with; say no for a network with fresh weights, or far more data.
    patience: stop after so many epochs that are not better on validation.
    metric: what chooses the epoch and the winner.
    positive: the class whose sensitivity and specificity are reported at an operating point.
    target_sensitivity: of the operating point, reached on the rows that chose it.
    group: the column whose equal values (a patient, a photo session) must not be split; for folds, the held-out fifth and the intervals.
    checks: look for duplicates across splits, and for classes that border or metadata alone give away.
    seed: of batches, augmentation and folds. The probe, hence the head that fine-tuning starts from, does not depend on it: networks fine-tuned
        with several seeds have one starting point and can be averaged.

    The findings are in `reports["transfer"]`: leaderboard with 95 % intervals, per-class figures, confusion matrix, curves, predictions row by row.
    Raises `BadInput` for settings, classes, groups or sizes that cannot be used, before any training; `Diverged` when a single network's loss does.
    Source: arXiv 2003.13145; linear probing before fine-tuning: arXiv 2202.10054.
    """
    for right, sentence in (
        (folds == 0 or folds >= 2, f"folds is {folds}: give 0 for a held-out part, or at least 2"),
        (epochs >= 1, f"epochs is {epochs}: give at least 1"),
        (learning_rate > 0 and head_learning_rate > 0, "learning_rate and head_learning_rate must be above 0"),
        (weight_decay >= 0, f"weight_decay is {weight_decay}: give at least 0"),
        (batch_size >= 2, f"batch_size is {batch_size}: give at least 2"),
        (size is None or size >= 8, f"size is {size}: give the side of the pictures in pixels, at least 8"),
        (0 <= label_smoothing < 1, f"label_smoothing is {label_smoothing}: give at least 0 and less than 1"),
        (patience is None or patience >= 1, f"patience is {patience}: give at least 1 epoch, or None"),
        (0 < target_sensitivity <= 1, f"target_sensitivity is {target_sensitivity}: give a share above 0, at most 1"),
        (seed >= 0, f"seed is {seed}: give at least 0"),
    ):
        if not right:
            raise BadInput(sentence)
    names = tuple(class_names(train))
    if positive is not None and positive not in names:
        raise BadInput(f"positive is {positive!r}, and the classes are {', '.join(names[:10])}: name one of them")
    splits, fold_of, warnings = splits_of(train, validation, names, folds, group, seed)
    judged = splits[0][2] if not folds else Part(train, np.arange(len(train)), names)
    titles = _titles(networks)
    for index in range(len(networks)):
        _usable(networks[index], size, splits[0][0].table)

    solve = partial(fit_probe, kind=probe, balance=balance)
    tune = partial(
        fine_tune, epochs=epochs, learning_rate=learning_rate, head_learning_rate=head_learning_rate, weight_decay=weight_decay,
        batch_size=batch_size, augment=augment, balance=balance, label_smoothing=label_smoothing, keep_norm=keep_norm, patience=patience, metric=metric, seed=seed,
    ) if mode == "fine-tune" else None  # fmt: skip
    number = None if positive is None else names.index(positive)
    trials: list[Trial] = []
    failed: dict[str, str] = {}
    for index, title in enumerate(titles):
        try:
            network = _sized(networks[index], size, names)
            trial = _tried(title, network, splits, tune=tune, solve=solve, metric=metric, positive=number, target_sensitivity=target_sensitivity)
        except Exception as failure:  # whatever one network cannot do must not cost the work on the others
            if len(titles) == 1:
                raise
            failed[title] = " ".join(str(failure).split()) or type(failure).__name__
            continue
        trials.append(trial)
        trials.sort(key=lambda each: (-_score(each.logits, judged.labels, metric), metrics(each.logits, judged.labels)["log_loss"], each.name))
        for beaten in trials[1:]:
            beaten.adapted = beaten.network = None
    if not trials:
        raise BadInput("no network could be adapted: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    best = trials[0]
    adapted = best.adapted or _refitted(best, Part(train, np.arange(len(train)), names), tune=tune, solve=solve)

    groups = None if group is None or group not in judged.table.column_names else group_of(judged.table, group)[judged.rows]
    report = report_of(trials, failed, judged, fold_of, metric=metric, positive=number, target=target_sensitivity, groups=groups, mode=mode)
    if best.network is not None and _seen(best.network, judged.table, folds, group):
        warnings.append(f"{best.name} was trained on {name_of(judged.table)} before: figures on it say nothing about new examples")
    if checks:
        table, found = checked(best, splits, fold_of, judged, groups)
        report.tables["checks"] = table
        warnings = found + warnings
    report.warnings = warnings + report.warnings
    if folds and validation is not None:
        last = Part(validation, np.arange(len(validation)), names)
        report.tables["last look at validation"] = [metrics(predict(adapted, validation), last.labels)]
    adapted.reports = {"transfer": report}
    where = name_of(judged.table) + (f", {folds} folds" if folds else "" if validation is not None else ", a fifth held out")
    chosen = metrics(best.logits, judged.labels)
    low, high = accuracy_interval(int((best.logits.argmax(1) == judged.labels).sum()), len(judged.labels))
    adapted.measured = [{"data": where, "rows": len(judged.rows), "metrics": chosen | {"accuracy_low": low, "accuracy_high": high}}]
    return adapted


# --- before


def _titles(networks: Sequence[Network]) -> list[str]:
    """A name for each network, all different."""
    found: list[str] = []
    for index in range(len(networks)):
        given = networks.given[index] if hasattr(networks, "given") else networks[index]
        if isinstance(given, Network):
            architecture = given.architecture or {}
            loaded = next((each["settings"].get("name") for each in given.lineage if each["method"] == "load"), None)
            given = loaded or architecture.get("name") or type(given.module).__name__
        name = str(given)
        found.append(name if name not in found else f"{name} ({index + 1})")
    return found


def _usable(network: Network, size: int | None, table: Dataset) -> None:
    """What can be said of a network before any of them is trained."""
    network.check_finite()
    if network.input is None:
        raise BadInput("this network does not say how it is fed: make it with Network(module, input=ImageInput(...)) or TextInput(...)")
    if network.input.column not in table.column_names:
        raise BadInput(f"one network reads a column {network.input.column!r} and train has {', '.join(table.column_names)}: give networks for these data")
    if size is not None and not isinstance(network.input, ImageInput):
        raise BadInput("size is of pictures, and one network reads text: leave it out")


def _seen(network: Network, judged: Dataset, folds: int, group: str | None) -> bool:
    """Whether an earlier step learned from the rows judged now. The fifth that transfer holds out is the same each time, hence unseen."""
    rows = fingerprint(judged)
    for each in network.lineage:
        roles = {data["argument"]: data["fingerprint"] for data in each["data"]}
        settings = each["settings"]
        held = each["method"] == "transfer" and "validation" not in roles and not settings.get("folds") and settings.get("group") == group
        if roles.get("train") == rows and not (held and not folds):
            return True
    return False


def _sized(network: Network, size: int | None, names: tuple[str, ...]) -> Network:
    """The network fed at this size. Raises `BadInput` when it cannot be, or does not give one row of logits for each example."""
    if size is not None and isinstance(network.input, ImageInput):
        network = network.edited(input=network.input.changed(size=(size, size), crop=1.0))
    trial = network.with_head(names)
    try:
        with torch.inference_mode():
            shape = tuple(trial(example_batch(trial)).shape)
    except (RuntimeError, AssertionError, ValueError) as failed:
        at = f" pictures of {size} x {size}" if size else " its own input"
        raise BadInput(f"this network cannot take{at} ({str(failed).strip().splitlines()[0][:120]}): leave size out or choose another network") from None
    if shape != (1, len(names)):
        raise BadInput(f"with a head for {len(names)} classes this network gives {list(shape)} for one example: name the layer that should be its head")
    return network
