"""Training on pairs with the other documents of the batch as negatives, beside sentence-transformers' trainer: all-MiniLM-L6-v2, titles and abstracts.

    pip install 'wellread[retrieve]'
    WELLREAD_DATA=... python -m bench.peers.contrastive [--quick]

One epoch over the same pairs with the same loss (softmax over cosines / 0.05), batch size, rates and number of tokens: ours are `fit`, `in_batch` and
`in_chunks`, theirs SentenceTransformerTrainer with MultipleNegativesRankingLoss, and for large batches CachedMultipleNegativesRankingLoss, both in
chunks of the same size. Turns are in changing order; tokens are those of texts, without padding. --quick tries it out and records nothing.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn

from bench.contriever import found
from bench.harness import Expect, Noted, record_peer
from wellread import Network, load, runtime
from wellread.batches import Batches
from wellread.contrastive import AT_ONCE, in_batch, in_chunks
from wellread.judged import load_collection
from wellread.ranking import measure
from wellread.train import fit

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
PAIRS, SMALL, LARGE, TOKENS = (96, 16, 96, 32) if QUICK else (384, 32, 192, 64)
RATE, WARMUP = 2e-5, 0.1
EXPECTS = [
    Expect("small batches: at least as many tokens a second as the trainer, to a tenth", "small_ours_tokens_per_second / small_theirs_tokens_per_second", 0.9),
    Expect("large batches in chunks: at least as many tokens a second as the cached loss, to a tenth",
           "large_ours_tokens_per_second / large_theirs_tokens_per_second", 0.9),
    Expect("both learn the same: nDCG@10 on Cranfield's queries after small batches is within 0.01", "abs(small_ours_ndcg_10 - small_theirs_ndcg_10)", 0.01,
           at_least=False),
    Expect("and after large ones", "abs(large_ours_ndcg_10 - large_theirs_ndcg_10)", 0.01, at_least=False),
]  # fmt: skip

Arm = Callable[[Network, Dataset, int, int], tuple[Network, float]]  # encoder, pairs, batch size, seed; the trained one, seconds


def ours(start: Network, pairs: Dataset, batch_size: int, seed: int) -> tuple[Network, float]:
    made = start.copy()
    source, titles, abstracts = made.input, pairs["title"], pairs["text"]

    def get(rows: np.ndarray) -> dict[str, Any]:
        return {name: source([texts[row] for row in rows.tolist()]) for name, texts in (("queries", titles), ("documents", abstracts))}  # type: ignore[misc]

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        queries, documents = (in_chunks(lambda tokens: module(**tokens), batch[side]) for side in ("queries", "documents"))
        return in_batch(queries, documents, temperature=0.05)

    batches = Batches(len(pairs), get, batch_size=batch_size, shuffle=True, seed=seed)
    started = time.perf_counter()
    fit(made.module, batches, step, epochs=1, learning_rate=RATE, warmup=WARMUP, clip=1.0, seed=seed)  # the trainer clips at 1
    return made, time.perf_counter() - started


def theirs(start: Network, pairs: Dataset, batch_size: int, seed: int) -> tuple[Network, float]:
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    made = start.copy()
    with tempfile.TemporaryDirectory() as folder:
        made.module.model.save_pretrained(folder)  # type: ignore[operator, union-attr]
        made.input.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
        model = SentenceTransformer(modules=[Transformer(folder), Pooling(made.embedding_size, "mean"), Normalize()], device="cpu")
        model.max_seq_length = made.input.max_length  # type: ignore[union-attr]
        loss = MultipleNegativesRankingLoss(model) if batch_size <= AT_ONCE else CachedMultipleNegativesRankingLoss(model, mini_batch_size=AT_ONCE)
        settings = SentenceTransformerTrainingArguments(
            folder, per_device_train_batch_size=batch_size, num_train_epochs=1, learning_rate=RATE, warmup_steps=WARMUP, lr_scheduler_type="cosine",
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=seed, data_seed=seed, use_cpu=True,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(model, settings, train_dataset=pairs.select_columns(["title", "text"]), loss=loss)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    made.module.model.load_state_dict(model[0].auto_model.state_dict())  # type: ignore[union-attr]
    return made, seconds


def main() -> None:
    began = time.perf_counter()
    note = figures = Noted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one judged document is empty
        asked = load_collection("cranfield")
    start = load("minilm-l6")
    start.input = replace(start.input, max_length=TOKENS)  # type: ignore[type-var]
    whole = asked.corpus.filter(lambda row: bool(row["title"] and row["text"])).select(range(PAIRS))
    tokens = sum(int(start.input(whole[column])["attention_mask"].sum()) for column in ("title", "text"))  # type: ignore[misc, operator]

    def worth(network: Network) -> float:
        return measure(found(network, asked, "dense")[0], asked.judgements, ["nDCG@10"]).mean["nDCG@10"]

    if not QUICK:
        note(start_ndcg_10=worth(start))
    arms: dict[str, Arm] = {"ours": ours, "theirs": theirs}
    for seed in SEEDS:
        print(f"seed {seed}", flush=True)
        for size, batch_size in (("small", SMALL), ("large", LARGE)):
            for name in np.random.default_rng((seed, batch_size)).permutation(list(arms)):
                made, seconds = arms[name](start, whole, batch_size, seed)
                note(**{f"{size}_{name}_tokens_per_second": tokens / seconds})
                if seed == SEEDS[0] and not QUICK:
                    note(**{f"{size}_{name}_ndcg_10": worth(made)})
    if QUICK:
        return
    record_peer(
        "contrastive",
        f"sentence-transformers {version('sentence-transformers')}: SentenceTransformerTrainer, (Cached)MultipleNegativesRankingLoss",
        figures=figures,
        expects=EXPECTS,
        sizes={"network": "all-MiniLM-L6-v2", "pairs": PAIRS, "batches": [SMALL, LARGE], "chunk": AT_ONCE, "tokens_of_a_text": TOKENS, "tokens": tokens},
        seconds=time.perf_counter() - began,
        seeds=SEEDS,
        notes=["seconds are those of the training call alone, tokenisation included", "nDCG@10 on Cranfield's 225 queries, seed 0; the pairs are its titles and abstracts"],
    )


if __name__ == "__main__":
    with runtime.using(progress=False):
        main()
