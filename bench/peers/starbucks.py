"""starbucks beside sentence-transformers' Matryoshka2dLoss: all-MiniLM-L6-v2 on pairs of SICK, equal steps, one process.

    pip install 'wellread[retrieve]'
    WELLREAD_DATA=... python -m bench.peers.starbucks [--quick]

The same pairs in the same order, batch size, optimiser and training loop, and CoSENT as the loss of one size in all arms. Matryoshka2dLoss takes part
twice: as it comes (one random layer and length beside the full ones in each step), and with all layers and lengths in every step. The correlations are
those of the encoder cut to a size, on test pairs; the speed is that of the training. --quick tries it out and records nothing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn

from bench.harness import Expect, record_peer
from bench.sentence_pairs import sick
from wellread import Network, load, runtime
from wellread.data import subset
from wellread.elastic.starbucks import Size, encoder, pair_batches, parse_sizes, size_name, spearman, starbucks_loss
from wellread.train import History, fit

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
TRAIN, TEST = (48, 60) if QUICK else (640, 1000)
NAMES = ["1x32", "2x64", "3x128", "4x192", "6x384"]
SETTINGS: dict[str, Any] = {"epochs": 1, "learning_rate": 5e-5, "warmup": 0.1}
EXPECTS = [
    Expect("at equal steps its smaller sizes are at least as good as those of Matryoshka2dLoss as it comes", "smaller_ratio_matryoshka", 1.0),
    Expect("its full size is, to a hundredth", "full_ratio_matryoshka", 0.99),
    Expect("its smaller sizes are at least as good as with all layers and lengths in every step", "smaller_ratio_matryoshka_all", 1.0),
    Expect("its steps are as fast, to a tenth, as those of Matryoshka2dLoss as it comes", "steps_per_second_ratio_matryoshka", 0.9),
    Expect("its steps are at least as fast as with all layers and lengths in every step", "steps_per_second_ratio_matryoshka_all", 1.0),
]

Train = Callable[[Network, Dataset, list[Size], int], tuple[Network, History]]


def ours(start: Network, train: Dataset, sizes: list[Size], seed: int) -> tuple[Network, History]:
    made = start.copy()
    parts = encoder(made)
    layers, dimensions = [size[0] for size in sizes], [size[1] for size in sizes]

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return sum(starbucks_loss(parts.vectors(module, batch["inputs"], layers), dimensions, batch["score"]))  # type: ignore[return-value]

    return made, fit(made.module, pair_batches(made, train, shuffle=True, seed=seed), step, seed=seed, **SETTINGS)


def theirs(per_step: int) -> Train:
    """per_step: how many layers and how many lengths are drawn in each step; -1 takes all."""

    def train_it(start: Network, train: Dataset, sizes: list[Size], seed: int) -> tuple[Network, History]:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CoSENTLoss, Matryoshka2dLoss
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        made = start.copy()
        with tempfile.TemporaryDirectory() as folder:
            made.module.model.save_pretrained(folder)  # type: ignore[operator, union-attr]
            made.input.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
            model = SentenceTransformer(modules=[Transformer(folder), Pooling(made.embedding_size, "mean"), Normalize()], device="cpu")
        lengths = [dimensions for _, dimensions in reversed(sizes)]
        loss = Matryoshka2dLoss(model, CoSENTLoss(model), lengths, n_layers_per_step=per_step, n_dims_per_step=per_step)

        def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
            halves = {name: tensor.chunk(2) for name, tensor in batch["inputs"].items()}
            return loss([{name: half[side] for name, half in halves.items()} for side in (0, 1)], batch["score"])

        history = fit(model, pair_batches(made, train, shuffle=True, seed=seed), step, seed=seed, **SETTINGS)
        made.module.model.load_state_dict(model[0].auto_model.state_dict())  # type: ignore[union-attr]
        return made, history

    return train_it


ARMS: dict[str, Train] = {"": ours, "_matryoshka": theirs(1), "_matryoshka_all": theirs(-1)}


def main() -> None:
    began = time.perf_counter()
    figures: dict[str, list[float]] = {}
    start = load("minilm-l6")
    parts = encoder(start)
    sizes = parse_sizes(NAMES, parts.depth, parts.width)
    pairs, whole = sick("train"), sick("test_annotated")
    test = subset(whole, np.random.default_rng(1).permutation(len(whole))[:TEST])

    def judged(name: str, network: Network) -> dict[str, float]:
        found = [100 * value for value in spearman(network, test, sizes).values()]
        each = {f"spearman_{size_name(size)}{name}": value for size, value in zip(sizes, found, strict=True)}
        return {f"smaller{name}": float(np.mean(found[:-1])), f"full{name}": found[-1]} | each

    untrained = judged("_untrained", start)
    for seed in SEEDS:
        print(f"seed {seed}", flush=True)
        train = subset(pairs, np.random.default_rng(seed).permutation(len(pairs))[:TRAIN])
        found = dict(untrained)
        for name in np.random.default_rng(seed).permutation(list(ARMS)):  # turns in another order each time
            made, history = ARMS[name](start, train, sizes, seed)
            found |= judged(name, made) | {f"steps_per_second{name}": history.steps / history.seconds}
        for peer in list(ARMS)[1:]:
            found |= {f"{figure}_ratio{peer}": found[figure] / found[f"{figure}{peer}"] for figure in ("smaller", "full", "steps_per_second")}
        for name, value in found.items():
            figures.setdefault(name, []).append(value)
            print(f"  {name:40} {value:.4g}", flush=True)
    if QUICK:
        return
    record_peer(
        "starbucks",
        f"sentence-transformers {version('sentence-transformers')}: Matryoshka2dLoss around CoSENTLoss",
        figures=figures,
        expects=EXPECTS,
        sizes={"network": "all-MiniLM-L6-v2", "sizes": " ".join(NAMES), "train_pairs": TRAIN, "test_pairs": TEST, "batch": 16},
        seconds=time.perf_counter() - began,
        seeds=SEEDS,
        notes=[
            "ratios are ours to theirs with the same seed; names without a peer's name are ours",
            "Spearman correlations times 100; smaller: the mean over the sizes below the full one",
            "matryoshka: one random layer and one random length in each step; matryoshka_all: all six layers with all five lengths",
            "ours trains these five sizes in each step and no others; Matryoshka2dLoss trains sizes in between as well",
        ],
    )


if __name__ == "__main__":
    with runtime.using(progress=False):
        main()
