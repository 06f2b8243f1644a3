"""pruning_by_explaining beside torch-pruning: ResNet-20 for CIFAR-10, the same pictures, steps and number of channels, no training after a cut.

    pip install 'wellread[compress]'
    WELLREAD_DATA=... python -m bench.peers.pruning_by_explaining [--quick]

torch-pruning ranks the channels over all layers by its Taylor or magnitude importance, and may cut the same channels as ours: the inner ones of each
block. What is timed begins with the network and a table of pictures, and ends with the smaller network; ours follows the accuracy on these pictures
at each step meanwhile, as it always does. --quick tries it out and records nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch_pruning
from datasets import Dataset
from torch import nn
from torch.nn import functional as F

from bench.cifar_resnet import network
from bench.harness import Expect, record_peer
from bench.pruning_by_explaining import few
from wellread import Network, load_data, meter, runtime
from wellread.batches import network_batches
from wellread.compress.pruning_by_explaining import pruning_by_explaining
from wellread.data import rename, subset
from wellread.evaluate import score
from wellread.features import example_batch

QUICK = "--quick" in sys.argv
DRAWS = [0] if QUICK else [0, 1, 2, 3, 4]
EACH, TEST, STEP, TURNS = (2, 60, 0.1, 1) if QUICK else (10, 1000, 0.05, 5)
LEVELS = (30, 50)  # percent of the inner channels
EXPECTS = [
    Expect("without half of the channels it is more accurate than with torch-pruning's Taylor criterion", "accuracy_50_ratio_taylor", 1.0),
    Expect("and than with its magnitude criterion", "accuracy_50_ratio_magnitude", 1.0),
    Expect("without three in ten of them as well", "accuracy_30_ratio_taylor", 1.0),
    Expect("pruning takes at most five times as long as with the Taylor criterion", "seconds_ratio_taylor", 5.0, at_least=False),
    Expect("the result is as fast, in batches of 32, to a tenth", "ms_32_ratio_taylor", 1.1, at_least=False),
    Expect("and faster than the whole network by a fifth", "ms_32_whole / ms_32", 1.2),
]

Prune = Callable[[Network, Dataset, int, int], Network]
"""A network, pictures, percent of the channels and a seed to a smaller network."""


def ours(start: Network, reference: Dataset, percent: int, seed: int) -> Network:
    return pruning_by_explaining(start, reference, remove=percent / 100, step=STEP, seed=seed)


def theirs(importance: Callable[[], object], loss: bool) -> Prune:
    """torch-pruning with its iterative pruner. loss: the criterion needs gradients."""

    def prune(start: Network, reference: Dataset, percent: int, seed: int) -> Network:
        made = start.copy()
        module, steps = made.module, round(percent / 100 / STEP)
        inner = [layer for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d) and name.startswith("layer") and name.endswith("conv1")]
        rest = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear) and all(layer is not each for each in inner)]
        pruner = torch_pruning.pruner.BasePruner(
            module, example_batch(made), importance(), global_pruning=True, pruning_ratio=percent / 100, iterative_steps=steps, ignored_layers=rest,
            max_pruning_ratio=0.9,
        )  # fmt: skip
        for _ in range(steps):
            if loss:
                module.zero_grad()
                for batch in network_batches(made, reference, batch_size=len(reference)).epoch(0):
                    F.cross_entropy(module(batch["inputs"]), batch["label"]).backward()
            pruner.step()
        module.zero_grad()
        return Network(module, made.input, made.head, made.labels)

    return prune


ARMS: dict[str, Prune] = {
    "": ours,
    "_taylor": theirs(torch_pruning.importance.GroupTaylorImportance, True),
    "_magnitude": theirs(lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2), False),
}


def inner_channels(made: Network) -> int:
    return sum(layer.out_channels for name, layer in made.module.named_modules() if isinstance(layer, nn.Conv2d) and name.endswith(".conv1"))


def main() -> None:
    began = time.perf_counter()
    figures: dict[str, list[float]] = {}
    cifar, start = load_data("cifar10"), network(20)
    order = np.random.default_rng(11).permutation(len(cifar["test"]))
    for draw in DRAWS:
        print(f"draw {draw}", flush=True)
        reference = few(cifar["train"], EACH, np.random.default_rng(200 + draw), "reference")
        test = rename(subset(cifar["test"], order[draw * TEST : (draw + 1) * TEST]), "test")
        found: dict[str, float] = {"accuracy_whole": 100 * score(start, test)}
        half = {"_whole": start}
        for name in np.random.default_rng(draw).permutation(list(ARMS)):  # turns in another order each time
            for percent in LEVELS:
                before = time.perf_counter()
                made = ARMS[name](start, reference, percent, draw)
                taken = time.perf_counter() - before
                found[f"accuracy_{percent}{name}"] = 100 * score(made, test)
                found[f"channels_{percent}{name}"] = inner_channels(made)
            found |= {f"seconds{name}": taken, f"macs_50{name}": meter.macs(made) / 1e6}  # of the last level
            half[str(name)] = made
        times: dict[str, list[float]] = {}
        for _ in range(TURNS):
            for name, each in half.items():
                for size in (1, 32):
                    times.setdefault(f"ms_{size}{name}", []).append(meter.milliseconds(each, size))
        found |= {name: float(np.median(values)) for name, values in times.items()}
        for peer in ("_taylor", "_magnitude"):
            for figure in ("accuracy_30", "accuracy_50", "seconds", "ms_1", "ms_32"):
                found[f"{figure}_ratio{peer}"] = found[figure] / found[f"{figure}{peer}"]
        for name, value in found.items():
            figures.setdefault(name, []).append(value)
            print(f"  {name:28} {value:.4g}", flush=True)
    if QUICK:
        return
    record_peer(
        "pruning_by_explaining",
        f"torch-pruning {version('torch-pruning')}: BasePruner, global, with GroupTaylorImportance and GroupMagnitudeImportance",
        figures=figures,
        expects=EXPECTS,
        sizes={"network": "ResNet-20, 336 inner channels", "reference": f"{EACH} pictures of each class", "test": TEST, "step": STEP, "turns": TURNS},
        seconds=time.perf_counter() - began,
        seeds=DRAWS,
        notes=[
            "ratios are ours to theirs in the same draw; names without a peer's name are ours (relevance); accuracies in percent, macs in millions",
            "seconds are those of removing half of the channels in ten steps; ours traces the network anew and follows the accuracy at each step",
            "channels are those that are left, of 336: torch-pruning's threshold may take one more or less than asked",
            "milliseconds are those of a batch, without half of the channels; medians of five turns, the networks taking turns",
        ],
    )


if __name__ == "__main__":
    with runtime.using(progress=False):
        main()
