"""ResNet-20 and ResNet-56 for CIFAR-10 stitched at all 24 places: no training, then a little, three draws; and EfficientNet-Lite0 with Lite2.

    WELLREAD_DATA=... python -m bench.stitchable [--quick]

Baselines: an identity and a random map in place of least squares, random stitches tuned for the same steps, and stitches tuned between frozen
networks. The EfficientNets, of different widths, are stitched without labels and judged by agreement with Lite2. --quick tries it out on few
photographs and records nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import wellread
from bench.cifar_resnet import network
from bench.harness import Expect, Noted, record
from wellread import Network, load_data, runtime
from wellread.data import labels, rename, subset
from wellread.elastic.stitchable import cut, quality, stitched_by_least_squares, tune
from wellread.evaluate import predict
from wellread.meter import macs, milliseconds
from wellread.norm import reestimate_norm

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
CALIBRATION, TRAIN, TEST, ANCHOR_TEST, LITE = (50, 128, 30, 60, 8) if QUICK else (200, 5000, 300, 2000, 96)
CLAIMS = [
    "one super-network interpolates between its anchors after a little training (abstract)",
    "the least-squares start matters (section 3.3)",
]

EXPECTS = [
    Expect("without training, stitches by least squares are on average at least 35 points above identity maps", "least_squares - identity", 35.0),
    Expect("and above random maps", "least_squares - random_map", 35.0),
    Expect("after tuning at least two thirds of the stitches are above the small network less two points", "above_small", 66.7),
    Expect("the best stitch under 70 % of the large network's cost is above the small network", "best_under_70 - small_same_photos", 0.0),
    Expect("the small network loses at most two points by it", "max(small - small_tuned)", 2.0, at_least=False),
    Expect("and so does the large one", "max(large - large_tuned)", 2.0, at_least=False),
    Expect("least squares is a better start for tuning than random layers", "tuned - tuned_from_random", 0.0),
    Expect("networks of other widths: Lite0 to Lite2 by least squares agrees with Lite2 more often than by random maps", "lite - lite_random", 0.0),
]


def filled(made: Network, fill: Callable[[Any], None]) -> Network:
    """A copy of a super-network whose stitches hold other values."""
    other = made.copy()
    with torch.no_grad():
        for layer in other.module.stitches:
            fill(layer.map)
    return other


def identity(layer: Any) -> None:
    layer.weight.copy_(torch.eye(len(layer.bias))[:, :, None, None])
    layer.bias.zero_()


def stitches(made: Network) -> list[int]:
    return [number for number, chosen in enumerate(made.module.configurations) if "back" in chosen]


def accuracies(made: Network, data: Any, truth: np.ndarray) -> np.ndarray:
    """In percent, of every configuration that is a stitch."""
    module: Any = made.module
    found = []
    before = module.choice
    with runtime.using(progress=False):
        for module.choice in stitches(made):
            found.append(100 * quality(made, data, truth))
    module.choice = before
    return np.array(found)


def main() -> None:
    note = figures = Noted()
    cifar = load_data("cifar10")
    order = np.random.default_rng(0).permutation(len(cifar["test"]))
    test = rename(subset(cifar["test"], order[:TEST]), "test")
    wide = rename(subset(cifar["test"], order[:ANCHOR_TEST]), "test of the networks alone")
    truth = labels(test)
    small, large = network(20), network(56)
    small_same = 100 * quality(small, test, truth)
    for seed in SEEDS:
        print(f"draw {seed}", flush=True)
        rows = np.random.default_rng(100 + seed).permutation(len(cifar["train"]))
        calibration, train = subset(cifar["train"], rows[:CALIBRATION]), subset(cifar["train"], rows[CALIBRATION : CALIBRATION + TRAIN])
        note(small=100 * quality(small, wide, labels(wide)), large=100 * quality(large, wide, labels(wide)), small_same_photos=small_same)
        made, seconds = stitched_by_least_squares([small, large], calibration)
        start = accuracies(made, test, truth)
        note(least_squares=start.mean(), least_squares_worst=start.min(), seconds_of_least_squares=seconds)
        torch.manual_seed(seed)
        random = filled(made, lambda layer: layer.reset_parameters())
        note(random_map=accuracies(random, test, truth).mean())
        if seed == SEEDS[0]:  # the identity knows no draw
            note(identity=accuracies(filled(made, identity), test, truth).mean())

        costs = np.array([macs(cut(made, number)) for number in stitches(made)]) / macs(large)
        options: dict[str, Any] = {"epochs": 1, "learning_rate": 0.01, "seed": seed}
        started = time.perf_counter()
        tuned = made.copy()
        tune(tuned, train, **options)
        note(seconds_of_tuning=time.perf_counter() - started)
        reached = accuracies(tuned, test, truth)
        note(
            tuned=reached.mean(), tuned_worst=reached.min(), above_small=100 * (reached > small_same - 2).mean(), best_under_70=reached[costs < 0.7].max(),
            small_tuned=100 * quality(cut(tuned, 0), wide, labels(wide)), large_tuned=100 * quality(cut(tuned, 1), wide, labels(wide)),
        )  # fmt: skip
        tune(random, train, **options)
        note(tuned_from_random=accuracies(random, test, truth).mean())
        frozen = made.copy()
        tune(frozen, train, tune_anchors=False, **options)
        note(tuned_between_frozen=accuracies(frozen, test, truth).mean())
        refreshed = [cut(made, number) for number in stitches(made)[:: 8 if QUICK else 3]]
        for one in refreshed:
            reestimate_norm(one, subset(train, range(min(TRAIN, 500))))
        note(
            least_squares_every_third=start[:: 8 if QUICK else 3].mean(),
            least_squares_norm_refreshed=100 * np.mean([quality(one, test, truth) for one in refreshed]),
        )
        if seed == SEEDS[0]:
            half = stitches(made)[int(np.abs(costs - 0.7).argmin())]
            with torch.inference_mode():
                times = {name: milliseconds(one, 32) for name, one in (("small", small), ("stitched", cut(tuned, half)), ("large", large))}
            note(ms_small=times["small"], ms_stitched_70=times["stitched"], ms_large=times["large"])

    # other widths: photographs enlarged to 224 pixels, no labels
    lite0, lite2 = wellread.load("efficientnet-lite0"), wellread.load("efficientnet-lite2")
    lite2.input = lite0.input
    some = np.random.default_rng(7).permutation(len(cifar["train"]))
    made, seconds = stitched_by_least_squares([lite0, lite2], subset(cifar["train"], some[:LITE]))
    judged = rename(subset(cifar["train"], some[LITE : LITE + LITE // 2]), "unlabelled photographs")
    answer = predict(lite2, judged).argmax(1)
    torch.manual_seed(0)
    random = filled(made, lambda layer: layer.reset_parameters())
    note(lite=accuracies(made, judged, answer).mean(), lite_random=accuracies(random, judged, answer).mean(), lite0=100 * quality(lite0, judged, answer))
    note(lite_seconds_of_least_squares=seconds)
    if QUICK:
        return
    method = ("least_squares", "tuned", "above_small", "best_under_70", "small_tuned", "large_tuned", "seconds", "lite_seconds", "ms_stitched")
    mine = {name for name in figures if name == "lite" or name.startswith(method)} - {"tuned_from_random", "tuned_between_frozen"}
    record(
        "stitchable",
        figures={name: values for name, values in figures.items() if name in mine},
        baselines={name: values for name, values in figures.items() if name not in mine},
        expects=EXPECTS,
        claims_tested=CLAIMS,
        sizes={"calibration": CALIBRATION, "train": TRAIN, "epochs": 1, "test": TEST, "stitches": 24, "lite_calibration": LITE, "lite_judged": LITE // 2},
        seeds=SEEDS,
        notes=[
            "accuracies in percent, means over 24 stitches unless the name says otherwise; small and large alone on 2000 photographs",
            "lite: agreement with Lite2 in percent, on CIFAR-10 photographs enlarged to 224 pixels, no labels, nothing trained",
            "the authors tune 30 (ResNet) to 50 (DeiT) epochs on ImageNet; here it is one epoch of 5000 photographs",
            "least_squares_norm_refreshed: every third stitch after its batch norms were re-estimated on 500 photographs, beside least_squares_every_third",
        ],
    )


if __name__ == "__main__":
    main()
