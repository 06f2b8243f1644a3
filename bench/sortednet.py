"""SortedNet on the blocks of ResNet-32: 125 depths from one training, CIFAR-10 photographs.

    WELLREAD_DATA=... python -m bench.sortednet [--quick]

All arms start from the same weights and see equally many photographs: nothing at all, ordinary fine-tuning of the full network, SortedNet,
blocks left out at random (as LayerDrop), and two sizes that are cut first and fine-tuned alone, each with the whole budget. Every arm is judged
at the same twenty prefixes, batch norm estimated anew for each. --quick tries it out on few photographs and records nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cifar_resnet import network
from bench.harness import Expect, Noted, record
from wellread import Network, load_data
from wellread.batches import network_batches
from wellread.data import subset
from wellread.elastic.sortednet import Edits, Selection, Sizes, find_sizes, train_nested
from wellread.evaluate import score
from wellread.meter import macs
from wellread.norm import reestimate_norm
from wellread.train import fit

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
DEPTH, TRAIN, NORM, TEST, JUDGED = (20, 256, 64, 64, 3) if QUICK else (32, 6000, 256, 500, 20)
DROP = 0.3  # share of the blocks that the random arm leaves out
ALONE = ("1-1-1", "2-2-2") if QUICK else ("1-1-1", "3-3-3")
SETTINGS: dict[str, Any] = {"epochs": 1, "learning_rate": 0.01, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4, "warmup": 0.1, "accumulate": 2}
CLAIM = "many sub-networks trained at once keep most of the full network's accuracy, without a search (abstract: up to 160 of them, at least 96 %)"

EXPECTS = [
    Expect("over twenty prefixes the mean accuracy is at least ten points above that of ordinary fine-tuning", "sorted - ordinary", 10.0),
    Expect("it is at least two points above leaving out blocks at random", "sorted - random_blocks", 2.0),
    Expect("sizes with at least 60 % of the multiplications keep 90 % of the full network's accuracy", "sorted_kept_by_large_sizes", 90.0),
    Expect("the full network is within two points of ordinary fine-tuning", "sorted_full - ordinary_full", -2.0),
]


def cross_entropy(output: Tensor, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(output, batch["label"])


def random_blocks(start: Network, sizes: Sizes, train: Dataset, seed: int) -> Network:
    """Each pass leaves out every block that may be left out with probability DROP."""
    made, random = start.copy(), np.random.default_rng(seed)

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        edits: Edits = []
        for path, (fewest, most) in sizes.lists.items():
            keep = [*range(fewest), *(block for block in range(fewest, most) if random.random() >= DROP)]
            edits.append({"edit": "keep_blocks", "blocks": path, "keep": keep})
        return cross_entropy(Selection(module, edits)(module, batch["inputs"]), batch)

    fit(made.module, network_batches(made, train, batch_size=32, shuffle=True, seed=seed, drop_last=True), step, seed=seed, **SETTINGS)
    return made


def main() -> None:
    note = figures = Noted()
    cifar = load_data("cifar10")
    order = np.random.default_rng(0).permutation(len(cifar["train"]))
    test, norm = subset(cifar["test"], range(TEST)), subset(cifar["train"], order[-NORM:])
    start = network(DEPTH)
    sizes = find_sizes(start)
    every = sizes.every()
    judged = [*every[: -1 : len(every) // (JUDGED - 1)][: JUDGED - 1], sizes.full]
    cost = {name: macs(start.edited(*sizes.edits(name))) for name in judged}

    def accuracy(made: Network, name: str) -> float:
        cut = made.edited(*sizes.edits(name))
        reestimate_norm(cut, norm)
        return 100 * score(cut, test)

    def judge(made: Network, arm: str) -> dict[str, float]:
        found = {name: accuracy(made, name) for name in judged}
        large = [found[name] for name in judged if cost[name] >= 0.6 * cost[sizes.full]]
        note(
            **{
                arm: float(np.mean(list(found.values()))),
                f"{arm}_full": found[sizes.full],
                f"{arm}_worst": min(found.values()),
                f"{arm}_kept_by_large_sizes": 100 * float(np.mean(large)) / found[sizes.full],
                f"{arm}_kept_by_all": 100 * float(np.mean(list(found.values()))) / found[sizes.full],
            }
        )
        return found

    judge(start, "untrained")
    for seed in SEEDS:
        print(f"seed {seed}", flush=True)
        train = subset(cifar["train"], np.random.default_rng(seed).permutation(order[:-NORM])[:TRAIN])

        def tuned(made: Network, several: list[Edits], seed: int = seed, train: Dataset = train) -> Network:
            batches = network_batches(made, train, batch_size=32, shuffle=True, seed=seed, drop_last=True)
            train_nested(made, several, batches, cross_entropy, seed=seed, **SETTINGS)
            return made

        judge(tuned(start.copy(), [[]]), "ordinary")
        nested = tuned(start.copy(), [sizes.edits(name) for name in every])
        judge(nested, "sorted")
        judge(random_blocks(start, sizes, train, seed), "random_blocks")
        for name in ALONE:
            alone = tuned(start.edited(*sizes.edits(name)), [[]])
            reestimate_norm(alone, norm)
            label = name.replace("-", "_")
            note(**{f"alone_{label}": 100 * score(alone, test), f"sorted_{label}": accuracy(nested, name)})
    if QUICK:
        return
    record(
        "sortednet",
        figures={name: values for name, values in figures.items() if name.startswith("sorted")},
        baselines={name: values for name, values in figures.items() if not name.startswith("sorted")},
        expects=EXPECTS,
        claims_tested=[CLAIM],
        sizes={"train": TRAIN, "test": TEST, "sizes_trained": len(every), "sizes_judged": len(judged), "network": "ResNet-32, 0.47 M parameters"},
        seeds=SEEDS,
        notes=[
            "accuracies in percent on test photographs, mean over the judged prefixes unless the name says otherwise; batch norm estimated anew for each size in every arm",
            "kept: accuracy in percent of the full network's of the same arm; large sizes have at least 60 % of its multiplications",
            "one pass over re-compressed photographs: the paper's 96 % is for a full training",
        ],
    )


if __name__ == "__main__":
    main()
