"""Starbucks on all-MiniLM-L6-v2: five sizes, fine-tuned on scored pairs of SICK, judged on its test pairs and on those of STS-B.

    WELLREAD_DATA=... python -m bench.starbucks [--quick]

Arms with equally many steps of the same pairs: the untouched encoder, plainly truncated; 2D Matryoshka (sentence-transformers' own loss, one random
layer and length in each step); Starbucks, with and without learning from the full size; and each size cut first and fine-tuned alone.
--quick tries it out on few pairs and records nothing.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn

from bench.harness import Expect, Noted, record
from bench.sentence_pairs import sick, stsb
from wellread import Network, load
from wellread.data import subset
from wellread.elastic.starbucks import encoder, pair_batches, parse_sizes, size_name, spearman, starbucks_loss, sub_network
from wellread.train import fit

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
TRAIN, SICK, STSB = (48, 60, 60) if QUICK else (900, 500, 300)
NAMES = ["1x32", "6x384"] if QUICK else ["1x32", "2x64", "3x128", "4x192", "6x384"]
SETTINGS: dict[str, Any] = {"epochs": 1, "learning_rate": 5e-5, "warmup": 0.1}
CLAIM = "a fixed list of sizes trained in every step is better than random sizes, and about as good as encoders trained for one size each"

EXPECTS = [
    Expect("on SICK the mean of the four smaller sizes is at least one point above 2D Matryoshka", "starbucks - matryoshka", 1.0),
    Expect("it is at least five points above plain truncation", "starbucks - truncated", 5.0),
    Expect("it is at most 1.5 points below encoders trained for one size each", "starbucks - alone", -1.5),
    Expect("the full size loses at most one point against ordinary fine-tuning", "starbucks_full - alone_full", -1.0),
]


def tuned(start: Network, train: Dataset, names: list[str], kl: Any, seed: int) -> Network:
    """A copy of `start` after one epoch of the loss over these sizes; a cut encoder is trained at its own size, by one name."""
    made = start.copy()
    parts = encoder(made)
    sizes = parse_sizes(names, parts.depth, parts.width)

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        vectors = parts.vectors(module, batch["inputs"], [layers for layers, _ in sizes])
        return sum(starbucks_loss(vectors, [dimensions for _, dimensions in sizes], batch["score"], kl=kl))  # type: ignore[return-value]

    fit(made.module, pair_batches(made, train, shuffle=True, seed=seed), step, seed=seed, **SETTINGS)
    return made


def alone(start: Network, train: Dataset, name: str, seed: int) -> Network:
    """The encoder cut to a size and trained for it."""
    cut = sub_network(start, name, untrained=True)

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        vectors = module(**batch["inputs"])
        return starbucks_loss([vectors], [vectors.shape[1]], batch["score"])[0]

    fit(cut.module, pair_batches(cut, train, shuffle=True, seed=seed), step, seed=seed, **SETTINGS)
    return cut


def matryoshka(start: Network, train: Dataset, dimensions: list[int], seed: int) -> Network:
    """2D Matryoshka as sentence-transformers has it, in the same loop."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss, Matryoshka2dLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    made = start.copy()
    with tempfile.TemporaryDirectory() as folder:
        made.module.model.save_pretrained(folder)  # type: ignore[operator, union-attr]
        made.input.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
        theirs = SentenceTransformer(modules=[Transformer(folder), Pooling(made.embedding_size, "mean"), Normalize()], device="cpu")
    loss = Matryoshka2dLoss(theirs, CoSENTLoss(theirs), dimensions)

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        halves = {name: tensor.chunk(2) for name, tensor in batch["inputs"].items()}
        return loss([{name: half[side] for name, half in halves.items()} for side in (0, 1)], batch["score"])

    fit(theirs, pair_batches(made, train, shuffle=True, seed=seed), step, seed=seed, **SETTINGS)
    made.module.model.load_state_dict(theirs[0].auto_model.state_dict())  # type: ignore[union-attr]
    return made


def main() -> None:
    note = figures = Noted()
    start = load("minilm-l6")
    parts = encoder(start)
    sizes = parse_sizes(NAMES, parts.depth, parts.width)
    full = size_name(sizes[-1])
    pairs = sick("train")
    random = np.random.default_rng(0)
    tests = {"": subset(whole := sick("test_annotated"), random.permutation(len(whole))[:SICK]), "_stsb": subset(other := stsb(), random.permutation(len(other))[:STSB])}

    def judge(arm: str, by_size: dict[str, dict[str, float]]) -> None:
        """by_size: of each test, the correlation at each size."""
        for which, found in by_size.items():
            note(**{arm + which: 100 * float(np.mean([found[name] for name in NAMES if name != full])), f"{arm}{which}_full": 100 * found[full]})
        note(**{f"{arm}_{name}": 100 * by_size[""][name] for name in NAMES if name != full})

    judge("truncated", {which: spearman(start, test, sizes) for which, test in tests.items()})
    for seed in SEEDS:
        print(f"seed {seed}", flush=True)
        judged_on = tests if seed == SEEDS[0] else {"": tests[""]}  # STS-B is not gated
        train = subset(pairs, np.random.default_rng(seed).permutation(len(pairs))[:TRAIN])
        arms = {
            "starbucks": lambda train=train, seed=seed: tuned(start, train, NAMES, "scores", seed),
            "starbucks_without_kl": lambda train=train, seed=seed: tuned(start, train, NAMES, "none", seed),
            "matryoshka": lambda train=train, seed=seed: matryoshka(start, train, [d for _, d in reversed(sizes)], seed),
        }
        for arm, make in arms.items():
            if arm == "starbucks_without_kl" and seed != SEEDS[0]:  # not gated
                continue
            made = make()
            judge(arm, {which: spearman(made, test, sizes) for which, test in judged_on.items()})
        found: dict[str, dict[str, float]] = {which: {} for which in judged_on}
        for name in NAMES:
            made = alone(start, train, name, seed)
            for which, test in judged_on.items():
                found[which][name] = correlation(made, test)
        judge("alone", found)
    if QUICK:
        return
    record(
        "starbucks",
        figures={name: values for name, values in figures.items() if name.startswith("starbucks")},
        baselines={name: values for name, values in figures.items() if not name.startswith("starbucks")},
        expects=EXPECTS,
        claims_tested=[CLAIM],
        sizes={"train_pairs": TRAIN, "sick_pairs": SICK, "stsb_pairs": STSB, "sizes": " ".join(NAMES), "network": "all-MiniLM-L6-v2, 22.7 M parameters"},
        seeds=SEEDS,
        notes=[
            "Spearman correlations times 100; without a size in the name: mean of the sizes below the full one, on SICK's test pairs; stsb: STS-B's, another domain, one seed",
            "the encoder is a sentence encoder already, so margins are smaller than from a raw BERT as in the paper; its masked-autoencoder pre-training is not tried",
            "2D Matryoshka is sentence-transformers' loss with its default settings: one random layer and one random length beside the full ones in each step",
        ],
    )


def correlation(cut: Network, test: Dataset) -> float:
    """Of a cut encoder, at its own size."""
    from scipy.stats import spearmanr

    from wellread.evaluate import predict

    first, second = (predict(cut, Dataset.from_dict({"text": test[column]}), batch_size=64) for column in ("sentence1", "sentence2"))
    return float(spearmanr((first * second).sum(1), test["score"]).statistic)


if __name__ == "__main__":
    main()
