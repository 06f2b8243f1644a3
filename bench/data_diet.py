"""Data diet on CIFAR-10 (JPEG photos): wrong labels found, what can be left out, scores across networks, and the speed of gradient norms.

Heads of one hidden layer on frozen features of EfficientNet-Lite0 (and Lite1) at 96 pixels; every run of every baseline uses the same features.

    python -m bench.data_diet [--quick]       quick: few rows, one seed, nothing kept
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from bench.harness import Expect, record
from wellread import load, load_data
from wellread.batches import tensor_batches
from wellread.data import labels, subset
from wellread.features import embed
from wellread.gradients import gradient_norms
from wellread.runtime import using
from wellread.select.data_diet import data_diet, max_margin
from wellread.select.pruning import FRACTIONS, RULES, crossing, head, pruning_curve, tables
from wellread.train import fit

SEEDS = (0, 1, 2)
SIZE, ROWS, TEST_ROWS = 96, 8000, 4000
CURVE: dict[str, Any] = {"classes": 10, "epochs": 6, "batch_size": 128}

EXPECTS = [
    Expect("flipped labels: area under the ROC curve of EL2N", "noise_auroc_el2n", 0.90),
    Expect("flipped labels: EL2N of five runs is at least as good as the loss of one", "noise_auroc_el2n - noise_auroc_loss_of_one_run", 0.0),
    Expect("flipped labels: the norm of the input is no better than chance", "abs(noise_auroc_input_norm - 0.5)", 0.05, False),
    Expect("flipped labels: untrained GraNd is no better than chance", "abs(noise_auroc_untrained_grand - 0.5)", 0.05, False),
    Expect("70 % kept: the hardest are at most 0.3 points below random ones", "percent_hardest_70 - percent_random_70", -0.3),
    Expect("70 % kept: the easiest are at least 1 point below random ones", "percent_random_70 - percent_easiest_70", 1.0),
    Expect("rank correlation of the scores of two networks", "transfer_spearman", 0.6),
    Expect("GraNd of the head is 10 times as fast as one backward pass each", "head_speedup", 10),
    Expect("GraNd of a small CNN on 8 x 8 pictures is 10 times as fast", "cnn_8x8_speedup", 10),
    Expect("GraNd of a small CNN on 32 x 32 photos costs at most 3 ordinary passes of the batch", "cnn_32x32_cost_in_passes", 3, False),
]


def flipped(data: Dataset, share: float, seed: int) -> tuple[Dataset, np.ndarray]:
    """The table with a share of its labels exchanged for another class, and which, bool [N]. The order of the rows stays."""
    random = np.random.default_rng(seed)
    values, classes = labels(data).copy(), len(data.features["label"].names)
    rows = random.permutation(len(values))[: round(share * len(values))]
    values[rows] = (values[rows] + random.integers(1, classes, len(rows))) % classes
    table = data.remove_columns("label").add_column("label", values.tolist())  # type: ignore[call-arg]
    return table.cast_column("label", data.features["label"]), np.isin(np.arange(len(values)), rows)


def fitted(x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """One head, trained as data_diet trains its runs."""
    torch.manual_seed(seed)
    network = head(x.shape[1], 10, 256)
    batches = tensor_batches({"inputs": x, "label": y}, batch_size=64, shuffle=True, seed=seed)
    step = lambda module, batch: nn.functional.cross_entropy(module(batch["inputs"]), batch["label"])  # noqa: E731
    fit(network, batches, step, epochs=epochs, learning_rate=1e-3, schedule="constant", seed=seed)
    return network.eval()


def out_of_fold(x: Tensor, y: Tensor, seed: int) -> np.ndarray:
    """Margin of each row against a head that did not learn from it (five folds): what confident learning ranks label errors by."""
    found = np.zeros(len(y))
    for learn, judge in StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y):
        with torch.no_grad():
            found[judge] = max_margin(fitted(x[learn], y[learn], 3, seed)(x[judge]), y[judge])
    return found


def noise(encoder: object, data: Dataset, seed: int) -> dict[str, float]:
    """How well each score tells flipped labels from others: areas under ROC curves."""
    table, wrong = flipped(data, 0.1, seed)
    [train] = tables(encoder, table)  # type: ignore[arg-type]
    scores = data_diet(encoder, table, seed=seed)
    untrained = data_diet(encoder, table, score="grand", epochs=0, runs=2, seed=seed)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(fitted(train.x, train.y, 3, seed)(train.x), train.y, reduction="none")
    found = {
        "el2n": scores.values,
        "grand": scores.columns["grand"],
        "max_margin": scores.columns["margin"],
        "forgetting": np.nan_to_num(scores.columns["forgetting"], posinf=1e9),
        "loss_of_one_run": loss,
        "out_of_fold_margin": out_of_fold(train.x, train.y, seed),
        "untrained_grand": untrained.values,
        "input_norm": np.linalg.norm(embed(encoder, table), axis=1),  # type: ignore[arg-type]
        "random": np.random.default_rng(seed).random(len(wrong)),
    }
    areas = {name: float(roc_auc_score(wrong, values)) for name, values in found.items()}
    assert scores.figures["agreement of two halves of the runs"] is not None
    return {
        **areas,
        "agreement": float(scores.figures["agreement of two halves of the runs"]),
        "precision": float(wrong[scores.highest(int(wrong.sum()))].mean()),
        "untrained_norm": float(untrained.figures["correlation with the norm of the input"]),
    }


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of several calls, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def one_by_one(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradient norms [B] as one would write them."""
    parameters, found = list(module.parameters()), []
    for row in range(len(y)):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(module(x[row : row + 1]), y[row : row + 1]), parameters)
        found.append(torch.cat([g.flatten() for g in gradients]).norm())
    return torch.stack(found)


def speed(module: nn.Module, x: Tensor) -> tuple[float, float]:
    """How many times faster gradient norms are than one backward pass each, and how many ordinary passes of the batch they cost."""
    torch.manual_seed(0)
    y = torch.randint(0, 10, (len(x),))
    module.eval()
    fast = seconds(lambda: gradient_norms(module, x, y), 9)
    slow = seconds(lambda: one_by_one(module, x[:64], y[:64]), 3) * len(x) / 64
    passes = seconds(lambda: torch.autograd.grad(nn.functional.cross_entropy(module(x), y), list(module.parameters())), 9)
    return slow / fast, fast / passes


def small_cnn(channels: int, width: int) -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]

    first, second, third = block(channels, width), block(width, 2 * width), block(2 * width, 4 * width)
    return nn.Sequential(
        *first, nn.MaxPool2d(2), *second, nn.MaxPool2d(2), *third, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)
    )


def main(quick: bool) -> None:
    rows, test_rows, seeds = (600, 300, SEEDS[:1]) if quick else (ROWS, TEST_ROWS, SEEDS)
    parts = load_data("cifar10")
    random = np.random.default_rng(0)
    data, test = (subset(parts[split], random.permutation(len(parts[split]))[:n]) for split, n in (("train", rows), ("test", test_rows)))
    encoders = {}
    for name in ("efficientnet-lite0", "efficientnet-lite1"):
        network = load(name)
        encoders[name] = network.edited(input=network.input.changed(size=(SIZE, SIZE), crop=1.0))  # type: ignore[union-attr]
    first, second = encoders.values()
    train_table, test_table = tables(first, data, test)
    embed(second, data)

    figures: dict[str, list[float] | float] = {}
    baselines: dict[str, list[float] | float] = {}
    torch.manual_seed(0)
    images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in data.select(range(256))["image"]]) / 255
    small = torch.nn.functional.interpolate(images.mean(1, keepdim=True), size=8)
    figures["head_speedup"], _ = speed(head(train_table.x.shape[1], 10, 256), train_table.x[:1024])
    figures["cnn_8x8_speedup"], _ = speed(small_cnn(1, 16), small)
    figures["cnn_32x32_speedup"], figures["cnn_32x32_cost_in_passes"] = speed(small_cnn(3, 16), images)

    areas, curves, transfer, halves, taken, chosen = [], [], [], [], [], []
    for seed in seeds:
        areas.append(noise(first, data, seed))
        began = time.perf_counter()
        scores = data_diet(first, data, seed=seed)
        taken.append(time.perf_counter() - began)
        transfer.append(float(spearmanr(scores.values, data_diet(second, data, seed=seed).values).statistic))
        halves.append(float(scores.figures["agreement of two halves of the runs"]))
        curves.append(pruning_curve(scores, train_table, test_table, seed=seed, **CURVE))
        untrained = data_diet(first, data, score="grand", epochs=0, seed=seed)
        [_, row] = pruning_curve(untrained, train_table, test_table, fractions=(0.5,), rules=("hardest",), seed=seed, **CURVE)
        chosen.append(row["hardest"])

    ours = ("el2n", "grand", "agreement", "precision")
    for name in areas[0]:
        into = figures if name in ours else baselines
        into[{"agreement": "noise_agreement_of_halves", "precision": "noise_precision_of_el2n", "untrained_norm": "untrained_grand_input_norm_spearman"}
             .get(name, f"noise_auroc_{name}")] = [each[name] for each in areas]  # fmt: skip
    figures |= {"transfer_spearman": transfer, "agreement_of_halves": halves, "seconds_for_all_runs": taken}
    baselines["percent_all"] = [curve[0]["random"] for curve in curves]
    for place, fraction in enumerate(FRACTIONS, 1):
        for rule in RULES:
            into = baselines if rule in ("random", "easiest") else figures
            into[f"percent_{rule}_{100 * fraction:.0f}"] = [curve[place][rule] for curve in curves]
    baselines["percent_hardest_by_untrained_grand_50"] = chosen
    crossed = [crossing(curve) for curve in curves]
    mean = [{key: float(np.mean([curve[place][key] for curve in curves])) for key in curves[0][0]} for place in range(len(FRACTIONS) + 1)]
    for row in mean:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    record(
        "data-diet",
        figures=figures,
        baselines=baselines,
        expects=EXPECTS,
        claims_tested=[
            "half of CIFAR-10 can go when the hardest are kept",
            "scores carry over to another network",
            "scores find wrong labels",
            "GraNd before training is no better than chance",
        ],
        sizes={"train": rows, "test": test_rows, "side": SIZE, "runs": 5, "epochs": 3, "epochs of the judged heads": CURVE["epochs"], "flipped": 0.1},
        seeds=seeds,
        notes=[
            f"random parts beat the hardest from this share downwards, by seed: {crossed}; of the means: {crossing(mean)}",
            "the paper trains whole ResNets from scratch on 50,000 images; here heads are trained on frozen pre-trained features",
            f"on photos of 32 x 32 gradient norms of the small CNN are {figures['cnn_32x32_speedup']:.1f} times as fast as one backward pass each: "
            "there arithmetic, not overhead, takes the time, and a batch saves none of it",
        ],
        results=Path(tempfile.mkdtemp()) if quick else None,
    )


if __name__ == "__main__":
    with using(progress="--quick" not in sys.argv):
        main("--quick" in sys.argv)
