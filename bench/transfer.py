"""Transfer to chest films with few labels: pre-trained networks fine-tuned or under a linear head, against the same network from random weights.

Then the checks: photos of deer and horses as they are, and with a shortcut or with copies planted in them.
Run with WELLREAD_DATA naming the folder of data sets; --quick tries it out on little and records nothing.
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture

import wellread
from bench.harness import Expect, record
from wellread.adapt import shortcuts
from wellread.adapt.probe import PENALTIES, basis, class_weights, logistic
from wellread.adapt.splits import fold_numbers
from wellread.adapt.transfer import transfer
from wellread.data import class_names, labels, load_data, rename, subset
from wellread.evaluate import metrics, predict, probabilities
from wellread.features import embed
from wellread.network import Network

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
ROWS, EPOCHS, SIDE, SIDE_CHECKS = (60, 1, 64, 48) if QUICK else (320, 4, 80, 64)
PHOTOS = 120 if QUICK else 600
COPIES = 30 if QUICK else 150

EXPECTS = [
    Expect("the better of fine-tuning and frozen probe is at least 15 points above the same network from random weights (test accuracy)",
           "best_transfer_accuracy_percent - random_start_accuracy_percent", 15.0),
    Expect("sensitivity, precision and F1 are scikit-learn's", "max(difference_from_scikit_learn)", 1e-9, at_least=False),
    Expect("with five folds every row is predicted exactly once", "min(share_predicted_once)", 1.0),
    Expect("all logistic penalties at once agree with scikit-learn one at a time (largest difference of a probability, real features)",
           "max(difference_of_probabilities)", 1e-3, at_least=False),
    Expect("on photos as they are the metadata control is within 10 points of chance (balanced accuracy)", "clean_metadata_control", 0.60, at_least=False),
    Expect("on photos as they are the border control is within 10 points of chance (balanced accuracy)", "clean_border_control", 0.60, at_least=False),
    Expect("on photos as they are no shortcut warning comes", "max(clean_warnings)", 0.0, at_least=False),
    Expect("one class 8 grey levels brighter: the metadata control is above 90 %", "brighter_metadata_control", 0.90),
    Expect("one class 8 grey levels brighter: the warning comes", "min(brighter_warned)", 1.0),
    Expect("one class saved as JPEG, the other as PNG: the metadata control is above 90 %", "format_metadata_control", 0.90),
    Expect("one class saved as JPEG, the other as PNG: the warning comes", "min(format_warned)", 1.0),
    Expect("one class with a thin grey frame: the border control is above 90 %", "frame_border_control", 0.90),
    Expect("one class with a thin grey frame: the warning comes", "min(frame_warned)", 1.0),
    Expect("of planted copies (same, recompressed, brighter) in another fold than their original at least 99 % are found", "copies_found", 0.99),
]  # fmt: skip

figures: dict[str, list[float]] = {}


def note(name: str, value: float) -> None:
    figures.setdefault(name, []).append(float(value))


def some(data: Dataset, rows: int, seed: int) -> Dataset:
    """As many rows as asked for, each class in its share."""
    truth, random = labels(data), np.random.default_rng(seed)
    chosen = [random.permutation(np.flatnonzero(truth == one))[: round(rows * (truth == one).mean())] for one in np.unique(truth)]
    return rename(subset(data, np.sort(np.concatenate(chosen))), f"pneumonia[{rows}]")


def tested(name: str, network: Network, test: Dataset) -> None:
    found = metrics(predict(network, test), labels(test))
    note(f"{name}_accuracy_percent", 100 * found["accuracy"])
    note(f"{name}_balanced_accuracy_percent", 100 * found["balanced_accuracy"])
    note(f"{name}_auroc", found["auroc"])


def chest(seed: int) -> None:
    """Fine-tuned, frozen, without augmentation, and from random weights, on the same few films."""
    films = load_data("pneumonia")
    train, validation, test = some(films["train"], ROWS, seed), some(films["validation"], ROWS // 2, seed), films["test"]
    networks = [wellread.load("efficientnet-lite0"), wellread.load("efficientnet-lite1")]
    common: dict[str, Any] = {"size": SIDE, "seed": seed, "positive": "pneumonia", "checks": False, "patience": None, "epochs": EPOCHS}
    started = time.time()
    probe = transfer(networks, train, validation, mode="probe", **common)
    note("probe_seconds", time.time() - started)
    started = time.time()
    tuned = transfer(networks, train, validation, **common)
    note("fine_tune_seconds", time.time() - started)
    renormed = transfer(networks[:1], train, validation, keep_norm=False, **common)
    plain = transfer(networks[:1], train, validation, augment="none", **common)
    lite0 = transfer(networks[:1], train, validation, mode="probe", **common)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = wellread.load("efficientnet-lite0", pretrained=False)
    random = transfer([fresh], train, validation, keep_norm=False, **common | {"learning_rate": 1e-3})
    random_probe = transfer([fresh], train, validation, mode="probe", **common)
    named = {"fine_tuned": tuned, "probe": probe, "probe_lite0": lite0, "unaugmented_lite0": plain, "updated_norms_lite0": renormed}
    named |= {"random_start": random, "random_probe": random_probe}
    for name, network in named.items():
        tested(name, network, test)
    better = max((tuned, probe), key=lambda each: each.measured[0]["metrics"]["balanced_accuracy"])  # chosen on validation
    note("best_transfer_accuracy_percent", 100 * metrics(predict(better, test), labels(test))["accuracy"])
    report = better.reports["transfer"]
    positive = labels(test) == class_names(test).index("pneumonia")
    said = probabilities(predict(better, test))[:, class_names(test).index("pneumonia")] >= report.figures["threshold"]
    note("test_sensitivity_at_the_chosen_threshold", said[positive].mean())
    note("test_specificity_at_the_chosen_threshold", (~said[~positive]).mean())
    note("difference_from_scikit_learn", against_scikit_learn(report))
    folded = transfer(networks[:1], train, mode="probe", folds=5, **common | {"checks": True}).reports["transfer"]
    rows = [row["row"] for row in folded.tables["predictions"]]
    note("share_predicted_once", len(set(rows)) / len(train) if len(rows) == len(train) else 0)
    note("five_fold_probe_accuracy_percent", 100 * folded.figures["accuracy"])
    control = {row["check"]: row.get("balanced_accuracy") for row in folded.tables["checks"]}
    note("films_metadata_control", control["what is known of the files (size, shape, brightness)"])
    note("films_border_control", control["the outer border of the pictures"])
    note("films_five_fold_balanced_accuracy", folded.figures["balanced_accuracy"])
    note("films_warnings", sum(warning.startswith("shortcut") for warning in folded.warnings))
    source = networks[0].edited(input=networks[0].input.changed(size=(SIDE, SIDE), crop=1.0))  # type: ignore[union-attr]
    one_at_a_time(embed(source, train), labels(train))


def against_scikit_learn(report: Any) -> float:
    from sklearn.metrics import classification_report

    predictions = report.tables["predictions"]
    theirs = classification_report([row["class"] for row in predictions], [row["predicted"] for row in predictions], output_dict=True, zero_division=0)
    pairs = [(row, theirs[row["class"]]) for row in report.tables["by class"]]
    pairs += [(row, theirs[f"{row['average']} avg"]) for row in report.tables["averages"]]
    names = (("precision", "precision"), ("sensitivity", "recall"), ("f1", "f1-score"))
    return max(abs(np.nan_to_num(ours[a]) - other[b]) for ours, other in pairs for a, b in names)


def one_at_a_time(features: np.ndarray, truth: np.ndarray) -> None:
    """All penalties at once against scikit-learn's solver, penalty after penalty, at a tolerance that gives the same probabilities."""
    from sklearn.linear_model import LogisticRegression

    started = time.time()
    weights = class_weights(truth, 2)[truth]
    found = basis(features, weights)
    weight, bias = logistic(found, torch.from_numpy(truth), 2, PENALTIES)
    note("all_penalties_seconds", time.time() - started)
    started, worst = time.time(), 0.0
    standard = ((torch.from_numpy(features.astype(np.float64)) - found.mean) / found.scale).numpy()
    for number, penalty in enumerate(PENALTIES):
        theirs = LogisticRegression(C=2 / (len(truth) * penalty), tol=1e-6, max_iter=5000).fit(standard, truth, sample_weight=weights)
        ours = torch.softmax(found.coordinates @ weight[number] + bias[number], 1).numpy()
        worst = max(worst, float(np.abs(ours - theirs.predict_proba(standard)).max()))
    note("one_at_a_time_seconds", time.time() - started)
    note("difference_of_probabilities", worst)


def photos(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Deer (0) and horses (1) of CIFAR-10, uint8 [32, 32, 3] each, and their classes."""
    data = load_data("cifar10:train")
    truth, names = labels(data), class_names(data)
    random = np.random.default_rng(seed)
    rows = np.concatenate([random.permutation(np.flatnonzero(truth == names.index(name)))[: PHOTOS // 2] for name in ("deer", "horse")])
    order = random.permutation(rows)
    return [np.asarray(image) for image in subset(data, order)["image"]], (truth[order] == names.index("horse")).astype(int)


def saved(image: np.ndarray, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Picture.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def table(images: list[dict[str, Any]], truth: np.ndarray, name: str) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=["deer", "horse"])})
    return rename(Dataset.from_dict({"image": images, "label": truth.tolist()}, features=features), name)


def planted(seed: int) -> None:
    """The controls on photos as they are, and with one class made differently."""
    images, truth = photos(seed)
    first = len(images) * 2 // 3

    def framed(image: np.ndarray) -> np.ndarray:
        image = image.copy()
        image[0], image[-1], image[:, 0], image[:, -1] = 128, 128, 128, 128
        return image

    made = {
        "clean": [saved(image) for image in images],
        "brighter": [saved(image.astype(int) + 8 * k) for image, k in zip(images, truth, strict=True)],
        "format": [saved(image, "JPEG", quality=90) if k else saved(image) for image, k in zip(images, truth, strict=True)],
        "frame": [saved(framed(image) if k else image) for image, k in zip(images, truth, strict=True)],
    }
    network = wellread.load("efficientnet-lite0")
    for name, content in made.items():
        train, validation = table(content[:first], truth[:first], f"{name}:train"), table(content[first:], truth[first:], f"{name}:validation")
        report = transfer([network], train, validation, mode="probe", size=SIDE_CHECKS).reports["transfer"]
        controls = [row for row in report.tables["checks"] if "balanced_accuracy" in row]
        note(f"{name}_metadata_control", controls[0]["balanced_accuracy"])
        note(f"{name}_border_control", controls[1]["balanced_accuracy"])
        note(f"{name}_network", controls[0]["network"])
        which = {"brighter": "what is known", "format": "what is known", "frame": "outer border"}.get(name, "")
        came = [warning for warning in report.warnings if warning.startswith("shortcut") and which in warning]
        note(f"{name}_warned" if which else f"{name}_warnings", bool(came) if which else len(came))


def copies(seed: int) -> None:
    """Copies of some photos among the others, five folds: how many pairs that were torn apart the two detectors find together."""
    images, truth = photos(seed + 10)
    how = [saved, lambda image: saved(image, "JPEG", quality=85), lambda image: saved(image.astype(float) * 1.1)]
    content = [saved(image) for image in images] + [how[n % 3](images[n]) for n in range(COPIES)]
    data = table(content, np.r_[truth, truth[:COPIES]], "copies")
    fold = fold_numbers(labels(data), 5, seed=seed)
    hashes = shortcuts.difference_hash(data)
    found = {(i, j) for i, j, _ in shortcuts.near_duplicates(hashes, hashes, same=True)}
    torn = {(n, len(images) + n) for n in range(COPIES) if fold[n] != fold[len(images) + n]}
    note("copies_found", len(torn & found) / len(torn))
    note("pairs_named_that_are_no_copies", len([pair for pair in found if pair[1] - pair[0] != len(images)]))


if __name__ == "__main__":
    for seed in SEEDS:
        for part in (chest, planted, copies):
            began = time.time()
            part(seed)
            print(f"seed {seed}, {part.__name__}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    if QUICK:
        for name, values in figures.items():
            print(f"{name:50} {np.round(values, 4)}")
        for expect in EXPECTS:
            print(expect.result(figures))
    else:
        baselines = {name: figures.pop(name) for name in [each for each in figures if each.startswith(("random_", "unaugmented_", "updated_norms_", "one_at_a_time"))]}
        record(
            "transfer",
            figures=figures,
            baselines=baselines,
            expects=EXPECTS,
            claims_tested=["two-class chest films: accuracy of fine-tuned networks (here normal against pneumonia, 28 x 28 pixels, other data)"],
            sizes={
                "train_rows": ROWS, "validation_rows": ROWS // 2, "test_rows": 624, "epochs": EPOCHS, "pixels": SIDE,
                "networks": ["efficientnet-lite0", "efficientnet-lite1"], "photos": PHOTOS, "photo_pixels": SIDE_CHECKS, "copies": COPIES,
            },
            seeds=SEEDS,
            notes=[
                "The films are PneumoniaMNIST, enlarged from 28 x 28; its test films come from another split than train and validation and are harder.",
            ],
        )  # fmt: skip
