"""What is lost when only a part of the training data is kept: heads on frozen features, trained anew on each part, for any scores.

For every method of this chapter that gives one number per example; with cached features a whole curve takes seconds to minutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from wellread.batches import Batches
from wellread.data import labels, name_of
from wellread.errors import BadInput
from wellread.evaluate import accuracy_interval
from wellread.features import embed
from wellread.network import Network
from wellread.results import Scores
from wellread.train import fit

Rule = Literal["hardest", "random", "easiest", "offset"]
RULES: tuple[Rule, ...] = ("hardest", "random", "easiest", "offset")
FRACTIONS = (0.9, 0.7, 0.5, 0.3, 0.1)


@dataclass
class Table:
    """Features float32 [N, d] and classes int64 [N]."""

    x: Tensor
    y: Tensor


def tables(network: Network, train: Dataset, *others: Dataset) -> list[Table]:
    """The network's features of each table, all brought to mean 0 and standard deviation 1 as measured on `train`. Cached on disk.

    Raises `BadInput` naming the first row whose features are not finite.
    """
    found = [embed(network, each) for each in (train, *others)]
    for data, z in zip((train, *others), found, strict=True):
        bad = np.flatnonzero(~np.isfinite(z).all(1))
        if len(bad):
            raise BadInput(f"the network's features of row {bad[0]} of {name_of(data)} are not finite: look at that row, or choose another network")
    mean, spread = found[0].mean(0), found[0].std(0)
    spread[spread < 1e-6] = 1.0  # a feature that never changes stays at 0
    return [Table(torch.from_numpy((z - mean) / spread), torch.from_numpy(labels(data))) for data, z in zip((train, *others), found, strict=True)]


def head(features: int, classes: int, hidden: int) -> nn.Module:
    """[B, features] to logits [B, classes]: one hidden layer with ReLU and dropout 0.2, or none when `hidden` is 0."""
    if hidden == 0:
        return nn.Linear(features, classes)
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, classes))


def pruning_curve(
    scores: Scores,
    train: Table,
    test: Table,
    *,
    classes: int,
    fractions: Sequence[float] = FRACTIONS,
    rules: Sequence[Rule] = RULES,
    hidden: int = 256,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
) -> list[dict[str, float]]:
    """For each fraction, the test accuracy (%) of a new head trained on the part that each rule keeps; the first row is all data.

    scores: of `train`. rules: those of `Scores.keep`; the offset window leaves out the hardest tenth and keeps the next ones.
    Every head takes the steps of `epochs` over all rows: a smaller part is seen more often, so that only the choice of the data differs.
    """

    def accuracy(kept: np.ndarray) -> float:
        order = np.random.default_rng((seed, len(kept))).permutation(kept)
        repeated = torch.from_numpy(np.resize(order, len(train.y)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = head(train.x.shape[1], classes, hidden)

        def get(rows: np.ndarray) -> dict[str, Tensor]:
            chosen = repeated[torch.from_numpy(rows)]
            return {"inputs": train.x[chosen], "label": train.y[chosen]}

        batches = Batches(len(repeated), get, batch_size=batch_size, shuffle=True, seed=seed)
        fit(network, batches, _step, epochs=epochs, learning_rate=learning_rate, seed=seed, name=f"{len(kept)} of {len(train.y)} rows")
        with torch.inference_mode():
            return 100 * float((network.eval()(test.x).argmax(1) == test.y).float().mean())

    whole = accuracy(np.arange(len(train.y)))
    found: list[dict[str, float]] = [{"kept": 1.0, "rows": len(train.y), **dict.fromkeys(rules, whole)}]
    for fraction in fractions:
        window = 1 - fraction - min(0.1, 1 - fraction)
        parts = {rule: scores.keep(fraction, rule, offset=window if rule == "offset" else None, seed=seed) for rule in rules}
        found.append({"kept": fraction, "rows": len(parts[rules[0]]), **{rule: accuracy(part) for rule, part in parts.items()}})
    return found


def _step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
    return nn.functional.cross_entropy(module(batch["inputs"]), batch["label"])


def crossing(curve: Sequence[Mapping[str, float]]) -> float | None:
    """The largest fraction at which a random part is better than the hardest one; None when there is none."""
    return max((row["kept"] for row in curve if row["random"] > row["hardest"]), default=None)


def judged(curve: Sequence[Mapping[str, float]], rows: int) -> dict[str, str]:
    """In words, what follows from a curve over all RULES that was measured on `rows` examples."""
    whole = curve[0]["random"]
    low = 100 * accuracy_interval(round(whole / 100 * rows), rows)[0]
    kept = min(row["kept"] for row in curve if max(row[rule] for rule in RULES) >= low)
    best = [rule for row in curve for rule in RULES if row["kept"] == kept and row[rule] >= low]
    crossed = crossing(curve)
    return {
        "smallest share without a clear loss": f"{kept:g} ({', '.join(best)})" if kept < 1 else "all",
        "random beats hardest": f"from {crossed:g} downwards" if crossed else "nowhere",
    }
