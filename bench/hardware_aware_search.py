"""LINAS against random search and NSGA-II on measurements: 375 sizes of one ResNet-32, CIFAR-10 photographs.

    WELLREAD_DATA=... python -m bench.hardware_aware_search [--quick]

One super-network is trained by SortedNet's loss (125 depths, each in three widths) and every size is measured once: accuracy, multiply-accumulates and
milliseconds on this machine. The searches then look into that table, so that many of them take minutes, and what counts is how many different sizes
each has to look at. --quick tries it out on few photographs and records nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from bench.cifar_resnet import network
from bench.harness import Expect, record
from wellread import load_data
from wellread.batches import network_batches
from wellread.data import subset
from wellread.elastic.hardware_aware_search import CROWD, Code, Space, hypervolume, search
from wellread.elastic.sortednet import find_sizes, parse, train_nested
from wellread.evaluate import score
from wellread.meter import macs, milliseconds
from wellread.norm import reestimate_norm
from wellread.results import Front
from wellread.runtime import cache_folder, track, using

QUICK = "--quick" in sys.argv
SEEDS = [0, 1] if QUICK else [0, 1, 2, 3, 4]
DEPTH, TRAIN, NORM, VALIDATION, TEST = (20, 64, 32, 32, 32) if QUICK else (32, 6000, 128, 600, 1000)
WIDTHS = [0.5] if QUICK else [0.5, 0.25]
POPULATION, BUDGET = (5, 20) if QUICK else (15, 60)  # of a round of LINAS, and all its evaluations
SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "learning_rate": 0.01,
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "warmup": 0.1,
    "accumulate": 2,
}
CLAIM = "predictors trained on few measurements find the front several times faster (paper: 8 times, against WeakNAS on ImageNet super-networks)"

EXPECTS = [
    Expect("random search needs at least four times the evaluations for the hypervolume that LINAS has after 60 (MACs)", "random_macs / 60", 4.0),
    Expect("NSGA-II on measurements needs at least four times as many, too (MACs)", "nsga2_macs / 60", 4.0),
    Expect("the same against random search where the milliseconds must be predicted", "random_ms / 60", 4.0),
    Expect("the same against NSGA-II where the milliseconds must be predicted", "nsga2_ms / 60", 4.0),
    Expect("LINAS after 60 evaluations is not below random search after 120 (ms)", "linas_ms_at_60 - random_ms_at_120", 0.0),
    Expect("nor below NSGA-II after 60 (ms)", "linas_ms_at_60 - nsga2_ms_at_60", 0.0),
    Expect("and above random search after 60 in at least four of five seeds (ms)", "linas_ms_at_60 > random_ms_at_60", 0.8),
]

Row = dict[str, Any]
Table = dict[Code, Row]


def measured() -> tuple[Space, Table, Callable[[Row], float]]:
    """The space of all sizes, {code: name, accuracy, macs, ms}, each measured once, and what measures one on the test photographs.

    The table is also written to `table_file()`, for the comparison with others.
    """
    torch.manual_seed(0)
    cifar = load_data("cifar10")
    order, test_rows = (np.random.default_rng(i).permutation(len(cifar[split])) for i, split in enumerate(("train", "test")))
    norm = subset(cifar["train"], order[TRAIN : TRAIN + NORM])
    validation = subset(cifar["test"], test_rows[:VALIDATION])
    test = subset(cifar["test"], test_rows[VALIDATION : VALIDATION + TEST])
    whole = network(DEPTH)
    sizes = find_sizes(whole, WIDTHS)

    def loss(output: Tensor, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(output, batch["label"])

    batches = network_batches(whole, subset(cifar["train"], order[:TRAIN]), batch_size=32, shuffle=True, seed=0, drop_last=True)
    train_nested(whole, [sizes.edits(name) for name in sizes.every()], batches, loss, seed=0, **SETTINGS)

    space = Space({**{path: list(range(low, high + 1)) for path, (low, high) in sizes.lists.items()}, "width": sorted(sizes.shares)})
    table: Table = {}
    for name in track(sizes.every(), "measuring every size"):
        depth, share = parse(name)
        cut = whole.edited(*sizes.edits(name))
        with using(progress=False):
            reestimate_norm(cut, norm)
            ms = milliseconds(cut, threads=1, repeats=9, seconds=0.2)
            row = {"name": name, "macs": macs(cut) / 1e6, "ms": ms, "accuracy": score(cut, validation)}
        table[space.encode({**dict(zip(sizes.lists, depth, strict=True)), "width": share})] = row
    table_file().write_text(json.dumps({"variables": space.variables, "rows": [[list(code), row] for code, row in table.items()]}))

    def on_test(row: Row) -> float:
        cut = whole.edited(*sizes.edits(row["name"]))
        with using(progress=False):
            reestimate_norm(cut, norm)
            return score(cut, test)

    return space, table, on_test


def table_file() -> Path:
    return cache_folder() / f"bench-hardware-aware-search{'-quick' if QUICK else ''}.json"


def shares(rows: list[Row], table: Table, cost: str) -> list[float]:
    """Percent of the hypervolume of the whole table after each row; up to the dearest and the least accurate of all sizes."""
    reference = max(row[cost] for row in table.values()), min(row["accuracy"] for row in table.values())

    def volume(some: list[Row]) -> float:
        return hypervolume([row[cost] for row in some], [row["accuracy"] for row in some], reference)

    whole = volume(list(table.values()))
    return [100 * volume(rows[:end]) / whole for end in range(1, len(rows) + 1)]


def linas(space: Space, table: Table, cost: str, seed: int, evaluations: int) -> list[Row]:
    known = {code: row["macs"] for code, row in table.items()} if cost == "macs" else None  # what any user knows of a size before it is measured

    def measure(configuration: Row) -> Row:
        return table[space.encode(configuration)]

    return search(space, measure, cost=cost, quality="accuracy", evaluations=evaluations, population=POPULATION, known=known, seed=seed)


def random(space: Space, table: Table, cost: str, seed: int, evaluations: int) -> list[Row]:
    rows = list(table.values())
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:evaluations]]


def nsga2(space: Space, table: Table, cost: str, seed: int, evaluations: int) -> list[Row]:
    """On measurements, in populations as large as the rounds of LINAS; a size asked for again costs nothing.

    One mutation for each child on average: with the authors' 0.02 it would stand still.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    asked: dict[Code, Row] = {}

    class Measured(ElementwiseProblem):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **more: Any) -> None:
            code = tuple(map(int, x))
            row = asked.setdefault(code, table[code])
            out["F"] = [row[cost], -row["accuracy"]]

    highest = np.asarray(space.counts) - 1.0
    operators = {
        "crossover": SBX(prob=0.9, eta=15, repair=RoundingRepair()),
        "mutation": PM(prob=1.0, prob_var=1 / len(highest), eta=20, repair=RoundingRepair()),
    }
    algorithm = NSGA2(pop_size=POPULATION, sampling=IntegerRandomSampling(), eliminate_duplicates=True, **operators)
    minimize(Measured(n_var=len(highest), n_obj=2, xl=0 * highest, xu=highest, vtype=int), algorithm, ("n_gen", 2 * CROWD), seed=seed)
    return list(asked.values())[:evaluations]


def main() -> None:
    figures: dict[str, list[float]] = {}
    baselines: dict[str, list[float]] = {}
    space, table, on_test = measured()
    every = list(table.values())
    print(f"{len(every)} sizes, accuracy {min(r['accuracy'] for r in every):.3f} to {max(r['accuracy'] for r in every):.3f}", flush=True)
    figures["spearman_of_macs_and_ms"] = [float(spearmanr([r["macs"] for r in every], [r["ms"] for r in every]).statistic)]
    efficient: dict[str, Row] = {}
    for cost in ("macs", "ms"):
        target = 0.0
        for each in (linas, nsga2, random):
            name, group = f"{each.__name__}_{cost}", figures if each is linas else baselines
            for seed in SEEDS:
                with using(progress=False):
                    rows = each(space, table, cost, seed, BUDGET if each is linas else len(every))
                percent = shares(rows, table, cost)
                group.setdefault(f"{name}_at_{BUDGET}", []).append(percent[min(BUDGET, len(percent)) - 1])
                if each is linas and seed == 0:
                    front = Front(rows, cost, "accuracy")
                    efficient |= {front.points[i]["name"]: front.points[i] for i in front.efficient()}
                if each is not linas:
                    group.setdefault(f"{name}_at_{2 * BUDGET}", []).append(percent[min(2 * BUDGET, len(percent)) - 1])
                    group.setdefault(name, []).append(float(next((i for i, share in enumerate(percent, 1) if share >= target), len(every))))
            target = target or float(np.mean(figures[f"linas_{cost}_at_{BUDGET}"]))
            print(f"  {name}: {np.mean(group[f'{name}_at_{BUDGET}']):.2f} % at {BUDGET}, {np.mean(group.get(name, BUDGET)):.0f} evaluations", flush=True)
    found = [row["accuracy"] for row in efficient.values()]
    again = [on_test(row) for row in efficient.values()]
    figures["spearman_of_front_validation_and_test"] = [float(spearmanr(found, again).statistic)]
    figures["front_validation_minus_test_points"] = [100 * float(np.mean(found) - np.mean(again))]
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
            "sizes": len(every),
            "train": TRAIN,
            "validation": VALIDATION,
            "test": TEST,
            "network": "ResNet-32, 0.47 M parameters",
            "population": POPULATION,
        },
        seeds=SEEDS,
        notes=[
            f"..._at_{BUDGET}: percent of the hypervolume of the whole table after {BUDGET} evaluations of different sizes",
            f"random_ms and the like: evaluations until the mean hypervolume of LINAS after {BUDGET} was reached; all {len(every)} when never",
            "multiply-accumulates are known to every search before measuring, but only LINAS can use them; milliseconds are of one picture and one thread",
            "one super-network, trained for one pass over few re-compressed photographs; seeds are of the searches, and luck in the table counts",
        ],
    )


if __name__ == "__main__":
    main()
