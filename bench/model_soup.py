"""Model soups of ResNet-20: a sweep of eight fine-tunings to colour-inverted CIFAR-10 photographs of low contrast, three sweeps.

    WELLREAD_DATA=... python -m bench.model_soup [--quick]

Each sweep draws its own training and held-out photographs and its own seeds. Baselines: every network of the sweep, the best of them on the
held-out data, the ensemble of all logits, and a soup of two networks from different random starts, which is expected to fail. --quick tries
it out on few photographs and records nothing.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import ImageOps
from PIL.Image import Image as Picture
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cifar_resnet import network
from bench.harness import Expect, Noted, record
from wellread import Network, load_data
from wellread.averages import fill
from wellread.batches import network_batches
from wellread.data import labels, rename, subset
from wellread.evaluate import predict, score
from wellread.merge.model_soup import model_soup
from wellread.network import Networks
from wellread.norm import reestimate_norm
from wellread.train import fit

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
TRAIN, HELD_OUT, TEST = (300, 200, 200) if QUICK else (2500, 1250, 2500)
EPOCHS, CONTROL_EPOCHS = (1, 1) if QUICK else (2, 6)
SWEEP = list(product((0.005, 0.02, 0.05), (False, True), (0.0, 0.1)))  # learning rate, augmentation, label smoothing: eight of these twelve
CLAIM = "a greedy soup is more accurate than the best single network of the sweep, at the cost of one network (abstract)"

EXPECTS = [
    Expect("on test photographs the greedy soup is at least as accurate as the network that is best on the held-out ones", "greedy - best_on_held_out", 0.0),
    Expect("it is more accurate in at least two of three sweeps", "greedy > best_on_held_out", 0.66),
    Expect("on the held-out photographs it is never below the best network", "min(greedy_held_out - best_held_out)", 0.0),
    Expect("a soup of two networks from different random starts falls at least 20 points below the worse of them", "control_worse - control_soup", 20.0),
]


def shifted(data: Dataset, rows: np.ndarray, name: str) -> Dataset:
    """The photographs of `rows`, colours inverted, contrast reduced to 40 %."""

    def change(picture: Picture) -> Picture:
        return ImageOps.invert(picture.convert("RGB")).point(lambda value: round(76.5 + 0.4 * value))

    chosen = subset(data, rows)
    return rename(chosen.map(lambda row: {"image": change(row["image"])}, features=chosen.features).cast_column("image", Image()), name)


def augment(images: Tensor) -> Tensor:
    """uint8 [B, C, H, W] after a random flip and a shift of up to four pixels, each image its own."""
    count, _, height, width = images.shape
    flip = torch.rand(count) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    down, right = torch.randint(0, 9, (2, count)).tolist()
    return torch.stack([padded[i, :, down[i] : down[i] + height, right[i] : right[i] + width] for i in range(count)])


def tuned(start: Network, data: Dataset, *, rate: float, augmented: bool, smoothing: float, epochs: int, seed: int) -> Network:
    """A copy of `start` after SGD on `data`."""

    def step(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch["inputs"]), batch["label"], label_smoothing=smoothing)

    made = start.copy()
    batches = network_batches(made, data, shuffle=True, seed=seed, augment=augment if augmented else None)
    made.module.to(memory_format=torch.channels_last)
    options = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4, "warmup": 0.1}
    fit(made.module, batches, step, epochs=epochs, learning_rate=rate, seed=seed, **options)
    made.module.to(memory_format=torch.contiguous_format)
    return made


def main() -> None:
    note = figures = Noted()
    cifar = load_data("cifar10")
    order = np.random.default_rng(0).permutation(len(cifar["train"]))
    test = shifted(cifar["test"], np.arange(TEST), "test")
    start = network(20)
    controls = []
    for seed in SEEDS:
        print(f"sweep {seed}", flush=True)
        first = seed * (TRAIN + HELD_OUT)
        train = shifted(cifar["train"], order[first : first + TRAIN], "train")
        held_out = shifted(cifar["train"], order[first + TRAIN : first + TRAIN + HELD_OUT], "held-out")
        truth = labels(test)
        note(before_tuning=100 * score(start, test))
        with tempfile.TemporaryDirectory() as place:
            sweep = np.random.default_rng(seed).permutation(len(SWEEP))[:8]
            given, outputs = [], []
            for number, (rate, augmented, smoothing) in enumerate(SWEEP[i] for i in sweep):
                one = tuned(start, train, rate=rate, augmented=augmented, smoothing=smoothing, epochs=EPOCHS, seed=100 * seed + number)
                outputs.append(predict(one, test))
                given.append(str(one.save(Path(place) / str(number))))
                print(f"  {rate:<6} augmented {augmented!s:5} smoothing {smoothing:<4} {100 * (outputs[-1].argmax(1) == truth).mean():.2f}", flush=True)
            single = np.array([100 * (logits.argmax(1) == truth).mean() for logits in outputs])
            barriers = seed == SEEDS[0]  # 28 midpoints take as long as the soups
            soups = {recipe: model_soup(given, held_out, train, recipe=recipe, barriers=barriers and recipe == "greedy", seed=seed) for recipe in ("greedy", "uniform", "learned")}
            plain = model_soup(given, held_out, recipe="uniform", barriers=False, refresh_norm=False)
        rows = {row["number"] - 1: row["accuracy"] for row in soups["greedy"].reports["soup"].tables["networks"]}
        held = np.array([rows[i] for i in range(8)])
        told = soups["greedy"].reports["soup"].figures
        note(
            greedy=100 * score(soups["greedy"], test), uniform=100 * score(soups["uniform"], test), learned=100 * score(soups["learned"], test),
            best_on_held_out=single[held.argmax()], mean_network=single.mean(), best_on_test=single.max(),
            ensemble_of_all=100 * (np.mean(outputs, 0).argmax(1) == truth).mean(), uniform_averaged_statistics=100 * score(plain, test),
            greedy_held_out=100 * told["soup"], best_held_out=100 * told["best network"], networks_kept=told["networks kept"],
        )  # fmt: skip
        if barriers:
            table = soups["greedy"].reports["soup"].tables["accuracy halfway between two networks"]
            note(worst_midpoint=100 * min(row[str(i + 1)] for row in table for i in range(8)))

        # the control: from nothing, on the same photographs
        torch.manual_seed(1000 + seed)
        controls.append(tuned(network(8, pretrained=False), train, rate=0.1, augmented=False, smoothing=0.0, epochs=CONTROL_EPOCHS, seed=seed))
    sample = subset(test, range(min(TEST, 2000)))
    for seed in SEEDS:
        pair = [controls[seed], controls[(seed + 1) % len(SEEDS)]]
        soup = pair[0].copy()
        fill(soup.module, Networks(pair), [0, 1])
        reestimate_norm(soup, subset(held_out, range(min(HELD_OUT, 1024))))
        note(control_soup=100 * score(soup, sample), control_worse=100 * min(score(each, sample) for each in pair))
    if QUICK:
        return
    method = ("greedy", "uniform", "learned", "greedy_held_out", "networks_kept", "worst_midpoint", "uniform_averaged_statistics")
    record(
        "model-soup",
        figures={name: values for name, values in figures.items() if name in method},
        baselines={name: values for name, values in figures.items() if name not in method},
        expects=EXPECTS,
        claims_tested=[CLAIM],
        sizes={"train": TRAIN, "held_out": HELD_OUT, "test": TEST, "networks": 8, "epochs": EPOCHS, "network": "ResNet-20, 0.27 M parameters"},
        seeds=SEEDS,
        notes=[
            "accuracies in percent on the test photographs, unless the name says held-out; every network starts from the same CIFAR-10 weights, head included",
            "every arm sees the same re-compressed photographs, so what tuning gains by that alone is in the baselines too",
            "the control networks are ResNet-8 (three of them, each in two pairs), their soup with re-estimated batch norm",
        ],
    )


if __name__ == "__main__":
    main()
