"""PROP on Cranfield: all-MiniLM-L6-v2 as a cross-encoder, taught by word sets of the abstracts, judged by people's judgements.

    WELLREAD_DATA=... python -m bench.prop [--quick]

BM25's best 30 documents are put into a new order. Without any judged query: a fresh head, PROP, and a placebo that learned from the same pairs with
labels thrown by a coin. After the same 20 judged queries: from nothing, after guessing hidden words (half the pairs), and after PROP. Those 20 queries are never
among the judged ones. PROP here learns from the word sets alone: in so few steps the hidden words beside them drown what the sets teach.
--quick tries it out in a few steps and records nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.harness import Expect, Noted, record
from bench.neural_ranking import first_search
from wellread import Network, load
from wellread.data import subset
from wellread.documents import rows
from wellread.judged import load_collection
from wellread.ranking import Run, measure
from wellread.rerankers import best_first, build, mixed
from wellread.retrieve.neural_ranking import candidates, read, scored
from wellread.retrieve.neural_ranking import learn as learn_from_judgements
from wellread.retrieve.prop import learn, pair_accuracy, pair_batches
from wellread.retrieve.spans import whole
from wellread.retrieve.word_sets import WordPairs, word_pairs
from wellread.runtime import using
from wellread.unigram import unigram

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
LENGTH, READ, DEPTH = 64, 24, 30  # tokens of query and document, words of a document's text that word sets are drawn from, documents of a query
PAIRS, APART, JUDGED = (32, 16, 4) if QUICK else (1152, 400, 60)  # to learn from, of held-out documents, queries
SETS: dict[str, Any] = {"words_per_set": 8.0, "vocabulary": 0, "shortest": 0}
BATCH, RATE = 16, 2e-4
LABELLED: dict[str, Any] = {"epochs": 1 if QUICK else 2, "patience": None, "learning_rate": 5e-5, "batch_size": 8, "negatives": 4}
ARMS: list[tuple[str, Any]] = [("fresh", None), ("hidden_words", None), ("shuffled", "softmax_hinge"), ("prop", "softmax_hinge")]
CLAIM = "pre-training with word sets makes a reranker that works without judged queries, and better after a few than one without this pre-training"

EXPECTS = [
    Expect("of the held-out pairs at least 0.70 are told apart in every seed", "min(pairs_told_apart)", 0.70),
    Expect("without a judged query PROP is at least 0.05 nDCG@10 above a fresh head in every seed", "min(prop - fresh)", 0.05),
    Expect("and above the placebo with labels thrown by a coin", "min(prop - shuffled)", 0.05),
    Expect("after 20 judged queries a start from PROP is above a start from nothing, by more than one standard error", "gain_in_standard_errors", 1.0),
    Expect("and not below a start from guessing hidden words alone", "prop_tuned - hidden_words_tuned", 0.0),
]


def shuffled(pairs: WordPairs, seed: int) -> WordPairs:
    """Which of the two sets is called the better one is thrown by a coin."""
    turn = np.repeat(np.random.default_rng((7, seed)).random(len(pairs)) < 0.5, pairs.sizes)
    return replace(pairs, words=np.where(turn, pairs.words[::-1], pairs.words))


def some(pairs: WordPairs, among: np.ndarray, count: int) -> WordPairs:
    """`count` pairs, drawn from those of the documents `among`, bool [N]."""
    chosen = np.zeros(len(pairs), bool)
    chosen[np.random.default_rng(0).permutation(np.flatnonzero(among[pairs.document]))[:count]] = True
    return pairs.of(chosen)


def main() -> None:
    note = figures = Noted()
    asked = load_collection("cranfield")
    run = first_search(asked)
    numbers = [int(query) for query in asked.queries["id"]]
    labelled = [row for row, number in enumerate(numbers) if number % 11 == 0]  # 20 of 225
    judged = [row for row, number in enumerate(numbers) if number % 11][:: 50 if QUICK else 3][:JUDGED]
    start = load("minilm-l6")
    bare = build(start, "cross-encoder", LENGTH, [])
    table = candidates(subset(asked.queries, [*labelled, *judged]), asked.corpus, run, asked.judgements, DEPTH)
    lists = read(table, bare.input)  # type: ignore[arg-type]
    named, ids = dict(zip(table["sentence1"], table["query"], strict=True)), np.array(table["document"])
    texts = list(asked.queries["text"])
    place = {query: number for number, query in enumerate(lists.queries)}
    learned, test = ([place[texts[row]] for row in part] for part in (labelled, judged))
    few = learned[:3] if QUICK else learned
    epoch_on, learn_from = lists.of(few[::4]), lists.of([number for i, number in enumerate(few) if i % 4])  # 5 and 15
    tested = lists.of(test)

    def worth(scores: np.ndarray, share: float) -> float:
        """nDCG@10 over the judged queries; documents that BM25 missed count as missed."""
        found: Run = {}
        for query, its in zip(tested.queries, tested.lists, strict=True):
            order = best_first(mixed(scores[its], lists.first[its], share))  # type: ignore[index]
            found[named[query]] = {str(ids[its[at]]): float(len(its) - rank) for rank, at in enumerate(order)}
        return measure(found, {query: asked.judgements[query] for query in found}, ["nDCG@10"]).mean["nDCG@10"]

    def noted(name: str, network: Network) -> None:
        scores = scored(network, tested)
        note(**{name: worth(scores, 1.0), f"{name}_half_bm25": worth(scores, 0.5)})

    note(bm25=worth(np.zeros(len(ids)), 0.0), best_possible=worth(lists.grades, 1.0))
    corpus = asked.corpus.map(lambda row: {"text": " ".join(row["text"].split()[:READ])})
    model = unigram(map(whole, rows(corpus)))
    for seed in SEEDS:
        print(f"seed {seed}", flush=True)
        away = np.random.default_rng(seed).random(len(corpus)) < 0.1  # kept out of the training, to tell their pairs apart
        drawn = word_pairs(model, model.counts, model.lengths, seed=seed, **SETS)
        pairs = some(drawn, ~away, PAIRS)
        apart = pair_batches(bare.input, corpus, some(drawn, away, APART), batch_size=32, mask=0, shuffle=False)  # type: ignore[arg-type]
        note(random=worth(np.random.default_rng((1, seed)).random(len(ids)), 1.0))
        networks = {}
        for arm, loss in ARMS:
            its = {"fresh": None, "hidden_words": some(pairs, ~away, PAIRS // 2), "shuffled": shuffled(pairs, seed), "prop": pairs}[arm]
            torch.manual_seed(seed)
            network = networks[arm] = build(start, "cross-encoder", LENGTH, [])
            if its is not None:
                batches = pair_batches(network.input, corpus, its, batch_size=BATCH, mask=0.0 if loss else 0.15, seed=seed)  # type: ignore[arg-type]
                history = learn(network, batches, loss=loss, learning_rate=RATE, seed=seed)
                note(**{f"{arm}_seconds": history.seconds})
            if arm != "hidden_words":  # its head has learned nothing
                noted(arm, network)
        note(pairs_told_apart=pair_accuracy(networks["prop"], apart), shuffled_pairs_told_apart=pair_accuracy(networks["shuffled"], apart))
        note(better_words_in_document=float(pairs.inside[0].mean()), worse_words_in_document=float(pairs.inside[1].mean()))
        for arm in ("fresh", "hidden_words", "prop"):
            network = networks[arm]
            learn_from_judgements(network, learn_from, epoch_on, seed=seed, **LABELLED)
            noted(f"{arm}_tuned", network)
    if QUICK:
        return
    gain = np.array(figures["prop_tuned"]) - np.array(figures["fresh_tuned"])
    note(gain_in_standard_errors=float(gain.mean() / (gain.std(ddof=1) / len(gain) ** 0.5)), prop_tuned_above_bm25=float(np.mean(figures["prop_tuned"]) - figures["bm25"][0]))
    others = ("bm25", "best_possible", "random", "fresh", "shuffled", "hidden_words")
    record(
        "prop",
        figures={name: values for name, values in figures.items() if not name.startswith(others)},
        baselines={name: values for name, values in figures.items() if name.startswith(others)},
        expects=EXPECTS,
        claims_tested=[CLAIM],
        sizes={"documents": len(corpus), "pairs": PAIRS, **SETS, "batch": BATCH, "tokens": LENGTH, "judged_queries": len(judged), "queries_to_learn_from": len(labelled),
               "depth": DEPTH, "after": LABELLED, "network": "all-MiniLM-L6-v2"},
        seeds=SEEDS,
        notes=[
            "figures without another unit are nDCG@10 on 60 of Cranfield's queries that no training saw; half_bm25: scores of BM25 and reranker at equal weight, fixed beforehand",
            "the start comes from a model that was trained on labelled pairs of texts; the paper starts from a plain language model",
            f"of the 20 judged queries 15 are learned from and 5 choose the epoch; learning rate {LABELLED['learning_rate']} is neural_ranking's own",
            "learning rate, words in a set (8; the queries have 10 that are no stop words) and layers were chosen on pairs of held-out documents, not on judged queries; the cut at 24 words was set without a trial, since about as much is read",
            "word sets alone (mask=0). Trials on pairs of held-out documents cut to 36 words, learning rate 1e-4: with hidden words 0.58 told apart after 60 steps, "
            "without 0.69 after 72 (at 2e-4, 60 steps: 0.71). Two layers, 3 words a set, 63 steps: at most 0.64. The arm hidden_words had half the pairs and steps",
            "words are drawn from all of the vocabulary (vocabulary=0): on a collection this small, the authors' 500 are mostly the document's own",
            "forward and backward passes in bfloat16",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    with using(precision="bfloat16"):
        main()
