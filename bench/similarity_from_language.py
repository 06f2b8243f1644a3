"""Similarity from words and networks, against people: STS-B and SICK (sentences), CIFAR-10H (pictures, where it is to be had).

    WELLREAD_DATA=... [CIFAR10H=folder] python -m bench.similarity_from_language [--quick]

Sentences: all-MiniLM-L6-v2 on the English sentence, on its German and on its French translation, TF-IDF of characters, and a placebo of random vectors.
Weights are fitted on development (SICK: training) pairs and judged on test pairs. Pictures: EfficientNet-lite0, and the classes that five people named,
taken out of the counts of some fifty; judged by how often two people, one for each picture, of the others name the same class.
CIFAR10H is a folder with counts.npy: [10000, 10], in the order of cifar10/test. Without it the pictures are not measured.
--quick tries it out on a few pairs and records nothing.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from bench.harness import Expect, Noted, record
from bench.sentence_pairs import sick
from wellread import load, load_data
from wellread.data import subset
from wellread.features import embed
from wellread.index import encode
from wellread.similarity import (
    Judged,
    agreement,
    bootstrap,
    choose_penalty,
    correlation,
    cosine,
    counted,
    described,
    fit_weights,
    interval,
    stacked,
    unit,
)

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
PAIRS, PICTURES, DRAWS = (120, 40, 100) if QUICK else (None, 400, 1000)
CLAIMS = ["sources stacked agree best with people", "words agree better with people than networks of pictures do, at far fewer judgements"]

EXPECTS = [
    Expect("STS-B: the fitted stack is above the best single source, by the lower end of the 95 % interval", "stsb_gain_low", 0.0001),
    Expect("SICK: so it is there", "sick_gain_low", 0.0001),
    Expect("STS-B: equal weights give at least half of the gain", "stsb_equal - (stsb_best + stsb_fitted) / 2", 0.0),
    Expect("SICK: so they do there", "sick_equal - (sick_best + sick_fitted) / 2", 0.0),
    Expect("STS-B: random vectors get at most a twentieth of the weight", "max(stsb_placebo_weight)", 0.05, at_least=False),
    Expect("and change r by at most 0.002", "max(abs(stsb_with_placebo - stsb_fitted))", 0.002, at_least=False),
    Expect("pictures: five people's words agree by 0.05 more than the network in every seed", "min(pictures_words - pictures_network)", 0.05),
    Expect("pictures: the fitted stack is not below the words in any seed", "min(pictures_fitted - pictures_words)", 0.0),
    Expect("pictures: within classes words are above the network in every seed", "min(pictures_words_within - pictures_network_within)", 0.0),
    Expect("pictures: within classes the stack is above the words in every seed", "min(pictures_fitted_within - pictures_words_within)", 0.0),
]


Two = tuple[np.ndarray, np.ndarray]  # of the training and of the test pairs


def sentences(name: str, note: Noted, sources: dict[str, Two], ratings: Two, rows: Sequence[list[Any]]) -> None:
    """Notes r of each source, of equal and of fitted weights on test pairs; sources: similarities [P]; rows begin with their two sentences."""
    train, test = (np.column_stack([source[part] for source in sources.values()]) for part in (0, 1))
    penalty = choose_penalty(train, ratings[0], *places(rows[0]))
    weights = fit_weights(train, ratings[0], penalty)
    best = int(np.argmax([correlation(column, ratings[0]) for column in train.T]))
    columns = np.column_stack([test, stacked(test, np.ones(len(sources))), stacked(test, weights)])
    r = [correlation(column, ratings[1]) for column in columns.T]
    drawn = bootstrap(columns, ratings[1], *places(rows[1]), draws=DRAWS)
    low, high = interval(drawn[:, -1] - drawn[:, best])
    note(**{f"{name}_{source}": value for source, value in zip(sources, r, strict=False)})
    note(**{f"{name}_best": r[best], f"{name}_equal": r[-2], f"{name}_fitted": r[-1], f"{name}_gain_low": low, f"{name}_gain_high": high})
    note(**{f"{name}_weight_{source}": weight for source, weight in zip(sources, weights, strict=True)})
    note(**{f"{name}_equal_gain_low": interval(drawn[:, -2] - drawn[:, best])[0]})
    for seed in SEEDS if name == "stsb" else ():
        random = np.random.default_rng(seed)  # 16 dimensions: cosines spread as widely as the others'
        chance = [np.einsum("pd,pd->p", *(unit(random.normal(size=(len(part), 16))) for _ in range(2)))[:, None] for part in (train, test)]
        more = fit_weights(np.hstack([train, chance[0]]), ratings[0], penalty)
        note(stsb_placebo_weight=more[-1], stsb_with_placebo=correlation(stacked(np.hstack([test, chance[1]]), more), ratings[1]))


def rows_of(language: str, part: str) -> list[list[str]]:
    with open(Path(os.environ["WELLREAD_DATA"]) / "stsb" / f"{language}-{part}.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[:PAIRS]


def paired(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines [P] of vectors [P, d]."""
    return np.einsum("pd,pd->p", unit(first), unit(second))


def by_meaning(encoder: Any, rows: Sequence[list[Any]]) -> Two:
    """Cosines of the two sentences at the start of each row."""
    train, test = (paired(*(encode(encoder, [row[side] for row in part]) for side in (0, 1))) for part in rows)
    return train, test


def by_letters(rows: Sequence[list[Any]]) -> Two:
    """Cosines of TF-IDF of runs of three and four letters, counted in the training sentences."""
    made = TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 4)).fit([text for row in rows[0] for text in row[:2]])
    sides = ([made.transform([row[side] for row in part]) for side in (0, 1)] for part in rows)
    train, test = (np.asarray(first.multiply(second).sum(1)).ravel() for first, second in sides)
    return train, test


def places(rows: list[Any]) -> np.ndarray:
    """Numbers [2, P] of the sentences of pairs: the same for the same sentence."""
    return np.unique([[row[side] for row in rows] for side in (0, 1)], return_inverse=True)[1].reshape(2, -1)


def pictures(counts: np.ndarray, note: Noted, eye: Any, encoder: Any, seed: int) -> None:
    """Notes agreement with people about 400 pictures: half at random, half of those on whose class fewer than 90 % of the people agree."""
    table, random = load_data("cifar10:test"), np.random.default_rng(seed)
    unsure = np.flatnonzero(counts.max(1) < 0.9 * counts.sum(1))
    rows = random.choice(unsure, PICTURES // 2, replace=False)
    rows = np.concatenate([rows, random.choice(np.setdiff1d(np.arange(len(counts)), rows), PICTURES - len(rows), replace=False)])
    chosen, names = subset(table, rows), table.features["label"].names
    five = np.array([random.multivariate_hypergeometric(each, 5) for each in counts[rows]])
    rest = (counts[rows] - five) / (counts[rows] - five).sum(1, keepdims=True)
    bags = [{name: float(times) for name, times in zip(names, each, strict=True) if times} for each in five]
    one = [{next(iter(bag)): 1.0} if len(bag) == 1 else {str(random.choice([*bag], p=np.array([*bag.values()]) / 5)): 1.0} for bag in bags]
    squares = {"network": cosine(embed(eye, chosen)), "words": counted(bags), "words_embedded": cosine(described(encoder, bags))}
    first, second = np.triu_indices(len(rows), 1)
    target, classes = (rest @ rest.T)[first, second], np.array(chosen["label"])
    judged = Judged(first, second, target, np.arange(len(first)), target, 0, None, 0)
    said = np.column_stack([square[first, second] for square in squares.values()])
    found, drawn, weights = agreement(
        said, list(squares), list(squares.values()), judged, classes, ceiling=float("nan"), folds=5, draws=DRAWS, permutations=99, seed=seed
    )
    for name, row in zip([*squares, "best", "equal", "fitted"], found, strict=True):
        note(**{f"pictures_{name}": row["Pearson r"], f"pictures_{name}_within": row["r within classes"]})
    low, high = interval(drawn[:, -1] - drawn[:, -3])
    note(pictures_gain_low=low, pictures_gain_high=high, pictures_one_word=correlation(counted(one)[first, second], target))
    note(**{f"pictures_weight_{name}": weight for name, weight in zip(squares, weights, strict=True)})


def people() -> np.ndarray | None:
    """Counts [10000, 10] of CIFAR-10H in the order of cifar10/test; None when they are not there."""
    folder = Path(os.environ.get("CIFAR10H") or Path(os.environ["WELLREAD_DATA"]) / "cifar10h")
    if not (folder / "counts.npy").is_file():
        return None
    counts = np.load(folder / "counts.npy", allow_pickle=False)
    agree = (counts.argmax(1) == np.array(load_data("cifar10:test")["label"])).mean()
    assert agree > 0.98, f"the classes that most people name are the labels of cifar10/test in {agree:.0%} only: the rows are in another order"
    return counts


def main() -> None:
    note = figures = Noted()
    encoder, counts = load("minilm-l6"), people()
    parts = {language: (rows_of(language, "dev"), rows_of(language, "test")) for language in ("en", "de", "fr")}
    ratings = [np.array([float(row[2]) for row in rows]) for rows in parts["en"]]
    sources = {name: by_meaning(encoder, parts[language]) for name, language in (("english", "en"), ("german", "de"), ("french", "fr"))}
    sources["characters"] = by_letters(parts["en"])
    sentences("stsb", note, sources, (ratings[0], ratings[1]), parts["en"])
    tables = [sick(part).select(range(PAIRS)) if PAIRS else sick(part) for part in ("train", "test_annotated")]
    rows: list[list[Any]] = [list(zip(table["sentence1"], table["sentence2"], strict=True)) for table in tables]
    scores = [np.array(table["score"]) for table in tables]
    sentences("sick", note, {"english": by_meaning(encoder, rows), "characters": by_letters(rows)}, (scores[0], scores[1]), rows)
    if counts is not None:
        eye = load("efficientnet-lite0")
        for seed in SEEDS:
            print(f"seed {seed}", flush=True)
            pictures(counts, note, eye, encoder, seed)
    if QUICK:
        return
    ours = ("stsb_equal", "stsb_fitted", "stsb_gain", "sick_equal", "sick_fitted", "sick_gain", "pictures_equal", "pictures_fitted", "pictures_gain")
    record(
        "similarity-from-language",
        figures={name: values for name, values in figures.items() if name.startswith(ours)},
        baselines={name: values for name, values in figures.items() if not name.startswith(ours)},
        expects=[expect for expect in EXPECTS if counts is not None or "pictures" not in expect.metric],
        claims_tested=CLAIMS if counts is not None else CLAIMS[:1],
        sizes={
            "stsb_pairs": [len(each) for each in ratings], "sick_pairs": [len(each) for each in scores],
            "pictures": PICTURES if counts is not None else 0, "networks": "all-MiniLM-L6-v2; EfficientNet-lite0",
        },
        seeds=SEEDS,
        notes=[
            "r is Pearson's with the mean rating; STS-B's weights come from its development pairs, SICK's from its training pairs; all figures are of test pairs",
            "all-MiniLM-L6-v2 names 21 training sets, STS-B and SICK not among them; it is an English network, its view of the translations is a poor one",
            "intervals redraw sentences (islands of sentences that share pairs) or pictures; seeds: random vectors of the placebo; pictures and five people",
            "pictures: half at random, half of those on whose class fewer than 90 % agree; the target is made of the people whose words were not drawn"
            if counts is not None
            else "CIFAR-10H was not there: pictures and the claim about words against networks were not measured",
            "EmoSim508 (rated pairs of emoji) and the paper's own judgements could not be had",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
