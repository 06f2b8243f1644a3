"""DupMAE on Cranfield: the first two layers of all-MiniLM-L6-v2, trained on the abstracts alone, judged by the queries and judgements of people.

    WELLREAD_DATA=... python -m bench.dupmae [--quick]

Arms with equally many steps on the same texts: masked language modelling, RetroMAE (no bag of words), the bag of words without the decoder, DupMAE, and a
placebo whose decoder rebuilds each text from the sentence vector of another. All begin with one warmed vocabulary head and end with the same short
training on pairs (title, abstract), since such an encoder is not made for direct search; the start has that too. Each is judged by its vectors
of meaning, by its word weights, and by both.
--quick tries it out in a few steps and records nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from bench.contriever import found, shallow
from bench.harness import Expect, Noted, record
from wellread import Network, load, runtime
from wellread.batches import Batches
from wellread.contrastive import in_batch
from wellread.inputs import TextInput
from wellread.judged import load_collection
from wellread.lexicon import both_parts, lexicon_of, ranked_by_parts, speakable, warm_up, with_lexicon
from wellread.ranking import Run, measure
from wellread.retrieve.contriever import Chunks, chunks
from wellread.retrieve.dupmae import bottleneck, corpus_words, learn, mismatched, text_batches
from wellread.train import fit

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
WARM, STEPS, PAIR_STEPS, TOKENS = (2, 2, 2, 32) if QUICK else (80, 50, 24, 64)
BATCH, RATE, PAIR_RATE = 32, 1e-4, 1e-4
ARMS: dict[str, dict[str, float]] = {  # weights of the decoder's loss and of the bag of words
    "mlm": {"decoder_weight": 0.0, "bow_weight": 0.0},
    "dupmae": {"decoder_weight": 1.0, "bow_weight": 0.1},
    "placebo": {"decoder_weight": 1.0, "bow_weight": 0.1},
    "retromae": {"decoder_weight": 1.0, "bow_weight": 0.0},
    "bag": {"decoder_weight": 0.0, "bow_weight": 0.1},
}
EVERY_SEED = ("mlm", "dupmae")
CLAIM = "rebuilding a text from its sentence vector and its words from its tokens makes a better search encoder than masked language modelling; both together are best"

EXPECTS = [
    Expect("after the same training on pairs DupMAE's joint search is at least 0.03 nDCG@10 above that of masked language modelling", "dupmae_joint - mlm_joint", 0.03),
    Expect("its joint search is not more than 0.005 below the better of its parts", "dupmae_joint - dupmae_better_part", -0.005),
    Expect("in every seed the decoder loses at least 0.1 nats without the text's own sentence vector", "min(dupmae_loss_other - dupmae_loss_own)", 0.1),
    Expect("a decoder that was given sentence vectors of other texts does not", "placebo_loss_other - placebo_loss_own", 0.02, at_least=False),
    Expect("DupMAE's joint search is not below RetroMAE's", "dupmae_joint - retromae_joint", 0.0),
    Expect("nor below that of the bag of words alone", "dupmae_joint - bag_joint", 0.0),
    Expect("nor below the placebo's", "dupmae_joint - placebo_joint", 0.0),
]


def warm_start(start: Network, corpus: Dataset, seed: int) -> tuple[Network, Chunks, Tensor]:
    """The encoder with a vocabulary head that was trained alone; the texts in pieces; the words that they use."""
    torch.manual_seed(seed)
    warmed, source = with_lexicon(start), start.input
    assert isinstance(source, TextInput)
    parts, kept = chunks(corpus, source.tokenizer, length=TOKENS - 2, shortest=8, seed=seed), lexicon_of(warmed).kept
    words = corpus_words(parts, len(kept))
    kept.copy_(speakable(source.tokenizer, words, len(kept)))
    warm_up(warmed, text_batches(source, parts, steps=WARM, batch_size=BATCH, seed=seed + 100), words, seed=seed)
    return warmed, parts, words


def pair_training(start: Network, titles: list[str], texts: list[str], steps: int, seed: int) -> Network:
    """A copy trained to find each abstract by its title among those of the batch, by the mean of the cosines of meaning and words."""
    made = start.copy()
    source: Any = made.input
    short = replace(source, max_length=24)
    order = np.concatenate([np.random.default_rng((seed, turn)).permutation(len(texts)) for turn in range(-(-steps * BATCH // len(texts)))])

    def get(rows: np.ndarray) -> dict[str, Any]:
        chosen = order[rows].tolist()
        return {"queries": short([titles[row] for row in chosen]), "documents": source([texts[row] for row in chosen])}

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        sides = []
        for side in ("queries", "documents"):
            parts = both_parts(module, batch[side], source.tokenizer)
            sides.append(torch.cat([F.normalize(part, dim=-1) for part in parts], 1))
        return in_batch(*sides, temperature=0.05)

    fit(made.module, Batches(steps * BATCH, get, batch_size=BATCH, seed=seed), step, epochs=1, learning_rate=PAIR_RATE, weight_decay=0.01, warmup=0.1, seed=seed)
    return made


def main() -> None:
    note = figures = Noted()
    asked = load_collection("cranfield")
    if QUICK:
        asked = replace(asked, corpus=asked.corpus.select(range(200)))
    whole = load("minilm-l6")
    whole.input = replace(whole.input, max_length=TOKENS)  # type: ignore[type-var]
    start = shallow(whole)
    pairs = [(row["title"], row["text"]) for row in asked.corpus if row["title"] and row["text"]]  # type: ignore[index, call-overload]
    titles, texts = (list(side) for side in zip(*pairs, strict=True))

    def value(run: Run, name: str = "nDCG@10") -> float:
        return measure(run, asked.judgements, [name]).mean[name]

    def judge(name: str, network: Network, seed: int) -> None:
        with runtime.using(progress=False):
            runs = ranked_by_parts(pair_training(network, titles, texts, PAIR_STEPS, seed), asked.queries, asked.corpus)
        values = {f"{name}_{part}": value(run) for part, run in runs.items()}
        values |= {f"{name}_{part}_recall_at_100": value(run, "R@100") for part, run in runs.items()}
        note(**values, **{f"{name}_better_part": max(values[f"{name}_dense"], values[f"{name}_lexical"])})

    def measured(seed: int) -> tuple[Chunks, Tensor]:
        print(f"seed {seed}", flush=True)
        warmed, parts, used = warm_start(start, asked.corpus, seed)
        batches = text_batches(start.input, parts, steps=STEPS, batch_size=BATCH, seed=seed)  # type: ignore[arg-type]
        if seed == SEEDS[0]:
            judge("start", warmed, seed)
        for arm, tasks in ARMS.items():
            if seed != SEEDS[0] and arm not in EVERY_SEED:
                continue
            given = mismatched(batches) if arm == "placebo" else batches
            trained, duplex, history = learn(warmed, given, used, learning_rate=RATE, pooling="mean", seed=seed, **tasks)
            note(**{f"{arm}_seconds": history.seconds})
            if arm in ("dupmae", "placebo"):
                losses = bottleneck(duplex, text_batches(start.input, parts, steps=2, batch_size=BATCH, seed=seed + 200))  # type: ignore[arg-type]
                note(**{f"{arm}_loss_{whose}": loss for whose, loss in losses.items()})
            judge(arm, trained, seed)
        return parts, used

    words, untrained = found(start, asked, "lexical", "dense")
    note(bm25=value(words), bm25_recall_at_100=value(words, "R@100"), untrained=value(untrained), all_minilm=value(*found(whole, asked, "dense")))
    with runtime.using(precision="bfloat16"):  # half the time
        for seed in SEEDS:
            parts, used = measured(seed)
    if QUICK:
        return
    record(
        "dupmae",
        figures={name: values for name, values in figures.items() if name.startswith("dupmae")},
        baselines={name: values for name, values in figures.items() if not name.startswith("dupmae")},
        expects=EXPECTS,
        claims_tested=[CLAIM],
        sizes={
            "documents": len(asked.corpus), "queries": len(asked.judgements), "texts": len(parts), "tokens_of_a_text": TOKENS, "warm_steps": WARM, "steps": STEPS,
            "pair_steps": PAIR_STEPS, "batch": BATCH, "words_guessed_from": len(used), "network": "all-MiniLM-L6-v2, its first two layers",
        },
        seeds=SEEDS,
        notes=[
            "nDCG@10 on Cranfield's 225 queries, which no training saw; all codes of its judgements count as relevant",
            "documents are read to 64 tokens by every encoder and whole by BM25, which is kind to BM25; arms were trained and read in bfloat16",
            "every arm and the start were trained on the same pairs of title and abstract, by the mean of the cosines of meaning and words; joint is the sum of both, of 260 words",
            "RetroMAE, the bag of words alone, the placebo and the start, which are controls, were run with the first seed only",
            "the start's two layers come from a model that was trained on labelled pairs; all_minilm is that model; untrained is the start without the pairs",
            "the learning rate is the paper's, that of the pairs bench/contriever.py's: nothing was tuned; steps are what the time allows, less than one pass over the texts",
            "the vocabulary head is new, trained alone first, and the same for all arms of a seed; guesses choose from the words of the corpus",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
