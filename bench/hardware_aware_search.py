"""LINAS against random search and NSGA-II on measurements: 500 sizes of one ResNet-32, CIFAR-10 photographs.

    WELLREAD_DATA=... python -m bench.hardware_aware_search [--quick]

One super-network is trained by SortedNet's loss (125 depths, each in four widths) and every size is measured once: accuracy, multiply-accumulates and
milliseconds on this machine. The searches then look into that table, so that many of them take minutes, and what counts is how many different sizes
each has to look at. --quick tries it out on few photographs and records nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from bench.cifar_resnet import network
from bench.harness import Expect, record
from wellread import Network, load_data
from wellread.batches import network_batches
from wellread.data import subset
from wellread.elastic.hardware_aware_search import Code, Sampler, Space, hypervolume, search
from wellread.elastic.sortednet import Sizes, find_sizes, parse, train_nested
from wellread.errors import BadInput
from wellread.evaluate import score
from wellread.meter import macs, milliseconds
from wellread.norm import reestimate_norm
from wellread.results import Front
from wellread.runtime import track, using

QUICK = "--quick" in sys.argv
SEEDS = [0, 1] if QUICK else [0, 1, 2, 3, 4]
DEPTH, TRAIN, NORM, VALIDATION, TEST = (20, 64, 32, 32, 32) if QUICK else (32, 6000, 128, 400, 1000)
WIDTHS = [0.5] if QUICK else [0.75, 0.5, 0.25]
BUDGET, MOST, TARGET = (20, 54, 0.99) if QUICK else (60, 300, 0.99)  # evaluations of LINAS; of each search at most; share of the best hypervolume
SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "learning_rate": 0.01,
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "warmup": 0.1,
    "accumulate": 2,
}
SAMPLERS: tuple[Sampler, ...] = ("linas", "nsga2", "random")
CLAIM = "predictors trained on few measurements find the front several times faster (paper: 8 times, against WeakNAS on ImageNet super-networks)"

EXPECTS = [
    Expect("random search needs at least four times the evaluations of LINAS to 99 % of the hypervolume (MACs)", "random_macs / linas_macs", 4.0),
    Expect("NSGA-II on measurements needs at least four times as many, too (MACs)", "nsga2_macs / linas_macs", 4.0),
    Expect("the same against random search where the milliseconds must be predicted", "random_ms / linas_ms", 4.0),
    Expect("the same against NSGA-II where the milliseconds must be predicted", "nsga2_ms / linas_ms", 4.0),
    Expect("after 60 evaluations LINAS is above random search, in percent of the best hypervolume (ms)", "linas_ms_at_60 - random_ms_at_60", 0.5),
]


def table_of(whole: Network, sizes: Sizes, data: dict[str, Any]) -> tuple[Space, dict[Code, dict[str, Any]]]:
    """The space of all sizes, and {code: name, accuracy, macs, ms}, each measured once."""
    variables = {path: list(range(fewest, most + 1)) for path, (fewest, most) in sizes.lists.items()}
    space = Space({**variables, "width": sorted(sizes.shares)})
    found = {}
    for name in track(sizes.every(), "measuring every size"):
        depth, share = parse(name)
        cut = whole.edited(*sizes.edits(name))
        with using(progress=False):
            reestimate_norm(cut, data["norm"])
            row = {
                "name": name,
                "macs": macs(cut) / 1e6,
                "ms": milliseconds(cut, threads=1, repeats=9, seconds=0.2),
                "accuracy": score(cut, data["validation"]),
            }
        found[space.encode({**dict(zip(variables, depth, strict=True)), "width": share})] = row
    return space, found


def searched(
    space: Space, table: dict[Code, dict[str, Any]], cost: str, sampler: Sampler, seed: int, best: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """The measured rows, in order, and the share of the best hypervolume after each; ends at the target, but not before BUDGET evaluations."""
    rows: list[dict[str, Any]] = []
    shares: list[float] = []

    def measure(configuration: dict[str, Any]) -> dict[str, Any]:
        if len(rows) >= BUDGET and shares[-1] >= TARGET:
            raise BadInput("the target is reached")
        rows.append(table[space.encode(configuration)])
        shares.append(volume(rows, table, cost) / best)
        return rows[-1]

    known = {code: row[cost] for code, row in table.items()} if cost == "macs" else None  # what any user knows of a size before it is measured
    try:
        search(space, measure, cost=cost, quality="accuracy", evaluations=MOST, sampler=sampler, known=known, seed=seed)
    except BadInput as end:
        if "reached" not in str(end):
            raise
    return rows, shares


def volume(rows: Sequence[dict[str, Any]], table: dict[Code, dict[str, Any]], cost: str) -> float:
    """Hypervolume up to the dearest and the least accurate of all sizes."""
    reference = max(row[cost] for row in table.values()), min(row["accuracy"] for row in table.values())
    return hypervolume([row[cost] for row in rows], [row["accuracy"] for row in rows], reference)


def main() -> None:
    figures: dict[str, list[float]] = {}
    baselines: dict[str, list[float]] = {}
    torch.manual_seed(0)
    cifar = load_data("cifar10")
    order = np.random.default_rng(0).permutation(len(cifar["train"]))
    test_rows = np.random.default_rng(1).permutation(len(cifar["test"]))
    data = {
        "train": subset(cifar["train"], order[:TRAIN]),
        "norm": subset(cifar["train"], order[TRAIN : TRAIN + NORM]),
        "validation": subset(cifar["test"], test_rows[:VALIDATION]),
        "test": subset(cifar["test"], test_rows[VALIDATION : VALIDATION + TEST]),
    }
    whole = network(DEPTH)
    sizes = find_sizes(whole, WIDTHS)
    every = [sizes.edits(name) for name in sizes.every()]

    def loss(output: Tensor, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(output, batch["label"])

    batches = network_batches(whole, data["train"], batch_size=32, shuffle=True, seed=0, drop_last=True)
    train_nested(whole, every, batches, loss, seed=0, **SETTINGS)
    del every
    space, table = table_of(whole, sizes, data)
    print(
        f"{len(table)} sizes, accuracy {min(r['accuracy'] for r in table.values()):.3f} to {max(r['accuracy'] for r in table.values()):.3f}",
        flush=True,
    )
    figures["spearman_of_macs_and_ms"] = [float(spearmanr([r["macs"] for r in table.values()], [r["ms"] for r in table.values()]).statistic)]

    efficient: dict[str, dict[str, Any]] = {}
    for cost in ("macs", "ms"):
        best = volume(list(table.values()), table, cost)
        for sampler in SAMPLERS:
            group = figures if sampler == "linas" else baselines
            for seed in SEEDS:
                with using(progress=False):
                    rows, shares = searched(space, table, cost, sampler, seed, best)
                reached = next((i for i, share in enumerate(shares, 1) if share >= TARGET), MOST)
                group.setdefault(f"{sampler}_{cost}", []).append(float(reached))
                group.setdefault(f"{sampler}_{cost}_at_{BUDGET}", []).append(100 * shares[min(BUDGET, len(shares)) - 1])
                print(
                    f"  {cost:5} {sampler:7} seed {seed}: {reached:4} evaluations to the target, {100 * shares[min(BUDGET, len(shares)) - 1]:.2f} % at {BUDGET}",
                    flush=True,
                )
                if sampler == "linas" and seed == 0:
                    front = Front(rows[:BUDGET], cost, "accuracy")
                    efficient |= {front.points[i]["name"]: front.points[i] for i in front.efficient()}
    found = list(efficient.values())
    again = []
    for row in found:
        cut = whole.edited(*sizes.edits(row["name"]))
        with using(progress=False):
            reestimate_norm(cut, data["norm"])
            again.append(100 * score(cut, data["test"]))
    figures["spearman_of_front_validation_and_test"] = [float(spearmanr([row["accuracy"] for row in found], again).statistic)]
    figures["front_validation_minus_test_points"] = [float(np.mean([100 * row["accuracy"] for row in found]) - np.mean(again))]
    if QUICK:
        print(figures, baselines)
        return
    record(
        "hardware-aware-search",
        figures=figures,
        baselines=baselines,
        expects=EXPECTS,
        claims_tested=[CLAIM],
        sizes={
            "sizes": len(table),
            "train": TRAIN,
            "validation": VALIDATION,
            "test": TEST,
            "network": "ResNet-32, 0.47 M parameters",
            "population": 15,
        },
        seeds=SEEDS,
        notes=[
            f"linas_macs and the like: different sizes looked at until {100 * TARGET:.0f} % of the hypervolume of the whole table, {MOST} when not before; a size asked for again costs nothing",
            f"..._at_{BUDGET}: percent of the hypervolume of the whole table after {BUDGET} evaluations",
            "multiply-accumulates are known to every search before measuring, but only LINAS can use them; milliseconds are of one picture and one thread",
            "one super-network, trained for one pass over few re-compressed photographs: seeds are of the searches",
        ],
    )


if __name__ == "__main__":
    main()
